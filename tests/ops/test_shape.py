"""LayerShape: what operators and kernels are told of a layer."""

import pytest
import torch

from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.layout import tensor_specs
from optimum_sab.ops.shape import LayerShape
from optimum_sab.ops.verification import sample_weight

SETTINGS = [
    LayerSettings(),
    LayerSettings(block_size=32, base_planes=2, row_scale="fp16"),
    LayerSettings(residual_planes=0),
    LayerSettings(block_size=512, residual_planes=2, salient_fraction=0.3),
]
SIZES = [(40, 300), (1, 1), (64, 256)]
cases = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.base_planes}+{s.residual_planes}")
sizes = pytest.mark.parametrize(("out_features", "in_features"), SIZES)


@cases
def test_shape_keeps_the_storage_settings_and_forgets_the_solver_s(settings):
    found = LayerShape.of(40, 300, settings.replace(iterations=3, damping=0.5)).settings
    for name in ("block_size", "base_planes", "residual_planes", "salient_fraction", "row_scale"):
        assert getattr(found, name) == getattr(settings, name)
    assert (found.iterations, found.damping) == (LayerSettings().iterations, LayerSettings().damping)


@cases
def test_shape_is_flat_and_equal_shapes_are_one_key(settings):
    shape = LayerShape.of(40, 300, settings)
    assert all(type(value) in (int, float, str) for value in shape)  # torch.library takes nothing else
    assert {shape: 1}[LayerShape(*shape)] == 1
    assert LayerShape.of(41, 300, settings) != shape


@cases
def test_text_of_a_shape_is_read_as_the_same(settings):
    shape = LayerShape.of(40, 300, settings.replace(salient_fraction=0.1 + 0.2))  # no short decimal
    found = LayerShape.read(shape.text)
    assert found == shape
    assert [type(value) for value in found] == [type(value) for value in shape]


def test_shape_salient_fraction_given_as_an_integer_is_the_same_shape():
    whole = LayerShape.of(40, 300, LayerSettings().replace(residual_planes=0, salient_fraction=0))
    assert whole == LayerShape.of(40, 300, LayerSettings().replace(residual_planes=0, salient_fraction=0.0))
    assert type(whole.salient_fraction) is float


@sizes
@cases
def test_names_are_the_format_s_in_its_order(settings, out_features, in_features):
    shape = LayerShape.of(out_features, in_features, settings)
    assert shape.names == tuple(tensor_specs(out_features, in_features, settings))
    assert ("residual_sign" in shape.names) == bool(settings.residual_planes)
    assert ("row_exponent" in shape.names) == (settings.row_scale == "fp8")
    assert shape.names[0] == "weight"  # operators look at the first tensor's device


@sizes
@cases
def test_geometry_counts_what_the_tensors_hold(settings, out_features, in_features):
    pytest.importorskip("triton")
    shape = LayerShape.of(out_features, in_features, settings)
    geometry, tensors = shape.geometry, sample_weight(settings, out_features, in_features).tensors
    planes, blocks, rows = tensors["row_scale"].shape
    assert (geometry.rows, geometry.columns) == (out_features, in_features)
    assert (geometry.planes, geometry.blocks, geometry.rows) == (planes, blocks, rows)
    salient = tensors["residual_index"].numel() if settings.residual_planes else 0
    assert sum(geometry.salient_counts) == salient
    assert geometry.fp8 == (tensors["row_scale"].dtype == torch.uint8)
    assert shape.geometry is geometry  # made once per shape, not once per call
