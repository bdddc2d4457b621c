"""The shrinker: every part small, every kind of layer there, ids inside of the vocabulary."""

import pytest

from optimum_sab.bench.coverage.families import all_families
from optimum_sab.bench.coverage.shrinking import FIRST_SPECIAL, HEADS, LAYERS, VOCABULARY, WIDTH, shrink


def test_widths_heads_and_vocabulary_are_small_in_every_part():
    found = shrink(
        {
            "projection_dim": 2048,
            "vision_config": {"model_type": "v", "hidden_size": 1024, "depth": 24, "num_heads": 16},
            "text_config": {"model_type": "t", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32000},
        }
    )
    assert (
        found["projection_dim"] == found["vision_config"]["hidden_size"] == found["text_config"]["hidden_size"] == WIDTH
    )
    assert found["vision_config"]["depth"] == found["text_config"]["num_hidden_layers"] == LAYERS
    assert found["vision_config"]["num_heads"] == HEADS
    assert found["text_config"]["vocab_size"] == VOCABULARY


def test_first_layer_of_each_kind_stays():
    types = ["sliding"] * 5 + ["full"] + ["sliding"] * 5 + ["full"]
    mlps = ["dense", *["sparse"] * 11]
    found = shrink({"num_hidden_layers": 12, "layer_types": types, "mlp_layer_types": mlps})
    assert found["layer_types"] == ["sliding", "sliding", "full"]
    assert found["mlp_layer_types"] == ["dense", "sparse", "sparse"]
    assert found["num_hidden_layers"] == 3


def test_two_layers_of_one_kind_stay():
    found = shrink({"num_hidden_layers": 12, "layer_types": ["full"] * 12})
    assert (found["num_hidden_layers"], found["layer_types"]) == (2, ["full", "full"])


def test_lists_of_layer_numbers_are_no_kinds():
    found = shrink(
        {"num_hidden_layers": 4, "moe_layers": [0, 1, 2, 3], "scaled": [0, 1, 2, 3], "cross_attention_layers": [3]}
    )
    assert found == {"num_hidden_layers": 2, "moe_layers": [0, 1], "scaled": [0, 1], "cross_attention_layers": [1]}


def test_what_single_layers_have_otherwise_stays_in_proportion():
    config = {
        "num_hidden_layers": 3,
        "layer_types": ["a", "a", "b"],
        "head_dim": 256,
        "per_layer_config": {"02": {"head_dim": 512}},
    }
    found = shrink(config)
    assert found["head_dim"] == 32
    assert found["per_layer_config"] == {"01": {"head_dim": 64}}


@pytest.mark.parametrize(("heads", "grouped", "expected"), [(32, 32, 4), (32, 8, 2), (32, 1, 1)])
def test_heads_that_share_keys_do_so_still(heads, grouped, expected):
    assert shrink({"num_attention_heads": heads, "num_key_value_heads": grouped})["num_key_value_heads"] == expected


def test_one_token_gets_one_id_in_all_parts():
    found = shrink(
        {
            "image_token_id": 151655,
            "pad_token_id": 3,
            "video_token_index": None,
            "text_config": {"model_type": "t", "eos_token_id": [151655, 151643], "vocab_size": 152064},
        }
    )
    assert found["image_token_id"] == found["text_config"]["eos_token_id"][0] == FIRST_SPECIAL
    assert found["text_config"]["eos_token_id"][1] == FIRST_SPECIAL + 1
    assert found["pad_token_id"] == 3
    assert found["video_token_index"] is None


def test_a_picture_is_a_few_patches():
    assert shrink({"image_size": 336, "patch_size": 14})["image_size"] == 56
    assert shrink({"image_size": [448, 448], "patch_size": [14, 14]})["image_size"] == [56, 56]


@pytest.mark.parametrize(("sections", "expected"), [([16, 24, 24], [4, 6, 6]), ([24, 20, 20], [6, 5, 5])])
def test_rotary_sections_cover_the_small_head(sections, expected):
    found = shrink({"head_dim": 128, "rope_parameters": {"mrope_section": sections}})
    assert found["rope_parameters"]["mrope_section"] == expected
    assert sum(expected) == found["head_dim"] // 2


@pytest.mark.compat
@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.name)
def test_default_configuration_of_each_family_becomes_small(family):
    from optimum_sab.bench.coverage.exceptions import exceptions_of

    def numbers(config):
        for name, value in config.items():
            if isinstance(value, dict):
                yield from numbers(value)
            elif isinstance(name, str) and isinstance(value, int):
                yield name, value

    small = shrink(family.config_class(**exceptions_of(family.name).default).to_dict())
    for name, value in numbers(small):
        if name in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads"):
            assert value <= VOCABULARY, name
        if name.endswith(("_token_id", "_token_index")):
            assert value < VOCABULARY, name
