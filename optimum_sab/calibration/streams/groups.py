"""Linears that share one input are binarized together, and in which order the groups of a block come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from optimum_sab.calibration.streams.arrival import QUANTIZED, Worker, row_count
from optimum_sab.calibration.streams.coroutines import Pause
from optimum_sab.calibration.streams.experts import ExpertLinears
from optimum_sab.errors import LockstepError


@dataclass
class Group:
    """Linears that share one input, in calling order; or those of experts."""

    names: tuple[str, ...]
    experts: ExpertLinears | None = None  # whose linears these are, which share no input
    solved: bool = False
    seen: set[Worker] = field(default_factory=set)  # coroutines that waited here

    @property
    def key(self) -> str:
        """By which it is known on all ranks."""
        return self.names[0] if self.experts is None else self.experts.key


@dataclass(frozen=True)
class Offer:
    """A group at which somebody waits.

    Attributes:
        place: of its first linear among those of the block.
        key: the group's.
        live: whether the quantized stream has rows there.
    """

    place: int
    key: str
    live: bool


class Groups:
    """The groups of one block.

    Args:
        index: the block's, for messages.
        names: its linears, in the order in which they are defined.
        together: those that share an input, by `names_by_input` on one sample.
        experts: of the block.
    """

    def __init__(
        self,
        index: int,
        names: Sequence[str],
        together: Sequence[tuple[str, ...]],
        experts: Sequence[ExpertLinears] = (),
    ) -> None:
        self._index = index
        self._order = {name: place for place, name in enumerate(names)}
        self._of = {name: group for group in map(Group, together) for name in group.names}
        for each in experts:
            self._of[each.key] = Group(tuple(each.names.values()), each)
            self._order[each.key] = self._order[next(iter(each.names.values()))]

    def get(self, name: str) -> Group | None:
        """The group of a linear; None for one that was not called."""
        return self._of.get(name)

    def offers(self, waiting: Mapping[Worker, Pause]) -> list[Offer]:
        """The groups at which somebody waits.

        Usually all wait at one group. Where the route depends on the token (experts as separate linears) they may
        not; then the group defined first in the block goes first, since whoever could still come to it is there.

        Args:
            waiting: coroutines at linears, on this rank.

        Raises:
            LockstepError: a linear is not the block's, or binarized already.
        """
        names = {str(pause.key) for pause in waiting.values()}
        for name in names:
            if name not in self._order:
                raise LockstepError(
                    f"{name} is called inside decoder block {self._index}, where it does not belong; leave it dense "
                    f"with modules_to_not_convert=[{name!r}]."
                )
            self._of.setdefault(name, Group((name,)))
        late = next((name for name in names if self._of[name].solved), None)
        if late is not None:
            raise LockstepError(
                f"a sample reaches {late} after it was binarized; its route through the block differs from the "
                f"others'. Leave it dense with modules_to_not_convert=[{late!r}]."
            )
        groups = {self._of[name].key: self._of[name] for name in names}
        places = {key: min(self._order[name] for name in group.names) for key, group in groups.items()}
        live = {self._of[str(p.key)].key for (_, stream), p in waiting.items() if stream == QUANTIZED and _has_rows(p)}
        return [Offer(place, key, key in live) for key, place in places.items()]

    def take(self, key: str, waiting: Mapping[Worker, Pause]) -> tuple[Group, dict[Worker, Pause]]:
        """The group of a key, and who waits there on this rank, which may be nobody."""
        group = self._of.setdefault(key, Group((key,)))
        return group, {w: pause for w, pause in waiting.items() if self._of[str(pause.key)] is group}


def _has_rows(pause: Pause) -> bool:
    return not isinstance(pause.payload, Tensor) or row_count(pause.payload) > 0


def names_by_input(calls: Sequence[tuple[str, Tensor]]) -> list[tuple[str, ...]]:
    """Linears that were given the same tensor.

    Args:
        calls: every linear one sample called, in calling order, and the input it was given.

    Raises:
        LockstepError: a linear was called twice.
    """
    found: list[tuple[Tensor, list[str]]] = []
    seen: set[str] = set()
    for name, inputs in calls:
        if name in seen:
            raise LockstepError(
                f"{name} is called more than once in one forward; leave it dense with "
                f"modules_to_not_convert=[{name!r}]."
            )
        seen.add(name)
        for shared, names in found:
            if _same_tensor(shared, inputs):
                names.append(name)
                break
        else:
            found.append((inputs, [name]))
    return [tuple(names) for _, names in found]


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    # empty tensors all have the data pointer 0: experts that no token chose do not share an input
    return a is b or (
        a.numel() > 0 and a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    )
