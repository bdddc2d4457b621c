"""Errors of every linear at a few levels, from the dense model's inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from optimum_sab.calibration.allocation.ladder import ANCHORS, probed_settings
from optimum_sab.calibration.progress import OnStep, no_step
from optimum_sab.calibration.ranks import solving_cost
from optimum_sab.calibration.samples.calibration_samples import CalibrationSamples
from optimum_sab.calibration.statistics.gathering import Gathering
from optimum_sab.calibration.statistics.hessian import HessianPass
from optimum_sab.calibration.streams.arrival import Arrival
from optimum_sab.calibration.streams.experts import ExpertLinears, RoutedArrival, pooled_arrivals
from optimum_sab.calibration.streams.lockstep import Lockstep
from optimum_sab.calibration.streams.mapped import Place
from optimum_sab.calibration.streams.targets import decoder_targets
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.parts import part
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import output_error, solve
from optimum_sab.nn.selection import Selection
from optimum_sab.ops.columns import column_loops

ROWS = 64  # of a weight; its error with every anchor is measured on so many
Errors = dict[str, dict[tuple[int, float], float]]  # relative output errors by linear and level


@dataclass(frozen=True)
class AnchorErrors:
    """What the probe found.

    Attributes:
        groups: the linears that choose together: of one shape and the same settings, with one input.
        errors: relative output error of every one of them at the `ANCHORS`, on `ROWS` of its rows.
    """

    groups: list[tuple[str, ...]] = field(default_factory=list)
    errors: Errors = field(default_factory=dict)


def measure_errors(
    model: nn.Module,
    selection: Selection,
    free: Collection[str],
    samples: CalibrationSamples,
    place: Place | None = None,
    on_step: OnStep = no_step,
) -> AnchorErrors:
    """Let the dense model's inputs pass every free linear once.

    Args:
        model: dense, in eval mode; not changed.
        selection: all linears that will be binarized.
        free: names of those to measure.
        samples: what the model reads; every rank reads its own of them, and all get the same errors.
        place: where blocks compute and samples wait; None leaves all where it is.
        on_step: told after every block.

    Returns:
        Without the linears that no token of these samples reaches.
    """
    targets, place = decoder_targets(model, selection), place or Place()
    gathering = Gathering(HessianPass(), samples.modalities, samples.ranks)
    probe = _Probe(selection.settings, targets.linears, gathering, frozenset(free), place.device, on_step)
    blocks, linears, ranks = targets.blocks, targets.linears, samples.ranks
    lockstep = Lockstep(
        model, blocks, linears, samples.inputs, False, place.device, mapped=place.mapped, ranks=ranks, own=samples.own
    )
    lockstep.run(probe)
    return probe.found


class _Probe:
    """A visitor that measures and changes nothing: the stream goes on through the dense weights."""

    def __init__(
        self,
        settings: Mapping[str, LayerSettings],
        linears: Sequence[Mapping[str, nn.Linear]],
        gathering: Gathering,
        free: frozenset[str],
        device: torch.device | None,
        on_step: OnStep,
    ) -> None:
        self.found = AnchorErrors()
        self._settings, self._linears, self._gathering, self._free = settings, linears, gathering, free
        self._index, self._device, self._on_step = 0, device, on_step

    def enter(self, index: int) -> None:
        self._index = index

    def solve(self, names: tuple[str, ...], arrivals: Sequence[Arrival]) -> Mapping[str, Tensor]:
        members = {name: self._linears[self._index][name] for name in names}
        groups: dict[tuple[LayerSettings, torch.Size], list[str]] = {}
        for name in names:
            if name in self._free:
                groups.setdefault((self._settings[name], members[name].weight.shape), []).append(name)
        if groups:
            device = self._device or members[names[0]].weight.device
            settings = [each for each, _ in groups]
            owner = self._owner(members)
            with part("statistics"):
                weights = {name: linear.weight for name, linear in members.items()}
                inputs = self._gathering.inputs(arrivals)
                statistics = self._gathering.statistics(weights, inputs, settings, device, owner=owner)

            def measured() -> Errors:
                assert statistics is not None
                found: Errors = {}
                for (own, _), group in groups.items():
                    found |= _measured(own, {name: members[name].weight for name in group}, statistics)
                return found

            self.found.groups.extend(map(tuple, groups.values()))
            self.found.errors.update(self._gathering.ranks.give(f"errors of {names[0]}", owner, measured))
        return {name: linear.weight for name, linear in members.items()}

    def solve_experts(self, linears: ExpertLinears, arrivals: Sequence[RoutedArrival]) -> Mapping[str, Tensor]:
        """Each chooses for itself, by errors on what all are given: few samples leave one little of its own."""
        members = {name: self._linears[self._index][name] for name in linears.names.values()}
        free = [name for name in members if name in self._free]
        if free:
            device = self._device or members[free[0]].weight.device
            ranks = self._gathering.ranks
            with part("statistics"):
                inputs = self._gathering.inputs(pooled_arrivals(linears, arrivals))
                weights = {name: members[name].weight for name in free}
                statistics = self._gathering.statistics(weights, inputs, (), device, owner=None)
            assert statistics is not None
            mine: Errors = {}
            for place, name in enumerate(free):
                if place % ranks.size == ranks.rank:
                    mine |= _measured(self._settings[name], {name: members[name].weight}, statistics)
            told: Errors = {}
            for each in ranks.exchange(f"errors of {linears.key}", mine):
                told |= each
            self.found.groups.extend((name,) for name in free)
            self.found.errors.update({name: told[name] for name in free})
        return {name: linear.weight for name, linear in members.items()}

    def _owner(self, members: Mapping[str, nn.Linear]) -> int:
        rows = sum(min(ROWS, linear.out_features) for linear in members.values())
        return self._gathering.ranks.owner_of(solving_cost(rows, next(iter(members.values())).in_features))

    def miss(self, names: Sequence[str]) -> None:
        """They stay as they are."""

    def leave(self, index: int, drift: float | None) -> None:
        self._on_step(index + 1, len(self._linears))


def _measured(settings: LayerSettings, weights: Mapping[str, Tensor], statistics: InputStatistics) -> Errors:
    """Of linears that choose together, as one stack."""
    generator = torch.Generator().manual_seed(0)
    errors: Errors = {}
    some = {}
    for name, weight in weights.items():
        rows = torch.randperm(weight.shape[0], generator=generator)[:ROWS].to(weight.device)
        some[name] = weight[rows].to(statistics.hessian.device, torch.float32)
        errors[name] = {}
    stack, sizes = torch.cat(list(some.values())), [len(each) for each in some.values()]
    for level in ANCHORS:
        quick = probed_settings(settings, level)
        solution = solve(stack, statistics, quick, next(iter(some)), column_loops(stack.device))
        for (name, each), found in zip(some.items(), solution.planes.dequantize().split(sizes), strict=True):
            errors[name][level] = output_error(each, found, statistics.hessian)
    return errors
