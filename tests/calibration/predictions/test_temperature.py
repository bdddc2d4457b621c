"""The temperature of a binarized model's predictions."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from optimum_sab.calibration.predictions import head as head_module
from optimum_sab.calibration.predictions import temperature
from optimum_sab.calibration.predictions.at_head import HeadInputs
from optimum_sab.calibration.predictions.head import SharedHead
from optimum_sab.calibration.predictions.last_norm import find_last_norm
from optimum_sab.calibration.predictions.temperature import set_temperature
from optimum_sab.calibration.ranks import Ranks
from optimum_sab.calibration.streams.placement import brought
from optimum_sab.errors import CalibrationError
from tests.calibration.noisy import ONE, head_inputs, sharpened

NORMS = {
    "llama": "model.norm",
    "gemma3": "model.norm",  # multiplies by one more than its weight
    "qwen2_5_vl": "model.language_model.norm",
    "qwen3_vl": "model.language_model.norm",
    "llava": "model.language_model.norm",
}


def fitted(model, pairs):
    return set_temperature(model, find_last_norm(model, model.lm_head, ONE), pairs)


def kl(model, pairs, scale):
    dense, binarized = (torch.cat([getattr(pair, of) for pair in pairs], dim=1) for of in ("dense", "binarized"))
    with torch.no_grad(), SharedHead(model, model.lm_head).open() as shared:
        p, q = (shared.logits_of(h, ONE)[0].log_softmax(-1) for h in (dense, scale * binarized))
    return float((p.exp() * (p - q)).sum()) / len(p)


@pytest.mark.parametrize("family", NORMS)
def test_noise_asks_for_a_higher_temperature_and_the_last_norm_takes_it_up(build, family):
    subject = build(family)
    model = subject.model
    sharpened(model)
    pairs = head_inputs(subject, 0.6)
    norm = model.get_submodule(NORMS[family])
    x = torch.randn(1, 5, 64)
    with torch.no_grad():
        before, others = norm(x), {n: p.clone() for n, p in model.named_parameters() if p is not norm.weight}
    found = fitted(model, pairs)
    assert found.value > 1.05
    assert found.after < found.before
    with torch.no_grad():
        assert torch.allclose(norm(x) * found.value, before, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters() if p is not norm.weight)


def test_the_temperature_is_where_the_divergence_is_least(build):
    subject = build("llama")
    sharpened(subject.model)
    pairs = head_inputs(subject, 0.6)
    at = {scale / 100: kl(subject.model, pairs, scale / 100) for scale in range(50, 126, 5)}
    found = fitted(subject.model, pairs)
    assert found.before == pytest.approx(at[1.0], rel=1e-3)
    assert found.after <= min(at.values()) * 1.001
    assert 1 / found.value == pytest.approx(min(at, key=at.get), abs=0.06)


def test_equal_streams_leave_the_model_alone(build):
    subject = build("llama")
    pairs = head_inputs(subject, 0.0)
    before = {n: p.clone() for n, p in subject.model.named_parameters()}
    assert fitted(subject.model, pairs) is None
    assert all(torch.equal(p, before[n]) for n, p in subject.model.named_parameters())


def test_a_norm_that_stands_elsewhere_too_is_left_alone(build):
    subject = build("llama")
    model = subject.model
    model.model.layers[0].input_layernorm.weight = model.model.norm.weight
    assert find_last_norm(model, model.lm_head, ONE) is None


def test_a_model_that_reads_no_single_token_is_named_before_the_work(build):
    model = build("llama").model
    with pytest.raises(CalibrationError, match=r"the forward that should show it fails \(.*input_ids"):
        find_last_norm(model, model.lm_head, {"pixels": 1})


def test_logits_cost_no_pass_through_the_blocks(build, monkeypatch):
    subject = build("llama")
    sharpened(subject.model)
    pairs = head_inputs(subject, 0.6)
    last = find_last_norm(subject.model, subject.model.lm_head, ONE)
    calls = []
    for block in subject.blocks:
        block.self_attn.register_forward_hook(lambda *args: calls.append(args))
    assert set_temperature(subject.model, last, pairs) is not None
    assert not calls
    subject.model(**ONE)
    assert len(calls) == len(subject.blocks)


def test_a_model_that_asks_more_of_its_blocks_runs_them():
    """With router logits in its output Mixtral reads what every block's router has said."""
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    sharpened(model)
    samples = [{"input_ids": torch.randint(0, 64, (1, 12))} for _ in range(3)]
    last = find_last_norm(model, model.lm_head, ONE)
    assert last.module is model.model.norm
    pairs = head_inputs(SimpleNamespace(model=model, samples=samples), 0.6)
    assert set_temperature(model, last, pairs).value > 1.05


def test_the_head_may_compute_on_a_device_of_its_own(build, monkeypatch):
    """cpu:0 is not cpu to PyTorch, so that the weight is brought there."""
    found, heads = [], []
    monkeypatch.setattr(head_module, "brought", lambda *a: heads.append(brought(*a)) or heads[-1])
    for device in (None, torch.device("cpu:0")):
        heads.clear()
        subject = build("llama")
        sharpened(subject.model)
        pairs = head_inputs(subject, 0.6)
        last = find_last_norm(subject.model, subject.model.lm_head, ONE)
        found.append(set_temperature(subject.model, last, pairs, device))
        assert set(heads[-1]) == (set() if device is None else {"weight"})
    assert found[0] is not None
    assert found[0] == found[1]


def test_the_tokens_that_are_judged_are_spread_over_all_samples_as_if_they_were_one(build, monkeypatch):
    monkeypatch.setattr(temperature, "TOKENS", 30)
    pairs = head_inputs(build("llama"), 0.6)[:9]
    for pair in pairs[::2]:
        pair.text[::3] = False
    judged = [torch.cat([getattr(p, of)[0][p.text] for p in pairs]) for of in ("dense", "binarized")]
    step = -(-len(judged[0]) // 30)
    assert step > 1 and len({int(pair.text.sum()) % step for pair in pairs}) > 1
    for found, wanted in zip(temperature._chosen(pairs[::-1], Ranks()), judged, strict=True):
        assert torch.equal(found, wanted[::step])


def test_no_text_no_temperature(build):
    subject = build("llama")
    pairs = [HeadInputs(p.sample, p.dense, p.binarized, ~p.text) for p in head_inputs(subject, 0.6)]
    assert fitted(subject.model, pairs) is None
