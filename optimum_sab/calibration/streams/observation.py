"""What a dense model does with its decoder blocks and linears, seen while it reads a sample.

A packed layer can be called and nothing else: its weight is no matrix. And the lockstep takes every block and linear
once a forward. Which linears do not go with that is seen here, in all blocks at once and before the work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from optimum_sab.calibration.streams.patching import patched_forwards
from optimum_sab.nn.decoder import behind_number
from optimum_sab.nn.streamed import weights_here

T = TypeVar("T")
# what may be asked of a weight because a packed layer's answers the same
_HARMLESS = ("device", "is_meta", "is_cuda", "requires_grad", "grad", "is_leaf", "layout", "is_sparse", "is_quantized")
_GETTER = re.compile(r"__get__|__set__")
_READ = "the model reads their weight (its dtype, say) instead of only calling them"
_TWICE = "the model calls them more than once in one forward"


@dataclass
class Observation:
    """What was seen so far.

    Attributes:
        entered: decoder blocks by dotted name, in the order of their first call: how often at most in one forward.
        called: the same of linears.
        read: linears whose weight the model reads outside of their own forward, and what it asks of it.
        coming: streamed blocks by dotted name, whose weights come when they are called.
    """

    entered: dict[str, int] = field(default_factory=dict)
    called: dict[str, int] = field(default_factory=dict)
    read: dict[str, str] = field(default_factory=dict)
    coming: Mapping[str, nn.Module] = field(default_factory=dict)

    def forward(self, run: Callable[[], T], blocks: Mapping[str, nn.Module], linears: Mapping[str, nn.Linear]) -> T:
        """See one forward, and give what it gives.

        Args:
            run: does it.
            blocks: by dotted name.
            linears: by dotted name; their weights are there and not shared.
        """
        entered: dict[str, int] = {}
        called: dict[str, int] = {}
        inside: set[str] = set()
        forwards = {block: _counting(block.forward, entered, name) for name, block in blocks.items()}
        forwards |= {each: self._inside(each.forward, called, name, inside) for name, each in linears.items()}
        for name, block in self.coming.items():
            own = {of: each for of, each in linears.items() if of.startswith(f"{name}.")}
            forwards[block] = self._arriving(forwards.get(block, block.forward), block, own, inside)
        with patched_forwards(forwards), self._watched(linears, inside):
            result = run()
        for seen, now in ((self.entered, entered), (self.called, called)):
            for name, count in now.items():
                seen[name] = max(count, seen.get(name, 0))
        return result

    def unfit(self, names: Sequence[str], blocks: Sequence[str]) -> dict[str, list[str]]:
        """Linears that no packed layer can stand for, by the reason: those that were seen so, in all blocks.

        Args:
            names: of linears.
            blocks: of the decoder blocks.
        """
        read = {behind_number(name, blocks) for name in self.read}
        twice = {behind_number(name, blocks) for name, count in self.called.items() if count > 1} - read
        return {
            reason: [name for name in names if behind_number(name, blocks) in found]
            for reason, found in ((_READ, read), (_TWICE, twice))
        }

    def _inside(
        self, original: Callable[..., Any], called: dict[str, int], name: str, inside: set[str]
    ) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            called[name] = called.get(name, 0) + 1
            inside.add(name)
            try:
                return original(*args, **kwargs)
            finally:
                inside.discard(name)

        return forward

    def _arriving(
        self, original: Callable[..., Any], block: nn.Module, linears: Mapping[str, nn.Linear], inside: set[str]
    ) -> Callable[..., Any]:
        """What is watched are the weights that have come, and not what stood in their place."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            with weights_here(block), self._watched(linears, inside):
                return original(*args, **kwargs)

        return forward

    @contextmanager
    def _watched(self, linears: Mapping[str, nn.Linear], inside: set[str]) -> Iterator[None]:
        before = {name: linear._parameters["weight"] for name, linear in linears.items()}
        try:
            for name, linear in linears.items():
                linear._parameters["weight"] = _WatchedWeight.of(linear.weight, partial(self._note, name, inside))
            yield
        finally:
            for name, linear in linears.items():
                linear._parameters["weight"] = before[name]

    def _note(self, name: str, inside: set[str], asked: str) -> bool:
        """Whether this is outside of the linear's own forward."""
        if name in inside:
            return False
        if asked not in _HARMLESS:
            self.read.setdefault(name, asked)
        return True


def told(left: Mapping[str, Sequence[str]]) -> str:
    """Linears that stay dense by the reason, in words."""
    return " ".join(f"{len(names)} linears, such as {names[0]}: {reason}." for reason, names in left.items() if names)


class _WatchedWeight(nn.Parameter):
    """A weight that tells when something is asked of it. What the model itself does to it, it does to a copy."""

    _note: Callable[[str], bool]

    @classmethod
    def of(cls, weight: Tensor, note: Callable[[str], bool]) -> _WatchedWeight:
        """A weight with the same content, which tells ``note`` of what is asked; that answers if it was the model."""
        watched: _WatchedWeight = torch.Tensor._make_subclass(cls, weight.detach(), False)
        watched._note = note
        return watched

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            owner = getattr(func, "__self__", None)
            asked = getattr(owner if _GETTER.fullmatch(getattr(func, "__name__", "")) else func, "__name__", str(func))

            def plain(value: Any) -> Any:
                if isinstance(value, _WatchedWeight):
                    tensor = value.as_subclass(Tensor)
                    return tensor.clone() if value._note(asked) and asked not in _HARMLESS else tensor
                if isinstance(value, (list, tuple)):
                    return type(value)(plain(each) for each in value)
                return value

            return func(*plain(args), **{key: plain(value) for key, value in (kwargs or {}).items()})


def _counting(original: Callable[..., Any], counts: dict[str, int], name: str) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        counts[name] = counts.get(name, 0) + 1
        return original(*args, **kwargs)

    return forward
