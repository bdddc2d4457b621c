"""Merging into packed layers is refused before anything is merged; into dequantized ones it gives the adapted model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_sab.errors import ConfigError

peft = pytest.importorskip("peft")
tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")


@pytest.fixture
def adapted(packed, moved):
    """With an adapter on dense layers too: the output embedding comes last, so an attempt must not touch it either."""

    def make(config=None, model=packed):
        config = config or peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"])
        return moved(peft.get_peft_model(model, config).eval())

    return make


MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "safe merge_and_unload": lambda model: model.merge_and_unload(safe_merge=True, progressbar=False),
    "merge_adapter": lambda model: model.merge_adapter(),
    "safe merge_adapter": lambda model: model.merge_adapter(safe_merge=True),
    "named": lambda model: model.merge_adapter(["default"]),
    "positional": lambda model: model.base_model.merge_and_unload(False, True, ["default"]),
    "one layer": lambda model: model.base_model.model.model.layers[0].mlp.down_proj.merge(),
}
CONFIGS = {
    "lora": {},
    "dora": {"use_dora": True},
    "ia3": None,
    "oft": None,
    "vera": None,
}


def config_of(kind):
    targets = ["q_proj", "down_proj"]
    if kind == "ia3":
        return peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"])
    if kind == "oft":
        return peft.OFTConfig(target_modules=targets, oft_block_size=32)
    if kind == "vera":
        return peft.VeraConfig(target_modules=targets)
    return peft.LoraConfig(r=4, target_modules=targets, **CONFIGS[kind])


@pytest.mark.parametrize("way", MERGES)
def test_merging_into_packed_layers_is_refused_and_leaves_all_as_it_was(way, adapted, token_ids):
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(token_ids).logits
    with pytest.raises(ConfigError, match=r"cannot be merged.*(down_proj|q_proj|a layer).*packed.*dequantize\(\)"):
        MERGES[way](model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(token_ids).logits, expected)
    assert not any(m.merged for m in model.modules() if isinstance(m, tuners_utils.BaseTunerLayer))


@pytest.mark.parametrize("kind", CONFIGS)
def test_merging_any_method_into_packed_layers_is_refused(kind, adapted):
    model = adapted(config_of(kind))
    for way in ("merge_and_unload", "safe merge_adapter", "one layer"):
        with pytest.raises(ConfigError, match="cannot be merged"):
            MERGES[way](model)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_merging_after_dequantize_gives_the_adapted_model(kind, safe, adapted, token_ids):
    model = adapted(config_of(kind))
    expected = model(token_ids).logits
    model.dequantize()
    torch.testing.assert_close(model(token_ids).logits, expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(merged(token_ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert all(
        type(merged.get_submodule(f"model.layers.0.{n}")) is torch.nn.Linear
        for n in ("self_attn.q_proj", "mlp.down_proj")
    )


def test_adapter_read_beside_the_dequantized_model_is_merged(adapted, random_llama, dense, token_ids, tmp_path):
    model = adapted()
    expected = model(token_ids).logits
    model.save_pretrained(tmp_path)
    merged = peft.PeftModel.from_pretrained(dense, tmp_path).merge_and_unload()
    torch.testing.assert_close(merged(token_ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_adapter_of_dense_layers_alone_is_merged_beside_packed_ones(adapted, token_ids):
    model = adapted(peft.LoraConfig(r=4, target_modules=["lm_head"]))
    expected = model(token_ids).logits
    torch.testing.assert_close(model.merge_and_unload()(token_ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_adapter_of_dense_layers_is_merged_by_name_beside_one_of_packed_layers(adapted, token_ids):
    model = adapted(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("head", peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    model.merge_adapter(["head"])
    assert model.base_model.model.lm_head.merged
    with pytest.raises(ConfigError, match="q_proj"):
        model.merge_adapter(["default"])


def test_packed_model_within_its_adapter_is_not_saved_under_names_that_nobody_loads(packed, tmp_path):
    del packed.config._pre_quantization_dtype  # Transformers' own, which a file does not take
    adapted = peft.get_peft_model(packed, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"q_proj\.base_layer lies within an adapter.*unload\(\)"):
        adapted.base_model.model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    adapted.unload().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "model.layers.0.self_attn.q_proj.weight" in loaded.state_dict()
