"""Error feedback: fix the signs of a block and pass the error on to the columns not yet binarized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.planes import BlockFit, sign_combinations, sign_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass
class LevelPicker:
    """Nearest level of one column at a time, for rows with levels ``c_j · Σ_p ±a_p``.

    Args:
        row_scale: a [planes, ..., out] of the block, of one weight or of a stack.
        base_planes: how many planes every column has.

    Attributes:
        combinations: by number of planes, their signs [2**p, p].
        levels: by number of planes, ``Σ_p ±a_p`` [..., 2**p, out].
    """

    row_scale: Float[Tensor, "planes ... out"]
    base_planes: int

    def __post_init__(self) -> None:
        planes = self.row_scale.shape[0]
        self.combinations = {p: sign_combinations(p, self.row_scale.device) for p in {self.base_planes, planes}}
        self.levels = {p: c @ self.row_scale[:p].movedim(0, -2) for p, c in self.combinations.items()}

    def pick(
        self, column: Float[Tensor, " out"], column_scale: Tensor, salient: bool
    ) -> tuple[Float[Tensor, "active out"], Float[Tensor, " out"]]:
        """Signs ±1 [active planes, out] and the value [out] nearest to ``column`` of one weight."""
        planes = self.row_scale.shape[0] if salient else self.base_planes
        if planes == 1:
            scale = self.row_scale[0] * column_scale
            sign = sign_of(column * scale)
            return sign[None], sign * scale
        levels = self.levels[planes] * column_scale
        choice = (levels - column).abs_().argmin(0)
        return self.combinations[planes][choice].T, levels.gather(0, choice[None])[0]


def column_feedback(
    weight: Float[Tensor, "out width"],
    fit: BlockFit,
    inverse_factor: Float[Tensor, "width width"],
    base_planes: int,
) -> Float[Tensor, "out width"]:
    """Binarize column by column; each error moves the block's later columns (GPTQ's rule with fixed levels).

    Signs of ``fit`` are replaced. Returns the scaled errors ``(w_j − q_j) / U_jj`` [out, width] for the columns
    beyond the block.
    """
    picker = LevelPicker(fit.row_scale, base_planes)
    columns = weight.T.contiguous()
    errors = torch.empty_like(columns)
    salient = fit.salient.tolist()
    diagonal = inverse_factor.diagonal().tolist()
    for j in range(columns.shape[0]):
        signs, value = picker.pick(columns[j], fit.column_scale[j], salient[j])
        fit.sign[: signs.shape[0], :, j] = signs
        error = (columns[j] - value) / diagonal[j]
        errors[j] = error
        if j + 1 < columns.shape[0]:
            columns[j + 1 :].addr_(inverse_factor[j, j + 1 :], error, alpha=-1.0)
    return errors.T


def block_feedback(
    weight: Float[Tensor, "... out width"], fit: BlockFit, inverse_factor: Float[Tensor, "... width width"]
) -> Float[Tensor, "... out width"]:
    """The lineage's rule (BiLLM, ARB-LLM): keep the fitted signs, scale the block's errors by U's diagonal only."""
    return (weight - fit.dequantize()) / inverse_factor.diagonal(dim1=-2, dim2=-1)[..., None, :]
