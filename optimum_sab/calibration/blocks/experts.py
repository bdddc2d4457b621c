"""The experts' linears of one name are solved: each from the tokens it gets, few of them mixed with the others'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from optimum_sab.calibration.blocks.measured import ModalityRows
from optimum_sab.calibration.blocks.report import ExpertsReport
from optimum_sab.calibration.blocks.solved import Solved
from optimum_sab.calibration.ranks import solving_cost
from optimum_sab.calibration.statistics.gathering import Gathering
from optimum_sab.calibration.statistics.group_inputs import GroupInputs
from optimum_sab.calibration.streams.experts import (
    ExpertLinears,
    RoutedArrival,
    arrivals_by_expert,
    pooled_arrivals,
)
from optimum_sab.calibration.streams.memory import give_back_heap, solving_room
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.many import solve_many
from optimum_sab.core.parts import part
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import CalibrationError
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.ops.columns import column_loops

ENOUGH = 2  # tokens for each column, from which on an expert's own are all that counts (core/mixture.py)
ROOM = 2**30  # bytes of statistics that wait on a rank to be solved together; an accelerator's may be more, ...
SHARE = 4  # ... a quarter of what is free there, since more of them are solved at once


@dataclass(frozen=True)
class ExpertsToSolve:
    """What is known of a block's linears.

    Attributes:
        linears: by dotted name.
        settings: of each.
        gathering: the calibration pass.
        device: where to compute.
    """

    linears: Mapping[str, nn.Linear]
    settings: Mapping[str, LayerSettings]
    gathering: Gathering
    device: torch.device


@dataclass(frozen=True)
class SolvedExperts:
    """What was found.

    Attributes:
        solved: each linear by dotted name.
        rows: some that this rank's samples gave to each.
        report: what came to the experts.
    """

    solved: dict[str, Solved]
    rows: dict[str, ModalityRows]
    report: ExpertsReport


def solve_experts(linears: ExpertLinears, arrivals: Sequence[RoutedArrival], block: ExpertsToSolve) -> SolvedExperts:
    """Solve the linears of one name of all experts.

    Args:
        linears: which.
        arrivals: who waits there.
        block: what they are part of.

    Every expert has a rank that solves it; all ranks call this.

    Raises:
        CalibrationError: no token comes to any of them.
    """
    return _Experts(linears, arrivals, block).solved()


class _Experts:
    def __init__(self, linears: ExpertLinears, arrivals: Sequence[RoutedArrival], block: ExpertsToSolve) -> None:
        self._linears, self._arrivals, self._block = linears, arrivals, block
        self._ranks = block.gathering.ranks
        self._shared: InputStatistics | None = None
        self._width = block.linears[next(iter(linears.names.values()))].in_features
        self._mixed = 0  # on this rank
        self._room = max(ROOM, (solving_room(block.device) or 0) // SHARE)

    def solved(self) -> SolvedExperts:
        tokens: list[Mapping[str, int]] = []
        rows: dict[str, ModalityRows] = {}
        found: dict[str, Solved] = {}
        waiting: dict[str, InputStatistics] = {}
        for name, here in arrivals_by_expert(self._linears, self._arrivals):
            group = self._block.gathering.inputs(here)
            linear = self._block.linears[name]
            owner = self._ranks.owner_of(solving_cost(linear.out_features, linear.in_features))
            own, came = self._own(name, group, owner)
            if own is not None:
                waiting[name] = self._with_others(own)
            tokens.append(came)
            rows[name] = ModalityRows.of(group, self._block.device)
            if any(self._ranks.exchange("room", sum(map(_bytes, waiting.values())) > self._room)):
                found.update(self._solve(waiting))
                waiting = {}
                give_back_heap(self._width, self._block.device)
        found.update(self._solve(waiting))
        mixed = sum(self._ranks.exchange("mixed experts", self._mixed))
        report = ExpertsReport(self._linears.key, tuple(tokens), mixed)
        return SolvedExperts({name: found[name] for name in rows}, rows, report)

    def _own(self, name: str, group: GroupInputs, owner: int) -> tuple[InputStatistics | None, Mapping[str, int]]:
        """Statistics of what comes to an expert, on its owner, and how many tokens do."""
        live = any(bool((pair.quantized != 0).any()) for pair in group.pairs.values())
        came: Mapping[str, int] = {}
        own = None
        if any(self._ranks.exchange(f"what comes to {name}", live)):
            came = group.count
            with part("statistics"):
                own = self._of(name, group, owner)
        elif self._ranks.rank == owner:
            own = InputStatistics.without_data(self._width, self._block.device)
        if self._ranks.size > 1 and sum(came.values()) < ENOUGH * self._width:
            self._of_all()  # every rank has some of it
        return own, came

    def _with_others(self, own: InputStatistics) -> InputStatistics:
        """With what came to the others, where there is too little to tell all columns apart by."""
        used = self._block.gathering.collector.of_expert(own, self._of_all, ENOUGH * self._width)
        self._mixed += used is not own
        return used

    def _of_all(self) -> InputStatistics:
        """Of what comes to any of the experts; made when it is first asked for."""
        if self._shared is None:
            group = self._block.gathering.inputs(pooled_arrivals(self._linears, self._arrivals))
            if not group.count:
                raise CalibrationError(
                    f"no calibration token comes to any of the experts {self._linears.key}; give more samples, or "
                    f"leave them dense with modules_to_not_convert={[self._linears.key.partition('.*')[0]]!r}."
                )
            with part("statistics"):
                self._shared = self._of(next(iter(self._linears.names.values())), group, None)
        assert self._shared is not None
        return self._shared

    def _of(self, name: str, group: GroupInputs, owner: int | None) -> InputStatistics | None:
        weights = {each: self._block.linears[each].weight for each in self._linears.names.values()}
        settings = [self._block.settings[name]]
        return self._block.gathering.statistics(weights, group, settings, self._block.device, owner=owner)

    def _solve(self, waiting: Mapping[str, InputStatistics]) -> dict[str, Solved]:
        """Every rank solves those that wait there, those with the same settings together; all get all."""
        mine: dict[str, Solved] = {}
        device = self._block.device
        for settings in dict.fromkeys(self._block.settings[name] for name in waiting):
            names = [name for name in waiting if self._block.settings[name] == settings]
            weights = [self._block.linears[name].weight.to(device) for name in names]
            statistics = [waiting[name] for name in names]
            loops, room = column_loops(device), solving_room(device)
            with torch.autocast(device.type, enabled=False):  # the caller's must not reach the solver
                solutions = solve_many(weights, statistics, settings, names, loops, room)
            with part("packing"):
                for name, solution in zip(names, solutions, strict=True):
                    mine[name] = Solved(PackedWeight.pack(solution.planes, settings), solution.error)
        found: dict[str, Solved] = {}
        for rank in range(self._ranks.size):
            found.update(self._ranks.give(f"experts of rank {rank}", rank, lambda: mine))
        return found


def _bytes(statistics: InputStatistics) -> int:
    matrices = [statistics.hessian, statistics.drift, *statistics.by_modality.values()]
    if statistics.half is not None:
        matrices += [statistics.half.hessian, statistics.half.drift]
    return sum(each.numel() * each.element_size() for each in matrices if each is not None)
