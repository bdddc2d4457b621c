"""The comparison of a binarized model with the dense one on samples of their own."""

import pytest
import torch
from torch import nn

from optimum_sab.calibration.predictions.agreement import Agreement, AgreementCheck
from optimum_sab.calibration.predictions.divergence import divergence
from optimum_sab.nn.decoder import find_decoder_blocks


def spoil(model, amount):
    """Move every weight of the decoder blocks."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in find_decoder_blocks(model).blocks:
            for parameter in block.parameters():
                parameter += amount * parameter.std() * torch.randn(parameter.shape, generator=generator)


def test_the_same_model_agrees_with_itself(subject):
    check = AgreementCheck(subject.model, {"some": subject.samples})
    found = check.measure()["some"]
    assert found.kl == pytest.approx(0.0, abs=1e-6)
    assert found.top1 == 1.0


def test_agreement_is_that_of_the_logits_of_two_models(build):
    model, other = build("qwen2_5_vl").model, build("qwen2_5_vl").model
    subject = build("qwen2_5_vl")
    check = AgreementCheck(model, {"some": subject.samples})
    spoil(model, 0.5)
    found = check.measure()["some"]
    kl, same = [], []
    with torch.no_grad():
        for sample in subject.samples:
            text = sample["input_ids"][0] != model.config.image_token_id
            p, q = (m(**sample).logits[0][text].log_softmax(-1) for m in (other, model))
            kl.append((p.exp() * (p - q)).sum(-1))
            same.append(p.argmax(-1) == q.argmax(-1))
    assert found.kl > 0.01
    assert found.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert found.top1 == pytest.approx(float(torch.cat(same).float().mean()))


def test_the_head_computes_for_the_tokens_that_are_judged_alone(build):
    subject = build("qwen2_5_vl")
    model, rows = subject.model, []
    original = model.lm_head.forward
    model.lm_head.forward = lambda hidden: rows.append(hidden.shape[-2]) or original(hidden)
    text = [int((each["input_ids"][0] != model.config.image_token_id).sum()) for each in subject.samples]
    assert sum(text) < sum(each["input_ids"].numel() for each in subject.samples)
    check = AgreementCheck(model, {"some": subject.samples})
    assert rows == [1] * len(text)  # of the dense model only what is given to it is kept
    rows.clear()
    check.measure()
    assert rows == [count for count in text for _ in range(2)]


def test_the_error_is_that_of_a_mean_over_samples():
    generator = torch.Generator().manual_seed(0)
    pairs = [tuple(torch.randn(n, 7, generator=generator) for _ in range(2)) for n in (3, 8, 5, 6)]
    found = Agreement.of(pairs)
    sums = [float(divergence(mine, dense).double().sum()) for mine, dense in pairs]
    tokens = [len(mine) for mine, _ in pairs]
    assert found.kl == pytest.approx(sum(sums) / sum(tokens))
    residuals = [total - found.kl * count for total, count in zip(sums, tokens, strict=True)]
    assert found.kl_error == pytest.approx((4 / 3 * sum(r * r for r in residuals)) ** 0.5 / sum(tokens))
    equal = [(torch.zeros(4, 7), torch.zeros(4, 7))] * 3
    assert Agreement.of([*equal, *equal]).kl_error == 0.0
    assert Agreement.of(pairs[:3]).kl_error is None and " ± " not in str(Agreement.of(pairs[:3]))
    assert f"KL {found.kl:.2f} ± {found.kl_error:.2f} nats per token" in str(found)


def test_capped_logits_are_those_of_the_model(build):
    model = build("gemma3").model
    model.config.final_logit_softcapping = 0.5  # Gemma caps behind the head
    subject = build("gemma3")
    other = build("gemma3").model
    other.config.final_logit_softcapping = 0.5
    check = AgreementCheck(model, {"some": subject.samples})
    spoil(model, 0.5)
    with torch.no_grad():
        capped, head = [], []
        for sample in subject.samples:
            p, q = (m(**sample).logits[0].log_softmax(-1) for m in (other, model))
            capped.append((p.exp() * (p - q)).sum(-1))
            p, q = (m.lm_head(m.model(**sample)[0])[0].log_softmax(-1) for m in (other, model))
            head.append((p.exp() * (p - q)).sum(-1))
    wanted, without = (float(torch.cat(each).mean()) for each in (capped, head))
    assert without > 2 * wanted > 0.02
    assert check.measure()["some"].kl == pytest.approx(wanted, rel=1e-4)


def test_the_model_is_left_as_it_was(build):
    subject = build("llama")
    model = subject.model.train()
    before = vars(model.lm_head).get("forward")
    AgreementCheck(model, {"some": subject.samples}).measure()
    assert model.training
    assert vars(model.lm_head).get("forward") is before
    assert model(**subject.samples[0]).logits.shape[0] == 1


def test_a_model_without_a_head_has_nothing_to_compare(build):
    subject = build("llama")
    assert AgreementCheck(subject.model.model, {"some": subject.samples}).measure() == {}


def test_every_prediction_counts_where_there_are_no_input_ids(build):
    subject = build("llama")
    check = AgreementCheck(subject.model, {"some": [{"inputs_embeds": torch.randn(1, 4, 64)}]})
    with torch.no_grad():
        subject.model.model.norm.weight.mul_(0.5)
    assert check.measure()["some"].kl > 0.0


def test_a_head_that_was_patched_before_stays_patched(build):
    subject = build("llama")
    head, calls = subject.model.lm_head, []
    original = head.forward

    def patched(input):
        calls.append(1)
        return original(input)

    head.forward = patched
    AgreementCheck(subject.model, {"some": subject.samples}).measure()
    assert head.forward is patched
    assert len(calls) == 3 * len(subject.samples)  # once for the dense model, then for both
    assert isinstance(head, nn.Linear)
