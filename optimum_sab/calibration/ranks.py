"""The processes that share a run, as its stages see them: what one does for all, and what all do together.

A run of one process has `Ranks` as it stands here, in which every exchange is with itself;
`optimum_sab.calibration.joined_ranks` has the one of several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from optimum_sab.errors import SampleError

T = TypeVar("T")


class Ranks:
    """This process among those of the run. Every rank makes the same calls in the same order.

    Args:
        rank: which this is; 0 prints and writes files.
        size: how many there are.

    Attributes:
        wire_bytes: what was sent so far from any rank to any other, content only: what all have to be told counts
            once for each that is told. The same number on every rank.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.wire_bytes = 0
        self._load = [0.0] * size

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes files."""
        return self.rank == 0

    def exchange(self, at: str, value: T) -> list[T]:
        """What every rank says, in the order of ranks.

        Args:
            at: what it is about, the same on every rank.
            value: small, can be pickled.

        Raises:
            RankError: another rank has failed, is gone, or is at another place.
        """
        return [value]

    def give(self, at: str, owner: int, make: Callable[[], T]) -> T:
        """What one rank makes, on all of them; its tensors come to the others on the CPU.

        Args:
            at: what it is about, the same on every rank.
            owner: who makes it, while the others wait.
            make: called on the owner alone.

        Raises:
            RankError: as `exchange`.
        """
        return make()

    def gather(self, at: str, value: T) -> list[T]:
        """What every rank has, on the first, in the order of ranks; nothing on the others. Tensors come on the CPU."""
        return [value]

    def sum_to(self, owner: int | None, tensor: Tensor) -> None:
        """Add every rank's tensor up in the owner's, in place; what the others hold afterwards means nothing.

        Comes right after an `exchange`, so that all are there.

        Args:
            owner: who gets the sum; None for all.
            tensor: of the same shape and dtype on every rank.
        """

    def sum_symmetric_to(self, owner: int | None, matrix: Tensor, strip: int = 256) -> None:
        """`sum_to` of symmetric [n, n], of which only the upper half travels, a strip of rows at a time."""
        if self.size == 1:
            return
        width = matrix.shape[0]
        for start in range(0, width, strip):
            end = min(start + strip, width)
            rows = matrix[start:end, start:].contiguous()
            self.sum_to(owner, rows)
            if owner is None or self.rank == owner:
                matrix[start:end, start:] = rows
                matrix[end:, start:end] = rows[:, end - start :].T

    def owner_of(self, cost: float) -> int:
        """Who does the next piece of work: the rank that has done least so far, the first of them.

        Args:
            cost: of the piece, in any unit, the same on every rank.
        """
        owner = min(range(self.size), key=lambda rank: self._load[rank])
        self._load[owner] += cost
        return owner

    def own(self, weights: Sequence[int]) -> list[int]:
        """Which of some samples are this rank's, ascending; see `shares`."""
        return shares(weights, self.size)[self.rank]

    def device(self, device: torch.device | None) -> torch.device | None:
        """This rank's own of the devices of a kind; as it is where it names one, or where there is one rank."""
        return device


def shares(weights: Sequence[int], size: int) -> list[list[int]]:
    """Share samples out such that every rank has about as many tokens: the longest first, each to who has least.

    Args:
        weights: tokens of every sample.
        size: ranks.

    Returns:
        Indices of each rank's samples, ascending.
    """
    found: list[list[int]] = [[] for _ in range(size)]
    load = [0] * size
    for index in sorted(range(len(weights)), key=lambda each: -weights[each]):
        rank = min(range(size), key=lambda each: load[each])
        found[rank].append(index)
        load[rank] += max(1, weights[index])
    return [sorted(each) for each in found]


def require_samples(count: int, size: int) -> None:
    """Every rank needs a sample.

    Raises:
        SampleError: they are fewer than the ranks.
    """
    if count < size:
        raise SampleError(
            f"{count} calibration samples are fewer than the {size} processes of this run, each of which needs one; "
            f"start {max(1, count)}, or give more samples."
        )


def solving_cost(outputs: int, inputs: int) -> float:
    """Of linears that share an input, for `Ranks.owner_of`: factors of the Hessian, and columns of the weight.

    Args:
        outputs: rows of all their weights.
        inputs: width of the input.
    """
    return float(inputs) ** 3 + float(inputs) ** 2 * outputs
