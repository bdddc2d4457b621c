"""The dense weight that the kernel makes is the reference's, bit by bit."""

import pytest
import torch

pytest.importorskip("triton")
from sab_kernels import dequantize, to_kernel_layout

pytestmark = pytest.mark.usefixtures("poisoned")  # every element must be written
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_exact(layer, dtype):
    found = dequantize(layer.tensors, layer.geometry, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.cpu(), layer.packed.dequantize().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 40), (33, 128), (64, 300), (70, 257), (31, 544)])
def test_dequantize_is_the_reference_s(random_layer, rows, columns, dtype):
    assert_exact(random_layer(rows, columns), dtype)


@pytest.mark.parametrize("planes", [(1, 0), (1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("block_size", [32, 64, 96, 128, 256, 512])
def test_dequantize_is_the_reference_s_with_all_settings(random_layer, block_size, planes):
    row_scale = "fp16" if (block_size // 32 + sum(planes)) % 2 else "fp8"
    layer = random_layer(
        33,
        270,
        block_size=block_size,
        base_planes=planes[0],
        residual_planes=planes[1],
        row_scale=row_scale,
        salient_fraction=0.3,
    )
    assert_exact(layer, torch.float32)


def test_dequantize_keeps_every_fp8_scale_and_exponent(random_packed, layer_of):
    """All finite e4m3 bit patterns, with the largest power of two a row may have and a very small one."""
    packed = random_packed(128, 64, block_size=32, residual_planes=0)
    codes = torch.arange(256, dtype=torch.uint8).view(1, 2, 128)
    packed.tensors["row_scale"] = torch.where(codes & 127 == 127, 1, codes).to(torch.uint8)
    packed.tensors["row_exponent"] = torch.tensor([-110, 0, 119, -7], dtype=torch.int8).repeat(32)
    packed.tensors["col_scale"] = torch.ones(64).half().view(torch.int16)
    assert_exact(layer_of(packed), torch.float32)


@pytest.mark.parametrize("rows", [slice(0, 32), slice(32, 70), slice(64, 65), slice(32, 64), slice(64, 500)])
def test_dequantize_of_a_run_of_rows_is_that_part(random_layer, rows):
    layer = random_layer(70, 257)
    found = dequantize(layer.tensors, layer.geometry, rows=rows)
    assert torch.equal(found.cpu(), layer.packed.dequantize()[rows])


def test_dequantize_of_no_rows_is_empty(random_layer):
    layer = random_layer(70, 257)
    assert dequantize(layer.tensors, layer.geometry, rows=slice(64, 64)).shape == (0, 257)


@pytest.mark.parametrize("start", [1, 31, 33])
def test_dequantize_refuses_rows_that_do_not_start_at_a_tile(random_layer, start):
    layer = random_layer(70, 257)
    with pytest.raises(ValueError, match=f"rows start at {start}"):
        dequantize(layer.tensors, layer.geometry, rows=slice(start, 70))


@pytest.mark.gpu
def test_dequantize_takes_a_layout_made_on_the_device(random_packed, layer_of, device):
    packed = random_packed(33, 300, base_planes=2)
    layer = layer_of(packed)
    layer.tensors = to_kernel_layout({n: t.to(device) for n, t in packed.tensors.items()}, layer.geometry)
    assert_exact(layer, torch.float32)
