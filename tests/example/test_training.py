import dataclasses

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from optimum_sab.example import architecture, checkpoint_path
from optimum_sab.example.architecture import build_model, model_config, save_model
from optimum_sab.example.training import TrainingSettings, batches, train, weighted_loss
from optimum_sab.hf.processor import load_processor

SMALL = TrainingSettings(steps=10, scenes=2, signs=1, texts=1, prose=1, warmup=4)

acceleration = pytest.importorskip("optimum_sab.example.acceleration", reason="training needs Transformers 5")


@pytest.fixture(scope="module")
def processor():
    return load_processor(checkpoint_path())


@pytest.fixture(scope="module")
def batch(processor):
    return next(batches(processor, SMALL))


def test_batches_are_determined_by_the_seed(processor, batch):
    again = next(batches(processor, SMALL))
    assert all(torch.equal(batch.inputs[name], again.inputs[name]) for name in batch.inputs)
    other = next(batches(processor, dataclasses.replace(SMALL, seed=1)))
    assert not torch.equal(batch.inputs["input_ids"], other.inputs["input_ids"])


def test_batches_weigh_answers_prose_and_nothing_else(batch):
    weight = batch.loss_weight
    assert set(weight[:4].unique().tolist()) == {0.0, 1.0}
    assert weight[4][batch.inputs["attention_mask"][4] == 1].unique().tolist() == pytest.approx([SMALL.prose_weight])
    assert not weight[batch.inputs["attention_mask"] == 0].any()


def test_weighted_loss_ignores_targets_without_weight(batch):
    torch.manual_seed(0)
    model = build_model()
    ids = batch.inputs["input_ids"].clone()
    last = batch.loss_weight[0].nonzero().max().item()
    ids[0, last + 1] = 300
    changed = dataclasses.replace(batch, inputs={**batch.inputs, "input_ids": ids})
    torch.testing.assert_close(weighted_loss(model, changed), weighted_loss(model, batch))


def test_acceleration_changes_neither_loss_nor_gradient(batch):
    torch.manual_seed(0)
    plain = build_model()
    torch.manual_seed(0)
    fast = build_model()
    acceleration.accelerate(fast, compiled=False)
    losses = [weighted_loss(model, batch) for model in (plain, fast)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    named = dict(plain.named_parameters())
    for name, parameter in fast.named_parameters():
        error = (parameter.grad - named[name].grad).norm() / named[name].grad.norm()
        assert error < 1e-4, name


@pytest.mark.usefixtures("quick_muon")
def test_train_saves_a_changed_decoder_and_leaves_the_tower_alone(processor, tmp_path, monkeypatch):
    torch.manual_seed(0)
    small = model_config()
    small["text_config"] |= {"num_hidden_layers": 1}
    monkeypatch.setattr(architecture, "model_config", lambda: small)
    model = build_model()
    before = {name: each.clone() for name, each in model.named_parameters()}
    train(model, processor, dataclasses.replace(SMALL, steps=2), lambda: save_model(model, tmp_path), save_every=100)
    changed = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert changed == {name for name in before if not name.startswith("model.visual.")}
    saved = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    for name, each in saved.named_parameters():
        torch.testing.assert_close(
            each, dict(model.named_parameters())[name].to(torch.bfloat16).float(), rtol=0, atol=0
        )


def test_model_config_matches_the_vocabulary_and_the_picture_features():
    config = model_config()
    assert config["text_config"]["hidden_size"] == config["vision_config"]["out_hidden_size"]
    assert build_model().get_input_embeddings().num_embeddings == config["text_config"]["vocab_size"]
