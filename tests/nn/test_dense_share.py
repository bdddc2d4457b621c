import warnings

import pytest
import torch
from torch import nn

from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import SABWarning
from optimum_sab.nn.dense_share import dense_share, warn_of_dense
from optimum_sab.nn.selection import select_linears

SETTINGS = LayerSettings(block_size=64)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(64, 128), nn.Linear(128, 64)


class Model(nn.Module):
    """A tower, a decoder of two blocks with 32,768 weights, an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.vision_tower = nn.ModuleList(nn.Linear(64, 64) for _ in range(9))
        self.embed_tokens = nn.Embedding(100, 64)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(64, 100)

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head


def warned(model, rules=()):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_dense(model, select_linears(model, SETTINGS, rules))


def test_nothing_is_dense_beside_tower_embedding_and_head():
    model = Model()
    assert dense_share(model, select_linears(model, SETTINGS)).share == 0.0
    warned(model)


@pytest.mark.parametrize("rule", ["down_proj", "re:down", "layers.0"])
def test_what_a_rule_asks_for_is_not_counted(rule):
    model = Model()
    selection = select_linears(model, SETTINGS, [rule])
    assert len(selection.left_dense) == 2
    assert dense_share(model, selection).share == 0.0
    warned(model, [rule])


def test_what_stays_dense_beside_what_a_rule_asks_for_is_counted_and_named():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Model()
    model.layers[0].up_proj = Scaled(64, 128)
    found = dense_share(model, select_linears(model, SETTINGS, ["down_proj"]))
    assert found.share == 0.25
    assert dict(found.parts) == {"layers.up_proj": 0.25}
    message = r"25% of the language model's matrices stay dense without a rule that says so: layers\.up_proj \(25%\)\. "
    with pytest.warns(SABWarning, match=message):
        warn_of_dense(model, select_linears(model, SETTINGS, ["down_proj"]))


def test_fused_experts_that_a_rule_names_are_not_counted():
    model = Model()
    model.layers[1].experts = nn.Module()
    model.layers[1].experts.gate_up_proj = nn.Parameter(torch.zeros(4, 64, 128))
    warned(model, ["experts"])


def test_fused_experts_are_counted_and_named():
    model = Model()
    model.layers[1].experts = nn.Module()
    model.layers[1].experts.gate_up_proj = nn.Parameter(torch.zeros(4, 64, 128))
    found = dense_share(model, select_linears(model, SETTINGS))
    assert found.share == 32768 / 65536
    with pytest.warns(SABWarning, match=r"layers\.experts\.gate_up_proj \(50%\)\. They are no linears") as heard:
        warn_of_dense(model, select_linears(model, SETTINGS))
    assert "docs/" not in str(heard[0].message)
    assert "'optimum-sab plan MODEL'" in str(heard[0].message)


def test_a_convolution_is_no_matrix():
    """Hybrid decoders (LFM2, Mamba layers) have one in a block; its kernel has three dimensions."""
    model = Model()
    model.layers[0].conv = nn.Conv1d(64, 64, 400, groups=64)
    warned(model)


def test_up_to_a_tenth_is_not_warned_of():
    model = Model()
    model.layers[0].extra = nn.Parameter(torch.zeros(50, 64))
    warned(model)
