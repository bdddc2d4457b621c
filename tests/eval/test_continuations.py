import pytest
import torch

from optimum_sab.errors import ConfigError
from optimum_sab.eval.continuations import TOKENS, Continuations, continued, prompts_of
from optimum_sab.eval.methods import read_method
from optimum_sab.eval.quality import compare_quality
from optimum_sab.eval.subject import Budget, find_subject


def test_figures_are_of_the_tokens():
    dense = [[1, 2, 3, 4, 5, 6], list(range(64))]
    found = Continuations.of([[1, 2, 3, 9, 9, 9], list(range(64))], dense)
    assert found.followed == pytest.approx((3 + 64) / 2 / TOKENS)
    assert found.same == 0.5
    assert found.repeated == 0.0
    again = Continuations.of([[7, 8] * 32], [[7, 8] * 32])
    assert again.repeated == pytest.approx(1 - 2 / 61)
    assert (again.followed, again.same) == (1.0, 1.0)
    stopped = Continuations.of([[1, 2]], [[1, 2, 3]])
    assert (stopped.followed, stopped.same) == (2 / TOKENS, 0.0)
    with pytest.raises(ConfigError, match="no prompt"):
        Continuations.of([], [])


def test_prompts_are_pieces_of_all_texts_in_turn_or_probes():
    texts = {"a": torch.arange(256).view(1, 256), "b": torch.arange(1000, 1100).view(1, 100)}
    found = [prompt["input_ids"] for prompt in prompts_of(texts, [], 50)]
    assert [int(ids[0, 0]) for ids in found] == [0, 1000, 64, 1064, 128, 192]
    assert all(ids.shape == (1, 32) for ids in found)
    assert len(prompts_of(texts, [], 3)) == 3
    probes = [{"input_ids": torch.zeros(1, 5), "pixel_values": torch.zeros(1)}] * 4
    assert prompts_of({}, probes, 2) == probes[:2]


def test_continuations_are_greedy_and_measured_beside_the_dense_model(llama_folder):
    subject = find_subject(
        llama_folder, None, Budget(samples=4, length=32, held_out=2, window=80, probes=2, continuations=3)
    )
    method = read_method("default,iterations=1,sweeps=0,block_size=128,allocation=uniform,temperature_scaling=false")
    quality = compare_quality(subject, [method])
    assert quality.dense.continuations.same == quality.dense.continuations.followed == 1.0
    assert 0 <= quality.rows[0].continuations.followed < 1
    model, prompt = subject.load(), prompts_of(subject.texts, (), 1)[0]
    (tokens,) = continued(model, [prompt])
    ids = prompt["input_ids"]
    for token in tokens[:5]:
        with torch.no_grad():
            assert int(model(input_ids=ids).logits[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_pictures_are_gone_on_from_too(small_example):
    subject = find_subject("example", "tasks", Budget(samples=2, questions=1, probes=6, continuations=2))
    prompts = prompts_of(subject.texts, subject.probes, 2)
    assert any("pixel_values" in prompt for prompt in prompts)
    assert [1 <= len(each) <= TOKENS for each in continued(subject.load(), prompts)] == [True, True]
