"""Checkpoints whose tensors have other names, or are other tensors, on disk than in memory."""

import copy
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_sab import SABConfig
from optimum_sab.errors import FormatError, SABWarning
from optimum_sab.hf.compat import RENAMES

if not RENAMES:
    pytest.skip("Transformers 4.57 loads tensors under their own names", allow_module_level=True)

from transformers import conversion_mapping
from transformers.core_model_loading import Chunk, PermuteForRope, WeightConverter, WeightRenaming

PROMPT = torch.arange(3, 40)[None]


def mapping():
    """Of a family whose checkpoints hold q, k and v as one tensor, o permuted, and name the rest in their own way."""
    targets = [f"self_attn.{name}_proj.weight" for name in "qkv"]
    return [
        WeightRenaming(r"transformer\.blocks\.", "model.layers."),
        WeightRenaming(r"\.ff_out\.weight", ".mlp.down_proj.weight"),
        WeightRenaming(r"\.mlp\.up", ".mlp.up_proj.weight"),  # leads nowhere for what is beside a weight
        WeightConverter("self_attn.att_proj.weight", targets, operations=[Chunk(dim=0)]),
        WeightConverter("self_attn.o_proj.weight", "self_attn.o_proj.weight", operations=[PermuteForRope()]),
    ]


@pytest.fixture
def family(monkeypatch):
    """Llama is that family."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # makes the table
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", mapping())


@pytest.fixture
def dense(family, llama_folder, tmp_path):
    """A dense checkpoint of it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    folder = tmp_path / "dense"
    shutil.copytree(llama_folder, folder)
    LlamaForCausalLM(config).save_pretrained(folder)
    assert {"transformer.blocks.0.self_attn.att_proj.weight", "transformer.blocks.1.ff_out.weight"} <= names(folder)
    return folder


def names(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def logits(model):
    with torch.no_grad():
        return model.eval()(PROMPT).logits


@pytest.mark.parametrize("left_dense", [[], ["layers.1.self_attn", "layers.0.mlp.down_proj"]])
def test_packed_layers_go_through_a_family_s_converters_unharmed(dense, quick_config, texts, tmp_path, left_dense):
    config = quick_config(calibration=texts, modules_to_not_convert=left_dense)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    stored = names(first)
    assert "transformer.blocks.0.self_attn.q_proj.row_scale" in stored
    assert "transformer.blocks.0.self_attn.q_proj.weight" in stored
    assert ("transformer.blocks.1.self_attn.att_proj.weight" in stored) is bool(left_dense)
    loaded = AutoModelForCausalLM.from_pretrained(first)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(second)
    assert load_file(first / "model.safetensors").keys() == load_file(second / "model.safetensors").keys()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(second)), logits(model))


def test_a_dequantized_model_is_saved_as_its_family_s_checkpoints_are(dense, quick_config, texts, tmp_path):
    packed, again = tmp_path / "packed", tmp_path / "again"
    config = quick_config(calibration=texts)
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(packed)
    model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=SABConfig(dequantize=True))
    model.save_pretrained(again)
    assert names(again) == names(dense)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(again)), logits(model))


def test_a_missing_tensor_is_named_under_its_name_in_the_model(dense, quick_config, texts, tmp_path):
    packed = tmp_path / "packed"
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=quick_config(calibration=texts)).save_pretrained(
        packed
    )
    file = packed / "model.safetensors"
    tensors = load_file(file)
    del tensors["transformer.blocks.1.ff_out.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with (
        pytest.warns(SABWarning, match="no digests"),
        pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.down_proj: tensor 'weight' is missing"),
    ):
        AutoModelForCausalLM.from_pretrained(packed)


def test_a_key_mapping_reaches_packed_layers(llama_folder, quick_config, texts, tmp_path):
    packed, renamed = tmp_path / "packed", tmp_path / "renamed"
    model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=quick_config(calibration=texts))
    model.save_pretrained(packed)
    shutil.copytree(packed, renamed)
    tensors = load_file(packed / "model.safetensors")
    own = {name.replace("model.layers.", "backbone.h."): tensor for name, tensor in tensors.items()}
    save_file(own, renamed / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(SABWarning, match="no digests"):
        found = AutoModelForCausalLM.from_pretrained(renamed, key_mapping={r"^backbone\.h\.": "model.layers."})
    assert torch.equal(logits(found), logits(model))
    with (
        pytest.raises(FormatError, match=r"layers\.0\.self_attn\.q_proj: no packed tensors"),
        pytest.warns(SABWarning, match="no digests"),
    ):
        AutoModelForCausalLM.from_pretrained(renamed)


def test_the_mapping_itself_is_left_as_it_was(dense, quick_config, texts):
    before = copy.deepcopy([(each.source_patterns, each.target_patterns) for each in mapping()])
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=quick_config(calibration=texts))
    table = conversion_mapping.get_checkpoint_conversion_mapping("llama")
    assert [(each.source_patterns, each.target_patterns) for each in table] == before
    assert [type(each) for each in table] == [type(each) for each in mapping()]
