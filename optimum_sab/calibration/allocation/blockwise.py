"""A backward pass of many samples at once, block after block: each block's weights are fetched twice in all.

The graph of every sample is cut at its blocks. On the way in, a block gives tensors that begin a graph of their own,
and only its arguments are kept. On the way back it computes again from these, with gradients: what comes to its outputs
goes through it to its arguments, and from there through the model's own way to the outputs of earlier blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.streams.arrival import DENSE, Worker
from optimum_sab.calibration.streams.caches import with_own_caches
from optimum_sab.calibration.streams.coroutines import Coroutines, Pause
from optimum_sab.calibration.streams.mapped import MappedActivations
from optimum_sab.calibration.streams.memory import give_back_freed
from optimum_sab.calibration.streams.patching import patched_forwards
from optimum_sab.calibration.streams.placement import block_at, change_tensors, first_device, map_tensors

_END = "end"


@dataclass
class _Call:
    """One sample's way through one block."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    outputs: list[Tensor]  # the leaves at which the rest of the forward begins


class BlockwiseBackward:
    """Runs a function of every sample that goes through the model and calls backward on what it finds.

    Args:
        blocks: decoder blocks whose weights are streamed.
        device: where they compute; None leaves them where they are.
        mapped: what bounds what is kept of samples, each block's input among it; None for no bound.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device | None = None,
        mapped: MappedActivations | None = None,
    ) -> None:
        self._blocks, self._device, self._mapped = blocks, device, mapped
        self._forwards: list[Callable[..., Any]] = []

    def run(self, forward: Callable[[int], None], count: int, on_step: Callable[[int, int], None]) -> None:
        """Take all samples forth and back.

        Args:
            forward: given a sample's index, runs the model with gradients and calls backward on a scalar.
            count: of samples.
            on_step: told after every block, on the way in and back, of as many samples as the share that is done.
        """
        self._forwards = [block.forward for block in self._blocks]
        wrapped = {block: self._wrap(index) for index, block in enumerate(self._blocks)}
        visits: list[tuple[int, list[_Call]]] = []
        blocks = 2 * len(self._blocks)

        def whole(sample: int) -> Pause:
            forward(sample)
            return Pause(_END, "")

        with patched_forwards(wrapped):
            self._coroutines = Coroutines([(index, DENSE) for index in range(count)], whole, self._mapped)
            try:
                waiting = self._coroutines.start()
                while here := _first(waiting):
                    index = int(waiting[here[0]].key)
                    visits.append((index, self._enter(index, here, waiting)))
                    give_back_freed()  # pieces of one size after another would take three times what is held
                    on_step(min(blocks, len(visits)) * count // blocks, count)
            finally:
                self._coroutines.close()
        done = len(visits)
        while visits:
            index, calls = visits.pop()
            with block_at(self._blocks[index], self._device), torch.enable_grad():
                while calls:
                    self._back(self._forwards[index], calls.pop(0))
            give_back_freed()
            on_step((2 * done - len(visits)) * count // (2 * done), count)

    def _enter(self, index: int, here: Sequence[Worker], waiting: dict[Worker, Pause]) -> list[_Call]:
        """Let these go through the block and on to the next one."""
        calls = []
        with block_at(self._blocks[index], self._device):
            ends = self._coroutines.resume(here)
        for worker in here:
            call = ends[worker].payload
            assert isinstance(call, _Call)
            calls.append(call)
        waiting.update(self._coroutines.resume(here))
        return calls

    def _wrap(self, index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._coroutines.pause(Pause("block", index))
            kept = with_own_caches((args, kwargs))
            with torch.no_grad():
                output = self._compute(self._forwards[index], (args, kwargs))
            outputs: list[Tensor] = []
            output = change_tensors(output, lambda tensor: _leaf(tensor, outputs))
            self._coroutines.pause(Pause("end of block", index, _Call(kept, outputs)))
            return output

        return forward

    def _compute(self, original: Callable[..., Any], call: Any) -> Any:
        """A block's output where its arguments are, computed where its weights are."""
        home = first_device(call)
        if self._device is None or home is None:
            args, kwargs = call
            return original(*args, **kwargs)
        args, kwargs = map_tensors(call, self._device)
        return map_tensors(original(*args, **kwargs), home)

    def _back(self, original: Callable[..., Any], call: _Call) -> None:
        """From the gradients of a block's outputs to those of its arguments, and on from there."""
        if all(leaf.grad is None for leaf in call.outputs):
            return
        given: list[Tensor] = []
        entries: list[Tensor] = []

        def entry(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            given.append(tensor)
            entries.append(tensor.detach().requires_grad_())
            return entries[-1]

        again: list[Tensor] = []
        output = self._compute(original, with_own_caches(change_tensors(call.arguments, entry)))
        change_tensors(output, lambda tensor: _listed(tensor, again))
        pairs = [(new, leaf.grad) for new, leaf in zip(again, call.outputs, strict=True) if leaf.grad is not None]
        reached = [(new, gradient) for new, gradient in pairs if new.requires_grad]
        torch.autograd.backward([new for new, _ in reached], [gradient for _, gradient in reached])
        on = [(tensor, each.grad) for tensor, each in zip(given, entries, strict=True) if each.grad is not None]
        if on:  # what the model computes for several blocks at once is gone through again for each
            ends, gradients = [tensor for tensor, _ in on], [gradient for _, gradient in on]
            torch.autograd.backward(ends, gradients, retain_graph=True)


def _first(waiting: Mapping[Worker, Pause]) -> list[Worker]:
    """Those that wait at the earliest block that anybody waits at."""
    at_block = {worker: int(pause.key) for worker, pause in waiting.items() if pause.kind == "block"}
    first = min(at_block.values(), default=-1)
    return [worker for worker, index in at_block.items() if index == first]


def _leaf(tensor: Tensor, leaves: list[Tensor]) -> Tensor:
    """A copy that begins a graph, since models write into what a block gives (features of pictures, say).

    The leaf, which gathers the gradient, has the tensor's shape and no values of its own.
    """
    if not tensor.is_floating_point():
        return tensor
    leaves.append(tensor.new_zeros(()).expand(tensor.shape).requires_grad_())
    copy: Tensor = _Beginning.apply(leaves[-1], tensor)
    return copy


class _Beginning(torch.autograd.Function):
    """Of a graph: values from one tensor, whose gradient another gets."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, values: Tensor) -> Tensor:
        return values.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _listed(tensor: Tensor, found: list[Tensor]) -> Tensor:
    if tensor.is_floating_point():
        found.append(tensor)
    return tensor
