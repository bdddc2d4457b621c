"""Choose the planes of every linear under a budget of stored bits, from measured sensitivities (`target_bits`)."""

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
from optimum_sab.calibration.pipeline import decoder_targets
from optimum_sab.calibration.placement import map_tensors
from optimum_sab.calibration.sensitivity import output_sensitivity
from optimum_sab.core.allocation import Level, allocate_levels
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import solve
from optimum_sab.errors import ConfigError
from optimum_sab.format.layout import stored_bits_per_weight
from optimum_sab.nn.selection import Selection

PLANES = ("base_planes", "residual_planes", "salient_fraction")  # what is chosen
LADDER = ((1, 0.0), (1, 0.0625), (1, 0.125), (1, 0.25), (1, 0.5), (2, 0.0), (2, 0.125), (2, 0.25), (2, 0.5), (3, 0.0))
ANCHORS = ((1, 0.0), (1, 0.125), (2, 0.0), (2, 0.125))  # fitted; the others lie on lines through these
ROWS = 64  # of a weight; its error with every anchor is measured on so many
SAMPLES = 16


@dataclass(frozen=True)
class Allocation:
    """Planes per linear.

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
    target_bits: float,
) -> Allocation:
    """Find the planes of the linears ``free`` such that all selected linears together take at most ``target_bits``.

    Expected loss of a linear at a level = its sensitivity times its relative output error there. Errors are measured
    with the dense model's inputs on a few rows of every weight for the levels `ANCHORS`; between and beyond those the
    logarithm of the error is linear in the share of columns.

    Args:
        model: dense; not changed.
        selection: all linears that will be binarized; the settings of those in ``free`` give everything but planes.
        free: names of the linears to choose for.
        samples: forward keyword arguments; `SAMPLES` of them, spread evenly, are used.
        target_bits: stored bits per weight at most.

    Raises:
        ConfigError: the budget is below the cheapest choice; the message says what that needs.
    """
    spread = samples[:: max(1, len(samples) // SAMPLES)][:SAMPLES]
    some = map_tensors([dict(sample) for sample in spread], next(model.parameters()).device)
    sensitivity = output_sensitivity(model, list(free), some)
    errors = _anchor_errors(model, selection, set(free), some)
    shapes = {name: _shape(model, name) for name in selection.settings}
    ladders = {name: _ladder(selection.settings[name]) for name in free}
    levels = {
        name: [
            Level(
                stored_bits_per_weight(*shapes[name], settings) * math.prod(shapes[name]),
                sensitivity[name] * _error(errors[name], step),
            )
            for step, settings in ladders[name].items()
        ]
        for name in free
    }
    weights = sum(math.prod(shape) for shape in shapes.values())
    fixed = sum(
        stored_bits_per_weight(*shapes[name], settings) * math.prod(shapes[name])
        for name, settings in selection.settings.items()
        if name not in levels
    )
    least = (fixed + sum(min(level.bits for level in of) for of in levels.values())) / weights
    if target_bits < least:
        raise ConfigError(
            f"target_bits={target_bits} is less than the {least:.3f} bits that this model's linears take at least; "
            "raise it, or use larger blocks (block_size)."
        )
    chosen = allocate_levels(levels, target_bits * weights - fixed)
    bits = (fixed + sum(levels[name][index].bits for name, index in chosen.items())) / weights
    settings = {name: list(ladders[name].values())[index] for name, index in chosen.items()}
    return Allocation(settings, sensitivity, bits)


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
    """Relative output error at a level, from those at the anchors."""
    base, fraction = step
    log = {key: math.log(max(value, 1e-12)) for key, value in anchors.items()}
    first, eighth, second, last = (log[key] for key in ANCHORS)
    plane = second - first  # what a whole plane changes
    begins, early = (first, eighth - first) if base == 1 else (second + (base - 2) * plane, last - second)
    if fraction <= 0.125:
        value = begins + early * fraction / 0.125
    else:
        value = begins + early + (plane - early) * (fraction - 0.125) / 0.875
    return math.exp(value)


def _shape(model: nn.Module, name: str) -> tuple[int, int]:
    linear = model.get_submodule(name)
    return int(linear.out_features), int(linear.in_features)  # type: ignore[arg-type]


@torch.no_grad()
def _anchor_errors(
    model: nn.Module, selection: Selection, free: set[str], samples: Sequence[Mapping[str, Any]]
) -> dict[str, dict[tuple[int, float], float]]:
    """Relative output error of every free linear at the anchors, on `ROWS` rows, under the dense model's inputs."""
    targets = decoder_targets(model, selection)
    config = getattr(model, "config", None)
    probe = _Probe(selection, targets.linears, [token_modalities(sample, config) for sample in samples], free)
    Lockstep(model, targets.blocks, targets.linears, samples, two_streams=False).run(probe)
    return probe.errors


class _Probe:
    """A visitor that measures and changes nothing: the stream goes on through the dense weights."""

    def __init__(
        self,
        selection: Selection,
        linears: Sequence[Mapping[str, nn.Linear]],
        modalities: Sequence[TokenModalities],
        free: set[str],
    ) -> None:
        self.errors: dict[str, dict[tuple[int, float], float]] = {}
        self._selection, self._linears, self._modalities, self._free = selection, linears, modalities, free
        self._index = 0

    def enter(self, index: int) -> None:
        self._index = index

    def solve(self, names: tuple[str, ...], arrivals: Sequence[Arrival]) -> Mapping[str, Tensor]:
        members = {name: self._linears[self._index][name] for name in names}
        asked = [name for name in names if name in self._free]
        if asked:
            device = members[asked[0]].weight.device
            statistics = HessianPass().collect(names[0], pair_streams(arrivals, self._modalities), device)
            generator = torch.Generator().manual_seed(0)
            for name in asked:
                weight = members[name].weight
                rows = torch.randperm(weight.shape[0], generator=generator)[:ROWS].to(device)
                self.errors[name] = {}
                own = self._selection.settings[name]
                ladder = _ladder(own)
                for base, fraction in ANCHORS:
                    quick = ladder.get((base, fraction))
                    if quick is None:  # blocks too narrow for an eighth
                        quick = own.replace(base_planes=base, residual_planes=0)
                    quick = quick.replace(iterations=3, sweeps=0, propagation=0.0)
                    self.errors[name][base, fraction] = solve(weight[rows].float(), statistics, quick, name).error
        return {name: linear.weight for name, linear in members.items()}

    def leave(self, index: int, drift: float | None) -> None:
        """Nothing to put in place."""
