"""Binary planes: the approximation itself, and what it is while it is fitted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.code import NO_CODE, find_code
from optimum_sab.core.settings import LayerSettings

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


def block_bounds(in_features: int, block_size: int) -> list[tuple[int, int]]:
    """``[start, end)`` of every block; the last one is narrower when ``block_size`` does not divide."""
    return [(s, min(s + block_size, in_features)) for s in range(0, in_features, block_size)]


def sign_combinations(planes: int, device: torch.device | None = None) -> Float[Tensor, "2**planes planes"]:
    """Every vector of ``planes`` signs in {−1, +1}, in binary counting order."""
    codes = torch.arange(2**planes, device=device)[:, None] >> torch.arange(planes, device=device)
    return (codes & 1).float() * 2.0 - 1.0


def sign_of(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """−1 or +1 in the dtype of ``values``; zero counts as positive."""
    return sign_into(torch.empty_like(values), values)


def sign_into(place: Float[Tensor, "..."], values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`sign_of`, written into ``place``, which may be ``values``."""
    return torch.ge(values, 0, out=place).mul_(2.0).sub_(1.0)


def block_sums(values: Float[Tensor, "... in"], block_size: int) -> Float[Tensor, "... blocks"]:
    """Sum over the columns of every block."""
    blocks = len(block_bounds(values.shape[-1], block_size))
    missing = blocks * block_size - values.shape[-1]
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.view(*values.shape[:-1], blocks, block_size).sum(-1)


def columns_where(mask: Bool[Tensor, "... width"]) -> Int[Tensor, "... count"]:
    """Which columns are marked, ascending; as many of every weight."""
    return mask.nonzero()[:, -1].view(*mask.shape[:-1], -1)


def take_columns(values: Float[Tensor, "... rows width"], columns: Tensor | slice) -> Float[Tensor, "... rows count"]:
    """Some columns, of every weight its own [..., count]."""
    if isinstance(columns, slice):
        return values[..., columns]
    if columns.ndim == 1:
        return values.index_select(-1, columns)
    return values.gather(-1, columns[..., None, :].expand(*values.shape[:-1], -1))


def take_rows(values: Float[Tensor, "... rows width"], rows: Tensor | slice) -> Float[Tensor, "... count width"]:
    """Some rows, of every weight its own [..., count]."""
    if isinstance(rows, slice):
        return values[..., rows, :]
    if rows.ndim == 1:
        return values.index_select(-2, rows)
    return values.gather(-2, rows[..., None].expand(*rows.shape, values.shape[-1]))


@dataclass(frozen=True)
class BinaryPlanes:
    """A weight as binary planes (docs/format.md)::

        W[i,j] ≈ c[j] · ( Σ_p a[p,k,i] B[p,i,j] + [j salient] Σ_r a[P0+r,k,i] R[r,i,j] ),   k = block of j

    With a code, the first of B is no sign but the derived planes' sum: ``B[0] = P_1 + P_2 / 2`` (core/code.py).

    Attributes:
        base_sign: B, bool [base_planes, out, in], True is +1.
        residual_sign: R on the salient columns, bool [residual_planes, out, salient].
        residual_index: salient columns, int64 [salient], ascending.
        row_scale: a, fp32 [planes, blocks, out], base planes first.
        column_scale: c, fp32 [in].
        block_size: columns per block.
        code: by which planes are derived of ``base_sign[0]``.
    """

    base_sign: Bool[Tensor, "base out in"]
    residual_sign: Bool[Tensor, "residual out salient"]
    residual_index: Int[Tensor, " salient"]
    row_scale: Float[Tensor, "planes blocks out"]
    column_scale: Float[Tensor, " in"]
    block_size: int
    code: str = NO_CODE

    @property
    def out_features(self) -> int:
        return self.base_sign.shape[1]

    @property
    def in_features(self) -> int:
        return self.base_sign.shape[2]

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The dense fp32 weight these planes stand for."""
        scale = self.row_scale
        widths = torch.tensor([e - s for s, e in block_bounds(self.in_features, self.block_size)], device=scale.device)
        dense = torch.zeros(self.out_features, self.in_features, dtype=scale.dtype, device=scale.device)
        for stored, parts in zip(scale, self.derived(), strict=False):
            for sign, part in parts:
                spread = (part * stored).T.repeat_interleave(widths, dim=1)
                dense += torch.where(sign, spread, -spread)
        block = self.residual_index // self.block_size
        for r in range(self.residual_sign.shape[0]):
            spread = scale[self.base_sign.shape[0] + r].T[:, block]
            dense[:, self.residual_index] += torch.where(self.residual_sign[r], spread, -spread)
        return dense * self.column_scale

    def derived(self) -> list[list[tuple[Bool[Tensor, "out in"], float]]]:
        """Of every stored base plane, the planes that weights are made of: signs, and their part of its row scale."""
        planes: list[list[tuple[Tensor, float]]] = [[(sign, 1.0)] for sign in self.base_sign]
        code = find_code(self.code)
        if code is not None:
            planes[0] = list(zip(code.planes(self.base_sign[0]), code.parts, strict=True))
        return planes

    def rows(self, some: slice) -> BinaryPlanes:
        """Some of its rows; views."""
        return replace(
            self,
            base_sign=self.base_sign[:, some],
            residual_sign=self.residual_sign[:, some],
            row_scale=self.row_scale[:, :, some],
        )

    def split(self, sizes: list[int]) -> list[BinaryPlanes]:
        """Cut a stack of linears that share an input back into its members, rows in order."""
        base, residual = self.base_sign.split(sizes, 1), self.residual_sign.split(sizes, 1)
        scale = self.row_scale.split(sizes, 2)
        return [
            replace(self, base_sign=b.clone(), residual_sign=r.clone(), row_scale=a.clone())
            for b, r, a in zip(base, residual, scale, strict=True)
        ]


@dataclass
class BlockFit:
    """Planes of one block while they are fitted; of one weight, or of a stack whose dimension is where the dots are.

    Attributes:
        row_scale: a [planes, ..., out].
        column_scale: c [..., width].
        sign: B as ±1 fp32 [planes, ..., out, width]; 0 where a residual plane has no column.
        salient: bool [..., width].
    """

    row_scale: Float[Tensor, "planes ... out"]
    column_scale: Float[Tensor, "... width"]
    sign: Float[Tensor, "planes ... out width"]
    salient: Bool[Tensor, "... width"]

    def dequantize(self) -> Float[Tensor, "... out width"]:
        return self.column_scale[..., None, :] * (self.row_scale[..., None] * self.sign).sum(0)

    def of(self, index: int) -> BlockFit:
        """One of a stack; views."""
        return BlockFit(self.row_scale[:, index], self.column_scale[index], self.sign[:, index], self.salient[index])


@dataclass
class WeightFit:
    """Planes of a whole weight while they are fitted, or of a stack of weights, as in `BlockFit`.

    Attributes:
        signs: ±1 fp32 [..., out, in] of every plane, base planes first; 0 where a residual plane has no column. Of a
            coded plane ``P_1 + P_2 / 2``.
        salient: bool [..., in].
        row_scale: a [planes, blocks, ..., out].
        column_scale: c [..., in].
        settings: planes, block size and code.
        stored: bits u of the coded plane, bool [out, in], of one weight; None without a code.
    """

    signs: list[Float[Tensor, "... out in"]]
    salient: Bool[Tensor, "... in"]
    row_scale: Float[Tensor, "planes blocks ... out"]
    column_scale: Float[Tensor, "... in"]
    settings: LayerSettings
    stored: Bool[Tensor, "out in"] | None = None

    @classmethod
    def empty(cls, like: Float[Tensor, "... out in"], settings: LayerSettings) -> WeightFit:
        """All zeros, of the shape, dtype and device of a weight or a stack."""
        (*stack, out, width), planes = like.shape, settings.planes
        return cls(
            [like.new_zeros(like.shape) for _ in range(planes)],
            like.new_zeros(*stack, width, dtype=torch.bool),
            like.new_zeros(planes, len(block_bounds(width, settings.block_size)), *stack, out),
            like.new_zeros(*stack, width),
            settings,
        )

    def of(self, index: int) -> WeightFit:
        """One of a stack; views."""
        return WeightFit(
            [sign[index] for sign in self.signs],
            self.salient[index],
            self.row_scale[:, :, index],
            self.column_scale[index],
            self.settings,
        )

    def values(self) -> Float[Tensor, "... out in"]:
        """The weight they stand for, without column scales."""
        total = torch.zeros_like(self.signs[0])
        width = total.shape[-1]
        for sign, scale in zip(self.signs, self.row_scale, strict=True):
            spread = scale.movedim(0, -1).repeat_interleave(self.settings.block_size, dim=-1)
            total.addcmul_(sign, spread[..., :width])
        return total

    def dequantize(self) -> Float[Tensor, "... out in"]:
        """The weight they stand for."""
        return self.column_scale[..., None, :] * self.values()

    def planes(self) -> BinaryPlanes:
        """What was found of one weight, as it is stored."""
        stored = [sign > 0 for sign in self.signs[: self.settings.base_planes]]
        if self.stored is not None:
            stored[0] = self.stored
        columns = self.salient.nonzero()[:, 0]
        residual = self.signs[self.settings.base_planes :]
        no_residual = self.salient.new_zeros(0, stored[0].shape[0], 0)
        return BinaryPlanes(
            base_sign=torch.stack(stored),
            residual_sign=torch.stack([s[:, columns] > 0 for s in residual]) if residual else no_residual,
            residual_index=columns,
            row_scale=self.row_scale.contiguous(),
            column_scale=self.column_scale,
            block_size=self.settings.block_size,
            code=self.settings.code,
        )
