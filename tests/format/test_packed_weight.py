import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from optimum_sab.core.planes import BinaryPlanes
from optimum_sab.core.row_scale import round_column_scale, round_row_scale
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import FormatError
from optimum_sab.format.layout import salient_per_block, stored_bits_per_weight, tensor_specs
from optimum_sab.format.packed_weight import PackedWeight

bounded = hypothesis.settings(max_examples=80, deadline=None, derandomize=True)


def random_planes(out, width, settings, seed=0):
    """Planes with rounded scales of both signs, and salient columns in random places."""
    generator = torch.Generator().manual_seed(seed)
    index = []
    for k, count in enumerate(salient_per_block(width, settings)):
        start = k * settings.block_size
        size = min(settings.block_size, width - start)
        index += [start + int(j) for j in torch.randperm(size, generator=generator)[:count].sort().values]
    blocks = len(salient_per_block(width, settings))
    row_scale = torch.randn(settings.planes, blocks, out, generator=generator)
    row_scale *= (3 * torch.randn(out, generator=generator)).exp()
    return BinaryPlanes(
        base_sign=torch.rand(settings.base_planes, out, width, generator=generator) < 0.5,
        residual_sign=torch.rand(settings.residual_planes, out, len(index), generator=generator) < 0.5,
        residual_index=torch.tensor(index, dtype=torch.int64),
        row_scale=round_row_scale(row_scale, settings.row_scale),
        column_scale=round_column_scale(torch.randn(width, generator=generator)),
        block_size=settings.block_size,
        code=settings.code,
    )


def assert_same(found, expected):
    for field in dataclasses.fields(BinaryPlanes):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype, field.name
            assert torch.equal(one, other), field.name
        else:
            assert one == other, field.name


layer_settings = st.builds(
    lambda block, planes, storage: LayerSettings(
        block_size=block, base_planes=planes[0], residual_planes=planes[1], row_scale=storage
    ),
    st.sampled_from([32, 64, 128]),
    st.sampled_from([(1, 0), (1, 1), (2, 0), (2, 1), (1, 3), (4, 0), (3, 1)]),
    st.sampled_from(["fp8", "fp16"]),
) | st.builds(
    lambda planes, storage: LayerSettings(
        block_size=128, base_planes=planes[0], residual_planes=planes[1], row_scale=storage, code="trellis16"
    ),
    st.sampled_from([(1, 0), (1, 1), (2, 0), (2, 1), (1, 2), (3, 0)]),
    st.sampled_from(["fp8", "fp16"]),
)


@bounded
@hypothesis.given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 300), layer_settings)
def test_unpack_gives_back_exactly_what_was_packed(seed, out, width, settings):
    planes = random_planes(out, width, settings, seed)
    packed = PackedWeight.pack(planes, settings)
    packed.validate()
    assert_same(packed.unpack(), planes)
    assert torch.equal(packed.dequantize(), planes.dequantize())


@bounded
@hypothesis.given(st.integers(1, 40), st.integers(1, 300), layer_settings)
def test_pack_stores_what_the_specs_say_and_counts_its_bytes(out, width, settings):
    packed = PackedWeight.pack(random_planes(out, width, settings), settings)
    specs = tensor_specs(out, width, settings)
    assert list(packed.tensors) == list(specs)
    for name, tensor in packed.tensors.items():
        assert (tuple(tensor.shape), tensor.dtype) == (specs[name].shape, specs[name].dtype)
        assert not tensor.dtype.is_floating_point
        assert tensor.is_contiguous()
    stored = sum(len(bytes(t.view(torch.uint8).flatten().tolist())) for t in packed.tensors.values())
    assert packed.stored_bytes == stored
    assert packed.bits_per_weight == 8 * stored / (out * width)
    assert packed.bits_per_weight == stored_bits_per_weight(out, width, settings)


def test_pack_of_wide_blocks_indexes_past_255():
    settings = LayerSettings(block_size=512, salient_fraction=0.5)
    planes = random_planes(2, 1000, settings)
    assert int((planes.residual_index % 512).max()) > 255
    assert_same(PackedWeight.pack(planes, settings).unpack(), planes)


# --- the layout on disk, byte by byte: a change here is a new format version ---

# Two rows, 34 columns in blocks of 32 and 2; one base and one residual plane; columns 3 and 17 are salient.
GOLDEN = LayerSettings(block_size=32, salient_fraction=0.0625)
FP16 = GOLDEN.replace(row_scale="fp16")


def golden_planes():
    base = torch.zeros(1, 2, 34, dtype=torch.bool)
    base[0, 0, [0, 31, 32]] = True
    base[0, 1] = True
    return BinaryPlanes(
        base_sign=base,
        residual_sign=torch.tensor([[[True, False], [True, True]]]),
        residual_index=torch.tensor([3, 17]),
        row_scale=torch.tensor([[[1.0, 7.0], [0.5, -3.5]], [[0.25, 1.75], [0.0, 0.0]]]),  # [plane, block, row]
        column_scale=torch.tensor([1.0, 0.5, 0.0, -2.0, *[1.0] * 30]),
        block_size=32,
    )


def test_pack_lays_out_the_golden_example_bit_by_bit():
    tensors = PackedWeight.pack(golden_planes(), GOLDEN).tensors
    # row 0: bits 0 and 31 of word 0 (0x80000001), bit 0 of word 1; row 1: all 32 bits, then bits 0 and 1
    assert tensors["weight"].tolist() == [[[-0x7FFFFFFF, 1], [-1, 3]]]
    # a bit per salient column, the first lowest
    assert tensors["residual_sign"].tolist() == [[[0b01], [0b11]]]
    assert tensors["residual_index"].tolist() == [3, 17]
    # row 0: 1.0 is the peak, the unit 2^-8, so 1.0 is 256 = 0x78, 0.5 is 128 = 0x70, 0.25 is 64 = 0x68
    # row 1: 7.0 is the peak, the unit 2^-6, so 7.0 is 448 = 0x7E, −3.5 is −224 = 0xF6, 1.75 is 112 = 0x6E
    assert tensors["row_scale"].tolist() == [[[0x78, 0x7E], [0x70, 0xF6]], [[0x68, 0x6E], [0x00, 0x00]]]
    assert tensors["row_exponent"].tolist() == [-8, -6]
    # 1.0 is 0x3C00, 0.5 is 0x3800, −2.0 is 0xC000 = −0x4000 as int16
    assert tensors["col_scale"].tolist() == [0x3C00, 0x3800, 0, -0x4000, *[0x3C00] * 30]


def test_pack_lays_out_fp16_row_scales_bit_by_bit():
    tensors = PackedWeight.pack(golden_planes(), FP16).tensors
    assert "row_exponent" not in tensors
    # 7.0 is 0x4700, −3.5 is 0xC300 = 0x4300 − 0x8000, 1.75 is 0x3F00, 0.25 is 0x3400
    assert tensors["row_scale"].tolist() == [[[0x3C00, 0x4700], [0x3800, 0x4300 - 0x8000]], [[0x3400, 0x3F00], [0, 0]]]


def golden_tensors():
    """The golden example as bytes, written by hand rather than by `pack`."""
    return {
        "weight": torch.tensor([[[-0x7FFFFFFF, 1], [-1, 3]]], dtype=torch.int32),
        "residual_sign": torch.tensor([[[1], [3]]], dtype=torch.uint8),
        "residual_index": torch.tensor([3, 17], dtype=torch.uint8),
        "row_scale": torch.tensor([[[0x78, 0x7E], [0x70, 0xF6]], [[0x68, 0x6E], [0, 0]]], dtype=torch.uint8),
        "row_exponent": torch.tensor([-8, -6], dtype=torch.int8),
        "col_scale": torch.tensor([0x3C00, 0x3800, 0, -0x4000, *[0x3C00] * 30], dtype=torch.int16),
    }


def test_unpack_reads_the_golden_bytes():
    packed = PackedWeight(golden_tensors(), 2, 34, GOLDEN)
    packed.validate()
    assert_same(packed.unpack(), golden_planes())


def test_dequantize_of_the_golden_bytes():
    # row 0: ±1 with + at columns 0 and 31, times c = 1, .5, 0, −2, 1 …; salient 3: (−1 + .25) · −2 = 1.5,
    #        salient 17: −1 − .25; block 1: ±.5
    # row 1: 7, 3.5, 0, salient 3: (7 + 1.75) · −2 = −17.5, salient 17: 7 + 1.75; block 1: −3.5
    expected = torch.full((2, 34), -1.0)
    expected[0, :4] = torch.tensor([1.0, -0.5, 0.0, 1.5])
    expected[0, [17, 31, 32, 33]] = torch.tensor([-1.25, 1.0, 0.5, -0.5])
    expected[1] = 7.0
    expected[1, :4] = torch.tensor([7.0, 3.5, 0.0, -17.5])
    expected[1, [17, 32, 33]] = torch.tensor([8.75, -3.5, -3.5])
    assert torch.equal(PackedWeight(golden_tensors(), 2, 34, GOLDEN).dequantize(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dequantize_does_not_depend_on_the_default_dtype(dtype):
    packed = PackedWeight.pack(random_planes(3, 70, LayerSettings(block_size=32)), LayerSettings(block_size=32))
    expected = packed.dequantize()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = packed.dequantize()
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


# --- what packing refuses ---


@pytest.mark.parametrize("value", [1.03, 1e-12, float("nan"), float("inf"), 3e38])
def test_pack_refuses_a_row_scale_that_its_type_cannot_hold(value):
    planes = golden_planes()
    planes.row_scale[1, 0, 0] = value  # beside a 1.0, so 1e-12 is below the smallest step of e4m3
    with pytest.raises(FormatError, match="row scale"):
        PackedWeight.pack(planes, GOLDEN)


@pytest.mark.parametrize("value", [1e-12, 1e6, 1.0001, float("nan")])
def test_pack_refuses_an_fp16_row_scale_that_its_type_cannot_hold(value):
    planes = golden_planes()
    planes.row_scale[1, 0, 0] = value
    with pytest.raises(FormatError, match="row scale"):
        PackedWeight.pack(planes, FP16)


def test_pack_refuses_an_infinite_fp16_row_scale():
    """float16 has an infinity of its own, so that this one is representable."""
    planes = golden_planes()
    planes.row_scale[1, 0, 0] = float("inf")
    with pytest.raises(FormatError, match="NaN or inf"):
        PackedWeight.pack(planes, FP16)


@pytest.mark.parametrize("value", [1e-12, 1e6, 1.0001, float("nan")])
def test_pack_refuses_a_column_scale_that_float16_cannot_hold(value):
    planes = golden_planes()
    planes.column_scale[5] = value
    with pytest.raises(FormatError, match="column scale"):
        PackedWeight.pack(planes, GOLDEN)


@pytest.mark.parametrize("index", [[3], [3, 33], [3, 17, 33]])
def test_pack_refuses_another_number_of_salient_columns_than_the_settings_ask_for(index):
    planes = golden_planes()
    planes = dataclasses.replace(
        planes, residual_index=torch.tensor(index), residual_sign=torch.zeros(1, 2, len(index), dtype=torch.bool)
    )
    with pytest.raises(FormatError, match=r"salient columns per block .* \[2, 0\]"):
        PackedWeight.pack(planes, GOLDEN)


def test_pack_refuses_salient_columns_out_of_order():
    planes = dataclasses.replace(golden_planes(), residual_index=torch.tensor([17, 3]))
    with pytest.raises(FormatError, match="residual_index"):
        PackedWeight.pack(planes, GOLDEN)


@pytest.mark.parametrize("changes", [{"base_planes": 2}, {"residual_planes": 2}, {"residual_planes": 0}])
def test_pack_refuses_planes_that_the_settings_do_not_describe(changes):
    with pytest.raises(FormatError):
        PackedWeight.pack(golden_planes(), GOLDEN.replace(**changes))


# --- what reading refuses ---


def refuse(key, tensors, settings=GOLDEN, out=2, width=34):
    with pytest.raises(FormatError) as caught:
        PackedWeight(tensors, out, width, settings).validate("model.layers.3.q_proj")
    message = str(caught.value)
    assert "model.layers.3.q_proj" in message
    if key is not None:
        assert repr(key) in message


@pytest.mark.parametrize("key", list(golden_tensors()))
def test_validate_refuses_a_missing_tensor_by_name(key):
    tensors = golden_tensors()
    del tensors[key]
    refuse(key, tensors)


@pytest.mark.parametrize("key", list(golden_tensors()))
def test_validate_refuses_a_misshapen_tensor_by_name(key):
    for change in (lambda t: t[..., :-1], lambda t: t[None], lambda t: torch.cat([t, t], -1)):
        tensors = golden_tensors()
        tensors[key] = change(tensors[key])
        refuse(key, tensors)


@pytest.mark.parametrize("key", list(golden_tensors()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_validate_refuses_another_dtype_by_name(key, dtype):
    tensors = golden_tensors()
    tensors[key] = tensors[key].to(dtype)
    refuse(key, tensors)


def test_validate_refuses_an_unexpected_tensor_by_name():
    refuse("zero_point", {**golden_tensors(), "zero_point": torch.zeros(2)})
    refuse("row_exponent", {**golden_tensors(), "row_scale": torch.zeros(2, 2, 2, dtype=torch.int16)}, FP16)


@pytest.mark.parametrize(
    ("key", "at", "bits"),
    [
        ("row_scale", (0, 0, 0), 0x7F),  # NaN of e4m3
        ("row_scale", (1, 1, 1), 0xFF),
        ("row_exponent", (1,), 127),  # 448 · 2^127 overflows
        ("col_scale", (5,), 0x7C00),  # inf
        ("col_scale", (33,), 0x7E00),  # NaN
        ("col_scale", (0,), -0x400),  # −inf
    ],
)
def test_validate_refuses_a_scale_that_is_not_finite(key, at, bits):
    tensors = golden_tensors()
    tensors[key][at] = bits
    with pytest.raises(FormatError, match=r"layers\.3.*NaN or inf"):
        PackedWeight(tensors, 2, 34, GOLDEN).validate("layers.3")


def test_validate_refuses_an_fp16_row_scale_that_is_not_finite():
    tensors = dict(PackedWeight.pack(golden_planes(), FP16).tensors)
    tensors["row_scale"][0, 0, 0] = 0x7C00
    with pytest.raises(FormatError, match="NaN or inf"):
        PackedWeight(tensors, 2, 34, FP16).validate()


@pytest.mark.parametrize("index", [[17, 3], [3, 3], [3, 34], [3, 255]])
def test_validate_refuses_salient_columns_out_of_order_or_of_range(index):
    tensors = golden_tensors()
    tensors["residual_index"] = torch.tensor(index, dtype=torch.uint8)
    refuse("residual_index", tensors)


@pytest.mark.parametrize("index", [[3, 40, 20, 21], [3, 32, 5, 6], [5, 14, 17, 3], [3, 4, 5, 32]])
def test_validate_refuses_salient_columns_outside_their_block(index):
    """Ascending as columns, yet an offset of 40 in a block of 32 would take the next block's row scale."""
    settings = LayerSettings(block_size=32, salient_fraction=0.0625)
    tensors = dict(PackedWeight.pack(random_planes(2, 64, settings), settings).tensors)
    tensors["residual_index"] = torch.tensor(index, dtype=torch.uint8)
    refuse("residual_index", tensors, settings, 2, 64)


def test_validate_refuses_a_negative_salient_column():
    settings = LayerSettings(block_size=512, salient_fraction=4 / 512)
    planes = random_planes(2, 512, settings)
    tensors = dict(PackedWeight.pack(planes, settings).tensors)
    tensors["residual_index"] = torch.tensor([-5, 1, 2, 3], dtype=torch.int16)
    refuse("residual_index", tensors, settings, 2, 512)


@pytest.mark.parametrize("settings", [GOLDEN, FP16, GOLDEN.replace(residual_planes=0)])
def test_validate_accepts_what_was_packed(settings):
    PackedWeight.pack(random_planes(5, 100, settings), settings).validate()
