"""Bits where they matter: choose one level per layer so that the expected loss is least under a total budget."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optimum_sab.errors import ConfigError


@dataclass(frozen=True)
class Level:
    """One way to store a layer.

    Attributes:
        bits: stored bits of the whole layer.
        loss: expected loss of the model if the layer is stored so, in any unit that adds up over layers.
    """

    bits: float
    loss: float


def efficient_levels(levels: Sequence[Level]) -> list[int]:
    """Indices of the levels on the lower convex hull of (bits, loss), bits ascending.

    Only those can be the best choice at some price per bit, and along them every further bit buys less than the one
    before. A level that needs more bits without less loss is not among them.
    """
    order = sorted(range(len(levels)), key=lambda i: (levels[i].bits, levels[i].loss))
    hull: list[int] = []
    for index in order:
        if hull and levels[index].loss >= levels[hull[-1]].loss:
            continue
        while len(hull) >= 2 and _gain(levels, hull[-2], hull[-1]) <= _gain(levels, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def allocate_levels(layers: Mapping[str, Sequence[Level]], budget: float) -> dict[str, int]:
    """The level of every layer, by index, that makes ``Σ loss`` small with ``Σ bits ≤ budget``.

    Every layer starts at its cheapest level; then the upgrade that saves most loss per bit is taken, as long as there
    are bits for it. On the convex hulls this is the exact optimum but for the last upgrade that no longer fits, after
    which smaller ones are still tried.

    Args:
        layers: the levels of every layer.
        budget: bits in all.

    Raises:
        ConfigError: the cheapest levels together need more than ``budget``.
    """
    hulls = {name: efficient_levels(levels) for name, levels in layers.items()}
    place = dict.fromkeys(layers, 0)
    left = budget - sum(layers[name][hull[0]].bits for name, hull in hulls.items())
    if left < 0:
        raise ConfigError(f"the cheapest levels need {budget - left:.6g} bits and the budget is {budget:.6g}.")
    queue: list[tuple[float, int, str]] = []
    rank = {name: i for i, name in enumerate(layers)}  # ties go to the earlier layer, so that runs repeat

    def offer(name: str) -> None:
        hull, at = hulls[name], place[name]
        if at + 1 < len(hull):
            heapq.heappush(queue, (-_gain(layers[name], hull[at], hull[at + 1]), rank[name], name))

    for name in layers:
        offer(name)
    while queue:
        _, _, name = heapq.heappop(queue)
        hull, at = hulls[name], place[name]
        price = layers[name][hull[at + 1]].bits - layers[name][hull[at]].bits
        if price > left:
            continue  # later levels of this layer cost more still; other layers may have smaller steps
        left -= price
        place[name] = at + 1
        offer(name)
    return {name: hulls[name][at] for name, at in place.items()}


def _gain(levels: Sequence[Level], low: int, high: int) -> float:
    """Loss saved per bit from one level to a dearer one."""
    return (levels[low].loss - levels[high].loss) / (levels[high].bits - levels[low].bits)
