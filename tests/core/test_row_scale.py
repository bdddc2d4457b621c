import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from optimum_sab.core.row_scale import EXPONENT_RANGE, FP8_MAX, round_column_scale, round_row_scale, row_exponent

bounded = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


def draw(seed, planes=2, blocks=3, out=5, spread=4.0):
    """Log-normal scales of both signs, ``spread`` natural logarithms wide."""
    generator = torch.Generator().manual_seed(seed)
    size = (torch.randn(planes, blocks, out, generator=generator) * spread).exp()
    return size * torch.where(torch.rand(planes, blocks, out, generator=generator) < 0.2, -1.0, 1.0)


@bounded
@hypothesis.given(st.integers(0, 10**6), st.floats(0.1, 20.0), st.sampled_from(["fp8", "fp16"]))
def test_round_row_scale_is_idempotent(seed, spread, storage):
    once = round_row_scale(draw(seed, spread=spread), storage)
    assert torch.equal(round_row_scale(once, storage), once)


@bounded
@hypothesis.given(st.integers(0, 10**6), st.floats(0.1, 6.0))
def test_round_row_scale_fp8_is_within_a_sixteenth_of_normal_values(seed, spread):
    scale = draw(seed, spread=spread)
    unit = 2.0 ** row_exponent(scale).float()
    error = (round_row_scale(scale, "fp8") - scale).abs()
    normal = scale.abs() >= 2.0**-6 * unit
    assert normal.any()
    assert (error[normal] <= 2.0**-4 * scale.abs()[normal]).all()
    subnormal_step = (2.0**-9 * unit).expand_as(scale)
    assert (error[~normal] <= subnormal_step[~normal] / 2).all()


@bounded
@hypothesis.given(st.integers(-118, 126), st.lists(st.integers(0, 17), min_size=1, max_size=6))
def test_round_row_scale_fp8_keeps_powers_of_two(top, below):
    """Every power of two from a row's largest down to 2^-17 of it is a value of e4m3 in that row's unit."""
    scale = torch.tensor([2.0**top, *(2.0 ** (top - b) for b in below)]).view(1, -1, 1)
    hypothesis.assume(scale.min() >= 2.0**-126)
    assert torch.equal(round_row_scale(scale, "fp8"), scale)
    assert torch.equal(round_row_scale(-scale, "fp8"), -scale)


@bounded
@hypothesis.given(st.integers(0, 10**6), st.integers(-60, 60))
def test_round_row_scale_fp8_gives_every_row_its_own_exponent(seed, power):
    scale = draw(seed)
    scaled = scale.clone()
    scaled[:, :, 1] *= 2.0**power
    expected = round_row_scale(scale, "fp8")
    expected[:, :, 1] *= 2.0**power
    assert torch.equal(round_row_scale(scaled, "fp8"), expected)


@bounded
@hypothesis.given(st.integers(0, 10**6), st.integers(-100, 100))
def test_row_exponent_is_the_smallest_that_fits(seed, power):
    scale = draw(seed) * 2.0**power
    exponent = row_exponent(scale)
    peak = scale.abs().amax((0, 1)).double()
    assert exponent.dtype == torch.int8
    inside = exponent > EXPONENT_RANGE[0]
    assert (peak <= FP8_MAX * 2.0 ** exponent.double()).all()
    assert (peak > FP8_MAX * 2.0 ** (exponent.double() - 1))[inside].all()


def test_round_row_scale_fp8_follows_the_values_of_e4m3():
    # the row's peak 448 makes its unit 1; steps of e4m3: 32 from 256 on, 1/8 from 1 on, 2^-9 below 2^-6
    scale = torch.tensor([448.0, 300.0, 1.06, -1.07, 0.0, 2.0**-9, 2.0**-11]).view(1, -1, 1)
    expected = torch.tensor([448.0, 288.0, 1.0, -1.125, 0.0, 2.0**-9, 0.0]).view(1, -1, 1)
    assert torch.equal(round_row_scale(scale, "fp8"), expected)


@pytest.mark.parametrize("storage", ["fp8", "fp16"])
def test_round_row_scale_keeps_zero_rows_and_stays_finite_at_the_ends(storage):
    scale = torch.tensor([0.0, 3.4e38, -3.4e38, 1e-38, 1e-45]).view(1, 1, -1)
    rounded = round_row_scale(scale, storage)
    assert rounded.isfinite().all()
    assert rounded[0, 0, 0] == 0
    assert (rounded.sign() * scale.sign() >= 0).all()


def test_round_row_scale_fp16_is_the_nearest_half():
    scale = torch.tensor([1.0, 1.0 + 2.0**-12, -0.1, 65504.0, 1e6, -1e6]).view(1, 1, -1)
    expected = torch.tensor([1.0, 1.0, -0.0999755859375, 65504.0, 65504.0, -65504.0]).view(1, 1, -1)
    assert torch.equal(round_row_scale(scale, "fp16"), expected)


def test_round_column_scale_is_the_nearest_half():
    scale = torch.tensor([0.0, 1.0, 1.0 + 2.0**-12, 0.1, -0.1])
    expected = torch.tensor([0.0, 1.0, 1.0, 0.0999755859375, -0.0999755859375])
    assert torch.equal(round_column_scale(scale), expected)
