"""One product of pairs of a row and an expert: what is multiplied, and with what."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .product import Product


@dataclass(frozen=True)
class ExpertProduct(Product):
    """Experts of one shape, and the pairs that are computed.

    Args:
        x: [pairs / repeats, columns], as in `Product`.
        tensors: in the kernel layout, each stacked along a new first dimension, contiguous.
        geometry: of one expert.
        sizes: its rows.
        biases: [experts, rows], contiguous, or none.
        outputs: one, contiguous [pairs, rows].
        ids: int [pairs], contiguous: the expert of every pair.
        repeats: pairs of one row of x, one after the other.
    """

    ids: Tensor
    repeats: int

    @property
    def tokens(self) -> int:
        """Pairs: each is computed like a token."""
        return self.ids.numel()

    @property
    def experts(self) -> int:
        return self.tensors["weight"].shape[0]
