"""What goes from column to column in the solver: C on a CPU, Triton kernels on an accelerator, else torch."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.columns import IN_TORCH, ColumnLoops
from optimum_sab.core.descent import SweptBlock
from optimum_sab.core.factorization import factor_hessian
from optimum_sab.core.feedback import LevelPicker
from optimum_sab.core.planes import BlockFit, WeightFit
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import warn
from optimum_sab.ops.backends import why_not
from optimum_sab.ops.cpu.columns import loops_on_cpu
from optimum_sab.ops.verification import raised

if TYPE_CHECKING:
    from torch import Tensor

    from sab_kernels.columns import Levels

AGREEMENT = 1e-3  # of the error that either way leaves; where two levels are as near, rounding may choose


def column_loops(device: torch.device) -> ColumnLoops:
    """The loops for what is on ``device``; warns, once, where they are torch's for want of something better.

    On a CPU the result is torch's, bit for bit; on an accelerator to rounding.
    """
    return loops_on_cpu() if device.type == "cpu" else _on_accelerator(device)


@cache
def _on_accelerator(device: torch.device) -> ColumnLoops:
    problem = why_not("triton", device) or disagreement(device)
    if problem is None:
        return IN_TRITON
    warn(f"quantizing takes longer than it must, its loops over columns run in torch on {device.type}: {problem}.")
    return IN_TORCH


def _feedback(weight: Tensor, fit: BlockFit, inverse_factor: Tensor, base_planes: int) -> Tensor:
    """`column_feedback`."""
    from sab_kernels.columns import feed_back

    fit.sign = fit.sign.contiguous()
    levels = _levels(LevelPicker(fit.row_scale, base_planes), fit.column_scale, fit.salient)
    return feed_back(weight, tuple(fit.sign), levels, _rows_contiguous(inverse_factor), base_planes)


def _sweep(block: SweptBlock) -> None:
    """`sweep_block`."""
    from sab_kernels.columns import descend

    fit, (start, end) = block.fit, block.bounds
    base = fit.settings.base_planes
    picker = LevelPicker(fit.row_scale[:, block.index], base)
    levels = _levels(picker, fit.column_scale[..., start:end], fit.salient[..., start:end])
    signs = tuple(sign[..., start:end] for sign in fit.signs)
    local = _rows_contiguous(block.hessian[..., start:end, start:end])
    fallen = descend(block.gradient, block.value[..., start:end], signs, levels, local, base)
    block.error[..., start:end] += fallen


IN_TRITON = replace(IN_TORCH, feedback=_feedback, sweep=_sweep, stacks=True)
"""On what Triton compiles for, and under its interpreter."""


def _levels(picker: LevelPicker, column_scale: Tensor, salient: Tensor) -> Levels:
    from sab_kernels.columns import Levels

    planes = picker.row_scale.shape[0]
    return Levels(
        picker.row_scale[0].contiguous(),
        picker.levels[picker.base_planes].contiguous(),
        picker.levels[planes].contiguous(),
        column_scale.contiguous(),
        salient.contiguous(),
    )


def _rows_contiguous(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def disagreement(device: torch.device) -> str | None:
    """Compare the Triton loops with torch's on small random blocks.

    Returns:
        None where what they leave as error is the same to `AGREEMENT`; else what is wrong, as the end of a sentence.
    """
    try:
        for base, residual in ((1, 1), (2, 1)):
            found, expected = (_left(loops, base, residual, device) for loops in (IN_TRITON, IN_TORCH))
            for name in expected:
                if not abs(found[name] - expected[name]) <= AGREEMENT * expected[name]:
                    return (
                        f"the Triton loops leave another error there ({name}: {found[name]:.6g} instead of "
                        f"{expected[name]:.6g}); please report this with the output of `optimum-sab env`"
                    )
    except Exception as error:  # whatever a compiler or driver raises: torch still gives right answers
        return raised(error, "loops")
    return None


def _left(loops: ColumnLoops, base: int, residual: int, device: torch.device) -> dict[str, float]:
    """Squared errors under the Hessians of a feedback, and of a descent behind it, as returned and by the signs.

    Of a stack of two weights; what goes wrong with one does with them.
    """
    generator = torch.Generator().manual_seed(base)
    rows, width, planes = 70, 35, base + residual
    factored = []
    for _ in range(2):
        inputs = torch.randn(50, width, generator=generator)
        factored.append(factor_hessian((inputs.T @ inputs).to(device), 0.1))
    H, U = (torch.stack([getattr(f, name) for f in factored]) for name in ("hessian", "inverse_factor"))
    weight = torch.randn(2, rows, width, generator=generator).to(device)
    salient = torch.stack([torch.arange(width) % 5 == first for first in (1, 3)]).to(device)
    scale = ((torch.rand(planes, 1, 2, rows, generator=generator) + 0.2) / planes).to(device)
    column = (torch.rand(2, width, generator=generator) + 0.5).to(device)
    fit = BlockFit(scale[:, 0], column, torch.zeros(planes, 2, rows, width, device=device), salient)
    errors = loops.feed_back(weight, fit, U, base)
    settings = LayerSettings(block_size=64, base_planes=base, residual_planes=residual)
    whole = WeightFit(list(fit.sign), salient, scale, column, settings)
    found = {"feedback": float(errors.square().sum())}

    def energy(error: Tensor) -> float:
        return float(((error @ H) * error).sum())

    value = whole.dequantize()
    error = weight - value
    found["signs of the feedback"] = energy(error)
    loops.descend(SweptBlock(whole, 0, error @ H, value, error, H))
    found["descent"] = energy(error)
    found["signs of the descent"] = energy(weight - whole.dequantize())
    return found
