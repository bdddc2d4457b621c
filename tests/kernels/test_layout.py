"""The kernel layout and the stored one hold the same layer."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.layout import tensor_specs
from optimum_sab.hf.config import SABConfig
from optimum_sab.ops.shape import LayerShape

pytest.importorskip("triton")
from sab_kernels import from_kernel_layout, kernel_bytes, to_kernel_layout

BLOCK_SIZES = [32, 64, 96, 128, 256, 512]
PLANES = [(1, 0), (1, 1), (2, 1), (2, 2)]
FRACTIONS = [1 / 8, 1 / 16, 0.3]
ROWS = [1, 31, 33, 70]
COLUMNS = [1, 31, 40, 128, 257, 300, 544]
# dimension of the stored tensor that runs over rows; the tensors that are not named have none
STORED_ROWS = {"weight": 1, "residual_sign": 1, "row_scale": 2, "row_exponent": 0}


def settings_of(block_size, planes, fraction, row_scale):
    return {
        "block_size": block_size,
        "base_planes": planes[0],
        "residual_planes": planes[1],
        "salient_fraction": fraction,
        "row_scale": row_scale,
    }


def geometry_of(packed):
    return LayerShape.of(packed.out_features, packed.in_features, packed.settings).geometry


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def assert_round_trip(packed):
    geometry = geometry_of(packed)
    tensors = to_kernel_layout(packed.tensors, geometry)
    assert_same(from_kernel_layout(tensors, geometry), packed.tensors)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == kernel_bytes(geometry)
    assert all(t.is_contiguous() for t in tensors.values())


@pytest.mark.parametrize(("planes", "fraction"), [(p, f) for p in PLANES for f in (FRACTIONS if p[1] else [1 / 8])])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_kernel_layout_gives_back_the_stored_tensors(random_packed, block_size, planes, fraction):
    rows, row_scales = itertools.cycle(ROWS), itertools.cycle(["fp8", "fp16"])
    for columns in COLUMNS:
        settings = settings_of(block_size, planes, fraction, next(row_scales))
        assert_round_trip(random_packed(next(rows), columns, **settings))


@pytest.mark.parametrize("row_scale", ["fp8", "fp16"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_kernel_layout_gives_back_the_stored_tensors_of_all_sizes(random_packed, rows, columns, row_scale):
    assert_round_trip(random_packed(rows, columns, **settings_of(96, (2, 1), 0.3, row_scale)))


@hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    rows=st.integers(1, 100),
    columns=st.integers(1, 700),
    seed=st.integers(0, 10**6),
    block_size=st.integers(1, 18).map(lambda n: 32 * n),
    planes=st.sampled_from([*PLANES, (1, 3), (3, 0), (4, 0)]),
    fraction=st.floats(1 / 16, 0.95),
    row_scale=st.sampled_from(["fp8", "fp16"]),
)
def test_kernel_layout_gives_back_the_stored_tensors_of_any_shape(
    random_packed, rows, columns, seed, block_size, planes, fraction, row_scale
):
    assert_round_trip(random_packed(rows, columns, seed, **settings_of(block_size, planes, fraction, row_scale)))


def test_kernel_layout_is_the_documented_one(random_packed):
    """The formulas of layout.py's docstring, bit by bit."""
    packed = random_packed(70, 300, block_size=96, base_planes=2, salient_fraction=0.3)
    geometry, planes = geometry_of(packed), packed.unpack()
    tensors = to_kernel_layout(packed.tensors, geometry)

    def dense(words):  # [planes, rows, columns], padding included
        row_tiles, tiles, count, _ = words.shape
        row, column = torch.meshgrid(torch.arange(row_tiles * 32), torch.arange(tiles * 128), indexing="ij")
        r, g = row % 32 // 8, row % 8
        s, h, q, i = column % 128 // 32, column % 32 // 16, column % 16 // 4, column % 4
        lane, bit = (4 * g + q) * 4 + r, 16 * h + 4 * i + s
        return torch.stack([words[row // 32, column // 128, p, lane] >> bit & 1 for p in range(count)]).bool()

    base = dense(tensors["weight"])
    assert torch.equal(base[:, :70, :300], planes.base_sign)
    assert not base[:, 70:].any() and not base[:, :, 300:].any()
    slots = tensors["residual_index"][: 128 * geometry.slot_tiles].long()
    assert torch.equal(slots[slots >= 0], planes.residual_index)
    residual = dense(tensors["residual_sign"])
    assert torch.equal(residual[:, :70, slots >= 0], planes.residual_sign)
    assert not residual[:, 70:].any() and not residual[:, :, slots < 0].any()
    places = tensors["residual_index"][128 * geometry.slot_tiles :].long()
    assert torch.equal((places >= 0).nonzero()[:, 0], planes.residual_index)
    assert torch.equal(slots[places[planes.residual_index]], planes.residual_index)
    scale = tensors["row_scale"].unflatten(-1, (8, 4)).permute(2, 1, 0, 4, 3).flatten(2)  # of (g, r): row 8 r + g
    assert torch.equal(scale[..., :70], packed.tensors["row_scale"])


def test_kernel_layout_pads_every_block_s_salient_columns_to_slots_of_16(random_packed):
    packed = random_packed(5, 544, block_size=256, salient_fraction=0.1)  # 26, 26 and 3 columns
    index = to_kernel_layout(packed.tensors, geometry_of(packed))["residual_index"][:128]
    counts = [int((part >= 0).sum()) for part in index.split(32)]
    assert counts == [26, 26, 3, 0]


@pytest.mark.parametrize("settings", [LayerSettings(), SABConfig.paper().layer_settings], ids=["default", "paper"])
@pytest.mark.parametrize(
    ("rows", "columns"), [(3584, 3584), (18944, 3584), (3584, 18944), (29568, 8192), (8192, 29568)]
)
def test_kernel_layout_of_large_models_takes_at_most_a_tenth_more_than_the_stored_one(rows, columns, settings):
    specs = tensor_specs(rows, columns, settings).values()
    stored = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)
    assert kernel_bytes(LayerShape.of(rows, columns, settings).geometry) <= 1.1 * stored


@pytest.mark.parametrize("row_scale", ["fp8", "fp16"])
@pytest.mark.parametrize("planes", PLANES)
def test_kernel_layout_of_stacked_layers_is_that_of_the_layers_concatenated(random_packed, planes, row_scale):
    sizes = [32, 64, 96, 17]
    whole = random_packed(sum(sizes), 300, **settings_of(128, planes, 1 / 8, row_scale))
    shares = {n: whole.tensors[n].split(sizes, d) for n, d in STORED_ROWS.items() if n in whole.tensors}
    layouts = []
    for layer, rows in enumerate(sizes):
        stored = {n: shares[n][layer].contiguous() if n in shares else t for n, t in whole.tensors.items()}
        layouts.append(to_kernel_layout(stored, LayerShape.of(rows, 300, whole.settings).geometry))
    stacked = {n: torch.cat([lay[n] for lay in layouts]) if n in STORED_ROWS else t for n, t in layouts[0].items()}
    assert_same(stacked, to_kernel_layout(whole.tensors, geometry_of(whole)))
