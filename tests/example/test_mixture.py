import copy
import dataclasses

import pytest
import torch
import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("5"):
    pytest.skip("fused experts need Transformers 5", allow_module_level=True)

from transformers import Qwen2_5_VLForConditionalGeneration

from optimum_sab.eval.subject import Budget, find_subject
from optimum_sab.example import checkpoint_path
from optimum_sab.example.architecture import save_model
from optimum_sab.example.evaluation import evaluate
from optimum_sab.example.mixture import CHOSEN, EXPERTS, build_mixture, imbalance, mixture_config
from optimum_sab.example.tasks import TASKS, held_out_questions
from optimum_sab.example.training import TrainingSettings, balanced_loss, batches, train, weighted_loss
from optimum_sab.hf.processor import load_processor

SMALL = TrainingSettings(steps=1, scenes=1, signs=0, texts=1, prose=0, warmup=1)


@pytest.fixture(scope="module")
def processor():
    return load_processor(checkpoint_path())


@pytest.fixture(scope="module")
def mixture():
    torch.manual_seed(0)
    return build_mixture()


def test_every_two_experts_begin_as_the_mlp_of_the_example(mixture):
    example = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint_path(), dtype=torch.float32)
    x = torch.randn(5, 256)
    for layer, dense in zip(mixture.model.language_model.layers, example.model.language_model.layers, strict=True):
        wanted = dense.mlp(x)
        for expert in range(0, EXPERTS, 2):
            chosen = torch.tensor([[expert, expert + 1]]).expand(len(x), -1)
            found = layer.mlp.experts(x, chosen, torch.full(chosen.shape, 0.5))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_imbalance_is_least_where_tokens_are_spread_evenly():
    even = torch.eye(EXPERTS).repeat(4, 1) + torch.eye(EXPERTS).roll(1, 1).repeat(4, 1)
    mask = torch.ones(1, len(even))
    torch.testing.assert_close(imbalance((even, even), mask), torch.tensor(float(CHOSEN)))
    one = torch.zeros_like(even)
    one[:, :CHOSEN] = 4.0
    assert imbalance((even, one), mask) > 1.5 * CHOSEN
    mask[0, 1:] = 0
    assert imbalance((even,), mask) > CHOSEN  # padding does not count


@pytest.mark.usefixtures("quick_muon")
@pytest.mark.parametrize("tower", [False, True])
def test_training_keeps_experts_in_use_and_changes_decoder_and_deepstack(mixture, processor, tower):
    model = copy.deepcopy(mixture)
    del model.model.language_model.layers[1:]
    batch = next(batches(processor, SMALL))
    with torch.no_grad():
        assert balanced_loss(model, batch) > weighted_loss(model, batch)
    before = {name: each.clone() for name, each in model.named_parameters()}
    train(model, processor, dataclasses.replace(SMALL, tower=tower), lambda: None, save_every=100)
    changed = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    visual = {name for name in before if name.startswith("model.visual.")}
    deep = {name for name in visual if "deepstack" in name}
    assert changed >= before.keys() - visual
    assert changed & deep
    assert bool(changed & (visual - deep)) == tower


def test_a_saved_mixture_is_the_same_and_asked_the_questions_of_the_example(mixture, processor, tmp_path):
    save_model(mixture, tmp_path, mixture_config())
    processor.save_pretrained(tmp_path)
    subject = find_subject(str(tmp_path), None, Budget(questions=1, probes=1))
    assert [each.task for each in subject.questions] == list(TASKS)
    model = subject.load()
    for name, each in model.named_parameters():
        wanted = mixture.get_parameter(name).to(torch.bfloat16).float()
        torch.testing.assert_close(each, wanted, rtol=0, atol=0)
    asked = held_out_questions("text", 10, 0)
    assert evaluate(model, subject.processor, asked).accuracy > 0
