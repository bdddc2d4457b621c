"""One decoder block while all samples are in it: who waits at which linear, and what is done there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.ranks import Ranks
from optimum_sab.calibration.streams.arrival import DENSE, QUANTIZED, Arrival, Worker, rows_given
from optimum_sab.calibration.streams.caches import with_own_caches
from optimum_sab.calibration.streams.coroutines import Coroutines, Pause
from optimum_sab.calibration.streams.drift import drift
from optimum_sab.calibration.streams.expert_calls import ExpertCalls
from optimum_sab.calibration.streams.experts import ExpertLinears, RoutedArrival, RoutedInputs
from optimum_sab.calibration.streams.groups import Group, Groups, names_by_input
from optimum_sab.calibration.streams.lockstep_block import LockstepBlock
from optimum_sab.calibration.streams.passage import BlockPassage, Finisher, call_with, hidden_states
from optimum_sab.calibration.streams.residual import Key, ResidualSource, ResidualWatch, read_arguments
from optimum_sab.calibration.streams.visitor import Visitor

Waiting = dict[Worker, Pause]


class BlockVisit:
    """All samples' way through one block.

    Args:
        block: which.
        coroutines: all of this rank; some wait at the block's entry, and the way of others leads past it.
        two_streams: whether a dense stream runs beside the quantized one.
        every_token: experts are shown all tokens, whichever are routed to them.
        ranks: who has samples.
    """

    def __init__(
        self,
        block: LockstepBlock,
        coroutines: Coroutines,
        two_streams: bool,
        every_token: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self._block = block
        self._coroutines = coroutines
        self._two_streams = two_streams
        self._ranks = ranks or Ranks()
        self._weights: dict[str, Tensor] = {}
        self._experts = ExpertCalls(self._weights, every_token)
        self._groups: Groups | None = None
        self._calls: list[tuple[str, Tensor]] | None = None  # of one sample, while it shows who shares an input
        self._watch: ResidualWatch | None = None
        self._unstopped = False  # no one waits at linears
        self._residuals: dict[Worker, dict[ResidualSource, Tensor]] = {}

    def run(self, waiting: Waiting, visitor: Visitor, finisher: Finisher | None) -> Waiting:
        """From the block's entry to its end: every group is solved, and what is known already is taken over."""
        known = finisher is not None and finisher.known(self._block.index)
        entries = waiting if finisher is not None else {}
        if known:
            with self._nobody_waits():
                waiting = self._coroutines.resume(waiting)
        else:
            waiting = self._solve_groups(waiting, visitor)
        if finisher is not None:
            finisher.finish(self._block.index, self._passage(entries, waiting))
        visitor.leave(self._block.index, drift(self._ranks, self._block.index, waiting) if self._two_streams else None)
        return waiting

    # -- what the wrapped forwards call, inside a coroutine --------------------------------------------------------

    def call_block(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's output; none yet for the quantized stream of a block whose result is known."""
        worker = self._coroutines.current
        if self._unstopped and worker is not None and worker[1] == QUANTIZED:
            return None
        return self._block.forward(*args, **kwargs)

    def call_linear(self, name: str, linear: nn.Linear, original: Callable[..., Any], inputs: Tensor) -> Any:
        """A linear's output in the stream that calls it, after its weight was found."""
        if self._calls is not None:
            self._calls.append((name, inputs))
            output = original(inputs)
            if self._watch is not None:
                self._watch.output(name, output)
            return output
        if self._unstopped:
            return original(inputs)
        worker = self._coroutines.current
        assert worker is not None
        group = None if self._groups is None else self._groups.get(name)
        if group is None or worker not in group.seen:
            self._coroutines.pause(Pause("linear", name, inputs))
        if worker[1] == DENSE:
            return original(inputs)
        return nn.functional.linear(inputs, self._weights[name], linear.bias)

    def call_experts(self, linears: ExpertLinears, original: Callable[..., Tensor], given: RoutedInputs) -> Tensor:
        """`SABExperts.product` in the stream that calls it, after the weights were found."""
        worker = self._coroutines.current
        if self._calls is not None or self._unstopped or worker is None:
            return original(linears.name, given.inputs, given.routing)
        group = None if self._groups is None else self._groups.get(linears.key)
        if group is None or worker not in group.seen:
            self._coroutines.pause(Pause("linear", linears.key, self._experts.shown(linears, worker, given)))
        if worker[1] == DENSE:
            return original(linears.name, given.inputs, given.routing)
        return self._experts.output(linears, given)

    # -- groups ----------------------------------------------------------------------------------------------------

    def _solve_groups(self, waiting: Waiting, visitor: Visitor) -> Waiting:
        linears = self._block.linears
        there = self._ranks.exchange(f"block {self._block.index}", sorted({sample for sample, _ in waiting}))
        company = sum(map(len, there))
        sources = self._learn(there, next(iter(waiting.values()), None))
        assert self._groups is not None
        entered = {worker: rows_given(pause.payload) for worker, pause in waiting.items()}
        reached: set[str] = set()
        self._residuals = {worker: {} for worker in self._coroutines.workers}
        with read_arguments(sources, self._keep_residual):
            waiting = self._coroutines.resume(waiting)
            while True:
                at_linear = {w: p for w, p in waiting.items() if p.kind == "linear"}
                offered = self._ranks.exchange(f"linears of block {self._block.index}", self._groups.offers(at_linear))
                offers = [each for some in offered for each in some]
                if not offers:
                    break
                key = min(offers, key=lambda each: each.place).key
                group, here = self._groups.take(key, at_linear)
                if group.experts is not None:
                    routed = [RoutedArrival(*w, p.payload, entered[w], company) for w, p in here.items()]
                    self._weights.update(visitor.solve_experts(group.experts, routed))
                    reached.update(group.names)
                    del routed
                elif any(each.live for each in offers if each.key == key):
                    self._solve_group(group, here, sources, (entered, company), visitor)
                    reached.update(group.names)
                else:  # the dense stream's alone, or nothing: some models call experts that no token chose all the same
                    self._weights.update({name: linears[name].weight for name in group.names})
                group.solved = True
                group.seen.update(here)
                for pause in here.values():
                    pause.payload = None  # frees the inputs of this group
                waiting.update(self._coroutines.resume(here))
        self._residuals = {}
        missed = [name for name in linears if name not in reached]
        if missed:
            visitor.miss(missed)
        return waiting

    def _solve_group(
        self,
        group: Group,
        here: Waiting,
        sources: Mapping[str, ResidualSource],
        came: tuple[Mapping[Worker, int], int],
        visitor: Visitor,
    ) -> None:
        """Linears that share an input."""
        entered, company = came
        source = sources.get(group.names[0]) if len(group.names) == 1 else None
        arrivals = [Arrival(*w, p.payload, self._residual(w, source), entered[w], company) for w, p in here.items()]
        self._weights.update(visitor.solve(group.names, arrivals))

    def _learn(self, there: Sequence[Sequence[int]], pause: Pause | None) -> dict[str, ResidualSource]:
        """Who shares an input, by the first sample that comes here, if any; returns what outputs are added to.

        Args:
            there: samples that come here, by rank.
            pause: of the first of this rank.
        """
        together: list[tuple[str, ...]] = []
        sources: dict[str, ResidualSource] = {}
        if any(there):
            first = min((samples[0], rank) for rank, samples in enumerate(there) if samples)[1]
            names = {id(module): name for name, module in self._block.module.named_modules()}

            def probed() -> tuple[list[tuple[str, ...]], dict[str, tuple[str, Key]]]:
                assert pause is not None
                together, sources = self._probe(pause)
                return together, {name: (names[id(each.module)], each.key) for name, each in sources.items()}

            together, told = self._ranks.give(f"who shares an input in block {self._block.index}", first, probed)
            module = self._block.module
            sources = {name: ResidualSource(module.get_submodule(at), key) for name, (at, key) in told.items()}
        self._groups = Groups(self._block.index, list(self._block.linears), together, self._block.experts)
        return sources if self._two_streams else {}

    def _probe(self, pause: Pause) -> tuple[list[tuple[str, ...]], dict[str, ResidualSource]]:
        """Run the block once on one sample: which linears share an input, and what their outputs are added to."""
        self._calls, self._watch = [], ResidualWatch(self._block.module)
        args, kwargs = self._block.brought(with_own_caches(pause.payload))
        try:
            if pause.state is not None:
                pause.state.restore()
            with self._watch.watching():
                self._block.forward(*args, **kwargs)
            return names_by_input(self._calls), self._watch.sources()
        finally:
            self._calls = self._watch = None
            self._coroutines.restore()

    def _keep_residual(self, source: ResidualSource, value: Tensor) -> None:
        worker = self._coroutines.current
        if worker is not None:
            self._residuals[worker][source] = value

    def _residual(self, worker: Worker, source: ResidualSource | None) -> Tensor | None:
        return None if source is None else self._residuals[worker].get(source)

    # -- the block's end -------------------------------------------------------------------------------------------

    def _passage(self, entries: Waiting, ends: Waiting) -> BlockPassage:
        def run(sample: int, parameters: Mapping[str, Tensor]) -> Any:
            entry, grad = entries[sample, QUANTIZED], torch.is_grad_enabled()
            args, kwargs = self._block.brought(with_own_caches(entry.payload))
            if entry.state is not None:
                entry.state.restore()
            torch.set_grad_enabled(grad)
            try:
                with self._nobody_waits():
                    return call_with(self._block.module, self._block.forward, parameters, args, kwargs)
            finally:
                self._coroutines.restore()
                torch.set_grad_enabled(grad)

        def dense(sample: int) -> Tensor | None:
            return hidden_states(ends[sample, DENSE].payload) if self._two_streams else None

        def replace(sample: int, output: Any) -> None:
            ends[sample, QUANTIZED].payload = output

        samples = [sample for sample, stream in entries if stream == QUANTIZED]
        return BlockPassage(self._block.module, samples, run, dense, replace)

    @contextmanager
    def _nobody_waits(self) -> Iterator[None]:
        self._unstopped = True
        try:
            yield
        finally:
            self._unstopped = False
