"""A packed weight with frozen signs and trainable scales, rounded in every forward to what will be stored."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimum_sab.core.planes import BinaryPlanes, block_bounds, block_sums
from optimum_sab.core.row_scale import round_column_scale, round_row_scale
from optimum_sab.format.packed_weight import PackedWeight

if TYPE_CHECKING:
    from jaxtyping import Float


class TrainableScales:
    """Row and column scales of one packed weight as free fp32 tensors.

    They are kept in units that make them about 1, so that one learning rate serves all: ``a = unit · a'`` with one
    power of two per row. `weight` rounds them to their stored precision and passes the gradient straight through, so
    what is trained is what `packed` stores. The signs stay packed and are unpacked where they are used, since a whole
    model's take eight times as much as booleans.

    Args:
        packed: the start.
        device: where to train.

    Attributes:
        row: a' [planes, blocks, out], requires grad.
        column: c [in], requires grad; columns whose scale is 0 (dead inputs) stay 0.
    """

    def __init__(self, packed: PackedWeight, device: torch.device) -> None:
        self.settings = packed.settings
        self._home = packed.tensors["weight"].device
        self._signs = packed.to(device)
        row, column = self._signs.row_scale(), self._signs.column_scale()
        self._unit = power_of_two(row[:1].square().mean((0, 1), keepdim=True).sqrt())
        self._live = column != 0
        self.row = (row / self._unit).requires_grad_()
        self.column = column.clone().requires_grad_()

    @property
    def tensors(self) -> list[Tensor]:
        """The trainable tensors."""
        return [self.row, self.column]

    def _stored(self) -> tuple[Tensor, Tensor]:
        row = _RoundRows.apply(self.row * self._unit, self.settings.row_scale)
        return row, _RoundColumns.apply(self.column * self._live)

    def weight(self) -> Float[Tensor, "out in"]:
        """The fp32 weight of the rounded scales, exactly what `packed` dequantizes to; gradients reach the scales."""
        row, column = self._stored()
        return _PlaneWeight.apply(row, column, self._signs)

    @torch.no_grad()
    def packed(self) -> PackedWeight:
        """The weight as it will be stored."""
        row, column = self._stored()
        planes = replace(self._signs.unpack(), row_scale=row, column_scale=column)
        return PackedWeight.pack(planes, self.settings).to(self._home)


def power_of_two(size: Tensor) -> Tensor:
    """The power of two nearest to ``size`` (1 where it is 0): a unit by which scaling is exact."""
    return torch.exp2(torch.log2(size.clamp_min(2.0**-100)).round()).where(size > 0, torch.ones_like(size))


class _RoundRows(torch.autograd.Function):
    """Straight-through rounding of row scales."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, storage: str) -> Tensor:
        return round_row_scale(values, storage)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _RoundColumns(torch.autograd.Function):
    """Straight-through rounding of column scales."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return round_column_scale(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _PlaneWeight(torch.autograd.Function):
    """``W[i,j] = c[j] · Σ_p a[p,k,i] B[p,i,j]`` with gradients to a and c; of a coded plane B is what it stands for.

    With ``G = ∂L/∂W``: ``∂L/∂a[p,k,i] = Σ_{j in block k} G[i,j] c[j] B[p,i,j]`` and
    ``∂L/∂c[j] = Σ_i G[i,j] Σ_p a[p,k,i] B[p,i,j]``. Autograd's own way would keep a dense tensor per plane.
    """

    @staticmethod
    def forward(ctx: Any, row: Tensor, column: Tensor, signs: PackedWeight) -> Tensor:
        plain = replace(signs.unpack(), row_scale=row, column_scale=torch.ones_like(column)).dequantize()
        ctx.save_for_backward(plain, column)
        ctx.signs = signs
        return plain * column

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        plain, column = ctx.saved_tensors
        planes: BinaryPlanes = ctx.signs.unpack()
        size, blocks = planes.block_size, len(block_bounds(planes.in_features, planes.block_size))
        pull = grads[0] * column
        per_row = []
        for parts in planes.derived():
            sums = pull.new_zeros(pull.shape[0], blocks)
            for sign, part in parts:
                sums += part * block_sums(torch.where(sign, pull, -pull), size)
            per_row.append(sums)
        if planes.residual_sign.shape[0]:
            narrow = pull[:, planes.residual_index]
            block = planes.residual_index // size
            for sign in planes.residual_sign:
                sums = pull.new_zeros(pull.shape[0], blocks)
                per_row.append(sums.index_add_(1, block, torch.where(sign, narrow, -narrow)))
        return torch.stack([s.T for s in per_row]), (grads[0] * plain).sum(0), None
