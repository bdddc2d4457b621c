"""Joint closed-form refit of every row scale of a row under the full Hessian, once the signs are fixed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optimum_sab.core.planes import block_bounds, block_sums

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

RIDGE = 1e-4  # relative to each plane's own energy; keeps rows with coinciding planes solvable
GRAM_BYTES = 2**29  # bound on the Gram matrices held at once


def refit_row_scale(
    signs: list[Float[Tensor, "out in"]],
    column_scale: Float[Tensor, " in"],
    target: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    block_size: int,
) -> Float[Tensor, "planes blocks out"]:
    """Minimise ``(t_i − Σ a v) H (t_i − Σ a v)ᵀ`` over all ``K = planes · blocks`` scales of row i together.

    ``v`` is a plane's signs times ``c`` inside one block and zero elsewhere. The basis [out, K, in] is never
    built: for each (plane, block) one product with ``H[block, :]`` and a segmented sum give a row of the K×K Gram
    matrices.

    Args:
        signs: one [out, in] per plane, entries ±1, 0 where a residual plane has no column.
        column_scale: c [in].
        target: the weight to approximate, [out, in].
        hessian: damped H [in, in].
        block_size: columns per block.
    """
    out, width = target.shape
    bounds = block_bounds(width, block_size)
    planes, blocks = len(signs), len(bounds)
    K = planes * blocks
    rows = max(1, min(out, GRAM_BYTES // (4 * (K * K + 6 * width))))
    result = target.new_empty(out, K)
    for first in range(0, out, rows):
        part = slice(first, min(first + rows, out))
        basis = [sign[part] * column_scale for sign in signs]
        pull = target[part] @ hessian
        gram = target.new_empty(pull.shape[0], K, K)
        right = target.new_empty(pull.shape[0], K)
        for p in range(planes):
            right[:, p * blocks : (p + 1) * blocks] = block_sums(basis[p] * pull, block_size)
            for k, (start, end) in enumerate(bounds):
                product = basis[p][:, start:end] @ hessian[start:end]
                for q in range(planes):
                    gram[:, p * blocks + k, q * blocks : (q + 1) * blocks] = block_sums(product * basis[q], block_size)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        floor = diagonal.amax(1, keepdim=True) * 1e-8 + torch.finfo(gram.dtype).tiny
        diagonal.add_(RIDGE * diagonal + floor)
        result[part] = torch.linalg.solve(gram, right[:, :, None])[:, :, 0]
    return result.view(out, planes, blocks).permute(1, 2, 0).contiguous()
