import itertools

import pytest
import torch

from optimum_sab.core.code import CODES, NO_CODE
from optimum_sab.errors import ConfigError, FormatError
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.ops.cpu import kernel, layer
from optimum_sab.ops.reference import binary_linear

PLANES = [(1, 0), (1, 1), (2, 1), (2, 2)]
BLOCKS = [32, 64, 96, 128, 256]
# Stored planes with a code; what is computed has one more.
CODED = [
    *(((1, 0), "trellis16"), ((1, 1), "trellis16"), ((2, 1), "trellis16")),
    *(((1, 1), "trellis16x2"), ((2, 0), "trellis16x2"), ((2, 1), "trellis16x2"), ((3, 0), "trellis16x2")),
]
KINDS = [*itertools.product(PLANES, BLOCKS, ["none"]), *((p, size, code) for p, code in CODED for size in (128, 512))]
WIDTHS = [1, 31, 40, 75, 128, 257, 300]
TENSORS = ["weight", "residual_sign", "residual_index", "row_scale", "row_exponent", "col_scale"]
TOKENS = [0, 1, 2, 3, 5, 8, 17, 64]
# Of 128 columns these make 4, 8, 16, 5 and 11 salient, of other blocks other numbers, odd ones among them.
FRACTIONS = [1 / 32, 1 / 16, 1 / 8, 5 / 128, 11 / 128]
# One rounding of the result to the input's dtype, and fp32's sums, relative to the sum of the terms' sizes.
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SUMS = 1e-5
INTEGER_SUMS = 5e-5  # of bf16 in integers, where inputs without outliers are rounded to 2⁻¹⁵ of their block's largest


PATHS = {
    "portable": (0, "-DSAB_PATH=0"),
    "portable dot products": (0, "-DSAB_PATH=0", "-DSAB_DOTS=1"),  # what Arm computes
    "avx2": (1, "-DSAB_PATH=1"),
    "avx512": (2, "-DSAB_PATH=2"),
    "avx512 of Skylake": (2, "-DSAB_PATH=2", "-mno-avx512vnni", "-mno-avx512vbmi2"),
}
IN_INTEGERS = ("portable dot products", "avx512", "avx512 of Skylake")  # bf16


@pytest.fixture(params=list(PATHS))
def path(request, monkeypatch, compiled):
    """Each of the kernel's paths that this machine has."""
    number, *flags = PATHS[request.param]
    build = compiled(*flags)
    if build.library is None or build.library.sab_path() != number:
        pytest.skip(f"no {request.param} here: {build.reason}")
    monkeypatch.setattr(kernel, "load_library", lambda: build.library)
    return request.param


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that the kernel allocates holds NaN until something is written."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))


every_kind = pytest.mark.parametrize(("planes", "block_size", "code"), KINDS)
every_code = pytest.mark.parametrize("code", ["none", "trellis16"])


def take_route(monkeypatch, route):
    """One way of `linear`, whatever the number of tokens; dense chunks are small so that there are several."""
    from_tokens = 0 if route == "dense" else 2**62
    monkeypatch.setattr(
        kernel, "_DENSE_FROM", {key: dict.fromkeys(kernel.DTYPES, from_tokens) for key in kernel._DENSE_FROM}
    )
    monkeypatch.setattr(kernel, "_CHUNK_BYTES", 20_000)


@pytest.fixture(params=["packed", "dense"])
def route(request, monkeypatch):
    take_route(monkeypatch, request.param)


def random_inputs(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found, inputs, packed, rounding):
    assert_near_slices([found], [inputs], packed, rounding)


def assert_near_slices(found, inputs, packed, rounding, sums=SUMS):
    """Each `found` is the linear of its `inputs`; the reference computes them all together."""
    together = torch.cat(inputs)
    expected = binary_linear(together.float(), packed)
    size = together.float().abs() @ packed.dequantize().abs().T  # Σ |x| |W|: what rounding in the sums relates to
    for y, x in zip(found, inputs, strict=True):
        assert y.dtype == x.dtype and y.shape == (x.shape[0], packed.out_features)
    allowed = rounding * expected.abs() + sums * size + 1e-7
    worst = ((torch.cat(found).float() - expected).abs() / allowed).nan_to_num(nan=float("inf"))
    assert worst.numel() == 0 or float(worst.max()) <= 1


@every_kind
def test_linear_equals_the_reference(path, random_packed, monkeypatch, planes, block_size, code):
    take_route(monkeypatch, "packed")
    rows = itertools.cycle([1, 7, 16, 33, 64, 65, 70])
    fractions = itertools.cycle(FRACTIONS if block_size >= 64 else [1 / 8, 1 / 4, 5 / 32])
    for seed, width in enumerate(WIDTHS):
        packed = random_packed(
            next(rows), width, seed, block_size=block_size, base_planes=planes[0], residual_planes=planes[1],
            salient_fraction=next(fractions), row_scale=("fp8", "fp16")[(seed + planes[1] + block_size // 32) % 2],
            code=code,
        )  # fmt: skip
        inputs = [random_inputs(tokens, width, seed=seed) for tokens in TOKENS]
        assert_near_slices([kernel.linear(x, packed) for x in inputs], inputs, packed, 0.0)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("planes", "code"), [*((p, "none") for p in PLANES), *CODED])
def test_linear_of_dense_chunks_equals_the_reference(random_packed, monkeypatch, planes, code, tokens):
    take_route(monkeypatch, "dense")
    packed = random_packed(70, 300, base_planes=planes[0], residual_planes=planes[1], code=code)
    inputs = random_inputs(tokens, 300)
    assert_near(kernel.linear(inputs, packed), inputs, packed, 0.0)


@every_code
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_linear_chooses_a_route_by_the_number_of_tokens(path, random_packed, dtype, code):
    packed = random_packed(70, 300, code=code)
    for tokens in (1, 31, 32, 64, 200):
        inputs = random_inputs(tokens, 300, dtype=dtype)
        found, exact = kernel.linear(inputs, packed), binary_linear(inputs.float(), packed)
        assert float((found.float() - exact).norm()) <= (ROUNDING[dtype] + SUMS) * float(exact.norm())


@every_code
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_linear_rounds_once(path, random_packed, monkeypatch, fraction, dtype, code):
    take_route(monkeypatch, "packed")
    packed = random_packed(37, 300, salient_fraction=fraction, code=code)
    inputs = [random_inputs(tokens, 300, dtype=dtype) for tokens in TOKENS]
    sums = INTEGER_SUMS if dtype is torch.bfloat16 and path in IN_INTEGERS else SUMS
    assert_near_slices([kernel.linear(x, packed) for x in inputs], inputs, packed, ROUNDING[dtype], sums)


@every_code
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("tokens", [1, 17])
def test_linear_adds_a_bias_to_the_rounded_product(path, route, random_packed, dtype, tokens, code):
    packed, inputs = random_packed(70, 300, code=code), random_inputs(tokens, 300, dtype=dtype)
    for other in ROUNDING:
        bias = random_inputs(70, seed=2, dtype=other)
        bias[:2] = torch.tensor([float("inf"), float("nan")])
        found, expected = kernel.linear(inputs, packed, bias), kernel.linear(inputs, packed) + bias.to(dtype)
        assert found.dtype == dtype
        assert torch.equal(found[:, [0, *range(2, 70)]], expected[:, [0, *range(2, 70)]])
        assert bool(found[:, 1].isnan().all())


@every_code
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_of_many_tokens_is_as_accurate_as_a_dense_layer(path, random_packed, monkeypatch, dtype, code):
    take_route(monkeypatch, "dense")
    packed, inputs = random_packed(70, 300, code=code), random_inputs(64, 300, dtype=dtype)
    exact = inputs.double() @ packed.dequantize().double().T
    error = (kernel.linear(inputs, packed).double() - exact).norm()
    dense = (torch.nn.functional.linear(inputs, packed.dequantize().to(dtype)).double() - exact).norm()
    assert error <= 1.05 * dense


@every_code
@pytest.mark.parametrize("rows", [*range(1, 71, 6), 64, 70])
def test_linear_of_any_number_of_rows_equals_the_reference(path, random_packed, rows, code):
    packed, inputs = random_packed(rows, 140, base_planes=2, code=code), random_inputs(6, 140)
    assert_near(kernel.linear(inputs, packed), inputs, packed, 0.0)


@every_code
@pytest.mark.parametrize("block_size", [512, 4096])
def test_linear_of_wide_blocks_equals_the_reference(path, random_packed, block_size, code):
    packed, inputs = random_packed(20, 4500, block_size=block_size, code=code), random_inputs(3, 4500)
    assert_near(kernel.linear(inputs, packed), inputs, packed, 0.0)


@pytest.mark.parametrize("width", range(1, 32))
def test_linear_with_a_code_of_rows_that_end_inside_of_a_word(path, random_packed, monkeypatch, width):
    """Derived bits behind the end count for nothing; rows of two panels carry into the second."""
    take_route(monkeypatch, "packed")
    for columns in (width, 128 + width):
        packed, inputs = random_packed(18, columns, width, code="trellis16"), random_inputs(3, columns)
        assert_near(kernel.linear(inputs, packed), inputs, packed, 0.0)
        assert torch.equal(kernel.dequantize(packed), packed.dequantize())


@every_code
@pytest.mark.parametrize("outlier", [1.0, 1e3, 1e6])
def test_linear_is_as_accurate_as_a_dense_layer_in_fp32(path, random_packed, monkeypatch, outlier, code):
    """Also beside an input that is a million times as large as the others."""
    take_route(monkeypatch, "packed")
    packed, inputs = random_packed(200, 1000, code=code), random_inputs(8, 1000)
    inputs[:, 70] *= outlier
    exact = inputs.double() @ packed.dequantize().double().T
    error = (kernel.linear(inputs, packed).double() - exact).norm()
    dense = (torch.nn.functional.linear(inputs, packed.dequantize()).double() - exact).norm()
    assert error <= 1.5 * dense


@every_code
def test_linear_of_inputs_of_any_size_is_the_same_but_for_the_size(path, random_packed, monkeypatch, code):
    take_route(monkeypatch, "packed")
    packed, inputs = random_packed(40, 300, code=code), random_inputs(5, 300)
    inputs[:, 128:256] *= 2.0**-20  # blocks differ
    found = kernel.linear(inputs, packed)
    for power in (2.0**-60, 2.0**80):
        assert torch.equal(kernel.linear(inputs * power, packed), found * power)
    assert_near(kernel.linear(inputs * 2.0**-140, packed), inputs * 2.0**-140, packed, 0.0)  # subnormal ones
    assert not kernel.linear(torch.zeros(3, 300), packed).any()


def with_threads(inputs, packed):
    """The product on one, two and three threads."""
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            found.append(kernel.linear(inputs, packed))
        finally:
            torch.set_num_threads(threads)
    return found


@every_code
def test_linear_is_the_same_for_any_number_of_threads(path, random_packed, code):
    """The layer is large enough for several threads to be started."""
    packed, inputs = random_packed(331, 1024, code=code), random_inputs(5, 1024)
    found = with_threads(inputs, packed)
    assert_near(found[0], inputs, packed, 0.0)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@every_code
def test_linear_of_bf16_is_the_same_for_any_number_of_threads(path, random_packed, monkeypatch, code):
    """There are so many tokens and columns that strips share what they read of the tables."""
    take_route(monkeypatch, "packed")
    packed, inputs = random_packed(331, 2600, code=code), random_inputs(70, 2600, dtype=torch.bfloat16)
    found = with_threads(inputs, packed)
    assert_near_slices(found[:1], [inputs], packed, ROUNDING[torch.bfloat16], INTEGER_SUMS)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(("block_size", "fraction"), [(32, 6 / 32), (96, 18 / 96), (128, 5 / 128), (128, 11 / 128)])
def test_linear_of_bf16_whose_pieces_end_inside_of_words_equals_the_reference(
    path, random_packed, monkeypatch, block_size, fraction
):
    take_route(monkeypatch, "packed")
    packed = random_packed(70, 300, block_size=block_size, salient_fraction=fraction)
    inputs = random_inputs(3, 300, dtype=torch.bfloat16)
    sums = INTEGER_SUMS if path in IN_INTEGERS else SUMS
    assert_near_slices([kernel.linear(inputs, packed)], [inputs], packed, ROUNDING[torch.bfloat16], sums)


WIDE = [*((p, s, "none") for p in PLANES for s in (32, 96, 128, 512)), *((p, 512, code) for p, code in CODED)]


@pytest.mark.parametrize(("planes", "block_size", "code"), WIDE)
def test_linear_of_bf16_gives_a_token_the_same_in_any_company(
    path, random_packed, monkeypatch, planes, block_size, code
):
    take_route(monkeypatch, "packed")
    packed = random_packed(
        130, 1100, base_planes=planes[0], residual_planes=planes[1], block_size=block_size, code=code,
        salient_fraction=5 / 32 if block_size < 128 else 11 / 128,
    )  # fmt: skip
    inputs = random_inputs(37, 1100, dtype=torch.bfloat16)
    together = kernel.linear(inputs, packed)
    for count in (1, 2, 3, 4, 5, 33):
        assert torch.equal(kernel.linear(inputs[-count:], packed), together[-count:])


@every_code
@pytest.mark.parametrize("outlier", [1.0, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("columns", [75, 512, 1000])
def test_linear_of_bf16_is_as_accurate_as_its_rounding(path, random_packed, monkeypatch, columns, outlier, code):
    """Closer to fp64 than a dense product, and hardly further than fp64 rounded to bf16."""
    take_route(monkeypatch, "packed")
    packed, inputs = random_packed(200, columns, code=code), random_inputs(37, columns, dtype=torch.bfloat16)
    inputs[:, 70] *= outlier
    exact = inputs.double() @ packed.dequantize().double().T
    error = (kernel.linear(inputs, packed).double() - exact).norm()
    dense = torch.nn.functional.linear(inputs, packed.dequantize().bfloat16())
    assert error <= (dense.double() - exact).norm()
    assert error <= 1.05 * (exact.bfloat16().double() - exact).norm()


@pytest.mark.parametrize(("code", "planes"), [("none", 1), ("none", 3), ("trellis16", 1), ("trellis16x2", 2)])
@pytest.mark.parametrize("kind", ["even", "equal", "one", "eight"])
def test_linear_of_bf16_keeps_its_bound(path, random_packed, monkeypatch, kind, code, planes):
    """Integers are off by at most half a unit, 2⁻¹⁶ of the largest sum |x₀| + … + |x₇| of neighbours in 256 columns."""
    take_route(monkeypatch, "packed")
    packed = random_packed(70, 1100, code=code, base_planes=planes, residual_planes=0)
    inputs = random_inputs(9, 1100, dtype=torch.bfloat16)
    if kind == "equal":
        inputs = inputs.sign()
    elif kind == "one":
        inputs[:, ::256] *= 4096
    elif kind == "eight":
        inputs.view(-1, 1100)[:, 512:520] *= 4096
    scale = packed.tensors["col_scale"].view(torch.float16).double()
    scaled = torch.nn.functional.pad(inputs.double() * scale, (0, 1280 - 1100)).abs()
    unit = scaled.view(9, -1, 32, 8).sum(-1).amax(-1) / 32_762  # [tokens, 256 columns]
    off = unit.repeat_interleave(256, 1)[:, :1100] / 2
    weight = packed.dequantize().double()
    exact = inputs.double() @ weight.T
    bound = off @ (weight / scale).abs().T + ROUNDING[torch.bfloat16] * exact.abs() * 1.01
    bound += 1e-6 * (inputs.double().abs() @ weight.abs().T)  # fp32's sums
    assert ((kernel.linear(inputs, packed).double() - exact).abs() <= bound).all()


@every_code
def test_linear_of_bf16_inputs_of_any_size_is_the_same_but_for_the_size(path, random_packed, monkeypatch, code):
    take_route(monkeypatch, "packed")
    packed, inputs = random_packed(40, 700, code=code), random_inputs(5, 700, dtype=torch.bfloat16)
    inputs[:, 256:512] *= 2.0**-20  # blocks differ
    found = kernel.linear(inputs, packed)
    for power in (2.0**-60, 2.0**80):
        assert torch.equal(kernel.linear(inputs * power, packed), found * power)
    tiny = inputs * 2.0**-130  # subnormal ones among them
    assert_near(kernel.linear(tiny, packed), tiny, packed, ROUNDING[torch.bfloat16])
    assert not kernel.linear(torch.zeros(3, 700, dtype=torch.bfloat16), packed).any()
    packed.tensors["row_exponent"].fill_(-40)
    packed.tensors["col_scale"].view(torch.float16).clamp_(max=1.0)
    largest = torch.zeros(1, 700, dtype=torch.bfloat16)
    largest[0, 300] = torch.finfo(torch.bfloat16).max / 4096  # row scales are up to 448 before their exponent
    assert_near(kernel.linear(largest, packed), largest, packed, ROUNDING[torch.bfloat16])


def test_linear_accepts_inputs_that_are_not_contiguous(route, random_packed):
    packed = random_packed(20, 75)
    for view in (random_inputs(75, 8).T, random_inputs(5, 150)[:, ::2], random_inputs(1, 75).expand(3, -1)):
        assert not view.is_contiguous()
        assert_near(kernel.linear(view, packed), view, packed, 0.0)


@every_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_linear_is_not_finite_where_the_reference_is_not(path, route, random_packed, value, dtype, code):
    packed = random_packed(40, 300, code=code)
    for column in (0, 127, 128, 299, int(packed.salient_columns()[3])):
        inputs = random_inputs(5, 300, dtype=dtype)
        inputs[2, column] = value
        finite = binary_linear(inputs.float(), packed).isfinite()
        assert not finite[2].any() and finite[[0, 1, 3, 4]].all()
        assert torch.equal(kernel.linear(inputs, packed).isfinite(), finite)


@every_code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [128, 512])
def test_linear_reads_nothing_outside_its_inputs_for_a_damaged_index(path, random_packed, block_size, dtype, code):
    """Whatever lies behind x and the column scales is NaN here, and would show in the result."""
    packed = random_packed(20, 75, block_size=block_size, code=code)
    packed.tensors["residual_index"].fill_(-1 if block_size > 256 else 255)
    scale = torch.full((4096,), 0x7E00, dtype=torch.int16)
    scale[:75] = packed.tensors["col_scale"]
    packed.tensors["col_scale"] = scale[:75]
    inputs = torch.full((70_000,), float("nan"), dtype=dtype)
    inputs[:75] = 1.0
    assert kernel.linear(inputs[:75].view(1, 75), packed).isfinite().all()


def test_linear_gives_no_gradient(route, random_packed):
    inputs = random_inputs(3, 75).requires_grad_()
    assert not kernel.linear(inputs, random_packed(20, 75)).requires_grad


@pytest.mark.parametrize("scale", ["fp8", "fp16"])
@every_kind
def test_dequantize_is_exact(path, random_packed, planes, block_size, code, scale):
    fractions = itertools.cycle(FRACTIONS if block_size >= 64 else [1 / 8, 1 / 4, 5 / 32])
    for seed, width in enumerate([*WIDTHS, 1000]):
        packed = random_packed(
            (37, 1, 64)[seed % 3], width, seed, block_size=block_size, base_planes=planes[0],
            residual_planes=planes[1], salient_fraction=next(fractions), row_scale=scale, code=code,
        )  # fmt: skip
        expected = packed.dequantize()
        for dtype in kernel.DTYPES:
            assert torch.equal(kernel.dequantize(packed, dtype), expected.to(dtype))


@every_code
def test_dequantize_is_exact_for_every_scale_and_exponent(path, random_packed, code):
    """All finite e4m3 values, and row exponents from the smallest stored to the largest."""
    packed = random_packed(254, 256, block_size=128, residual_planes=0, code=code)
    finite = torch.tensor([bits for bits in range(256) if bits & 0x7F != 0x7F], dtype=torch.uint8)
    packed.tensors["row_scale"][0, 0], packed.tensors["row_scale"][0, 1] = finite, finite.flip(0)
    for exponent in (-128, -127, -126, -100, -20, 0, 20, 119):
        packed.tensors["row_exponent"].fill_(exponent)
        expected = packed.dequantize()
        for dtype in kernel.DTYPES:
            assert torch.equal(kernel.dequantize(packed, dtype), expected.to(dtype))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(3, 76), "76.*75"),
        (torch.zeros(75), r"\(75,\).*75"),
        (torch.zeros(1, 3, 75), "1, 3, 75"),
        (torch.zeros(3, 75, dtype=torch.float64), "float64"),
        (torch.zeros(3, 75, dtype=torch.int32), "int32"),
        (torch.zeros(3, 75, device="meta"), "meta"),
    ],
)
def test_linear_refuses_other_inputs(random_packed, inputs, message):
    with pytest.raises(ConfigError, match=message):
        kernel.linear(inputs, random_packed(20, 75))


def test_codes_that_c_computes_are_all_that_there_are():
    assert set(layer.CODES) == {NO_CODE, *CODES}


def test_dequantize_refuses_another_dtype(random_packed):
    with pytest.raises(ConfigError, match="float64"):
        kernel.dequantize(random_packed(20, 75), torch.float64)


@pytest.mark.parametrize(
    "name", ["weight", "residual_sign", "residual_index", "row_scale", "row_exponent", "col_scale"]
)
@pytest.mark.parametrize(
    "damage",
    [
        lambda tensor: None,
        lambda tensor: tensor.long(),
        lambda tensor: tensor[..., :-1].contiguous(),
        lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
        lambda tensor: tensor.to("meta"),
    ],
    ids=["missing", "dtype", "shape", "strides", "device"],
)
def test_linear_refuses_a_tensor_that_c_cannot_trust(random_packed, name, damage):
    packed = random_packed(20, 75)
    tensors = dict(packed.tensors)
    tensors[name] = damage(tensors[name])
    broken = PackedWeight({n: t for n, t in tensors.items() if t is not None}, 20, 75, packed.settings)
    for compute in (lambda: kernel.linear(random_inputs(1, 75), broken), lambda: kernel.dequantize(broken)):
        with pytest.raises(FormatError, match=name):
            compute()
