"""GPTQ baseline: against its definition, and as a sane quantizer."""

import pytest
import torch

from optimum_sab.core.solver import output_error
from optimum_sab.eval.baselines import gptq


def correlated_hessian(width, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * width, width, generator=g) @ torch.randn(width, width, generator=g)
    return x.T @ x / len(x)


def test_gptq_with_an_identity_hessian_rounds_to_nearest():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    result = gptq(weight, torch.eye(64), bits=3, group_size=32)
    for start in (0, 32):
        block = weight[:, start : start + 32]
        low, high = block.amin(1).clamp_max(0), block.amax(1).clamp_min(0)
        scale = ((high - low) / 7).half().float()[:, None]
        zero = torch.round(-low[:, None] / scale)
        nearest = ((torch.round(block / scale) + zero).clamp(0, 7) - zero) * scale
        torch.testing.assert_close(result.weight[:, start : start + 32], nearest)


def test_gptq_error_falls_with_bits_and_beats_rounding():
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(2))
    hessian = correlated_hessian(128)
    errors = [output_error(weight, gptq(weight, hessian, bits).weight, hessian) for bits in (2, 3, 4)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] < output_error(weight, gptq(weight, torch.eye(128), 2).weight, hessian)


@pytest.mark.parametrize(("bits", "width", "expected"), [(2, 256, 2.25), (3, 128, 3.25), (2, 192, 2 + 64 / 192)])
def test_gptq_bits_count_scales_and_offsets(bits, width, expected):
    result = gptq(torch.randn(4, width), torch.eye(width), bits)
    assert result.bits_per_weight == pytest.approx(expected)
    assert all(row.unique().numel() <= 2**bits * -(-width // 128) for row in result.weight)
