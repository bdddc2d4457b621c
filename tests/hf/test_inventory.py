"""What a packed checkpoint's files say of it."""

import os

import pytest

from optimum_sab.errors import FormatError
from optimum_sab.hf.inventory import rule_names
from optimum_sab.hf.stored_files import local_files
from optimum_sab.nn.rules import covered_by


@pytest.mark.parametrize(
    ("stored", "rule"),
    [
        ("model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
        ("language_model.model.layers.11.self_attn.q_proj", "layers.11.self_attn.q_proj"),
        ("layers.3.experts.7.down", "layers.3.experts.7.down"),
        ("head", "head"),
    ],
)
def test_a_name_in_a_file_gives_the_rule_for_it(stored, rule):
    assert rule_names([stored]) == {stored: rule}


def test_names_that_would_be_the_same_rule_keep_what_tells_them_apart():
    stored = ["model.encoder.layers.0.fc", "model.decoder.layers.0.fc", "model.decoder.layers.1.fc"]
    assert list(rule_names(stored).values()) == ["encoder.layers.0.fc", "decoder.layers.0.fc", "layers.1.fc"]
    in_memory = ["model.encoder.layers.0.fc", "model.decoder.layers.0.fc", "model.decoder.layers.1.fc"]
    rules = list(rule_names(stored).values())
    assert covered_by(rules, in_memory) == {rule: [name] for rule, name in zip(rules, in_memory, strict=True)}


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)],
    ids=["a pipe", "a folder", "a link that leads nowhere"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "other.safetensors"])
def test_what_has_the_name_of_weights_and_is_no_file_is_named(tmp_path, make, name):
    """Reading a pipe would wait without end."""
    make(tmp_path / name)
    with pytest.raises(FormatError, match=rf"{name}' is no file .*; fetch the checkpoint again"):
        local_files(tmp_path)
