"""Random packed layers are what the format allows, at every shape that leaves padding somewhere."""

import pytest
import torch

from optimum_sab.bench.random_layers import random_linear
from optimum_sab.core.settings import LayerSettings
from optimum_sab.format import PackedWeight
from optimum_sab.format.layout import stored_bits_per_weight
from optimum_sab.format.random_weight import SCALE, random_packed
from optimum_sab.hf.config import SABConfig

SETTINGS = {
    "default": LayerSettings(),
    "paper": SABConfig.paper().layer_settings,
    "no residual": LayerSettings(residual_planes=0),
    "wide blocks": LayerSettings(block_size=512),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("shape", [(64, 256), (96, 400), (33, 131), (5, 1100)], ids=str)
def test_random_packed_follows_the_format(settings, shape):
    packed = random_packed(*shape, settings, seed=3)
    packed.validate()
    assert packed.bits_per_weight == pytest.approx(stored_bits_per_weight(*shape, settings))
    again = PackedWeight.pack(packed.unpack(), settings)  # exact only with zero padding and the packer's exponents
    assert again.tensors.keys() == packed.tensors.keys()
    for name, tensor in packed.tensors.items():
        assert torch.equal(again.tensors[name], tensor), name


def test_random_packed_has_positive_scales_near_weights_of_models():
    packed = random_packed(64, 512, LayerSettings())
    rows, columns = packed.row_scale(), packed.column_scale()
    assert 0.4 * SCALE < float(rows[0].min()) < float(rows[0].max()) < 1.6 * SCALE
    assert 0.7 < float(columns.min()) < float(columns.max()) < 1.3
    signs = packed.unpack().base_sign.float().mean()
    assert float(signs) == pytest.approx(0.5, abs=0.02)


def test_random_packed_depends_on_its_seed_alone():
    first, same, other = (random_packed(32, 256, LayerSettings(), seed) for seed in (1, 1, 2))
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, same.tensors[name])
    assert not torch.equal(first.tensors["weight"], other.tensors["weight"])
    assert not torch.equal(first.tensors["residual_index"], other.tensors["residual_index"])


def test_random_linear_computes_with_what_it_drew():
    bias = torch.randn(48)
    layer = random_linear(48, 256, LayerSettings(), seed=5, bias=bias)
    x = torch.randn(3, 256)
    expected = x @ random_packed(48, 256, LayerSettings(), seed=5).dequantize().T + bias
    assert torch.allclose(layer(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_random_packed_is_valid_on_cuda():
    packed = random_packed(29568, 8192, LayerSettings(), device="cuda")
    packed.validate()
    assert packed.tensors["weight"].is_cuda
    assert packed.bits_per_weight == pytest.approx(stored_bits_per_weight(29568, 8192, LayerSettings()))
