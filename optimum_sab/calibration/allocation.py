"""Choose the planes of every linear under a budget of stored bits, from measured sensitivities."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.lockstep import Arrival, Lockstep
from optimum_sab.calibration.modality import TokenModalities, token_modalities
from optimum_sab.calibration.passes import HessianPass, pair_streams
from optimum_sab.calibration.pipeline import DecoderTargets, check_weights, decoder_targets
from optimum_sab.calibration.placement import map_tensors
from optimum_sab.calibration.progress import OnStep, no_step
from optimum_sab.calibration.sensitivity import output_sensitivity
from optimum_sab.calibration.spread import spread
from optimum_sab.core.allocation import Level, allocate_levels
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import output_error, solve
from optimum_sab.errors import ConfigError
from optimum_sab.format.layout import stored_bits_per_weight
from optimum_sab.nn.selection import Selection

PLANES = ("base_planes", "residual_planes", "salient_fraction")  # what is chosen
FRACTIONS = (0.0, 0.03125, 0.0625, 0.09375, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.75)
LADDER = (*((base, f) for base in (1, 2, 3) for f in FRACTIONS), (4, 0.0))
ANCHOR_FRACTION = 0.125
# Levels at which errors are measured; those at the others lie on curves through these.
ANCHORS = ((1, 0.0), (1, ANCHOR_FRACTION), (2, 0.0), (2, ANCHOR_FRACTION))
ROWS = 64  # of a weight; its error with every anchor is measured on so many
SAMPLES = 16


@dataclass(frozen=True)
class Allocation:
    """Planes per linear; linears of one shape that share an input have the same.

    Attributes:
        settings: of every linear that was free to choose.
        sensitivity: expected KL per relative output error, nats (`output_sensitivity`).
        bits_per_weight: stored bits over weights, the linears that were not free included.
    """

    settings: dict[str, LayerSettings]
    sensitivity: dict[str, float]
    bits_per_weight: float

    def rules(self, prefix: str) -> dict[str, dict[str, Any]]:
        """The same as rules for ``dynamic``, one per distinct choice; names begin at the decoder's block list."""
        chosen: dict[tuple[int, int, float], list[str]] = {}
        start = len(prefix) + 1 if prefix else 0
        for name, own in self.settings.items():
            key = (own.base_planes, own.residual_planes, own.salient_fraction)
            chosen.setdefault(key, []).append(re.escape(name[start:]))
        last = re.escape(prefix.rpartition(".")[2])
        head = rf"(?:^|\.){last}\." if last else "^"
        return {
            f"{head}(?:{'|'.join(names)})$": dict(zip(PLANES, choice, strict=True)) for choice, names in chosen.items()
        }


def allocate(
    model: nn.Module,
    selection: Selection,
    free: Sequence[str],
    samples: Sequence[Mapping[str, Any]],
    target_bits: float | None = None,
    device: torch.device | None = None,
    on_step: OnStep = no_step,
) -> Allocation:
    """Find the planes of the linears ``free`` such that all selected linears together take at most the budget.

    Expected loss of a linear at a level = its sensitivity times its relative output error there. Errors are measured
    with the dense model's inputs on a few rows of every weight for the levels `ANCHORS` (see `_error` for the others).
    Linears of one shape that share an input and their settings choose together (k and v; gate and up): they are solved
    as one stack and run in one launch. Linears that no token of these samples reaches stay as they are.

    Args:
        model: dense; not changed.
        selection: all linears that will be binarized; the settings of those in ``free`` give everything but planes.
        free: names of the linears to choose for.
        samples: forward keyword arguments; `SAMPLES` of them, spread evenly, are used.
        target_bits: stored bits per weight at most; None for what ``selection`` takes as it is.
        device: where blocks are moved while they are worked on; None leaves them where they are.
        on_step: told how far it is, in samples of the backward pass and blocks of the other.

    Raises:
        ConfigError: the budget is below the cheapest choice; the message says what that needs.
        NonFiniteError: a weight, an activation or a gradient holds NaN or inf.
        CalibrationError: a weight is offloaded, or see `output_sensitivity`.
    """
    check_weights(model, selection)
    few = [dict(samples[index]) for index in spread(len(samples), SAMPLES)]
    some = map_tensors(few, next(model.parameters()).device)
    targets = decoder_targets(model, selection)
    stages = len(some) + len(targets.blocks)

    def backward(done: int, _: int) -> None:
        on_step(done, stages)

    def forward(done: int, _: int) -> None:
        on_step(len(some) + done, stages)

    sensitivity = output_sensitivity(model, list(free), some, targets.blocks, device, on_step=backward)
    probe = _probe(model, selection, set(free), targets, some, device, forward)
    costs = _Costs(model, selection, sensitivity, probe.errors)
    groups = {names[0]: names for names in probe.groups}
    ladders = {first: _ladder(selection.settings[first]) for first in groups}
    levels = {first: [costs.level(groups[first], *each) for each in ladders[first].items()] for first in groups}
    measured = {name for names in groups.values() for name in names}
    fixed = sum(costs.bits(name, own) for name, own in selection.settings.items() if name not in measured)
    weights = sum(costs.weights(name) for name in selection.settings)
    bits = target_bits
    if bits is None:
        bits = sum(costs.bits(name, own) for name, own in selection.settings.items()) / weights
    least = (fixed + sum(min(level.bits for level in of) for of in levels.values())) / weights
    if bits < least - 1e-9:
        raise ConfigError(
            f"target_bits={bits:g} is less than the {least:.3f} bits that this model's linears take at least; "
            "raise it, or use larger blocks (block_size)."
        )
    chosen = allocate_levels(levels, bits * weights - fixed)
    total = (fixed + sum(levels[first][index].bits for first, index in chosen.items())) / weights
    picked = {first: list(ladders[first].values())[index] for first, index in chosen.items()}
    by_name = {name: picked[first] for first, names in groups.items() for name in names}
    return Allocation({name: by_name[name] for name in free if name in by_name}, sensitivity, total)


@dataclass(frozen=True)
class _Costs:
    """What a linear costs at a level, in bits and in expected loss."""

    model: nn.Module
    selection: Selection
    sensitivity: Mapping[str, float]
    errors: Mapping[str, Mapping[tuple[int, float], float]]

    def weights(self, name: str) -> int:
        return math.prod(self._shape(name))

    def bits(self, name: str, settings: LayerSettings) -> float:
        """Stored bits of the linear, its bias among them, which stays as it is."""
        bias = self.model.get_submodule(name).bias
        kept = bias.element_size() * bias.numel() if isinstance(bias, Tensor) else 0
        return stored_bits_per_weight(*self._shape(name), settings) * self.weights(name) + 8 * kept

    def level(self, names: Sequence[str], step: tuple[int, float], settings: LayerSettings) -> Level:
        """Of linears that choose together."""
        loss = sum(self.sensitivity[name] * _error(self.errors[name], step) for name in names)
        return Level(sum(self.bits(name, settings) for name in names), loss)

    def _shape(self, name: str) -> tuple[int, int]:
        linear = self.model.get_submodule(name)
        return int(linear.out_features), int(linear.in_features)  # type: ignore[arg-type]


def _ladder(settings: LayerSettings) -> dict[tuple[int, float], LayerSettings]:
    """The levels a linear with these settings can choose from, by base planes and share of columns."""
    steps = {}
    for base, fraction in LADDER:
        if round(fraction * settings.block_size) < 1:
            steps[base, 0.0] = settings.replace(base_planes=base, residual_planes=0)
        else:
            steps[base, fraction] = settings.replace(base_planes=base, residual_planes=1, salient_fraction=fraction)
    return steps


def _error(anchors: Mapping[tuple[int, float], float], step: tuple[int, float]) -> float:
    """Relative output error at a level, from those at the anchors.

    A plane more on the share f of the columns, the salient ones first, takes the part ``f^p`` of what it takes off the
    logarithm of the error on all of them; p comes from the anchor at an eighth.
    """
    base, fraction = step
    first, eighth, second, last = (math.log(max(anchors[key], 1e-12)) for key in ANCHORS)
    plane = min(second - first, -1e-6)  # what a whole plane changes
    begins, early = (first, eighth - first) if base == 1 else (second + (base - 2) * plane, last - second)
    power = math.log(min(max(early / plane, 1e-3), 0.999)) / math.log(ANCHOR_FRACTION)
    return math.exp(begins + plane * fraction**power)


@torch.no_grad()
def _probe(
    model: nn.Module,
    selection: Selection,
    free: set[str],
    targets: DecoderTargets,
    samples: Sequence[Mapping[str, Any]],
    device: torch.device | None,
    on_step: OnStep,
) -> _Probe:
    """Let the dense model's inputs pass every free linear once."""
    config = getattr(model, "config", None)
    modalities = [token_modalities(sample, config) for sample in samples]
    probe = _Probe(selection, targets.linears, modalities, free, device, on_step)
    Lockstep(model, targets.blocks, targets.linears, samples, False, device).run(probe)
    return probe


class _Probe:
    """A visitor that measures and changes nothing: the stream goes on through the dense weights.

    Attributes:
        groups: the free linears that choose together.
        errors: relative output error of every free linear at the anchors, on `ROWS` of its rows.
    """

    def __init__(
        self,
        selection: Selection,
        linears: Sequence[Mapping[str, nn.Linear]],
        modalities: Sequence[TokenModalities],
        free: set[str],
        device: torch.device | None,
        on_step: OnStep,
    ) -> None:
        self.groups: list[tuple[str, ...]] = []
        self.errors: dict[str, dict[tuple[int, float], float]] = {}
        self._selection, self._linears, self._modalities, self._free = selection, linears, modalities, free
        self._index, self._device, self._on_step = 0, device, on_step

    def enter(self, index: int) -> None:
        self._index = index

    def solve(self, names: tuple[str, ...], arrivals: Sequence[Arrival]) -> Mapping[str, Tensor]:
        members = {name: self._linears[self._index][name] for name in names}
        groups: dict[tuple[LayerSettings, torch.Size], list[str]] = {}
        for name in names:
            if name in self._free:
                kind = self._selection.settings[name], members[name].weight.shape
                groups.setdefault(kind, []).append(name)
        if groups:
            device = self._device or members[names[0]].weight.device
            collector = HessianPass()
            collector.by_modality = any(settings.significance == "modality" for settings, _ in groups)
            statistics = collector.collect(names[0], pair_streams(arrivals, self._modalities), device)
            for (settings, _), group in groups.items():
                self.groups.append(tuple(group))
                self._measure(settings, {name: members[name].weight for name in group}, statistics)
        return {name: linear.weight for name, linear in members.items()}

    def _measure(self, settings: LayerSettings, weights: Mapping[str, Tensor], statistics: InputStatistics) -> None:
        generator = torch.Generator().manual_seed(0)
        some = {}
        for name, weight in weights.items():
            rows = torch.randperm(weight.shape[0], generator=generator)[:ROWS].to(weight.device)
            some[name] = weight[rows].to(statistics.hessian.device, torch.float32)
            self.errors[name] = {}
        stack, sizes, ladder = torch.cat(list(some.values())), [len(each) for each in some.values()], _ladder(settings)
        for base, fraction in ANCHORS:
            quick = ladder.get((base, fraction))
            if quick is None:  # blocks too narrow for an eighth
                quick = settings.replace(base_planes=base, residual_planes=0)
            quick = quick.replace(iterations=3, sweeps=0, propagation=0.0)
            solution = solve(stack, statistics, quick, next(iter(some)))
            for (name, each), found in zip(some.items(), solution.planes.dequantize().split(sizes), strict=True):
                self.errors[name][base, fraction] = output_error(each, found, statistics.hessian)

    def miss(self, names: Sequence[str]) -> None:
        """They stay as they are."""

    def leave(self, index: int, drift: float | None) -> None:
        self._on_step(index + 1, len(self._linears))
