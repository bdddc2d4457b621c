"""Coordinate descent over the signs under the full Hessian, scales fixed (zero bits, lower error)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optimum_sab.core.feedback import LevelPicker
from optimum_sab.core.planes import WeightFit, block_bounds

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def descend_signs(fit: WeightFit, target: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]) -> None:
    """One sweep over the columns; each takes the level that minimises ``(t − q) H (t − q)ᵀ`` given all others.

    With error ``E = T − Q`` and gradient ``G = E H`` the best real value of column j is ``q_j + G_j / H_jj``;
    the nearest level to it is the exact minimiser, so the error never rises. G is kept for one block of columns and
    brought up to date between blocks by one product. ``fit.signs`` is changed in place.
    """
    signs, column_scale, block_size = fit.signs, fit.column_scale, fit.settings.block_size
    value = column_scale * _dense(signs, fit.row_scale, block_size)
    error = target - value
    diagonal = hessian.diagonal().tolist()
    salient_columns = fit.salient.tolist()
    for k, (start, end) in enumerate(block_bounds(target.shape[1], block_size)):
        picker = LevelPicker(fit.row_scale[:, k], fit.settings.base_planes)
        gradient = (error @ hessian[:, start:end]).T.contiguous()  # [width, out]
        current = value[:, start:end].T.contiguous()
        local = hessian[start:end, start:end]
        before = current.clone()
        for j in range(end - start):
            wanted = current[j] + gradient[j] / diagonal[start + j]
            chosen, new = picker.pick(wanted, column_scale[start + j], salient_columns[start + j])
            for p in range(chosen.shape[0]):
                signs[p][:, start + j] = chosen[p]
            change = current[j] - new  # error grows by this
            current[j] = new
            if j + 1 < end - start:
                gradient[j + 1 :].addr_(local[j, j + 1 :], change)
        error[:, start:end] += (before - current).T


def _dense(signs: list[Tensor], row_scale: Tensor, block_size: int) -> Tensor:
    total = torch.zeros_like(signs[0])
    width = total.shape[1]
    for sign, scale in zip(signs, row_scale, strict=True):
        spread = scale.T.repeat_interleave(block_size, dim=1)[:, :width]
        total.addcmul_(sign, spread)
    return total
