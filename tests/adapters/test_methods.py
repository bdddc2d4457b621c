"""Every method of PEFT on packed layers: as on the dequantized ones, or refused by name."""

import copy
import dataclasses

import pytest
import torch

from optimum_sab.errors import ConfigError
from optimum_sab.hf.adapters.support import WORKING

peft = pytest.importorskip("peft")

METHODS = {kind.value: kind for kind in peft.PeftType}
# prompts are put in front, and these train a norm and an embedding: no packed layer is wrapped
ELSEWHERE = {
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
}
OPTIONS = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"target_modules": "self_attn", "adapter_layers": 1, "adapter_len": 4},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 32},
    "FOURIERFT": {"n_frequency": 50},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "OFT": {"oft_block_size": 32, "use_cayley_neumann": False},
    "POLY": {"r": 4, "n_tasks": 1},
    "RANDLORA": {"r": 4},
    "VBLORA": {"num_vectors": 8, "vector_length": 32, "topk": 2},
    "WAVEFT": {"n_frequency": 50},
}
# not tried: they need adapters of their own, tasks, scikit-learn
APART = {"XLORA", "MULTITASK_PROMPT_TUNING", "ADAMSS"}
REFUSED = sorted(METHODS.keys() - set(WORKING) - ELSEWHERE.keys() - APART)


def configuration(method):
    kind = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[METHODS[method]]
    options = {"task_type": "CAUSAL_LM", **ELSEWHERE.get(method, {}), **OPTIONS.get(method, {})}
    if method not in ELSEWHERE and "target_modules" in {field.name for field in dataclasses.fields(kind)}:
        options.setdefault("target_modules", ["q_proj", "v_proj", "down_proj"])
    return kind(**options)


def adapted(model, method, moved):
    torch.manual_seed(0)
    return moved(peft.get_peft_model(model, configuration(method)).eval())


def outcome(model, method, ids):
    tasks = {"task_ids": torch.zeros(len(ids), dtype=torch.long)} if method == "POLY" else {}
    given = model(input_ids=ids, labels=ids, **tasks)
    given.loss.backward()
    return given.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_every_method_that_is_said_to_work_is_one_of_peft_s():
    assert set(WORKING) <= METHODS.keys()


@pytest.mark.parametrize("method", [*WORKING, *ELSEWHERE])
def test_method_computes_as_on_the_dequantized_model(method, packed, dense, token_ids, moved):
    before = packed(token_ids).logits
    expected, wanted = outcome(adapted(dense, method, moved), method, token_ids)
    logits, found = outcome(adapted(packed, method, moved), method, token_ids)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert method in ELSEWHERE or not torch.allclose(logits, before, atol=1e-4)
    assert found.keys() == wanted.keys() and found
    for name, gradient in wanted.items():
        assert gradient is not None, name
        size = gradient.abs().max().clamp(min=1e-9)
        torch.testing.assert_close(found[name] / size, gradient / size, rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize("method", WORKING)
def test_method_is_saved_and_read_again(method, packed, random_llama, token_ids, moved, tmp_path):
    tasks = {"task_ids": torch.zeros(len(token_ids), dtype=torch.long)} if method == "POLY" else {}
    model = adapted(packed, method, moved)
    expected = model(token_ids, **tasks).logits
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(random_llama), tmp_path)
    assert torch.equal(again(token_ids, **tasks).logits, expected)


@pytest.mark.parametrize("method", REFUSED)
def test_method_that_reads_weights_is_refused_before_a_layer_is_wrapped(method, packed, token_ids):
    before = packed(token_ids).logits
    with pytest.raises(ConfigError, match=rf"{method} is not for packed layers such as model\.layers\.0.*dequantize"):
        peft.get_peft_model(packed, configuration(method))
    assert not any("base_layer" in name for name, _ in packed.named_modules())
    assert torch.equal(packed(token_ids).logits, before)


@pytest.mark.parametrize("method", ["LOHA", "UNILORA"])
def test_refused_method_is_welcome_where_no_layer_is_packed(method, dense, token_ids, moved):
    assert adapted(dense, method, moved)(token_ids).logits.isfinite().all()


@pytest.mark.parametrize("chosen", ["bat"])
def test_option_that_reads_weights_is_refused(chosen, packed):
    with pytest.raises(ConfigError, match="init_weights='bat'"):
        peft.get_peft_model(packed, peft.MissConfig(target_modules=["q_proj"], init_weights=chosen))
