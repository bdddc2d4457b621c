"""The experts' linears of one name are solved: each from the tokens it gets, few of them mixed with the others'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from optimum_sab.calibration.blocks.measured import ModalityRows
from optimum_sab.calibration.blocks.report import ExpertsReport
from optimum_sab.calibration.statistics.gathering import Gathering
from optimum_sab.calibration.statistics.pairing import PairedInputs
from optimum_sab.calibration.streams.experts import (
    ExpertLinears,
    RoutedArrival,
    arrivals_by_expert,
    pooled_arrivals,
)
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.many import solve_many
from optimum_sab.core.parts import part
from optimum_sab.core.planes import BinaryPlanes
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import CalibrationError
from optimum_sab.ops.columns import column_loops

ENOUGH = 2  # tokens for each column, from which on an expert's own are all that counts (core/mixture.py)
ROOM = 2**30  # bytes of statistics that wait to be solved together
Solved = tuple[BinaryPlanes, float, ModalityRows]


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
        solved: of each linear by dotted name: its planes, its relative output error, and some rows it was given.
        report: what came to the experts.
    """

    solved: dict[str, Solved]
    report: ExpertsReport


def solve_experts(linears: ExpertLinears, arrivals: Sequence[RoutedArrival], block: ExpertsToSolve) -> SolvedExperts:
    """Solve the linears of one name of all experts.

    Args:
        linears: which.
        arrivals: who waits there.
        block: what they are part of.

    Raises:
        CalibrationError: no token comes to any of them.
    """
    return _Experts(linears, arrivals, block).solved()


class _Experts:
    def __init__(self, linears: ExpertLinears, arrivals: Sequence[RoutedArrival], block: ExpertsToSolve) -> None:
        self._linears, self._arrivals, self._block = linears, arrivals, block
        self._shared: InputStatistics | None = None
        self._width = int(arrivals[0].given.inputs.shape[-1])
        self._mixed = 0

    def solved(self) -> SolvedExperts:
        tokens: list[Mapping[str, int]] = []
        found: dict[str, Solved] = {}
        waiting: dict[str, tuple[InputStatistics, ModalityRows]] = {}
        for name, own, statistics, rows in self._statistics():
            tokens.append(own)
            waiting[name] = statistics, rows
            if sum(_bytes(each) for each, _ in waiting.values()) > ROOM:
                found.update(self._solve(waiting))
                waiting = {}
        found.update(self._solve(waiting))
        return SolvedExperts(found, ExpertsReport(self._linears.key, tuple(tokens), self._mixed))

    def _statistics(self) -> Iterator[tuple[str, Mapping[str, int], InputStatistics, ModalityRows]]:
        device = self._block.device
        for name, here in arrivals_by_expert(self._linears, self._arrivals):
            pairs = self._block.gathering.pairs(here)
            if any(bool((pair.quantized != 0).any()) for pair in pairs):
                with part("statistics"):
                    own = self._of(name, pairs)
            else:
                own = InputStatistics.without_data(self._width, device)
            yield name, own.tokens, self._with_others(own), ModalityRows.of(pairs, device)

    def _with_others(self, own: InputStatistics) -> InputStatistics:
        """With what came to the others, where there is too little to tell all columns apart by."""
        used = self._block.gathering.collector.of_expert(own, self._of_all, ENOUGH * self._width)
        self._mixed += used is not own
        return used

    def _of_all(self) -> InputStatistics:
        """Of what comes to any of the experts; made when it is first asked for."""
        if self._shared is None:
            pairs = self._block.gathering.pairs(pooled_arrivals(self._linears, self._arrivals))
            if not any(pair.quantized.numel() for pair in pairs):
                raise CalibrationError(
                    f"no calibration token comes to any of the experts {self._linears.key}; give more samples, or "
                    f"leave them dense with modules_to_not_convert={[self._linears.key.partition('.*')[0]]!r}."
                )
            with part("statistics"):
                self._shared = self._of(next(iter(self._linears.names.values())), pairs)
        return self._shared

    def _of(self, name: str, pairs: Sequence[PairedInputs]) -> InputStatistics:
        weights = {each: self._block.linears[each].weight for each in self._linears.names.values()}
        settings = [self._block.settings[name]]
        return self._block.gathering.statistics(weights, pairs, settings, self._block.device)

    def _solve(self, waiting: Mapping[str, tuple[InputStatistics, ModalityRows]]) -> dict[str, Solved]:
        """Those with the same settings together."""
        found: dict[str, Solved] = {}
        device = self._block.device
        for settings in dict.fromkeys(self._block.settings[name] for name in waiting):
            names = [name for name in waiting if self._block.settings[name] == settings]
            weights = [self._block.linears[name].weight.to(device) for name in names]
            statistics = [waiting[name][0] for name in names]
            with torch.autocast(device.type, enabled=False):  # the caller's must not reach the solver
                solutions = solve_many(weights, statistics, settings, names, column_loops(device))
            for name, solution in zip(names, solutions, strict=True):
                found[name] = solution.planes, solution.error, waiting[name][1]
        return found


def _bytes(statistics: InputStatistics) -> int:
    matrices = [statistics.hessian, statistics.drift, *statistics.by_modality.values()]
    if statistics.half is not None:
        matrices += [statistics.half.hessian, statistics.half.drift]
    return sum(each.numel() * each.element_size() for each in matrices if each is not None)
