import pytest
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError
from optimum_sab.nn.decoder import BlockLists, find_decoder_blocks
from optimum_sab.nn.linear import SABLinear


def stack(count, width):
    return nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)) for _ in range(count))


class Tower(nn.Module):
    def __init__(self, count, width):
        super().__init__()
        self.layers = stack(count, width)


class Inner(nn.Module):
    def __init__(self, vision, text):
        super().__init__()
        self.visual = Tower(*vision)
        self.language_model = Tower(*text)


class Model(nn.Module):
    """A vision-language model; ``accessor`` is what `get_decoder` answers with."""

    def __init__(self, vision=(2, 8), text=(3, 16), accessor=None):
        super().__init__()
        self.model = Inner(vision, text)
        if accessor is not None:
            self.get_decoder = lambda: accessor(self)


def test_decoder_blocks_are_those_of_get_decoder_even_when_the_vision_tower_is_larger():
    model = Model(vision=(6, 32), accessor=lambda m: m.model.language_model)
    found = find_decoder_blocks(model)
    assert found.lists.names == ("model.language_model.layers",)
    assert found.blocks == tuple(model.model.language_model.layers)


def test_decoder_blocks_without_an_accessor_are_the_list_with_most_linear_weights():
    assert find_decoder_blocks(Model()).lists.names == ("model.language_model.layers",)


def test_decoder_blocks_ignore_an_accessor_that_answers_with_no_module():
    assert find_decoder_blocks(Model(accessor=lambda m: None)).lists.names == ("model.language_model.layers",)


def test_decoder_blocks_are_the_outer_list_where_blocks_hold_lists():
    model = Tower(2, 8)
    for block in model.layers:
        block.append(nn.ModuleList(nn.Linear(8, 8) for _ in range(4)))  # experts
    assert find_decoder_blocks(model).lists.names == ("layers",)


def test_decoder_blocks_of_a_packed_model_are_those_of_the_dense_one():
    model = Model(vision=(5, 12))  # a little less than the language model
    dense = find_decoder_blocks(model).lists
    for block in model.model.language_model.layers:
        for i in range(2):
            block[i] = SABLinear(16, 16, LayerSettings(block_size=32))
    assert find_decoder_blocks(model).lists == dense == BlockLists(("model.language_model.layers",))


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(4, 4),
        nn.ModuleDict({"layers": nn.ModuleList()}),
        nn.ModuleDict({"layers": nn.ModuleList([nn.LayerNorm(4)])}),
    ],
)
def test_decoder_blocks_of_a_model_without_any_are_refused(model):
    with pytest.raises(ConfigError, match=type(model).__name__):
        find_decoder_blocks(model)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_of_conv1d_is_told_that_this_is_the_reason(wrapped):
    """GPT-2 has no `nn.Linear` in its blocks."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    if wrapped:
        model = nn.ModuleDict({"decoder": model})
    with pytest.raises(
        ConfigError, match=r"computes with Conv1D, such as .*transformer\.h\.0\.attn\.c_attn.*nn\.Linear"
    ):
        find_decoder_blocks(model)
