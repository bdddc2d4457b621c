"""Binarize a model: run the lockstep forward, solve every group of linears, put packed layers in place."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.agreement import Agreement
from optimum_sab.calibration.head import output_embedding
from optimum_sab.calibration.lockstep import DENSE, QUANTIZED, Arrival, Lockstep
from optimum_sab.calibration.modality import TEXT, TokenModalities, model_modalities, token_modalities
from optimum_sab.calibration.passage import BlockPassage
from optimum_sab.calibration.passes import CalibrationPass, calibration_pass, pair_streams
from optimum_sab.calibration.placement import map_tensors
from optimum_sab.calibration.progress import OnStep, no_step
from optimum_sab.calibration.refine.parameters import ModuleParameters, vectors_of, write_vectors
from optimum_sab.calibration.refine.reconstruction import Reconstruction, reconstruct
from optimum_sab.calibration.refine.tuning import Tuning
from optimum_sab.calibration.refine.whole_model import head_to_tune_to, tune_model
from optimum_sab.calibration.resume import FinishedBlock, ResumeFolder
from optimum_sab.calibration.spread import spread
from optimum_sab.calibration.temperature import (
    TEMPERATURE_SAMPLES,
    HeadInputs,
    Temperature,
    find_last_norm,
    set_temperature,
)
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.refinement import RefineSettings
from optimum_sab.core.solver import solve
from optimum_sab.errors import CalibrationError, NonFiniteError, SABWarning, SampleError
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.nn.decoder import find_decoder_blocks
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.selection import Selection, set_module

MISSED = 0.25  # of the weights that are binarized in a block: so many may be those of experts without a token


@dataclass(frozen=True)
class LayerReport:
    """One binarized linear.

    Attributes:
        name: dotted name.
        error: relative output error against the propagated target on the calibration inputs, of all the linears
            that share its input together: they are solved as one stack.
        bits_per_weight: from stored bytes, bias included.
        weights: how many.
    """

    name: str
    error: float
    bits_per_weight: float
    weights: int


@dataclass(frozen=True)
class BlockReport:
    """One decoder block.

    Attributes:
        index: position in the decoder.
        layers: its linears.
        drift: ``Σ‖h − ĥ‖² / Σ‖h‖²`` of the block's outputs between the streams; None with one stream.
        seconds: wall time of the block.
        reconstruction: what the refinement made of the block; None without it.
    """

    index: int
    layers: tuple[LayerReport, ...]
    drift: float | None
    seconds: float
    reconstruction: Reconstruction | None = None

    @property
    def error(self) -> float:
        """Mean relative output error of the block's linears."""
        return sum(layer.error for layer in self.layers) / len(self.layers)


@dataclass(frozen=True)
class BinarizationReport:
    """The whole model.

    Attributes:
        blocks: per decoder block.
        tokens: calibration tokens per modality.
        seconds: wall time in all.
        temperature: of the model's predictions; None where it was left alone.
        tuning: what the refinement made of the whole model; None without it.
        agreement: with the dense model's predictions on samples that did not calibrate it, by kind; filled in by
            whoever makes the check.
    """

    blocks: tuple[BlockReport, ...]
    tokens: dict[str, int]
    seconds: float
    temperature: Temperature | None = None
    tuning: Tuning | None = None
    agreement: Mapping[str, Agreement] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights, all binarized linears together."""
        layers = [layer for block in self.blocks for layer in block.layers]
        return sum(la.bits_per_weight * la.weights for la in layers) / sum(la.weights for la in layers)


@torch.no_grad()
def binarize(
    model: nn.Module,
    selection: Selection,
    samples: Sequence[Mapping[str, Any]],
    pass_name: str = "hessian",
    device: torch.device | None = None,
    on_block: Callable[[BlockReport, int], None] | None = None,
    refine: RefineSettings | None = None,
    resume: ResumeFolder | None = None,
    on_step: OnStep = no_step,
    temperature_scaling: bool = True,
) -> BinarizationReport:
    """Binarize the selected linears of ``model`` in place. After an error the model is half binarized: discard it.

    Args:
        model: dense, every parameter on a real device.
        selection: what to binarize and how.
        samples: forward keyword arguments, one dict per sample (`calibration.samples.encode_samples`).
        pass_name: a registered calibration pass.
        device: where blocks are moved while they are worked on; None leaves them where they are.
        on_block: called with each block's report and the number of blocks.
        refine: how long to refine scales, norms and biases; None leaves them as solved.
        resume: keeps every finished block and the state of the tuning, so that the same call after an
            interruption goes on from there, to the same result.
        on_step: told how far the refinement of the whole model is.
        temperature_scaling: fit the temperature of the predictions (`temperature.set_temperature`), where there are two
            streams and a head.

    Raises:
        CalibrationError: no token goes through a linear that is not one of a few idle experts; see also
            `head_to_tune_to` and `ResumeFolder`.
        SampleError: no samples.
        NonFiniteError: a weight or an activation holds NaN or inf.
        LockstepError, SingularHessianError: see there.
    """
    if not samples:
        raise SampleError("no calibration samples; give at least one text or chat message, or calibration='builtin'.")
    collector = calibration_pass(pass_name)()
    targets = decoder_targets(model, selection)
    check_weights(model, selection)
    config = getattr(model, "config", None)
    modalities = [token_modalities(sample, config) for sample in samples]
    tokens = _count_tokens(modalities, config)
    _warn_few_tokens(sum(tokens.values()), model, selection)
    home = next(model.parameters()).device
    moved = map_tensors([dict(sample) for sample in samples], home)
    dtype = next(iter(targets.linears[0].values())).weight.dtype
    tuned = refine is not None and refine.steps > 0
    head = head_to_tune_to(model) if tuned else output_embedding(model)
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    worker = _Binarizer(
        model, selection, targets.positions, targets.linears, modalities, collector, device, on_block, refine, resume
    )
    two_streams = runs_two_streams(selection, refine)
    try:
        lockstep = Lockstep(model, targets.blocks, targets.linears, moved, two_streams, device)
        last = None
        if temperature_scaling and two_streams and head is not None and "input_ids" in moved[0]:
            last = find_last_norm(model, head, _one_token(moved[0], modalities[0]))
        scaled = [] if last is None else spread(len(samples), TEMPERATURE_SAMPLES)
        to_head = [(i, DENSE) for i in (range(len(samples)) if tuned else scaled)] + [(i, QUANTIZED) for i in scaled]
        at_head = lockstep.run(worker, worker if refine or resume else None, head, to_head)
        temperature = None if last is None else set_temperature(model, last, _head_inputs(at_head, modalities), device)
        tuning = None
        if refine is not None and refine.steps:
            teacher = {i: _teacher(at_head, i) for i in range(len(samples))}
            tuning = tune_model(model, moved, modalities, teacher, dtype, refine.steps, device, resume, on_step)
    finally:
        model.train(was_training)
    return BinarizationReport(tuple(worker.reports), tokens, time.perf_counter() - started, temperature, tuning)


def runs_two_streams(selection: Selection, refine: RefineSettings | None) -> bool:
    """Whether a dense stream runs beside the quantized one."""
    return refine is not None or any(s.propagation != 0.0 for s in selection.settings.values())


def _head_inputs(at_head: Mapping[tuple[int, str], Tensor], modalities: Sequence[TokenModalities]) -> list[HeadInputs]:
    """Of the samples that came to the head in both streams, and whose tokens there are known by their modality."""
    pairs = []
    for (sample, stream), dense in at_head.items():
        binarized, text = at_head.get((sample, QUANTIZED)), modalities[sample].text
        if stream == DENSE and binarized is not None and dense.shape[-2] == text.numel():
            pairs.append(HeadInputs(dense, binarized, text))
    return pairs


def _teacher(at_head: Mapping[tuple[int, str], Tensor], sample: int) -> Tensor:
    """What the dense stream of a sample gave to the head."""
    if (sample, DENSE) not in at_head:
        raise CalibrationError(
            f"sample {sample} never comes to the model's output embedding; use refine_steps=0 for this model."
        )
    return at_head[sample, DENSE]


def _one_token(sample: Mapping[str, Any], modalities: TokenModalities) -> dict[str, Tensor]:
    """The sample's first text token as forward arguments."""
    first = int(modalities.text.to(torch.int64).argmax())
    return {"input_ids": sample["input_ids"][:, first : first + 1]}


@dataclass
class _Binarizer:
    """The lockstep's visitor: solves each group as it comes up and swaps a block's linears when it is done."""

    model: nn.Module
    selection: Selection
    positions: Sequence[int]
    linears: Sequence[Mapping[str, nn.Linear]]
    modalities: Sequence[TokenModalities]
    collector: CalibrationPass
    device: torch.device | None
    on_block: Callable[[BlockReport, int], None] | None
    refine: RefineSettings | None = None
    folder: ResumeFolder | None = None
    reports: list[BlockReport] = field(default_factory=list)

    def enter(self, index: int) -> None:
        self._started = time.perf_counter()
        self._packed: dict[str, PackedWeight] = {}
        self._error: dict[str, float] = {}
        self._index = index
        self._vectors: dict[str, Tensor] = {}  # that the refinement changed
        self._reconstruction: Reconstruction | None = None

    def solve(self, names: tuple[str, ...], arrivals: Sequence[Arrival]) -> Mapping[str, Tensor]:
        members = [(n, self.linears[self._index][n]) for n in names]
        device = self.device or members[0][1].weight.device
        self.collector.by_modality = any(self.selection.settings[n].significance == "modality" for n in names)
        statistics = self.collector.collect(names[0], pair_streams(arrivals, self.modalities), device)
        return self._solve(members, statistics)

    def miss(self, names: Sequence[str]) -> None:
        linears = self.linears[self._index]
        missed, selected = (sum(linears[n].weight.numel() for n in some) for some in (names, linears))
        experts = {name: _idle_expert(name, self._packed) for name in names}
        remedy = (
            "Give more or more varied samples, or leave them dense with "
            f"modules_to_not_convert={list(dict.fromkeys(experts[name] or name for name in names))}."
        )
        strange = [name for name in names if experts[name] is None]
        if strange:
            raise CalibrationError(
                f"no calibration token goes through {strange[0]}, and it is no expert among others that one goes "
                f"through: the model may read its weight in another way, or not use it with these samples. {remedy}"
            )
        what = f"no calibration token reached {len(names)} linears of experts, such as {names[0]}"
        if missed > MISSED * selected:
            raise CalibrationError(f"{what}, {missed / selected:.0%} of what is binarized in their block. {remedy}")
        warnings.warn(
            f"{what}: they are binarized to approximate their weights, without data. {remedy}", SABWarning, stacklevel=2
        )
        for name in names:
            device = self.device or linears[name].weight.device
            statistics = InputStatistics.without_data(linears[name].in_features, device)
            self._solve([(name, linears[name])], statistics)

    def _solve(self, members: Sequence[tuple[str, nn.Linear]], statistics: InputStatistics) -> dict[str, Tensor]:
        """Solve linears that share an input, those with the same settings as one stack."""
        device = statistics.hessian.device
        weights: dict[str, Tensor] = {}
        for settings in dict.fromkeys(self.selection.settings[n] for n, _ in members):
            stack = [(n, m) for n, m in members if self.selection.settings[n] == settings]
            weight = torch.cat([m.weight.to(device, torch.float32) for _, m in stack])
            with torch.autocast(device.type, enabled=False):  # the caller's must not reach the solver
                solution = solve(weight, statistics, settings, stack[0][0])
            for (name, dense), planes in zip(
                stack, solution.planes.split([m.out_features for _, m in stack]), strict=True
            ):
                packed = PackedWeight.pack(planes, settings)
                self._packed[name] = packed
                weights[name] = packed.dequantize().to(dense.weight.device, dense.weight.dtype)
                self._error[name] = solution.error
        return weights

    def known(self, index: int) -> bool:
        return self.folder is not None and self.folder.knows_block(index)

    def finish(self, index: int, passage: BlockPassage) -> None:
        if self.known(index):
            self._read(index)
        elif self.refine is None or not self.refine.epochs or not self._refine(index, passage):
            return
        # from here on the outputs come from the stored values, the same in a run that is resumed and one that is not
        start = self._start(index)
        write_vectors(passage.block, self._vectors)
        weights = {
            f"{name.removeprefix(start)}.weight": self._packed[name].dequantize().to(m.weight.device, m.weight.dtype)
            for name, m in self.linears[index].items()
        }
        for sample in passage.samples:
            passage.replace(sample, passage.run(sample, weights))

    def _refine(self, index: int, passage: BlockPassage) -> bool:
        """Reconstruct the block's output; whether that improved it."""
        assert self.refine is not None
        start = self._start(index)
        packed = {name.removeprefix(start): weight for name, weight in self._packed.items()}
        dense = next(iter(self.linears[index].values())).weight
        parameters = ModuleParameters(packed, dense.dtype, vectors_of(passage.block), dense.device)
        self._reconstruction = reconstruct(passage, parameters, self.refine.epochs, seed=index)
        if self._reconstruction.improved:
            self._packed.update({start + name: weight for name, weight in parameters.packed().items()})
            self._vectors = parameters.built_vectors()
        return self._reconstruction.improved

    def _read(self, index: int) -> None:
        """Take over what an interrupted run had finished."""
        assert self.folder is not None
        linears = self.linears[index]
        shapes = {n: (m.out_features, m.in_features, self.selection.settings[n]) for n, m in linears.items()}
        block = self.folder.read_block(index, shapes)
        self._packed.update(block.packed)
        self._error.update(block.errors)
        self._vectors, self._reconstruction = block.vectors, block.reconstruction

    def _start(self, index: int) -> str:
        """What the names of the block's modules begin with."""
        prefix = self.selection.prefix
        return f"{prefix}.{self.positions[index]}." if prefix else f"{self.positions[index]}."

    def leave(self, index: int, drift: float | None) -> None:
        if self.folder is not None and not self.folder.knows_block(index):
            block = FinishedBlock(self._packed, self._error, self._vectors, self._reconstruction)
            self.folder.write_block(index, block)
        layers: list[LayerReport] = []
        for name, dense in self.linears[index].items():
            layer = SABLinear.from_packed(self._packed[name], dense.bias).to(dense.weight.device)
            layer.train(dense.training)
            set_module(self.model, name, layer)
            dense._parameters["weight"] = None  # the lockstep still refers to the module; its weight can go
            weights = layer.in_features * layer.out_features
            layers.append(LayerReport(name, self._error[name], layer.bits_per_weight, weights))
        seconds = time.perf_counter() - self._started
        report = BlockReport(self.positions[index], tuple(layers), drift, seconds, self._reconstruction)
        self.reports.append(report)
        if self.on_block is not None:
            self.on_block(report, len(self.linears))


def _idle_expert(name: str, reached: Collection[str]) -> str | None:
    """The expert that a linear belongs to, if the same linear of another expert was reached; else None."""
    parts, others = name.split("."), [other.split(".") for other in reached]
    for place in reversed([i for i, part in enumerate(parts) if part.isdigit()]):
        before, after = parts[:place], parts[place + 1 :]
        if any(len(o) == len(parts) and o[:place] == before and o[place + 1 :] == after for o in others):
            return ".".join(parts[: place + 1])
    return None


@dataclass(frozen=True)
class DecoderTargets:
    """The decoder blocks that hold selected linears.

    Attributes:
        positions: of the blocks in the decoder.
        blocks: themselves.
        linears: of each block, by dotted name.
    """

    positions: list[int]
    blocks: list[nn.Module]
    linears: list[dict[str, nn.Linear]]


def decoder_targets(model: nn.Module, selection: Selection) -> DecoderTargets:
    """Where the selected linears are."""
    decoder = find_decoder_blocks(model)
    targets = DecoderTargets([], [], [])
    for index, block in enumerate(decoder.blocks):
        start = f"{decoder.prefix}.{index}." if decoder.prefix else f"{index}."
        inside = {name: _linear(model, name) for name in selection.settings if name.startswith(start)}
        if inside:
            targets.positions.append(index)
            targets.blocks.append(block)
            targets.linears.append(inside)
    return targets


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise CalibrationError(f"{name} is a {type(module).__name__}; only nn.Linear can be binarized.")
    return module


def refuse_offloaded(model: nn.Module, selection: Selection) -> None:
    """Every target weight must be there.

    Raises:
        CalibrationError: one is on meta.
    """
    for name in selection.settings:
        if _linear(model, name).weight.device.type == "meta":
            raise CalibrationError(
                f"the weight of {name} is offloaded; load the model on the CPU for binarization (device_map='cpu') and "
                "name the accelerator in SABConfig(calibration_device=...)."
            )


def check_weights(model: nn.Module, selection: Selection) -> None:
    """Stop before hours of work: every target weight must be real and finite."""
    refuse_offloaded(model, selection)
    for name in selection.settings:
        if not bool(torch.isfinite(_linear(model, name).weight).all()):
            raise NonFiniteError(
                f"the weight of {name} holds NaN or inf; the checkpoint is damaged, or overflowed in float16."
            )


def _count_tokens(modalities: Sequence[TokenModalities], config: Any) -> dict[str, int]:
    expected = model_modalities(config)
    names = dict.fromkeys([*expected, *(n for m in modalities for n in m.names)])
    tokens = {name: sum(m.count(name) for m in modalities) for name in names}
    for name in expected:
        if not tokens[name] and name != TEXT:
            warnings.warn(
                f"no calibration sample has {name} tokens: that modality is left out of the Hessians and of the "
                f"significance map. Give samples with {name} input if the model will see it.",
                SABWarning,
                stacklevel=3,
            )
    return {name: count for name, count in tokens.items() if count}


def _warn_few_tokens(tokens: int, model: nn.Module, selection: Selection) -> None:
    width, widest = max((_linear(model, name).in_features, name) for name in selection.settings)
    if tokens < width:
        warnings.warn(
            f"{tokens} calibration tokens are fewer than the {width} input features of {widest}: its Hessian is "
            "rank-deficient and the result will overfit. Give more samples.",
            SABWarning,
            stacklevel=3,
        )
