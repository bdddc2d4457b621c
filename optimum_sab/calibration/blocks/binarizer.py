"""The lockstep's visitor that binarizes: each group is solved as it comes up, and a block's linears are swapped."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from optimum_sab.calibration.blocks.experts import ExpertsToSolve, solve_experts
from optimum_sab.calibration.blocks.finished import FinishedBlock, is_finished
from optimum_sab.calibration.blocks.idle_experts import allow_idle_experts
from optimum_sab.calibration.blocks.measured import (
    BlockSignificance,
    ModalityRows,
    block_significance,
    errors_of,
)
from optimum_sab.calibration.blocks.report import BlockReport, LayerReport
from optimum_sab.calibration.blocks.solved import Solved
from optimum_sab.calibration.ranks import solving_cost
from optimum_sab.calibration.refine.parameters import ModuleParameters, vectors_of, write_vectors
from optimum_sab.calibration.refine.reconstruction import reconstruct
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.statistics.gathering import Gathering
from optimum_sab.calibration.statistics.passes import calibration_pass
from optimum_sab.calibration.streams.arrival import Arrival
from optimum_sab.calibration.streams.experts import ExpertLinears, RoutedArrival
from optimum_sab.calibration.streams.memory import give_back_heap
from optimum_sab.calibration.streams.passage import BlockPassage
from optimum_sab.calibration.streams.targets import DecoderTargets
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.parts import part
from optimum_sab.core.solver import solve
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.modules import set_module
from optimum_sab.nn.streamed import keep_weights
from optimum_sab.ops.columns import column_loops


class BlockBinarizer:
    """Visits the blocks of a run, and finishes them: refined, or taken over from an interrupted run.

    Args:
        run: with its samples.
        targets: the blocks.

    Attributes:
        reports: of the blocks that are done.
    """

    def __init__(self, run: Run, targets: DecoderTargets) -> None:
        self.reports: list[BlockReport] = []
        self._run = run
        self._targets = targets
        self._settings = run.selection.settings
        self._device = run.options.device
        self._ranks = run.ranks
        collector = calibration_pass(run.options.calibration_pass)()
        self._gathering = Gathering(collector, run.samples.modalities, run.ranks)

    def enter(self, index: int) -> None:
        self._started = time.perf_counter()
        self._sent = self._ranks.wire_bytes
        self._index = index
        self._linears = self._targets.linears[index]
        self._block = FinishedBlock({}, {}, {}, None, {}, None)

    # -- groups ----------------------------------------------------------------------------------------------------

    def solve(self, names: tuple[str, ...], arrivals: Sequence[Arrival]) -> Mapping[str, Tensor]:
        device = self._device or self._linears[names[0]].weight.device
        give_back_heap(self._linears[names[0]].in_features, device)
        settings = [self._settings[name] for name in names]
        group = self._gathering.inputs(arrivals)
        first, owner = not self._block.packed, self._owner(names)
        with part("statistics"):
            weights = {name: self._linears[name].weight for name in names}
            statistics = self._gathering.statistics(weights, group, settings, device, first, owner)

        def solved() -> tuple[BlockSignificance | None, dict[str, Solved]]:
            assert statistics is not None
            with part("significance"):
                shown = self._significance(names, statistics) if first else None
            return shown, self._solve(names, statistics)

        shown, found = self._ranks.give(f"the solution of {names[0]}", owner, solved)
        if first:
            self._block = replace(self._block, significance=shown)
        return self._keep(found, dict.fromkeys(names, ModalityRows.of(group, device)))

    def solve_experts(self, linears: ExpertLinears, arrivals: Sequence[RoutedArrival]) -> Mapping[str, Tensor]:
        device = self._device or self._linears[next(iter(linears.names.values()))].weight.device
        found = solve_experts(linears, arrivals, ExpertsToSolve(self._linears, self._settings, self._gathering, device))
        weights = self._keep(found.solved, found.rows)
        self._block = replace(self._block, experts=(*self._block.experts, found.report))
        return weights

    def miss(self, names: Sequence[str]) -> None:
        allow_idle_experts(names, self._linears, self._block.packed)
        for name in names:
            linear = self._linears[name]
            device = self._device or linear.weight.device
            nothing = InputStatistics.without_data(linear.in_features, device)
            solved = partial(self._solve, (name,), nothing)
            self._keep(self._ranks.give(f"the solution of {name}", self._owner((name,)), solved), {})

    def _owner(self, names: Sequence[str]) -> int:
        """The rank that solves linears that share an input."""
        linears = [self._linears[name] for name in names]
        return self._ranks.owner_of(solving_cost(sum(m.out_features for m in linears), linears[0].in_features))

    def _significance(self, names: Sequence[str], statistics: InputStatistics) -> BlockSignificance | None:
        """Of a block's first linears only: their input is narrow, so Hessians of each modality cost little there."""
        weights = [self._linears[name].weight.to(statistics.hessian.device, torch.float32) for name in names]
        damping = self._settings[names[0]].damping
        return block_significance(torch.cat(weights), statistics, damping, names[0])

    def _solve(self, names: Sequence[str], statistics: InputStatistics) -> dict[str, Solved]:
        """Solve linears that share an input, those with the same settings as one stack."""
        device = statistics.hessian.device
        found: dict[str, Solved] = {}
        for settings in dict.fromkeys(self._settings[name] for name in names):
            stack = {name: self._linears[name] for name in names if self._settings[name] == settings}
            weight = torch.cat([m.weight.to(device, torch.float32) for m in stack.values()])
            with torch.autocast(device.type, enabled=False):  # the caller's must not reach the solver
                solution = solve(weight, statistics, settings, next(iter(stack)), column_loops(device))
            parts = solution.planes.split([m.out_features for m in stack.values()])
            with part("packing"):
                for name, planes in zip(stack, parts, strict=True):
                    found[name] = Solved(PackedWeight.pack(planes, settings), solution.error)
        return found

    def _keep(self, solved: Mapping[str, Solved], rows: Mapping[str, ModalityRows]) -> dict[str, Tensor]:
        """Linears are solved; returns their weights.

        Args:
            solved: by dotted name.
            rows: that this rank's samples gave them; none of those that nothing came to.
        """
        weights: dict[str, Tensor] = {}
        sums = {}
        for name, each in solved.items():
            dense = self._linears[name].weight
            device = self._device or dense.device
            packed = each.packed.to(device)
            with part("packing"):
                found = packed.dequantize()
            self._block.packed[name], self._block.errors[name] = packed, each.error
            if name in rows:
                with torch.autocast(device.type, enabled=False), part("errors"):
                    sums[name] = rows[name].sums(dense.to(device, torch.float32), found.float())
            weights[name] = found.to(dense.device, dense.dtype)
        told = self._ranks.exchange(f"errors in block {self._index}", sums)
        self._block.by_modality.update({name: errors_of([each.get(name, {}) for each in told]) for name in solved})
        return weights

    # -- ends of blocks --------------------------------------------------------------------------------------------

    def known(self, index: int) -> bool:
        return is_finished(self._run.resume, index)

    def finish(self, index: int, passage: BlockPassage) -> None:
        if self.known(index):
            self._block = self._read()
        elif not self._refine(passage):
            return
        # from here on the outputs come from the stored values, the same in a run that is resumed and one that is not
        write_vectors(passage.block, self._block.vectors)
        weights = {
            f"{name.removeprefix(self._start)}.weight": self._block.packed[name]
            .dequantize()
            .to(linear.weight.device, linear.weight.dtype)
            for name, linear in self._linears.items()
        }
        for sample in passage.samples:
            passage.replace(sample, passage.run(sample, weights))

    def _refine(self, passage: BlockPassage) -> bool:
        """Reconstruct the block's output; whether that improved it."""
        refine = self._run.options.refine
        if refine is None or not refine.epochs:
            return False
        packed = {name.removeprefix(self._start): weight for name, weight in self._block.packed.items()}
        dense = next(iter(self._linears.values())).weight
        parameters = ModuleParameters(packed, dense.dtype, vectors_of(passage.block), dense.device)
        found = reconstruct(passage, parameters, refine.epochs, self._index, self._ranks)
        self._block = replace(self._block, reconstruction=found)
        if found is None or not found.improved:
            return False
        weights, vectors = self._ranks.give(f"refined block {self._index}", 0, parameters.stored)
        for name, weight in weights.items():
            self._block.packed[self._start + name] = weight.to(packed[name].tensors["weight"].device)
        self._block = replace(self._block, vectors=vectors)
        return True

    def _read(self) -> FinishedBlock:
        """What an interrupted run had finished."""
        assert self._run.resume is not None
        shapes = {n: (m.out_features, m.in_features, self._settings[n]) for n, m in self._linears.items()}
        return FinishedBlock.read(self._run.resume, self._index, shapes)

    @property
    def _start(self) -> str:
        """What the names of the block's modules begin with."""
        return f"{self._targets.names[self._index]}."

    def leave(self, index: int, drift: float | None) -> None:
        if self._run.resume is not None and not self.known(index):
            self._block.write(self._run.resume, index)
        layers = tuple(self._swap(name, dense) for name, dense in self._linears.items())
        keep_weights(self._targets.blocks[index])
        seconds = time.perf_counter() - self._started
        position = self._run.selection.blocks.index(self._targets.names[index])
        found = self._block
        sent = self._ranks.wire_bytes - self._sent
        more = (found.reconstruction, found.significance, found.experts)
        report = BlockReport(position, layers, drift, seconds, *more, sent)
        self.reports.append(report)
        self._run.progress.on_block(report, len(self._targets.linears))

    def _swap(self, name: str, dense: nn.Linear) -> LayerReport:
        """Put the packed layer in the dense one's place."""
        layer = SABLinear.from_packed(self._block.packed[name], dense.bias).to(dense.weight.device)
        set_module(self._run.model, name, layer.train(dense.training))
        dense._parameters["weight"] = None  # the lockstep still refers to the module; its weight can go
        weights = layer.in_features * layer.out_features
        return LayerReport(
            name, self._block.errors[name], layer.bits_per_weight, weights, self._block.by_modality[name]
        )
