"""Training adapters: both kinds of checkpointing, PEFT's preparation, Transformers' Trainer."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from optimum_sab.nn.linear import SABLinear

peft = pytest.importorskip("peft")

KINDS = (None, {"use_reentrant": False}, {"use_reentrant": True})


@pytest.fixture
def forwards(monkeypatch):
    """Counts the calls of packed layers: checkpointing makes them twice."""
    seen = []
    real = SABLinear.forward

    def count(layer, inputs):
        seen.append(torch.is_grad_enabled())
        return real(layer, inputs)

    monkeypatch.setattr(SABLinear, "forward", count)
    return seen


def lora(model, moved):
    torch.manual_seed(0)
    return moved(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")))


def gradients(model, ids):
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_model_checkpoints_and_has_the_same_gradients(kind, packed, random_llama, token_ids, moved, forwards):
    expected = gradients(lora(copy.deepcopy(random_llama), moved), token_ids)
    plain = len(forwards)
    forwards.clear()
    prepared = peft.prepare_model_for_kbit_training(packed, gradient_checkpointing_kwargs=kind)
    found = gradients(lora(prepared, moved), token_ids)
    assert len(forwards) > plain, "nothing was checkpointed"
    torch.testing.assert_close(found, expected)


def test_preparation_without_checkpointing_leaves_it_off(packed, random_llama, token_ids, moved, forwards):
    prepared = peft.prepare_model_for_kbit_training(packed, use_gradient_checkpointing=False)
    found = gradients(lora(prepared, moved), token_ids)
    plain = len(forwards)
    assert plain == 14
    torch.testing.assert_close(found, gradients(lora(copy.deepcopy(random_llama), moved), token_ids))


def test_preparation_makes_norms_float32_and_leaves_packed_tensors(packed, random_llama):
    prepared = peft.prepare_model_for_kbit_training(packed.to(torch.bfloat16))
    kinds = {p.dtype for p in prepared.parameters() if p.is_floating_point()}
    assert kinds == {torch.float32} and not any(p.requires_grad for p in prepared.parameters())
    for name, layer in random_llama.named_modules():
        if isinstance(layer, SABLinear):
            assert torch.equal(prepared.get_submodule(name).weight, layer.weight)


def test_preparation_of_a_dense_model_is_as_without_us(dense, token_ids, forwards):
    prepared = peft.prepare_model_for_kbit_training(dense)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in prepared.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_trains_an_adapter_and_saves_it_alone(kind, packed, random_llama, token_ids, moved, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in token_ids.repeat(4, 1)]
    if kind is not None and kind["use_reentrant"]:
        packed.enable_input_require_grads()  # which 4.57 leaves to the user, of dense models too
    model = lora(packed, moved)
    before = model.eval()(input_ids=token_ids, labels=token_ids).loss.item()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        learning_rate=2e-2,
        per_device_train_batch_size=4,
        gradient_checkpointing=kind is not None,
        gradient_checkpointing_kwargs=kind,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        save_strategy="no",
        logging_steps=100,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    after = model.eval()(input_ids=token_ids, labels=token_ids).loss.item()
    assert after < before - 0.1
    trainer.save_model(str(tmp_path / "adapter"))
    files = {each.name for each in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    again = peft.PeftModel.from_pretrained(copy.deepcopy(random_llama), tmp_path / "adapter")
    assert again(input_ids=token_ids, labels=token_ids).loss.item() == pytest.approx(after, abs=1e-5)


def test_biases_beside_an_adapter_are_trained(small_biased, token_ids, moved):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM")
    found = gradients(moved(peft.get_peft_model(small_biased, config)), token_ids)
    assert any(name.endswith("q_proj.base_layer.bias") for name in found)
    assert any(name.endswith("v_proj.bias") for name in found)
    assert all(g is not None and bool(g.isfinite().all()) for g in found.values())


@pytest.fixture
def small_biased(packed):
    """With a bias in every packed layer of an attention."""
    for name, layer in packed.named_modules():
        if isinstance(layer, SABLinear) and "self_attn" in name:
            layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features), requires_grad=False)
    return packed
