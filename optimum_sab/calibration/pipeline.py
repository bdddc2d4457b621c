"""Binarize a model: run the lockstep forward, solve every group of linears, put packed layers in place."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.lockstep import Arrival, Lockstep
from optimum_sab.calibration.modality import TEXT, TokenModalities, model_modalities, token_modalities
from optimum_sab.calibration.passes import CalibrationPass, calibration_pass, pair_streams
from optimum_sab.core.solver import solve
from optimum_sab.errors import CalibrationError, NonFiniteError, SABWarning, SampleError
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.nn.decoder import DecoderBlocks, find_decoder_blocks
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.selection import Selection, set_module


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
    """

    index: int
    layers: tuple[LayerReport, ...]
    drift: float | None
    seconds: float

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
    """

    blocks: tuple[BlockReport, ...]
    tokens: dict[str, int]
    seconds: float

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
) -> BinarizationReport:
    """Binarize the selected linears of ``model`` in place. After an error the model is half binarized: discard it.

    Args:
        model: dense, every parameter on a real device.
        selection: what to binarize and how.
        samples: forward keyword arguments, one dict per sample (`calibration.samples.encode_samples`).
        pass_name: a registered calibration pass.
        device: where blocks are moved while they are worked on; None leaves them where they are.
        on_block: called with each block's report and the number of blocks.

    Raises:
        SampleError: no samples.
        NonFiniteError: a weight or an activation holds NaN or inf.
        LockstepError, SingularHessianError: see there.
    """
    if not samples:
        raise SampleError("no calibration samples; give at least one text or chat message, or calibration='builtin'.")
    collector = calibration_pass(pass_name)()
    decoder = find_decoder_blocks(model)
    positions, linears = _targets(model, decoder, selection)
    _check_weights(model, selection)
    config = getattr(model, "config", None)
    modalities = [token_modalities(sample, config) for sample in samples]
    tokens = _count_tokens(modalities, config)
    _warn_few_tokens(sum(tokens.values()), model, selection)
    home = next(model.parameters()).device
    moved = [{k: v.to(home) if isinstance(v, Tensor) else v for k, v in s.items()} for s in samples]
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    worker = _Binarizer(model, selection, positions, linears, modalities, collector, device, on_block)
    two_streams = any(s.propagation > 0 for s in selection.settings.values())
    try:
        blocks = [decoder.blocks[position] for position in positions]
        Lockstep(model, blocks, linears, moved, two_streams, device).run(worker)
    finally:
        model.train(was_training)
    return BinarizationReport(tuple(worker.reports), tokens, time.perf_counter() - started)


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
    reports: list[BlockReport] = field(default_factory=list)

    def enter(self, index: int) -> None:
        self._started = time.perf_counter()
        self._packed: dict[str, PackedWeight] = {}
        self._error: dict[str, float] = {}
        self._index = index

    def solve(self, names: tuple[str, ...], arrivals: Sequence[Arrival]) -> Mapping[str, Tensor]:
        members = [(n, self.linears[self._index][n]) for n in names]
        device = self.device or members[0][1].weight.device
        statistics = self.collector.collect(names[0], pair_streams(arrivals, self.modalities), device)
        weights: dict[str, Tensor] = {}
        for settings in dict.fromkeys(self.selection.settings[n] for n in names):
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

    def leave(self, index: int, drift: float | None) -> None:
        layers: list[LayerReport] = []
        for name, dense in self.linears[index].items():
            layer = SABLinear.from_packed(self._packed[name], dense.bias).to(dense.weight.device)
            layer.train(dense.training)
            set_module(self.model, name, layer)
            dense._parameters["weight"] = None  # the lockstep still refers to the module; its weight can go
            weights = layer.in_features * layer.out_features
            layers.append(LayerReport(name, self._error[name], layer.bits_per_weight, weights))
        seconds = time.perf_counter() - self._started
        report = BlockReport(self.positions[index], tuple(layers), drift, seconds)
        self.reports.append(report)
        if self.on_block is not None:
            self.on_block(report, len(self.linears))


def _targets(
    model: nn.Module, decoder: DecoderBlocks, selection: Selection
) -> tuple[list[int], list[dict[str, nn.Linear]]]:
    """The places of the decoder blocks that hold selected linears, and those linears by dotted name."""
    positions: list[int] = []
    linears: list[dict[str, nn.Linear]] = []
    for index in range(len(decoder.blocks)):
        start = f"{decoder.prefix}.{index}." if decoder.prefix else f"{index}."
        inside: dict[str, nn.Linear] = {}
        for name in selection.settings:
            if name.startswith(start):
                inside[name] = _linear(model, name)
        if inside:
            positions.append(index)
            linears.append(inside)
    return positions, linears


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise CalibrationError(f"{name} is a {type(module).__name__}; only nn.Linear can be binarized.")
    return module


def _check_weights(model: nn.Module, selection: Selection) -> None:
    """Stop before hours of work: every target weight must be real and finite."""
    for name in selection.settings:
        weight = _linear(model, name).weight
        if weight.device.type == "meta":
            raise CalibrationError(
                f"the weight of {name} is offloaded; load the model on the CPU for binarization (device_map='cpu') and "
                "name the accelerator in SABConfig(calibration_device=...)."
            )
        if not bool(torch.isfinite(weight).all()):
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
