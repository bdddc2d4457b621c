"""Coded planes in the kernels: layout, dense weight and products against the reference."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from optimum_sab.core.code import code_for
from sab_kernels import (
    Geometry,
    Launch,
    binary_linear,
    dequantize,
    from_kernel_layout,
    kernel_bytes,
    linear,
    stacked_linear,
    to_kernel_layout,
)
from sab_kernels.layout import _shuffled, _unshuffled

pytestmark = pytest.mark.usefixtures("poisoned")
# rows, columns, base planes, residual planes, block size, row scales
LAYERS = [
    (1, 1, 1, 0, 128, "fp8"),
    (33, 40, 1, 1, 512, "fp16"),
    (70, 300, 1, 1, 128, "fp8"),
    (31, 257, 2, 0, 384, "fp8"),
    (33, 300, 2, 1, 128, "fp16"),
    (5, 150, 3, 0, 512, "fp8"),
]
SMALL = (70, 300, 1, 1, 128, "fp8")  # three row tiles and three column tiles, neither full
WITH_OTHERS = (33, 300, 2, 1, 128, "fp16")
WAYS = {"decode": {}, "small_batch": {"decode_tokens": 0}, "dense": {"decode_tokens": 0, "dense_tokens": 1}}


@pytest.fixture(scope="module")
def coded(random_layer):
    """``coded(rows, columns, base, residual, block size, row scales)``: a layer with a code."""

    def build(rows, columns, base, residual, block_size, row_scale):
        return random_layer(
            rows,
            columns,
            code=code_for(base).name,
            base_planes=base,
            residual_planes=residual,
            block_size=block_size,
            row_scale=row_scale,
        )

    return build


def product(layer, x, way, bias=None, **launch):
    settings = Launch(**{**WAYS[way], **launch})
    assert linear.regime(x.shape[0], x.dtype, settings) == way
    return binary_linear(x, layer.tensors, layer.geometry, bias, settings)


@pytest.mark.parametrize("layer", LAYERS)
def test_kernel_layout_gives_back_a_coded_layer_s_tensors(coded, layer):
    layer = coded(*layer)
    found = from_kernel_layout(layer.tensors, layer.geometry)
    assert found.keys() == layer.packed.tensors.keys()
    assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in layer.packed.tensors.items())
    assert sum(t.numel() * t.element_size() for t in layer.tensors.values()) == kernel_bytes(layer.geometry)
    assert all(t.is_contiguous() for t in layer.tensors.values())


def test_kernel_layout_of_a_coded_layer_is_the_documented_one(coded):
    layer = coded(*WITH_OTHERS)
    weight, stored = layer.tensors["weight"].cpu(), layer.packed.unpack().base_sign
    row, column = torch.meshgrid(torch.arange(33), torch.arange(300), indexing="ij")
    word = weight[row // 32, column // 128, :, (row % 8 * 4 + column % 128 // 32) * 4 + row % 32 // 8]
    bit = column % 32
    assert torch.equal((word[..., 0] >> bit & 1).bool(), stored[0])
    assert torch.equal((word[..., 1] >> (bit % 2 * 16 + bit // 2) & 1).bool(), stored[1])


def test_words_are_unshuffled_and_back():
    one = torch.tensor([1 << b for b in range(31)] + [-(2**31)], dtype=torch.int32)
    found = _unshuffled(one)
    assert [int(w) & 0xFFFFFFFF for w in found] == [1 << (b % 2 * 16 + b // 2) for b in range(32)]
    words = torch.randint(-(2**31), 2**31, (64,), dtype=torch.int32)
    assert torch.equal(_shuffled(_unshuffled(words)), words)


def test_stacked_coded_layers_are_laid_out_as_one(coded):
    whole = coded(64, 150, 2, 0, 128, "fp8")
    rows = {"weight": 1, "row_scale": 2, "row_exponent": 0}
    halves = []
    for first in (0, 32):
        stored = {n: t.narrow(rows[n], first, 32) if n in rows else t for n, t in whole.packed.tensors.items()}
        halves.append(to_kernel_layout(stored, replace(whole.geometry, rows=32)))
    for name, tensor in whole.tensors.items():
        found = torch.cat([half[name] for half in halves]) if name in rows else halves[0][name]
        assert torch.equal(found, tensor.cpu()), name


@pytest.mark.parametrize("layer", LAYERS)
def test_dequantize_of_a_coded_layer_is_the_reference_s(coded, layer):
    layer = coded(*layer)
    for dtype in (torch.float32, torch.float16):
        found = dequantize(layer.tensors, layer.geometry, dtype).cpu()
        assert torch.equal(found, layer.packed.dequantize().to(dtype))


def test_dequantize_of_a_run_of_a_coded_layer_s_rows_is_that_part(coded):
    layer = coded(*SMALL)
    found = dequantize(layer.tensors, layer.geometry, rows=slice(32, 70)).cpu()
    assert torch.equal(found, layer.packed.dequantize()[32:70])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("way", "dtype"), [("decode", "float16"), ("small_batch", "float16"), ("small_batch", "float32")]
)
def test_linear_of_a_coded_layer_is_the_reference_s(coded, assert_near, way, dtype, layer):
    layer = coded(*layer)
    for tokens in (1, 2, 3) if way == "decode" else (2,):
        x = layer.inputs(tokens, getattr(torch, dtype))
        assert_near(product(layer, x, way), layer.expected(x))


@pytest.mark.parametrize("layer", [SMALL, WITH_OTHERS])
@pytest.mark.parametrize("tokens", range(1, 9))
def test_decode_of_any_number_of_tokens_with_a_coded_layer_is_the_reference_s(coded, assert_near, layer, tokens):
    layer = coded(*layer)
    x, bias = layer.inputs(tokens, torch.float16), layer.bias()
    assert_near(product(layer, x, "decode", bias), layer.expected(x, bias))


@pytest.mark.parametrize("way", ["small_batch", "dense"])
def test_linear_of_more_tokens_with_a_coded_layer_is_the_reference_s(coded, assert_near, way):
    layer = coded(*WITH_OTHERS)
    x = layer.inputs(20, torch.float16)
    assert_near(product(layer, x, way), layer.expected(x))


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_decode_of_a_coded_layer_in_parts_is_the_reference_s(coded, assert_near, tokens):
    """A part begins in the middle of a row: the bits before it count."""
    layer = coded(64, 1100, 1, 1, 512, "fp8")
    x, bias = layer.inputs(tokens, torch.float16), layer.bias()
    found = product(layer, x, "decode", bias, decode_programs=64, decode_tiles=2)
    assert_near(found, layer.expected(x, bias))


def test_small_batch_of_a_coded_layer_in_parts_is_the_reference_s(coded, assert_near):
    layer = coded(33, 600, 2, 0, 128, "fp8")
    x = layer.inputs(9, torch.float16)
    assert_near(product(layer, x, "small_batch", batch_programs=64, batch_warps=1), layer.expected(x))


@pytest.mark.parametrize("way", WAYS)
def test_stacked_linear_of_coded_layers_is_the_reference_s(coded, assert_near, way):
    layer, sizes = coded(*SMALL), (32, 38)
    x, bias = layer.inputs(2, torch.float16), layer.bias()
    found = stacked_linear(x, layer.tensors, layer.geometry, sizes, bias.split(sizes), Launch(**WAYS[way]))
    for part, expected in zip(found, layer.expected(x, bias).split(sizes, 1), strict=True):
        assert_near(part, expected)


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_decode_of_a_coded_layer_s_largest_sums_is_exact(random_packed, layer_of, tokens):
    """All activations the largest an integer of 15 bits can be, all weights three halves: sums that leave the range
    which is read as a float would be far off."""
    packed = random_packed(32, 256, code="trellis16", block_size=128, residual_planes=0)
    packed.tensors["weight"].fill_(-1)  # P₁ = P₂ = 1 but for the first columns
    packed.tensors["row_scale"].fill_(0x38)  # 1
    packed.tensors["row_exponent"].zero_()
    packed.tensors["col_scale"] = torch.ones(256).half().view(torch.int16)
    layer = layer_of(packed)
    for sign in (1, -1):
        x = torch.full((tokens, 256), sign * 16383 / 8192, dtype=torch.float32).half()
        expected = layer.expected(x)
        found = product(layer, x.to(layer.device), "decode").cpu().float()
        assert torch.allclose(found, expected, rtol=2e-3), (found[0, 0], expected[0, 0])


@pytest.mark.parametrize("way", ["decode", "small_batch"])
def test_linear_of_a_coded_layer_keeps_the_largest_fp16_scales(random_packed, layer_of, assert_near, way):
    """3/2 of 60000 is more than fp16 holds."""
    packed = random_packed(32, 128, code="trellis16", block_size=128, residual_planes=0, row_scale="fp16")
    packed.tensors["row_scale"] = torch.full((1, 1, 32), 60000.0).half().view(torch.int16)
    packed.tensors["col_scale"] = torch.full((128,), 2.0**-14).half().view(torch.int16)
    layer = layer_of(packed)
    x = layer.inputs(3, torch.float16)
    assert_near(product(layer, x, way), layer.expected(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_decode_of_a_coded_layer_keeps_what_is_not_finite_within_its_token(coded, value):
    layer = coded(*SMALL)
    x = layer.inputs(2, torch.float16)
    clean = product(layer, x, "decode")
    x[1, 131] = value
    found = product(layer, x, "decode")
    assert not bool(torch.isfinite(found[1]).any())
    assert torch.equal(found[0], clean[0])


@pytest.mark.parametrize("code", [(0b1,), (0b1, 0b10, 0b11), (0b11, 0), (0b11, 1 << 31)])
def test_kernel_layout_refuses_codes_that_the_kernels_do_not_compute_with(code):
    geometry = Geometry(1, 1, 128, 1, 0, 0, 0, True, code)
    with pytest.raises(NotImplementedError, match="make two planes"):
        to_kernel_layout({"weight": torch.zeros(1, 1, 1, dtype=torch.int32)}, geometry)
