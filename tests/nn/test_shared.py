"""A process's share of a packed linear as a module: its layers add up, and are grouped like whole ones."""

import pytest
import torch
from torch import nn

from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError
from optimum_sab.format.random_weight import random_packed
from optimum_sab.nn import input_group
from optimum_sab.nn.input_group import group_linears
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.shared import SABShare, refuse_shares
from optimum_sab.ops.cpu import compiler
from tests.nn.siblings import WIDTH, siblings

OUT, HALF = 40, 96


def share_of_columns(bias=None):
    """Of 192 columns the first half: a block of 64 and one of 32."""
    pieces = [
        SABLinear.from_packed(random_packed(OUT, width, LayerSettings(block_size=width), seed=width))
        for width in (64, 32)
    ]
    return SABShare((2 * HALF, OUT), pieces, bias)


@pytest.mark.parametrize("biased", [False, True])
def test_layers_of_consecutive_columns_add_up(biased):
    bias = nn.Parameter(torch.randn(OUT), requires_grad=False) if biased else None
    share = share_of_columns(bias)
    x = torch.randn(2, 3, HALF)
    weight = torch.cat([piece.packed.dequantize() for piece in share.pieces], 1)
    torch.testing.assert_close(share(x), nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    assert share.only is None and (share.in_features, share.out_features) == (192, OUT)


@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_with_columns_around_its_own_is_given_zeros_there(biased):
    bias = nn.Parameter(torch.randn(OUT), requires_grad=False) if biased else None
    layer = SABLinear.from_packed(random_packed(OUT, 256, LayerSettings(block_size=128, code="trellis16")))
    share = SABShare((2 * HALF, OUT), [layer], bias, (128, 32))
    x = torch.randn(2, 3, HALF, requires_grad=True)
    weight = layer.packed.dequantize()[:, 128:-32]
    output = share(x)
    torch.testing.assert_close(output, nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    [gradient] = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(gradient, weight.sum(0).expand_as(x), rtol=1e-5, atol=1e-5)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        layers = siblings((64, 32, 32))
        self.q, self.k, self.v = (SABShare((WIDTH, 2 * each.out_features), [each]) for each in layers)

    def forward(self, x):
        return [self.q(x), self.k(x), self.v(x)]


@pytest.mark.skipif(not compiler.availability().usable, reason="needs a C compiler")
def test_shares_of_rows_that_have_one_input_are_one_launch(monkeypatch):
    seen, together = [], input_group.direct_linears
    monkeypatch.setattr(
        input_group,
        "direct_linears",
        lambda x, linears, *rest: seen.append(len(linears)) or together(x, linears, *rest),
    )
    attention, x = Attention(), torch.randn(2, WIDTH)
    alone = attention(x)
    assert not seen
    assert [len(group.members) for group in group_linears(attention)] == [3]
    for one, other in zip(attention(x), alone):
        assert torch.equal(one, other)
    assert seen == [3]


def test_layers_within_a_share_are_no_group():
    twice = siblings((32, 32))
    assert not group_linears(SABShare((2 * WIDTH, 32), twice))


def test_a_share_is_no_whole_layer():
    refuse_shares(nn.Sequential(*siblings([32])), "saved")
    with pytest.raises(ConfigError, match=r"^0 is a share of a packed layer.* cannot be saved"):
        refuse_shares(nn.Sequential(share_of_columns()), "saved")
    part = siblings([32])[0]
    part.counted *= 2  # an expert's, which is no module of its own
    with pytest.raises(ConfigError, match="share"):
        refuse_shares(nn.Sequential(part), "saved")
