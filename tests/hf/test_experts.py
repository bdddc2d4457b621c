"""Mixture-of-experts models through `from_pretrained`: packed, saved, loaded, made dense, resumed."""

import json
import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_utils

from optimum_sab import SABConfig
from optimum_sab.errors import ConfigError, SABWarning
from optimum_sab.hf.selection import select
from optimum_sab.nn.experts import SABExperts
from optimum_sab.nn.linear import SABLinear

pytestmark = pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="experts are no one module")

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1024,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
KINDS = {
    "qwen3_moe": {"moe_intermediate_size": 32, "intermediate_size": 96, "num_experts": 6},
    "gpt_oss": {
        "intermediate_size": 32,
        "num_local_experts": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": {"intermediate_size": 96, "num_local_experts": 4},
}
QUICK = {
    "iterations": 2,
    "sweeps": 0,
    "allocation": "uniform",
    "temperature_scaling": False,
    "examples": False,
    "progress": "none",
}
TOKENS = torch.arange(3, 27)[None]


def samples(count=6, length=40):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 1024, (1, length), generator=generator)} for _ in range(count)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory, smallest_example):
    """Folders of small random models by kind, each with a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(smallest_example)

    def build(kind):
        folder = tmp_path_factory.mktemp(kind) / "dense"
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **COMMON, **KINDS[kind])
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # as much of an expert as of the rest
            parameter.data.mul_(4) if parameter.dim() > 1 else None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return {kind: build(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    """The same, packed: in memory, and the folder it was saved to."""

    def pack(kind):
        model = quantize(dense[kind])
        folder = tmp_path_factory.mktemp(kind) / "packed"
        model.save_pretrained(folder)
        return model, folder

    return {kind: pack(kind) for kind in KINDS}


def quantize(folder, **settings):
    config = SABConfig(calibration=samples(), **{**QUICK, **settings})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)


def logits(model, ids=TOKENS):
    with torch.no_grad():
        return model(ids).logits


def experts(model):
    return [module for module in model.modules() if isinstance(module, SABExperts)]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_model_comes_back_as_it_was_saved(packed, kind):
    model, folder = packed[kind]
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before, after = model.state_dict(), found.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)
    assert len(experts(found)) == 2
    for each in experts(found):
        assert sum(isinstance(module, SABLinear) for module in each.modules()) == 2 * len(each)


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_is_near_the_dense_one(packed, kind):
    report = packed[kind][0].hf_quantizer.report
    errors = [layer.error for block in report.blocks for layer in block.layers if ".experts." in layer.name]
    assert len(errors) == 2 * 2 * len(experts(packed[kind][0])[0])
    assert min(errors) > 0.01 and max(errors) < 0.4  # a sign and a scale alone leave 0.36 of a normal distribution


@pytest.mark.parametrize("kind", KINDS)
def test_eager_computes_the_same(packed, kind):
    model = AutoModelForCausalLM.from_pretrained(packed[kind][1], dtype=torch.float32, experts_implementation="eager")
    torch.testing.assert_close(logits(model), logits(packed[kind][0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_model_is_dense_again_under_its_own_names(dense, packed, kind, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed[kind][1], dtype=torch.float32).dequantize()
    assert not experts(model)
    torch.testing.assert_close(logits(model), logits(packed[kind][0]), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    names = [set(json.loads((folder / "config.json").read_text())) for folder in (tmp_path, dense[kind])]
    assert "quantization_config" not in names[0]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert {name: p.shape for name, p in again.named_parameters()} == {
        name: p.shape
        for name, p in AutoModelForCausalLM.from_pretrained(dense[kind], dtype=torch.float32).named_parameters()
    }


def test_a_second_save_is_the_first(packed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed["qwen3_moe"][1], dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_stacked_experts_are_saved_without_a_copy(packed, tmp_path, monkeypatch):
    """Transformers copies what is in one storage with something else."""
    model = packed["qwen3_moe"][0]
    model(TOKENS)  # experts are stacked
    views = {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if isinstance(module, SABExperts)
        for key, tensor in module.state_dict().items()
    }
    assert any(each.untyped_storage().nbytes() > each.nbytes for each in views.values())
    handed, own = {}, modeling_utils.remove_tied_weights_from_state_dict

    def watched(state, whole):
        handed.update(before := dict(state))
        after = own(state, whole)
        assert all(after[name] is tensor for name, tensor in before.items() if name in after)
        return after

    monkeypatch.setattr(modeling_utils, "remove_tied_weights_from_state_dict", watched)
    model.save_pretrained(tmp_path / "again")
    assert all(handed[name].data_ptr() == tensor.data_ptr() for name, tensor in views.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_it_counts_as_the_dense_model_does(dense, packed):
    model = AutoModelForCausalLM.from_pretrained(dense["qwen3_moe"])
    assert packed["qwen3_moe"][0].num_parameters() == model.num_parameters()


def test_it_generates(packed):
    model = packed["qwen3_moe"][0]
    found = model.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert found.shape == (1, TOKENS.shape[1] + 4)


def test_rules_name_an_expert_a_blocks_experts_and_the_router(dense):
    rules = ["layers.0.mlp.experts.3", "layers.1.mlp.experts"]
    model = quantize(dense["qwen3_moe"], modules_to_not_convert=rules)
    [own] = experts(model)
    assert [isinstance(own.linear(index, "down_proj"), SABLinear) for index in range(6)] == [True] * 3 + [False] + [
        True
    ] * 2
    assert model.model.layers[1].mlp.experts.gate_up_proj.shape == (6, 64, 64)
    with pytest.raises(ConfigError, match=r"module rule 'mlp\.experts\.9' matches no module"):
        quantize(dense["qwen3_moe"], modules_to_not_convert=["mlp.experts.9"])


def test_a_model_with_some_experts_dense_comes_back(dense, tmp_path):
    rules = ["layers.0.mlp.experts.3", "layers.1.mlp.experts"]
    model = quantize(dense["qwen3_moe"], modules_to_not_convert=rules)
    model.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    before, after = model.state_dict(), found.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)


def test_settings_of_one_expert(dense):
    model = quantize(dense["qwen3_moe"], dynamic={r"experts\.1\.": {"base_planes": 2}})
    own = experts(model)[0]
    assert [own.linear(index, "down_proj").settings.base_planes for index in range(6)] == [1, 2, 1, 1, 1, 1]
    wanted = logits(model)
    torch.testing.assert_close(logits(model.dequantize()), wanted, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_whose_experts_are_dense_keeps_them_fused(dense, tmp_path):
    """As those are that were made before experts could be packed."""
    model = quantize(dense["qwen3_moe"], modules_to_not_convert=["mlp.experts"])
    assert not experts(model) and "experts" not in model.config.quantization_config.measured
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SABWarning)
        found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert not experts(found)
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)


def test_experts_that_are_packed_where_the_model_has_none(packed, tmp_path):
    config = json.loads((packed["qwen3_moe"][1] / "config.json").read_text())
    config["quantization_config"]["measured"]["experts"] = ["layers.0.mlp.nowhere"]
    model = AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model("qwen3_moe", **COMMON, **KINDS["qwen3_moe"])
    )
    own = SABConfig.from_dict(config["quantization_config"])
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.nowhere: its experts are packed"):
        select(model, own, strict=False)


def test_the_report_tells_what_came_to_each_expert(packed):
    report = packed["qwen3_moe"][0].hf_quantizer.report
    for block in report.blocks:
        first, second = block.experts
        assert first.name.endswith("experts.*.gate_up_proj") and second.name.endswith("experts.*.down_proj")
        assert first.counts == second.counts and sum(first.counts) == 6 * 40 * 2
    entry = report.to_dict()["blocks"][0]["experts"][0]
    assert entry["experts"] == 6 and entry["tokens"] == report.blocks[0].experts[0].counts
