"""Decoder blocks whose dense weights are in files: they come while a block is worked on, and go again.

Whatever runs a model's forward needs to know nothing of it: a streamed block fetches its weights when it is called. Who
has several samples to bring through a block opens `weights_here` around them, and the block is read once for all. What
has come to stay lies in scratch files, whose pages are given back whenever a block has been used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from optimum_sab.nn.experts import SABExperts
from optimum_sab.nn.scratch import Scratch, give_back, make_private

_MARK = "_streamed_weights"


@dataclass(frozen=True)
class StreamedBlock:
    """Where a block's weights are.

    Attributes:
        name: of the block, dotted.
        read: gives them by their names inside of the block, as the model was built (experts fused): tensors in memory
            of their own, on the device and in the dtype that they are to have.
    """

    name: str
    read: Callable[[], Mapping[str, Tensor]]


class _Stream:
    """What a streamed block bears while its model is worked on."""

    def __init__(self, block: nn.Module, source: StreamedBlock, scratch: Scratch | None) -> None:
        self._block, self.source, self._scratch = block, source, scratch
        self._users = 0
        self._placed: list[tuple[dict[str, Any], str, Any]] = []
        self.stays = False

    @contextmanager
    def here(self) -> Iterator[None]:
        if not self._users:
            self._give_back()  # of what came before the block
            if not self.stays:
                self._bring()
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._leave()

    def keep(self) -> None:
        if not self._users and not self.stays:
            self._bring()
        self.stays, self._placed = True, []
        if not self._users:
            self._leave()

    def _leave(self) -> None:
        """Nobody needs the block in memory."""
        if not self.stays:
            self._drop()
        elif self._scratch is not None:
            self._scratch.put(_tensors(self._block))
        self._give_back()

    def _give_back(self) -> None:
        if self._scratch is not None:
            self._scratch.give_back()

    def _bring(self) -> None:
        for path, tensor in self.source.read().items():
            for owner, key, value in _places(self._block, path, tensor):
                held: dict[str, Any] = owner._parameters if key in owner._parameters else owner._buffers
                before = held[key]
                self._placed.append((held, key, before))
                parameter = isinstance(before, nn.Parameter)
                held[key] = nn.Parameter(value, requires_grad=before.requires_grad) if parameter else value

    def _drop(self) -> None:
        for held, key, before in self._placed:
            held[key] = before
        self._placed = []


def _places(block: nn.Module, path: str, tensor: Tensor) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The modules that a tensor of the model, as it was built, is for, with the name and the value there."""
    stem, _, key = path.rpartition(".")
    owner = block.get_submodule(stem)
    if isinstance(owner, SABExperts) and key in owner.layout.parameters:
        yield from owner.parts(key, tensor)
    else:
        yield owner, key, tensor


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
    for each in module.modules():
        if isinstance(each, SABExperts):
            yield from each.stacked_tensors()


@contextmanager
def streamed(model: nn.Module, blocks: Sequence[StreamedBlock], scratch: Scratch | None = None) -> Iterator[None]:
    """Inside, these blocks fetch their weights when they are called; at the end, dense ones have come to stay.

    After an error they are left on meta.

    Args:
        model: the parameters and persistent buffers that the blocks' sources give are on meta.
        blocks: which.
        scratch: where blocks lie that have come to stay, packed ones too; None for memory. At the end they are mapped
            as a checkpoint would be (`make_private`).
    """
    modules = {source.name: model.get_submodule(source.name) for source in blocks}
    streams = {name: _Stream(modules[name], source, scratch) for name, source in zip(modules, blocks, strict=True)}
    for name, block in modules.items():
        vars(block)[_MARK] = streams[name]
        vars(block)["forward"] = _fetching(streams[name], block.forward)
    try:
        yield
        for each in streams.values():
            each.keep()
        make_private(_tensors(model))
    finally:
        for block in modules.values():
            for attribute in (_MARK, "forward"):
                vars(block).pop(attribute, None)


def _fetching(stream: _Stream, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with stream.here():
            return original(*args, **kwargs)

    return forward


def is_streamed(block: nn.Module) -> bool:
    """Whether a block's weights come and go; no longer, when it has been kept."""
    stream = vars(block).get(_MARK)
    return stream is not None and not stream.stays


def weights_here(block: nn.Module) -> AbstractContextManager[None]:
    """Inside, the block's weights are there, read once; for a block that is not streamed nothing is done."""
    stream = vars(block).get(_MARK)
    found: AbstractContextManager[None] = nullcontext() if stream is None else stream.here()
    return found


def keep_weights(block: nn.Module) -> None:
    """What the block holds stays from now on (fetched, if it is not there); nothing is read for it again."""
    stream = vars(block).get(_MARK)
    if stream is not None:
        stream.keep()


def streamed_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks by dotted name whose weights come and go."""
    return {name: module for name, module in model.named_modules() if is_streamed(module)}


def weights_around(model: nn.Module, name: str) -> AbstractContextManager[None]:
    """Inside, the weights of the block that a dotted name lies in are there; what stays lies in files afterwards."""
    parts = name.split(".")
    module = model
    for part in parts:
        if _MARK in vars(module):
            break
        module = module.get_submodule(part)
    return weights_here(module)


def parameters_in_turn(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """As `nn.Module.named_parameters`, streamed blocks' weights there while theirs are given, one block at a time.

    Of those outside of the blocks that lie in files, pages are given back as soon as the next one is asked for.
    """
    blocks = streamed_blocks(model)
    names = [name for name, _ in model.named_parameters()]

    def block_of(name: str) -> str:
        return next((block for block in blocks if name.startswith(f"{block}.")), "")

    for block, group in groupby(names, key=block_of):
        with weights_here(blocks[block]) if block else nullcontext():
            for name in group:
                parameter = model.get_parameter(name)
                yield name, parameter
                give_back(parameter)
