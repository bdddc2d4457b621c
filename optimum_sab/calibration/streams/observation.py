"""What a dense model does with its decoder blocks and linears, seen while it reads a sample.

A packed layer can be called and nothing else: its weight is no matrix. And the lockstep takes every block and linear
once a forward. Which linears do not go with that is seen here, in all blocks at once and before the work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from optimum_sab.calibration.streams.arrival import DENSE, Worker
from optimum_sab.calibration.streams.coroutines import Coroutines, Pause
from optimum_sab.calibration.streams.patching import patched_forwards
from optimum_sab.nn.decoder import behind_number
from optimum_sab.nn.streamed import weights_here
from optimum_sab.wording import counted

T = TypeVar("T")
# what may be asked of a weight because a packed layer's answers the same
_HARMLESS = ("device", "is_meta", "is_cuda", "requires_grad", "grad", "is_leaf", "layout", "is_sparse", "is_quantized")
_GETTER = re.compile(r"__get__|__set__")
_READ = "the model reads their weight (its dtype, say) instead of only calling them"
_TWICE = "the model calls them more than once in one forward"


_END, _BLOCK = "end", "block"


@dataclass(frozen=True)
class Forward(Generic[T]):
    """One forward that is looked at.

    Attributes:
        run: does it.
        training: whether the model is in training mode meanwhile; blocks are not counted then.
        around: what is to be opened whenever it computes.
    """

    run: Callable[[], T]
    training: bool = False
    around: Callable[[], AbstractContextManager[None]] = nullcontext


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
        return self.forwards([Forward(run)], blocks, linears)[0]

    def forwards(
        self, runs: Sequence[Forward[T]], blocks: Mapping[str, nn.Module], linears: Mapping[str, nn.Linear]
    ) -> list[T]:
        """See several forwards, and give what they give. They wait for each other at streamed blocks.

        Args:
            runs: do them.
            blocks: by dotted name.
            linears: by dotted name; their weights are there and not shared.
        """
        entered: list[dict[str, int]] = [{} for _ in runs]
        called: list[dict[str, int]] = [{} for _ in runs]
        inside: set[str] = set()
        coroutines = Coroutines(
            [(index, DENSE) for index in range(len(runs))], lambda i: Pause(_END, "", runs[i].run())
        )

        def count(counts: Sequence[dict[str, int]], name: str) -> None:
            assert coroutines.current is not None
            own = counts[coroutines.current[0]]
            own[name] = own.get(name, 0) + 1

        def block(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if name in blocks:
                    count(entered, name)
                if name in self.coming:
                    coroutines.pause(Pause(_BLOCK, name))
                return original(*args, **kwargs)

            return forward

        def linear(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                count(called, name)
                inside.add(name)
                try:
                    return original(*args, **kwargs)
                finally:
                    inside.discard(name)

            return forward

        forwards = {each: block(name, each.forward) for name, each in (dict(blocks) | dict(self.coming)).items()}
        forwards |= {each: linear(name, each.forward) for name, each in linears.items()}
        with patched_forwards(forwards), self._watched(linears, inside):
            found = self._side_by_side(coroutines, runs, linears, inside)
        for index, run in enumerate(runs):
            _raise_to(self.called, called[index])
            if not run.training:  # there a block may be called again for its gradients
                _raise_to(self.entered, entered[index])
        return found

    def _side_by_side(
        self,
        coroutines: Coroutines,
        runs: Sequence[Forward[T]],
        linears: Mapping[str, nn.Linear],
        inside: set[str],
    ) -> list[T]:
        """Every block that one waits for is fetched once for all that do."""

        def resumed(workers: Iterable[Worker]) -> dict[Worker, Pause]:
            found = {}
            for worker in workers:
                with runs[worker[0]].around():
                    found[worker] = coroutines.go_on(worker) if started else coroutines.begin(worker)
            return found

        started = False
        try:
            waiting = resumed(coroutines.workers)
            started = True
            while any(pause.kind == _BLOCK for pause in waiting.values()):
                name = next(name for name in self.coming if any(p.key == name for p in waiting.values()))
                own = {of: each for of, each in linears.items() if of.startswith(f"{name}.")}
                # what is watched are the weights that have come, and not what stood in their place
                with weights_here(self.coming[name]), self._watched(own, inside):
                    waiting |= resumed([worker for worker, pause in waiting.items() if pause.key == name])
        finally:
            coroutines.close()
        return [waiting[worker].payload for worker in coroutines.workers]

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
    return " ".join(
        f"{counted(len(names), 'linear')}, such as {names[0]}: {reason}." for reason, names in left.items() if names
    )


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


def _raise_to(seen: dict[str, int], counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        seen[name] = max(count, seen.get(name, 0))
