"""What a linear's output is added to (the residual), found by watching a block run once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
Key = int | str  # place of an argument in a call: position or keyword


@dataclass(frozen=True)
class ResidualSource:
    """Where a residual can be read before the linear's output exists: as an argument of an earlier module.

    In a pre-norm block that is the norm: ``h + o_proj(attention(norm(h)))`` adds to what the norm was given.
    """

    module: nn.Module
    key: Key


class ResidualWatch:
    """Records a block's additions, the inputs of its modules and the outputs of its linears during one run.

    Tensors are kept until the watch is dropped, so that no address is used twice.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._inputs: list[tuple[ResidualSource, Tensor]] = []
        self._outputs: dict[str, Tensor] = {}
        self._sums: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what runs inside."""

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for key, value in _tensors(args, kwargs):
                self._inputs.append((ResidualSource(module, key), value))

        inner = [module for module in self._block.modules() if module is not self._block]
        handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in inner]
        try:
            with _AdditionMode(self._sums):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def output(self, name: str, value: Tensor) -> None:
        """Note the output of a linear."""
        self._outputs[name] = value

    def sources(self) -> dict[str, ResidualSource]:
        """The residual of every linear whose output is added, unchanged, to the input of an earlier module."""
        found: dict[str, ResidualSource] = {}
        for name, output in self._outputs.items():
            for left, right in self._sums:
                other = right if _same(left, output) else left if _same(right, output) else None
                if other is None:
                    continue
                source = next((source for source, value in self._inputs if _same(value, other)), None)
                if source is not None:
                    found[name] = source
                break
        return found


@contextmanager
def read_arguments(
    sources: Mapping[str, ResidualSource], keep: Callable[[ResidualSource, Tensor], None]
) -> Iterator[None]:
    """Hand every source's argument to ``keep`` whenever its module is called."""
    handles = []
    for source in dict.fromkeys(sources.values()):

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], source: ResidualSource = source
        ) -> None:
            value = dict(_tensors(args, kwargs)).get(source.key)
            if value is not None:
                keep(source, value)

        handles.append(source.module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _AdditionMode(TorchDispatchMode):
    """Notes the operands of every addition of two tensors of one shape."""

    def __init__(self, sums: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._noted = sums

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ADDITIONS and len(args) >= 2 and isinstance(args[1], Tensor) and args[0].shape == args[1].shape:
            self._noted.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Key, Tensor]]:
    pairs: list[tuple[Key, Any]] = [*enumerate(args), *kwargs.items()]
    return [(key, value) for key, value in pairs if isinstance(value, Tensor)]


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.numel() > 0 and a.data_ptr() == b.data_ptr() and a.shape == b.shape)
