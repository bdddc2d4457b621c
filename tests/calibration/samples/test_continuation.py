"""Continuations: right in batches, drawn as they should be, and without a trace."""

import random

import pytest
import torch
from torch import nn

from optimum_sab.calibration.samples import continuation
from optimum_sab.calibration.samples.continuation import Prompt, continue_prompts, require_generation
from optimum_sab.calibration.samples.token_inputs import extend_inputs
from optimum_sab.calibration.samples.vocabulary import Vocabulary
from optimum_sab.errors import CalibrationError, NonFiniteError

MARKS = frozenset({60, 61, 62, 63})  # placeholders and borders of pictures in the tiny models
OPEN = Vocabulary(ends=frozenset(), forbidden=MARKS, padding=0)
END = 7


def prompts_of(subject, room=6, seed=0):
    return [Prompt(s, room + i, random.Random(f"{seed} {i}")) for i, s in enumerate(subject.samples)]


# -- what is written ----------------------------------------------------------------------------------------------


def test_continuation_in_a_padded_batch_is_what_the_whole_forward_gives(subject, monkeypatch):
    """Drawing nothing but the likeliest token, every one is the best answer of a forward over the finished sample."""
    monkeypatch.setattr(continuation, "TOP_P", 1e-6)
    found = continue_prompts(subject.model, prompts_of(subject), OPEN)
    assert [len(each.tokens) for each in found] == [6 + i for i in range(len(found))]
    for sample, each in zip(subject.samples, found, strict=True):
        finished = extend_inputs(sample, each.tokens)
        with torch.no_grad():
            logits = subject.model(**finished, use_cache=False).logits[0]
        logits[:, sorted(MARKS)] = -torch.inf
        start = sample["input_ids"].shape[1]
        assert logits[start - 1 : -1].argmax(dim=1).tolist() == list(each.tokens)


def test_continuation_does_not_hang_on_the_batch(subject):
    together = continue_prompts(subject.model, prompts_of(subject), OPEN)
    alone = [continue_prompts(subject.model, [prompt], OPEN)[0] for prompt in prompts_of(subject)]
    assert together == alone


def test_continuations_differ_by_the_source_of_chance(build):
    subject = build("llama")
    first = continue_prompts(subject.model, prompts_of(subject), OPEN)
    assert continue_prompts(subject.model, prompts_of(subject), OPEN) == first
    assert continue_prompts(subject.model, prompts_of(subject, seed=1), OPEN) != first


def test_more_prompts_than_a_batch_come_back_in_order(build, monkeypatch):
    subject = build("llama")
    expected = continue_prompts(subject.model, prompts_of(subject), OPEN)
    monkeypatch.setattr(continuation, "BATCH", 2)
    assert continue_prompts(subject.model, prompts_of(subject), OPEN) == expected


def test_continuation_stops_behind_the_end_token(build):
    subject = build("llama")
    vocabulary = Vocabulary(frozenset({END}), MARKS, 0)
    seen = [
        each
        for seed in range(30)
        for each in continue_prompts(subject.model, prompts_of(subject, room=12, seed=seed), vocabulary)
    ]
    ended = [each for each in seen if each.ended]
    assert 0 < len(ended) < len(seen)
    assert all(each.tokens.index(END) == len(each.tokens) - 1 for each in ended)
    assert all(END not in each.tokens and len(each.tokens) >= 12 for each in seen if not each.ended)


def test_forbidden_tokens_and_those_without_text_are_never_written(build):
    subject = build("llama")
    allowed = {3, 4, 5}
    vocabulary = Vocabulary(frozenset(), frozenset(set(range(40)) - allowed | {9999}), 0, size=40)
    found = continue_prompts(subject.model, prompts_of(subject, room=20), vocabulary)
    assert {token for each in found for token in each.tokens} == allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision_continue(subject, dtype):
    subject.model.to(dtype)
    samples = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in s.items()} for s in subject.samples]
    found = continue_prompts(subject.model, [Prompt(s, 4, random.Random(0)) for s in samples], OPEN)
    assert [len(each.tokens) for each in found] == [4] * len(samples)


# -- how tokens are drawn -----------------------------------------------------------------------------------------


def draw(logits, rows):
    """Counts of the tokens drawn from equal rows of logits."""
    choice = continuation._Choice([random.Random(i) for i in range(rows)], Vocabulary(frozenset(), frozenset(), 0))
    scores = choice(torch.zeros(rows, 1, dtype=torch.int64), logits.expand(rows, -1).clone())
    assert torch.equal(scores.isfinite().sum(dim=1), torch.ones(rows, dtype=torch.int64))
    return torch.bincount(scores.argmax(dim=1), minlength=logits.numel())


def test_tokens_are_drawn_in_proportion_inside_the_nucleus():
    shares = torch.tensor([0.02, 0.5, 0.03, 0.25, 0.2])  # the three large ones make up exactly 0.95
    counts = draw(shares.log(), 4000) / 4000
    assert counts[0] == counts[2] == 0
    assert torch.allclose(counts, shares * torch.tensor([0, 1, 0, 1, 1]) / 0.95, atol=0.03)


def test_a_token_with_all_the_weight_is_always_drawn():
    assert draw(torch.tensor([0.0, 100.0, 0.0]), 50).tolist() == [0, 50, 0]


# -- no trace -----------------------------------------------------------------------------------------------------


def test_continuing_leaves_the_model_and_global_chance_as_they_were(subject):
    model = subject.model
    with torch.no_grad():
        before = [model(**sample, use_cache=False).logits for sample in subject.samples]
    model.train()
    model.get_decoder().layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    model.config.use_cache = False
    config = model.generation_config
    config.update(temperature=0.1, num_beams=3, repetition_penalty=5.0, use_cache=False, max_length=17)
    settings, text = config.to_dict(), model.config.to_dict()
    torch.manual_seed(3)
    random.seed(3)
    state, other = torch.get_rng_state(), random.getstate()

    continue_prompts(model, prompts_of(subject), OPEN)

    assert model.generation_config is config
    assert config.to_dict() == settings
    assert model.config.to_dict() == text
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == other
    model.eval()
    with torch.no_grad():
        after = [model(**sample, use_cache=False).logits for sample in subject.samples]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_models_own_generation_settings_have_no_say(build):
    subject = build("llama")
    expected = continue_prompts(subject.model, prompts_of(subject), OPEN)
    subject.model.generation_config.update(num_beams=3, repetition_penalty=9.0, max_length=4, do_sample=True)
    assert continue_prompts(subject.model, prompts_of(subject), OPEN) == expected


def test_generation_config_comes_back_after_an_error(build):
    subject = build("llama")
    config = subject.model.generation_config
    subject.model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(NonFiniteError):
        continue_prompts(subject.model, prompts_of(subject), OPEN)
    assert subject.model.generation_config is config


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(build, value):
    subject = build("llama")
    broken = torch.tensor(5)
    subject.model.lm_head.register_forward_hook(lambda module, args, output: output.index_fill(-1, broken, value))
    with pytest.raises(NonFiniteError, match=r"logits hold NaN or inf.*float16.*bfloat16"):
        continue_prompts(subject.model, prompts_of(subject), OPEN)


def test_a_model_without_a_head_is_refused(build):
    for model in (build("llama").model.model, nn.Linear(2, 2)):
        with pytest.raises(CalibrationError, match=rf"{type(model).__name__} cannot generate.*AutoModelForCausalLM"):
            require_generation(model)
        with pytest.raises(CalibrationError, match="cannot generate"):
            continue_prompts(model, [], OPEN)


def test_an_offloaded_model_is_refused(build):
    model = build("llama").model
    model.model.norm.to("meta")
    with pytest.raises(CalibrationError, match=r"model\.norm\.weight is offloaded.*device_map"):
        require_generation(model)


def test_a_failing_generation_names_the_way_out(build):
    subject = build("llama")
    prompt = Prompt({**subject.samples[0], "unheard_of": torch.ones(1, 3)}, 2, random.Random(0))
    with pytest.raises(CalibrationError, match=r"LlamaForCausalLM failed.*unheard_of.*calibration='builtin'"):
        continue_prompts(subject.model, [prompt], OPEN)


def test_prompts_with_unlike_pictures_do_not_share_a_batch():
    ids = torch.tensor([[3, 4]])
    inputs = [
        {"input_ids": ids},
        {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 8, 8)},
        {"input_ids": torch.tensor([[3, 4, 5]]), "pixel_values": torch.zeros(1, 3, 8, 8)},
        {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 8, 4)},
        {"input_ids": ids, "sizes": [(8, 8)]},
        {"input_ids": ids, "sizes": [(8, 8)]},
    ]
    batches = list(continuation._batches([Prompt(each, 1, random.Random(0)) for each in inputs]))
    assert batches == [[0], [1, 2], [3], [4], [5]]
