"""Where the bits and bytes of a finished model are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BIAS = "bias"  # beside the tensors that the format names


@dataclass(frozen=True)
class LinearSizes:
    """Binarized linears of one kind, or with the same planes.

    Attributes:
        linears: how many.
        weights: of all of them.
        bytes: stored for them, biases included.
    """

    linears: int = 0
    weights: int = 0
    bytes: int = 0

    def plus(self, weights: int, stored: int) -> LinearSizes:
        """One linear more."""
        return LinearSizes(self.linears + 1, self.weights + weights, self.bytes + stored)


@dataclass(frozen=True)
class Sizes:
    """Where bits and bytes are; counted from what is stored.

    Attributes:
        kinds: of the binarized linears, by the last part of their names.
        planes: the same by their planes: "1 + 1 on 18.75 %" is one on every column and one on so many of them.
        tensors: bytes of the binarized linears by stored tensor.
        dense: bytes of what stays dense, by where it is in the model.
        dense_linears: bytes that the binarized linears took before.
    """

    kinds: Mapping[str, LinearSizes]
    planes: Mapping[str, LinearSizes]
    tensors: Mapping[str, int]
    dense: Mapping[str, int]
    dense_linears: int

    @property
    def packed_bytes(self) -> int:
        """Of the binarized linears."""
        return sum(self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Of the binarized linears."""
        return 8.0 * self.packed_bytes / sum(each.weights for each in self.kinds.values())

    @property
    def total_bytes(self) -> int:
        """Of the whole model."""
        return self.packed_bytes + sum(self.dense.values())

    @property
    def total_before(self) -> int:
        """Of the whole model before the work, in the same dtype."""
        return self.dense_linears + sum(self.dense.values())
