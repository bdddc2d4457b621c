"""What save_pretrained, pickle and copies keep."""

import copy
import io
import json
import pickle

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from optimum_sab import SABConfig, SABLinear
from optimum_sab.errors import SABWarning

FIVE = int(transformers.__version__.split(".")[0]) >= 5


def assert_same_state(found, expected):
    assert found.state_dict().keys() == expected.state_dict().keys()
    for (name, a), b in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b), name


def test_save_and_load_keep_keys_dtypes_logits_and_tokens(model, logits, continued, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_state(again, model)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(continued(again), continued(model))
    assert again.get_memory_footprint() == model.get_memory_footprint()


def test_without_safetensors_is_refused_or_the_argument_is_gone(model, tmp_path):
    if FIVE:  # the argument is no longer known: safetensors are written
        model.save_pretrained(tmp_path)
        assert [file.suffix for file in tmp_path.glob("model*")] == [".safetensors"]
        assert model.hf_quantizer.is_serializable()
        return
    with pytest.warns(SABWarning, match="safetensors only"), pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())


def test_dequantized_it_generates_saves_and_loads_as_a_dense_model(model, logits, continued, tmp_path):
    packed = logits(model)
    model.dequantize()
    torch.testing.assert_close(logits(model), packed, rtol=1e-4, atol=1e-4)
    tokens = continued(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_state(again, model)
    assert torch.equal(continued(again), tokens)


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def torch_saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copied, pickled, torch_saved])
def test_a_copy_is_a_packed_model_of_its_own(model, logits, continued, tmp_path, duplicate):
    expected, tokens = logits(model), continued(model)
    twin = duplicate(model)
    assert_same_state(twin, model)
    assert twin.hf_quantizer is not model.hf_quantizer
    assert twin.num_parameters() == model.num_parameters()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SABLinear):
                module.weight.zero_()
    assert torch.equal(logits(twin), expected)
    assert torch.equal(continued(twin), tokens)
    twin.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("saved_before", [False, True])
def test_the_config_is_json(pair, model, tmp_path, saved_before):
    if saved_before:
        model.save_pretrained(tmp_path)
    for config in (model.config, AutoConfig.from_pretrained(pair.packed)):
        for state in (config.to_dict(), config.to_diff_dict(), json.loads(config.to_json_string())):
            found = json.loads(json.dumps(state["quantization_config"]))
            assert found["quant_method"] == "sab"
            assert SABConfig.from_dict(found) == SABConfig.from_dict(model.config.quantization_config.to_dict())
    assert (
        AutoConfig.from_pretrained(pair.packed).to_dict()["quantization_config"]["block_size"] == SABConfig().block_size
    )


def test_resized_embeddings_are_saved_and_loaded(model, logits, tmp_path):
    before = logits(model)
    model.resize_token_embeddings(1100)
    assert model.get_input_embeddings().weight.shape == model.lm_head.weight.shape == (1100, 64)
    after = logits(model)
    assert torch.equal(after[..., :1024], before)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), after)


def test_tied_weights_stay_tied(tied, logits, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    before = logits(model)
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.get_input_embeddings().weight
    model.resize_token_embeddings(1030)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(logits(again)[..., :1024], before)
