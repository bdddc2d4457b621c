"""Coded planes through `from_pretrained` and `save_pretrained`: format version 2."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_sab import SABConfig, SABLinear
from optimum_sab.core.code import TRELLIS16
from optimum_sab.errors import ConfigError, FormatError, FormatVersionError


def packed_linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, SABLinear)}


@pytest.fixture(scope="module")
def coded(llama_folder, tmp_path_factory, quick_config, texts):
    """A Llama with coded planes: (model, folder)."""
    folder = tmp_path_factory.mktemp("llama-coded")
    config = quick_config(calibration=texts, block_size=128, code="trellis16", sweeps=1)
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(folder)
    return model, folder


def changed(folder, tmp_path, edit):
    """A copy whose quantization_config went through ``edit``."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    edit(config["quantization_config"])
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def without_codes(config):
    """Of all linears and of the rules that the allocation left."""
    for settings in (config, *config["dynamic"].values()):
        settings.pop("code", None)


def test_a_coded_model_is_read_as_it_was_saved(coded, token_ids):
    model, folder = coded
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (stored["format_version"], stored["code"]) == (2, "trellis16")
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert any(m.settings.code == "trellis16" for m in packed_linears(again).values())
    for name, layer in packed_linears(model).items():
        assert again.get_submodule(name).shape == layer.shape
    with torch.no_grad():
        assert torch.equal(model(input_ids=token_ids).logits, again(input_ids=token_ids).logits)
        dense = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=SABConfig(dequantize=True)
        )
        torch.testing.assert_close(dense(input_ids=token_ids).logits, again(input_ids=token_ids).logits)


def test_weights_are_those_of_the_documented_formula(coded):
    layer = next(m for m in packed_linears(coded[0]).values() if m.settings.code != "none")
    packed = layer.packed
    planes = packed.unpack()
    first, second = (2.0 * plane - 1.0 for plane in TRELLIS16.planes(planes.base_sign[0]))
    spread = packed.row_scale()[0].T.repeat_interleave(layer.settings.block_size, 1)[:, : layer.in_features]
    dense = spread * (first + second / 2)
    for p in range(1, layer.settings.base_planes):
        other = packed.row_scale()[p].T.repeat_interleave(layer.settings.block_size, 1)[:, : layer.in_features]
        dense += other * (2.0 * planes.base_sign[p] - 1.0)
    plain = torch.ones(layer.in_features, dtype=torch.bool)
    plain[planes.residual_index] = False
    torch.testing.assert_close(packed.dequantize()[:, plain], (dense * packed.column_scale())[:, plain])


@pytest.fixture(scope="module")
def plain(llama_folder, tmp_path_factory, quicker_config, texts):
    """The Llama with planes as they always were: (model, folder)."""
    folder = tmp_path_factory.mktemp("llama-plain")
    config = quicker_config(calibration=texts, block_size=128)
    model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config)
    model.save_pretrained(folder)
    return model, folder


def test_as_many_bits_as_plain_planes_at_most(coded, plain):
    models = (coded[0], plain[0])
    sizes = [sum(sum(m.stored_bytes.values()) for m in packed_linears(model).values()) for model in models]
    assert sizes[0] <= sizes[1]


def test_a_plain_model_says_nothing_of_codes(plain):
    """Version 1 stays what readers of version 1 know."""
    folder = plain[1]
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stored["format_version"] == 1
    assert "code" not in json.dumps(stored)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert "code" not in file.metadata()["sab_layers"]


@pytest.mark.parametrize(
    ("edit", "error", "named"),
    [
        (lambda c: c.update(format_version=1), FormatVersionError, "format_version=1 does not fit"),
        (lambda c: c.update(format_version=3), FormatVersionError, "format_version=3"),
        (lambda c: c.update(code="magic"), ConfigError, "code='magic'"),
        (lambda c: c.update(code=["trellis16"]), ConfigError, "code="),
        (without_codes, FormatVersionError, "format_version=2 does not fit"),
        (lambda c: (without_codes(c), c.update(format_version=1)), FormatError, "was saved with code='trellis16"),
    ],
    ids=["named 1", "named 3", "unknown", "a list", "left out", "left out and named 1"],
)
def test_a_changed_configuration_is_refused(coded, tmp_path, edit, error, named):
    with pytest.raises(error, match=named):
        AutoModelForCausalLM.from_pretrained(changed(coded[1], tmp_path, edit))


def test_a_plain_file_that_is_called_coded_is_refused(plain, tmp_path):
    folder = changed(plain[1], tmp_path, lambda c: c.update(code="trellis16", format_version=2))
    with pytest.raises(FormatError, match="was saved with code='none'"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_rules_may_mix_codes_in_linears_that_share_an_input(llama_folder, quicker_config, texts, tmp_path, token_ids):
    rules = {"q_proj": {"code": "trellis16"}, "gate_proj": {"code": "trellis16", "base_planes": 2}}
    config = quicker_config(calibration=texts, block_size=128, dynamic=rules)
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32, quantization_config=config)
    codes = {name.rpartition(".")[2]: m.settings.code for name, m in packed_linears(model).items()}
    assert {kind for kind, code in codes.items() if code != "none"} == {"q_proj", "gate_proj"}
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(input_ids=token_ids).logits, again(input_ids=token_ids).logits)


def test_refinement_and_resuming_keep_the_code(llama_folder, quicker_config, texts, tmp_path):
    settings = {"calibration": texts, "block_size": 128, "code": "trellis16", "refine": True, "refine_epochs": 1}
    settings |= {"refine_steps": 1, "resume_folder": tmp_path / "resume"}
    found = []
    for _ in range(2):  # the second takes all blocks from the folder
        config = quicker_config(**settings)
        model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32, quantization_config=config)
        found.append({name: m.packed.dequantize() for name, m in packed_linears(model).items()})
        assert all(m.settings.code == "trellis16" for m in packed_linears(model).values())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_digests_notice_a_flipped_bit_of_a_coded_plane(coded, tmp_path):
    folder = tmp_path / "flipped"
    shutil.copytree(coded[1], folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("mlp.down_proj.weight"))
    tensors[name][0, 0, 0] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata)
    with pytest.raises(FormatError, match="digest"):
        AutoModelForCausalLM.from_pretrained(folder)
