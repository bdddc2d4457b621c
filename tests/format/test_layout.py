import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.layout import TensorSpec, salient_per_block, stored_bits_per_weight, tensor_specs

bounded = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)


def test_specs_of_a_worked_layer():
    # 200 columns in blocks of 64, 64, 64 and 8, with 8, 8, 8 and 1 salient ones;
    # ⌈200/32⌉ = 7 words of signs, ⌈25/8⌉ = 4 bytes of residual signs
    settings = LayerSettings(block_size=64, base_planes=2, salient_fraction=0.125)
    assert salient_per_block(200, settings) == [8, 8, 8, 1]
    assert tensor_specs(10, 200, settings) == {
        "weight": TensorSpec((2, 10, 7), torch.int32),
        "residual_sign": TensorSpec((1, 10, 4), torch.uint8),
        "residual_index": TensorSpec((25,), torch.uint8),
        "row_scale": TensorSpec((3, 4, 10), torch.uint8),
        "row_exponent": TensorSpec((10,), torch.int8),
        "col_scale": TensorSpec((200,), torch.int16),
    }


def test_specs_without_residual_planes_and_with_fp16_scales_hold_what_is_left():
    specs = tensor_specs(10, 64, LayerSettings(block_size=32, residual_planes=0, row_scale="fp16"))
    assert specs == {
        "weight": TensorSpec((1, 10, 2), torch.int32),
        "row_scale": TensorSpec((1, 2, 10), torch.int16),
        "col_scale": TensorSpec((64,), torch.int16),
    }


@pytest.mark.parametrize(("block", "dtype"), [(128, torch.uint8), (256, torch.uint8), (288, torch.int16)])
def test_residual_index_is_wide_enough_for_its_block(block, dtype):
    spec = tensor_specs(4, 4 * block, LayerSettings(block_size=block))["residual_index"]
    assert spec.dtype == dtype
    assert torch.iinfo(dtype).max >= block - 1


@bounded
@hypothesis.given(
    st.integers(1, 50),
    st.integers(1, 700),
    st.sampled_from([32, 64, 128, 512]),
    st.sampled_from([(1, 0), (1, 1), (2, 1), (1, 3), (4, 0)]),
    st.sampled_from(["fp8", "fp16"]),
)
def test_specs_are_integers_and_weight_has_a_rank_no_dense_weight_has(out, width, block, planes, storage):
    specs = tensor_specs(
        out, width, LayerSettings(block_size=block, base_planes=planes[0], residual_planes=planes[1], row_scale=storage)
    )
    assert all(not spec.dtype.is_floating_point for spec in specs.values())
    assert specs["weight"].dtype == torch.int32
    assert len(specs["weight"].shape) == 3


# 3584 × 3584 with the defaults, in bits per weight: signs 1, residual signs 3/16, row scales 2 · 8/512 = 1/32,
# exponents 8/3584, columns 16/3584, indices 16 · 672 / 3584² = 3/3584: together 1.21875 + 27/3584 = 1.2262835
def test_stored_bits_of_a_worked_layer():
    assert stored_bits_per_weight(3584, 3584, LayerSettings()) == pytest.approx(1.21875 + 27 / 3584, rel=1e-12)


@pytest.mark.parametrize(("out", "width"), [(3584, 3584), (18944, 3584), (3584, 18944)])
def test_stored_bits_with_the_defaults_stay_below_1_23_at_7b_shapes(out, width):
    assert 1.21 < stored_bits_per_weight(out, width, LayerSettings()) <= 1.23


def test_stored_bits_of_the_paper_s_storage_count_its_scales():
    settings = LayerSettings(
        block_size=128, base_planes=2, salient_fraction=0.125, row_scale="fp16", refit=False, sweeps=0
    )
    assert stored_bits_per_weight(3584, 3584, settings) == pytest.approx(2 + 1 / 8 + 3 * 16 / 128, rel=0.005)
