from types import SimpleNamespace

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


class Reader(Tower):
    """A part that reads pictures, as Transformers' are marked."""

    main_input_name = "pixel_values"


class WholeModel(nn.Module):
    """A model that answers `get_decoder` with itself, like GIT; its picture part is the largest."""

    def __init__(self, senses, name="reader"):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        setattr(self, name, senses)
        self.encoder = Tower(3, 16)

    def get_decoder(self):
        return self

    def get_input_embeddings(self):
        return self.embed


@pytest.mark.parametrize(
    ("senses", "name"), [(Reader(6, 32), "reader"), (Tower(6, 32), "image_encoder"), (Tower(6, 32), "audio_tower")]
)
def test_what_reads_pictures_or_sound_is_not_the_decoder_however_large(senses, name):
    assert find_decoder_blocks(WholeModel(senses, name)).lists.names == ("encoder.layers",)


def test_a_part_with_the_token_embedding_reads_text_whatever_it_is_called():
    model = Model(vision=(1, 8))
    model.image_text_model, model.model = model.model, None
    model.image_text_model.embed = nn.Embedding(11, 16)
    model.get_input_embeddings = lambda: model.image_text_model.embed
    assert find_decoder_blocks(model).lists.names == ("image_text_model.language_model.layers",)


def test_lists_of_blocks_beside_the_largest_are_the_decoder_s_too():
    model = Model()
    decoder = model.model.language_model
    decoder.gated_cross_attn_layers = stack(1, 16)
    decoder.projections = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))  # linears, no blocks
    decoder.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
    found = find_decoder_blocks(model)
    start = "model.language_model"
    assert found.lists.names == (f"{start}.layers", f"{start}.gated_cross_attn_layers")
    assert list(found.named) == [*(f"{start}.layers.{i}" for i in range(3)), f"{start}.gated_cross_attn_layers.0"]
    assert found.blocks[-1] is decoder.gated_cross_attn_layers[0]


class EncoderDecoder(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.decoder = encoder, Tower(3, 16)
        self.config = SimpleNamespace(is_encoder_decoder=True)

    def get_encoder(self):
        return self.encoder

    def get_decoder(self):
        return self.decoder


def test_a_text_encoder_is_part_of_the_language_model_and_comes_first():
    found = find_decoder_blocks(EncoderDecoder(Tower(2, 8)))
    assert found.lists.names == ("encoder.layers", "decoder.layers")
    assert len(found.blocks) == 5


def test_an_encoder_of_pictures_is_not():
    assert find_decoder_blocks(EncoderDecoder(Reader(2, 64))).lists.names == ("decoder.layers",)


@pytest.mark.parametrize(
    ("lists", "above", "names"),
    [
        (("layers",), "", {"layers.0.mlp": "layers.0.mlp", "x.layers.0.mlp": "layers.0.mlp"}),
        (("model.layers",), "model", {"model.layers.0.mlp": "layers.0.mlp", "layers.0.mlp": "layers.0.mlp"}),
        (
            ("m.encoder.layers", "m.decoder.layers"),
            "m",
            {"m.encoder.layers.1.q": "encoder.layers.1.q", "other.m.decoder.layers.1.q": "decoder.layers.1.q"},
        ),
        (("m.layers", "m.cross_layers"), "m", {"m.cross_layers.3.q": "cross_layers.3.q", "m.layers.3.q": "layers.3.q"}),
        (("",), "", {"0.up": "0.up"}),
        (("h",), "", {"lm_head": "lm_head"}),
    ],
)
def test_short_names_begin_with_the_list(lists, above, names):
    found = BlockLists(lists)
    assert found.above == above
    assert {name: found.short(name) for name in names} == names
