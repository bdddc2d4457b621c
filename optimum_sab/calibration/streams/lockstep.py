"""Every sample runs the model's own forward once; all wait for each other at every linear that is binarized.

A sample is a coroutine (greenlet) per stream. Target linears and decoder blocks have their ``forward`` wrapped: the
coroutine pauses there and hands its input to the scheduler. When all that will ever come have come, the visitor
binarizes the linears that share this input, and the coroutines go on, the quantized stream through the new weight.
So no code here knows an architecture, each stream is one forward in all, and each linear's calibration input already
carries the error of every linear before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.ranks import Ranks
from optimum_sab.calibration.streams.arrival import DENSE, QUANTIZED, Worker
from optimum_sab.calibration.streams.block_visit import BlockVisit, Waiting
from optimum_sab.calibration.streams.caches import with_own_caches
from optimum_sab.calibration.streams.coroutines import Coroutines, Pause
from optimum_sab.calibration.streams.experts import ExpertLinears, RoutedInputs, expert_linears
from optimum_sab.calibration.streams.lockstep_block import LockstepBlock
from optimum_sab.calibration.streams.mapped import MappedActivations
from optimum_sab.calibration.streams.modes import without_cache
from optimum_sab.calibration.streams.passage import Finisher
from optimum_sab.calibration.streams.patching import patched_forwards
from optimum_sab.calibration.streams.placement import block_at, first_device, map_tensors
from optimum_sab.calibration.streams.visitor import Visitor
from optimum_sab.errors import LockstepError
from optimum_sab.nn.experts import SABExperts
from optimum_sab.nn.routing import Routing

_END = "end of the forward"


@dataclass
class Lockstep:
    """The scheduler.

    Args:
        model: in eval mode, weights on real devices.
        blocks: the decoder blocks, in the order the model calls them.
        linears: target linears by dotted name, per block.
        samples: keyword arguments of the model's forward, one dict per sample.
        two_streams: run a dense stream beside the quantized one.
        device: where each block is moved while its samples run; None leaves everything where it is.
        every_token: experts are shown all tokens; what the model computes stays routed.
        mapped: what bounds the memory of samples that wait; None for no bound.
        ranks: who has the samples; all go through the blocks and groups of linears in the same order.
        own: which samples are this rank's; None for all.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    linears: Sequence[Mapping[str, nn.Linear]]
    samples: Sequence[Mapping[str, Any]]
    two_streams: bool
    device: torch.device | None = None
    every_token: bool = False
    mapped: MappedActivations | None = None
    ranks: Ranks = field(default_factory=Ranks)
    own: Sequence[int] | None = None
    _visit: BlockVisit | None = field(default=None, init=False)

    def run(
        self,
        visitor: Visitor,
        finisher: Finisher | None = None,
        head: nn.Module | None = None,
        to_head: Collection[Worker] = (),
    ) -> dict[Worker, Tensor]:
        """Drive all samples through all blocks.

        Args:
            visitor: what binarizes.
            finisher: what may change a block once it is binarized, or knows it from before.
            head: the output embedding.
            to_head: the streams, as (sample, stream), that go on until it is called.

        Returns:
            What each of ``to_head`` gave to ``head``, of this rank's samples; those that end without calling it are
            missing.

        Raises:
            LockstepError: a sample comes to a block again, or reaches a linear that is already binarized.
            MissingDependencyError: see `import_greenlet`.
        """
        streams = (DENSE, QUANTIZED) if self.two_streams else (QUANTIZED,)
        own = range(len(self.samples)) if self.own is None else self.own
        workers = [(i, stream) for i in own for stream in streams]
        with torch.no_grad(), self._patched(head):
            self._coroutines = Coroutines(workers, self._forward, self.mapped)
            try:
                waiting = self._coroutines.start()
                for index in range(len(self.blocks)):
                    waiting = self._visit_block(index, waiting, visitor, finisher)
                return self._finish(waiting, to_head if head is not None else ())
            finally:
                self._coroutines.close()

    def _visit_block(self, index: int, waiting: Waiting, visitor: Visitor, finisher: Finisher | None) -> Waiting:
        """Let those that come to the block go through it; those whose way leads past it wait behind it."""
        for worker, pause in waiting.items():
            if pause.kind == "linear" or (pause.kind == "block" and int(pause.key) < index):
                raise LockstepError(
                    f"sample {worker[0]} is at {pause} while the others enter decoder block {index}: no sample may go "
                    "through a block twice, or through blocks in another order. Remove the sample, or report the model."
                )
        here = {worker: pause for worker, pause in waiting.items() if pause.kind == "block" and pause.key == index}
        past = {worker: pause for worker, pause in waiting.items() if worker not in here}
        visitor.enter(index)
        block = self._lockstep_blocks[index]
        self._visit = BlockVisit(block, self._coroutines, self.two_streams, self.every_token, self.ranks)
        with block_at(self.blocks[index], self.device):
            here = self._visit.run(here, visitor, finisher)
        if index + 1 < len(self.blocks):
            here = self._coroutines.resume(here)
        return {worker: here[worker] if worker in here else past[worker] for worker in waiting}

    def _finish(self, waiting: Waiting, to_head: Collection[Worker]) -> dict[Worker, Tensor]:
        """Let one sample run to its end: what comes back to a block was calibrated on half of its way."""
        at_head: dict[Worker, Tensor] = {}
        for worker in (each for each in to_head if each in waiting):
            pause = waiting[worker] = self._behind_blocks(worker, waiting[worker])
            if pause.kind == "head":
                at_head[worker] = pause.payload
            else:
                _check_end(pause)
        for first in self._coroutines.workers[:1]:
            pause = self._behind_blocks(first, waiting[first])
            _check_end(self._coroutines.go_on(first) if pause.kind == "head" else pause)
        return at_head

    def _behind_blocks(self, worker: Worker, pause: Pause) -> Pause:
        return self._coroutines.go_on(worker) if pause.kind == "end of block" else pause

    # -- inside the coroutines ---------------------------------------------------------------------------------------

    def _forward(self, sample: int) -> Pause:
        self.model(**self.samples[sample], **without_cache(self.model))
        return Pause(_END, "")

    @contextmanager
    def _patched(self, head: nn.Module | None) -> Iterator[None]:
        names = {id(module): name for name, module in self.model.named_modules()}
        self._lockstep_blocks = [
            LockstepBlock(
                i, block, block.forward, linears, expert_linears(block, names[id(block)], linears), self.device
            )
            for i, (block, linears) in enumerate(zip(self.blocks, self.linears, strict=True))
        ]
        forwards: dict[nn.Module, Callable[..., Any]] = {b.module: self._wrap_block(b) for b in self._lockstep_blocks}
        products: dict[nn.Module, Callable[..., Any]] = {}
        for block in self._lockstep_blocks:
            waiting = {name for each in block.experts for name in each.names.values()}
            own = {name: linear for name, linear in block.linears.items() if name not in waiting}
            forwards |= {linear: self._wrap_linear(name, linear, linear.forward) for name, linear in own.items()}
            products |= {each.module: self._wrap_experts(each.module, block.experts) for each in block.experts}
        if head is not None:
            forwards[head] = self._wrap_head(head.forward)
        with patched_forwards(forwards), patched_forwards(products, "product"):
            yield

    def _wrap_block(self, block: LockstepBlock) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._coroutines.pause(Pause("block", block.index, with_own_caches((args, kwargs))))
            home = first_device((args, kwargs))
            args, kwargs = block.brought((args, kwargs))
            assert self._visit is not None
            end = Pause("end of block", block.index, self._visit.call_block(args, kwargs))
            self._coroutines.pause(end)
            output = end.payload
            return output if self.device is None or home is None else map_tensors(output, home)

        return forward

    def _wrap_linear(self, name: str, linear: nn.Linear, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(input: Tensor) -> Any:  # the name it has in nn.Linear, for models that pass it by keyword
            if self._visit is None:  # before the first block
                self._coroutines.pause(Pause("linear", name, input))
            assert self._visit is not None
            return self._visit.call_linear(name, linear, original, input)

        return forward

    def _wrap_experts(self, module: SABExperts, experts: Sequence[ExpertLinears]) -> Callable[..., Any]:
        original = module.product
        of = {each.name: each for each in experts if each.module is module}

        def product(name: str, inputs: Tensor, routing: Routing) -> Tensor:
            if name not in of:
                return original(name, inputs, routing)
            if self._visit is None:  # before the first block
                self._coroutines.pause(Pause("linear", of[name].key, inputs))
            assert self._visit is not None
            return self._visit.call_experts(of[name], original, RoutedInputs(inputs, routing))

        return product

    def _wrap_head(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(input: Tensor) -> Any:
            self._coroutines.pause(Pause("head", "", input))
            return original(input)

        return forward


def _check_end(pause: Pause) -> None:
    if pause.kind != _END:
        raise LockstepError(
            f"a sample comes to {pause} again after the last decoder block; models that use a block twice in one "
            "forward cannot be binarized."
        )
