"""Which decoder blocks are run again on the way back through the model, and which remember their way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from optimum_sab.calibration.streams.mapped import MappedActivations
from optimum_sab.calibration.streams.passage import call_with, recomputed
from optimum_sab.calibration.streams.placement import brought


@dataclass(frozen=True)
class Recomputation:
    """Decoder blocks that keep their inputs only and run again for their gradients.

    Args:
        blocks: which, in the order in which they are called.
        device: where they compute, their weights brought there for as long; None leaves them where they are.
        room: bytes that may be remembered of a sample; as many blocks as find room there do not run again. None does
            with a device, whose memory this is not about.
        mapped: what bounds what is kept of samples that go through streamed blocks together; None for no bound.
    """

    blocks: Sequence[nn.Module]
    device: torch.device | None = None
    room: int = 0
    mapped: MappedActivations | None = None

    def forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        """What stands in for the blocks' forwards."""
        memory = _Memory(self.room if self.device is None else 0)
        return {block: self._again(block, index, memory) for index, block in enumerate(self.blocks)}

    def _again(self, block: nn.Module, index: int, memory: _Memory) -> Callable[..., Any]:
        original = block.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            return call_with(block, original, brought(block, self.device), args, kwargs)

        again = recomputed(call, self.device)

        def forward(*args: Any, **kwargs: Any) -> Any:
            size = _numbers_given(args, kwargs)
            if memory.measured is None and memory.room:
                return memory.measure(block, size, lambda: original(*args, **kwargs))
            return original(*args, **kwargs) if memory.holds(index, size) else again(*args, **kwargs)

        return forward


class _Memory:
    """What blocks remember for their gradients, after the first of them.

    Args:
        room: bytes for one sample.

    Attributes:
        measured: bytes per number in a block's input; None so far.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.measured: float | None = None

    def holds(self, index: int, size: int) -> bool:
        """Whether this block and those before it, with an input of so many numbers, find room."""
        return self.measured is not None and (index + 1) * size * self.measured <= self.room

    def measure(self, block: nn.Module, size: int, run: Callable[[], Any]) -> Any:
        """Run the block and count what autograd keeps, weights aside."""
        weights = {each.untyped_storage().data_ptr() for each in block.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            output = run()
        self.measured = sum(kept.values()) / max(1, size)
        return output


def _numbers_given(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Of the first floating-point argument, the hidden states."""
    given = (each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.is_floating_point())
    return next((each.numel() for each in given), 0)
