"""Products with packed weights against the reference, interpreted where there is no GPU."""

import math
from itertools import product as product_of

import pytest
import torch

pytest.importorskip("triton")
from sab_kernels import Launch, binary_linear, dense, linear, stacked_linear
from sab_kernels.product import Product

pytestmark = pytest.mark.usefixtures("poisoned")  # every output and every intermediate must be written

WAYS = {
    "decode": {},
    "small_batch": {"decode_tokens": 0},
    "dense": {"decode_tokens": 0, "dense_tokens": 1},
}
# every way with the dtypes it takes; interpreted, bf16 is computed in fp32 (test_interpreted_bf16_is_...)
CASES = [
    ("decode", torch.float16),
    ("small_batch", torch.float16),
    ("small_batch", torch.float32),
    ("dense", torch.float16),
    ("dense", torch.float32),
    *[pytest.param(way, torch.bfloat16, marks=pytest.mark.gpu) for way in WAYS],
]
every_way = pytest.mark.parametrize(("way", "dtype"), CASES)
LOW_PRECISION = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def settings_of(block_size, planes, row_scale="fp8", fraction=0.125):
    return {
        "block_size": block_size,
        "base_planes": planes[0],
        "residual_planes": planes[1],
        "row_scale": row_scale,
        "salient_fraction": fraction,
    }


def product(layer, x, way, bias=None, **launch):
    settings = Launch(**{**WAYS[way], **launch})
    assert linear.regime(x.shape[0], x.dtype, settings) == way
    found = binary_linear(x, layer.tensors, layer.geometry, bias, settings)
    assert found.dtype == x.dtype and found.shape == (x.shape[0], layer.rows) and found.is_contiguous()
    return found


# what makes the weight dense: test_dequantize.py
SAMPLED = {("decode", 32, (2, 2)), ("decode", 96, (1, 0)), ("small_batch", 64, (2, 1)), ("small_batch", 512, (1, 1))}
PLANES_AND_BLOCKS = [
    pytest.param(*case, marks=() if case in SAMPLED else pytest.mark.full)
    for case in product_of(["decode", "small_batch"], [32, 64, 96, 128, 256, 512], [(1, 0), (1, 1), (2, 1), (2, 2)])
]


@pytest.fixture(scope="module")
def layer(random_layer):
    """Three row tiles and three column tiles, neither full."""
    return random_layer(70, 300)


@pytest.fixture
def splits(monkeypatch):
    """Into how many parts the columns of every product were split."""
    split, found = Product.split, []

    def record(*args):
        found.append(split(*args))
        return found[-1]

    monkeypatch.setattr(Product, "split", record)
    return found


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "settings"),
    [
        (1, 1, 2, settings_of(128, (1, 1))),  # no salient column
        (1, 40, 3, settings_of(128, (1, 0), "fp16")),
        (31, 31, 1, settings_of(32, (1, 1), "fp16")),
        (33, 40, 8, settings_of(32, (2, 1), "fp8", 0.3)),
        (70, 128, 1, settings_of(64, (1, 0))),
        (64, 257, 2, settings_of(128, (1, 1))),
        (33, 300, 3, settings_of(96, (1, 1), "fp16", 0.3)),
        (70, 300, 5, settings_of(256, (1, 1), "fp8", 0.3)),
        (31, 544, 2, settings_of(512, (2, 1), "fp16", 1 / 16)),
        (33, 544, 4, settings_of(128, (1, 1))),
    ],
)
@every_way
def test_linear_of_any_shape_is_the_reference_s(random_layer, assert_near, way, dtype, rows, columns, tokens, settings):
    layer = random_layer(rows, columns, **settings)
    x = layer.inputs(tokens, dtype)
    assert_near(product(layer, x, way), layer.expected(x))


@pytest.mark.parametrize(("way", "block_size", "planes"), PLANES_AND_BLOCKS)
def test_linear_of_any_planes_and_blocks_is_the_reference_s(random_layer, assert_near, way, block_size, planes):
    row_scale = "fp16" if (block_size // 32 + sum(planes)) % 2 else "fp8"
    layer = random_layer(20, 140, **settings_of(block_size, planes, row_scale, 0.3))
    x = layer.inputs(3, torch.float16)
    assert_near(product(layer, x, way), layer.expected(x))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9, 17, 40])
@every_way
def test_linear_of_any_number_of_tokens_is_the_reference_s(random_layer, assert_near, way, dtype, tokens):
    if way == "decode" and tokens > 8:
        pytest.skip("more tokens than it takes")
    layer = random_layer(33, 200, block_size=64, salient_fraction=0.3)
    x = layer.inputs(tokens, dtype)
    assert_near(product(layer, x, way), layer.expected(x))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize(
    "launch",
    [
        {"decode_tiles": 1, "decode_programs": 1, "decode_unroll": 1},
        {"decode_tiles": 2, "decode_programs": 1, "decode_unroll": 3},
        {"decode_tiles": 1, "decode_programs": 64},
        {"decode_tiles": 2, "decode_programs": 64, "decode_unroll": 4},
    ],
    ids=str,
)
def test_decode_with_any_launch_is_the_reference_s(random_layer, assert_near, splits, launch, dtype):
    layer = random_layer(128, 600, block_size=64)  # five column tiles in one part or two, three slot tiles
    x, bias = layer.inputs(2, dtype), layer.bias()
    assert_near(product(layer, x, "decode", bias, **launch), layer.expected(x, bias))
    if layer.device.type == "cpu":
        assert splits == [2 if launch["decode_programs"] == 64 else 1]


@pytest.mark.parametrize("tokens", [4, 8])
def test_decode_of_columns_in_four_parts_is_the_reference_s(random_layer, assert_near, splits, tokens):
    """More parts than the residual has tiles: some have nothing to add."""
    layer = random_layer(33, 1100, salient_fraction=1 / 16)
    x, bias = layer.inputs(tokens, torch.float16), layer.bias()
    assert_near(product(layer, x, "decode", bias, decode_programs=64), layer.expected(x, bias))
    assert splits == [4]


@pytest.mark.parametrize(
    "launch",
    [
        {"batch_warps": 1, "batch_tokens": 16},
        {"batch_warps": 2, "batch_tokens": 16, "batch_programs": 1},
        {"batch_warps": 4, "batch_tokens": 32},
        {"batch_warps": 8, "batch_tokens": 64},
        {"batch_warps": 1, "batch_tokens": 32, "batch_programs": 64},
        {"batch_warps": 2, "batch_tokens": 16, "batch_programs": 64},
        {"batch_warps": 4, "batch_tokens": 16, "batch_programs": 64, "batch_stages": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
def test_small_batch_with_any_launch_is_the_reference_s(random_layer, assert_near, splits, launch, dtype):
    layer = random_layer(70, 400, salient_fraction=1 / 16)  # three row tiles: no program of 2, 4 or 8 warps is full
    x, bias = layer.inputs(20, dtype), layer.bias()
    assert_near(product(layer, x, "small_batch", bias, **launch), layer.expected(x, bias))
    if launch.get("batch_programs") == 64:
        assert splits == [2]


@pytest.mark.parametrize("sizes", [(70,), (32, 38)])
def test_dense_in_pieces_is_the_reference_s(random_layer, assert_near, monkeypatch, sizes):
    layer = random_layer(70, 4200, residual_planes=0)
    pieces, into = [], dense.dequantize_into

    def record(out, tensors, geometry, start):
        pieces.append((start, start + len(out)))
        into(out, tensors, geometry, start)

    monkeypatch.setattr(dense, "dequantize_into", record)
    x, bias = layer.inputs(3, torch.float32), layer.bias()
    launch = Launch(dense_tokens=1, dense_bytes=1 << 20)  # 32 rows
    found = stacked_linear(x, layer.tensors, layer.geometry, sizes, bias.split(sizes), launch)
    assert_near(torch.cat(found, 1), layer.expected(x, bias))
    assert pieces == [(0, 32), (32, 64), (64, 70)]


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16])
@every_way
def test_linear_adds_the_bias(layer, assert_near, way, dtype, bias_dtype):
    x, bias = layer.inputs(3, dtype), layer.bias(bias_dtype)
    assert_near(product(layer, x, way, bias), layer.expected(x, bias))


@every_way
def test_linear_of_zero_scales_is_the_bias(random_packed, layer_of, way, dtype):
    packed = random_packed(40, 200)
    packed.tensors["row_scale"] &= 0x80  # positive and negative zero
    layer = layer_of(packed)
    bias = layer.bias(dtype)
    assert torch.equal(product(layer, layer.inputs(3, dtype), way, bias), bias.expand(3, -1))


@every_way
def test_linear_keeps_every_fp8_scale(random_packed, layer_of, way, dtype):
    """All finite e4m3 bit patterns. A token sees one block, so that no large scale hides an error in a small one."""
    packed = random_packed(64, 128, block_size=32, residual_planes=0)
    codes = torch.arange(256, dtype=torch.uint8).view(1, 4, 64)
    packed.tensors["row_scale"] = torch.where(codes & 127 == 127, 1, codes).to(torch.uint8)
    packed.tensors["row_exponent"].zero_()
    layer = layer_of(packed)
    x = layer.inputs(4, dtype) * torch.eye(4, device=layer.device).repeat_interleave(32, 1).to(dtype)
    error = (product(layer, x, way).cpu().float() - layer.expected(x)).abs()
    summands = x.cpu().float().abs() @ packed.dequantize().abs().T
    assert bool((error <= {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype] * summands).all())
    assert bool((summands > 0).sum() >= 64 * 4 - 2)  # all but the two zeros


@pytest.mark.parametrize("way", ["small_batch", "dense"])
def test_linear_keeps_the_largest_and_smallest_powers_of_two(random_packed, layer_of, assert_near, way):
    packed = random_packed(40, 128)
    exponent = torch.tensor([-126, -60, 0, 50, 100]).repeat(8)
    packed.tensors["row_exponent"] = exponent.to(torch.int8)
    packed.tensors["row_scale"] = packed.tensors["row_scale"] & 0x80 | 0x30  # ±0.5
    layer = layer_of(packed)
    x = layer.inputs(3, torch.float32)
    unit = torch.exp2(exponent.double())
    found = product(layer, x, way).cpu().double() / unit
    assert_near(found.float(), layer.expected(x).double() / unit)


@every_way
def test_linear_of_zero_columns_and_a_token_of_zeros_is_the_reference_s(layer, assert_near, way, dtype):
    x, bias = layer.inputs(4, dtype), layer.bias(dtype)
    x[:, :40] = 0
    x[:, 128:256] = 0
    x[2] = 0
    found = product(layer, x, way, bias)
    assert_near(found, layer.expected(x, bias))
    assert torch.equal(found[2], bias)


@every_way
def test_linear_with_an_outlier_is_the_reference_s(layer, assert_near, way, dtype):
    x = layer.inputs(3, dtype)
    x[1, 17] = 1000
    found, expected = product(layer, x, way), layer.expected(x)
    for token in range(3):
        assert_near(found[token], expected[token])


@pytest.mark.parametrize("columns", [32, 200])
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("inputs", ["normal", "outlier", "tiny", "equal"])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_decode_rounds_activations_to_15_bits(random_layer, columns, block_size, inputs, dtype):
    """|error| ≤ 2⁻¹⁴ · Σ over tiles of 128 columns of max |x c| · Σ |w / c|, and the output's rounding."""
    layer = random_layer(20, columns, block_size=block_size, salient_fraction=0.2)
    x = layer.inputs(2, dtype)
    if inputs == "outlier":
        x[:, 5] = 1000
    elif inputs == "tiny":
        x *= 2.0**-12
    elif inputs == "equal":
        x = (x * 0 + 1.5).to(dtype)
    found, exact = product(layer, x, "decode").cpu().double(), layer.expected(x).double()
    weight, scale = layer.packed.dequantize().double(), layer.packed.column_scale().double()
    peaks = [part.abs().amax(1) for part in (x.cpu().double() * scale).split(128, 1)]
    sums = [part.abs().sum(1) for part in (weight / scale).split(128, 1)]
    bound = 2.0**-14 * sum(peak[:, None] * total[None, :] for peak, total in zip(peaks, sums))
    summands = x.cpu().double().abs() @ weight.abs().T
    rounding = EPSILON[dtype] * (exact.abs() + bound) + 2.0**-25 + 2.0**-20 * summands  # of fp16, and of fp32 sums
    assert bool(((found - exact).abs() <= bound + rounding).all())


VIEWS = {
    "transposed": lambda whole: whole.T[1:5, 40:190],
    "cut": lambda whole: whole[1:5, 40:190],
    "every other column": lambda whole: whole[1:5, 1:301:2],
    "every other row": lambda whole: whole[1:9:2, 40:190],
    "one row": lambda whole: whole[1:2, 40:190],
}


@pytest.mark.parametrize("view", VIEWS)
@every_way
def test_linear_of_inputs_of_any_strides_is_the_reference_s(random_layer, assert_near, way, dtype, view):
    """What lies around the inputs is NaN, and shows if a kernel reads it."""
    layer = random_layer(33, 150)
    whole = torch.full((320, 10) if view == "transposed" else (10, 320), math.nan, dtype=dtype, device=layer.device)
    x = VIEWS[view](whole)
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(3)))
    if view == "one row":
        x = x.expand(4, -1)
    assert not x.is_contiguous()
    assert_near(product(layer, x, way), layer.expected(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_of_no_tokens_is_empty(layer, dtype):
    found = binary_linear(torch.zeros(0, 300, dtype=dtype, device=layer.device), layer.tensors, layer.geometry)
    assert found.shape == (0, 70) and found.dtype == dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@every_way
def test_linear_keeps_what_is_not_finite_within_its_token(layer, way, dtype, value):
    x = layer.inputs(3, dtype)
    clean = product(layer, x, way)
    x[1, 131] = value
    found = product(layer, x, way)
    assert not bool(torch.isfinite(found[1]).any())
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


@every_way
def test_linear_is_the_same_from_call_to_call(random_layer, splits, way, dtype):
    layer = random_layer(33, 600)
    x, bias = layer.inputs(3, dtype), layer.bias()
    launch = {"decode_programs": 64, "batch_programs": 64, "batch_warps": 1}
    first = product(layer, x, way, bias, **launch)
    assert torch.equal(first, product(layer, x, way, bias, **launch))
    assert way == "dense" or min(splits) > 1


@every_way
def test_stacked_linear_is_the_reference_s_of_every_layer(random_layer, assert_near, way, dtype):
    layer, sizes = random_layer(145, 150), (32, 64, 32, 17)
    x, bias = layer.inputs(3, dtype), layer.bias()
    found = stacked_linear(x, layer.tensors, layer.geometry, sizes, bias.split(sizes), Launch(**WAYS[way]))
    assert all(part.is_contiguous() and part.dtype == dtype for part in found)
    for part, expected in zip(found, layer.expected(x, bias).split(sizes, 1), strict=True):
        assert_near(part, expected)


@pytest.mark.parametrize("sizes", [(32, 32, 1), (32, 33), (64, 1), (65,)])
@pytest.mark.parametrize("way", WAYS)
def test_stacked_linear_of_any_number_of_layers_is_the_reference_s(random_layer, assert_near, way, sizes):
    layer = random_layer(65, 100)
    x = layer.inputs(2, torch.float16)
    found = stacked_linear(x, layer.tensors, layer.geometry, sizes, (), Launch(**WAYS[way]))
    for part, expected in zip(found, layer.expected(x).split(sizes, 1), strict=True):
        assert_near(part, expected)


@pytest.mark.parametrize("way", ["decode", "small_batch"])
def test_stacked_linear_of_columns_in_parts_is_the_reference_s(random_layer, assert_near, splits, way):
    layer = random_layer(81, 600)
    x = layer.inputs(2, torch.float16)
    launch = Launch(**WAYS[way], decode_programs=64, batch_programs=64)
    found = stacked_linear(x, layer.tensors, layer.geometry, (32, 32, 17), (), launch)
    assert_near(torch.cat(found, 1), layer.expected(x))
    assert splits[0] > 1


@pytest.mark.parametrize(("tokens", "apart"), [(2, 2**31), (4, 2**30)])
@pytest.mark.parametrize("way", ["decode", "small_batch"])
def test_linear_addresses_tokens_that_are_far_apart(layer, way, tokens, apart):
    """The stride does not fit into 32 bits, or the offset does not."""
    if layer.device.type == "cuda" and torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of memory")
    near = layer.inputs(tokens, torch.float16)
    far = torch.empty_strided((tokens, 300), (apart, 1), dtype=near.dtype, device=near.device)  # few pages are touched
    far.copy_(near)
    assert torch.equal(product(layer, far, way), product(layer, near, way))


def test_regime_follows_tokens_and_dtype():
    launch = Launch(decode_tokens=4, dense_tokens=100)
    for dtype in (torch.float16, torch.bfloat16):
        found = [linear.regime(tokens, dtype, launch) for tokens in (1, 4, 5, 99, 100, 10**6)]
        assert found == ["decode", "decode", "small_batch", "small_batch", "dense", "dense"]
    found = [linear.regime(tokens, torch.float32, launch) for tokens in (1, 99, 100)]
    assert found == ["small_batch", "small_batch", "dense"]
    assert linear.regime(1, torch.float16, Launch(decode_tokens=0)) == "small_batch"


@pytest.mark.parametrize("shape", [(3, 299), (3, 301), (300,), (1, 3, 300), (300, 3)])
def test_linear_refuses_inputs_of_another_shape(layer, shape):
    with pytest.raises(ValueError, match=r"\[tokens, 300\]") as raised:
        binary_linear(torch.zeros(shape, device=layer.device), layer.tensors, layer.geometry)
    assert str(shape) in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64])
def test_linear_refuses_inputs_of_another_dtype(layer, dtype):
    with pytest.raises(ValueError, match=str(dtype)):
        binary_linear(torch.zeros(3, 300, dtype=dtype, device=layer.device), layer.tensors, layer.geometry)


def test_linear_refuses_inputs_on_another_device(layer):
    with pytest.raises(ValueError, match=f"on meta, the weight on {layer.device.type}"):
        binary_linear(torch.zeros(3, 300, device="meta"), layer.tensors, layer.geometry)


@pytest.mark.parametrize("sizes", [(32, 32), (70, 32), (31, 39), (32, 33, 5), (32, 0, 0, 0, 38), ()])
def test_stacked_linear_refuses_sizes_that_do_not_fit(layer, sizes):
    with pytest.raises(ValueError, match="cannot be stacked") as raised:
        stacked_linear(layer.inputs(3, torch.float32), layer.tensors, layer.geometry, sizes)
    assert str(sizes) in str(raised.value)


@pytest.mark.parametrize("sizes", [(70,), (38, 32), (32,), (32, 37)])
def test_stacked_linear_refuses_biases_of_other_sizes(layer, sizes):
    biases = [torch.zeros(size, device=layer.device) for size in sizes]
    with pytest.raises(ValueError, match="do not belong to layers") as raised:
        stacked_linear(layer.inputs(3, torch.float32), layer.tensors, layer.geometry, (32, 38), biases)
    assert str(list(sizes)) in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")
@pytest.mark.parametrize("tokens", [1, 3, 20, 700])
def test_interpreted_bf16_is_the_reference_s_rounded_once(random_layer, assert_near, tokens):
    """Triton's interpreter multiplies the bit patterns of bfloat16 and cuts where it should round."""
    layer = random_layer(40, 160, base_planes=2)
    x = torch.randn(tokens, 160, generator=torch.Generator().manual_seed(3)).bfloat16()
    bias = torch.randn(40, generator=torch.Generator().manual_seed(4)).bfloat16()
    found = binary_linear(x, layer.tensors, layer.geometry, bias)
    assert_near(found, x.double() @ layer.packed.dequantize().double().T + bias.double())
    wide = binary_linear(x.float(), layer.tensors, layer.geometry, bias)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wide.bfloat16())
