"""The finished model is compared with the dense one on samples that somebody gave for it."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from optimum_sab import AutoModelForVision2Seq, SABConfig
from optimum_sab.calibration.predictions.agreement import Agreement
from optimum_sab.calibration.samples import inputs
from optimum_sab.calibration.stages import answers, comparison
from optimum_sab.errors import ConfigError, SABWarning, SampleError
from optimum_sab.hf.binarization import binarize_loaded
from optimum_sab.hf.plan import PlannedModel, make_plan
from optimum_sab.hf.processor import load_processor

ROWS = [
    {"question": "Which colour is it?", "answer": "red", "image": Image.new("RGB", (56, 56), "red")},
    "A text of a few words.",
    {"question": "Say hello.", "answer": "hello"},
]


def quantized(folder, config, kind=AutoModelForVision2Seq):
    return kind.from_pretrained(folder, dtype=torch.float32, quantization_config=config)


def test_own_samples_are_compared_by_what_they_show_and_are_not_stored(smallest_example, quicker_config, tmp_path):
    plain = quantized(smallest_example, quicker_config(calibration_samples=4))
    model = quantized(smallest_example, quicker_config(calibration_samples=4, evaluation=iter(ROWS)))
    found, before = model.hf_quantizer.report.agreement, plain.hf_quantizer.report.agreement
    assert list(found) == ["text", "pictures", "own pictures", "own text"]
    assert {kind: found[kind] for kind in before} == before
    assert model.hf_quantizer.report.verdict.kind.startswith("own ")
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "evaluation" not in stored and set(stored["measured"]["agreement"]) == set(found)


def test_agreement_on_own_samples_is_that_of_the_two_models(llama_folder, quick_config, texts):
    config = quick_config(calibration=texts[:4], evaluation=["one two three four five"], temperature_scaling=False)
    model = quantized(llama_folder, config, AutoModelForCausalLM)
    dense = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(llama_folder)("one two three four five", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = Agreement.of([(model(tokens).logits[0], dense(tokens).logits[0])])
    found = model.hf_quantizer.report.agreement["own text"]
    assert found.kl == pytest.approx(expected.kl, rel=1e-4) and found.top1 == expected.top1


def test_streamed_weights_give_the_same(llama_folder, quick_config, texts):
    pytest.importorskip("transformers", minversion="5")
    found = [
        quantized(
            llama_folder, quick_config(calibration=texts[:4], evaluation=texts[4:6], **more), AutoModelForCausalLM
        ).hf_quantizer.report.agreement["own text"]
        for more in ({}, {"stream_weights": True})
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("evaluation", "error", "message"),
    [
        ("builtin", ConfigError, "evaluation='builtin' is no data of your own"),
        ("nowhere.jsonl", SampleError, r"evaluation: the calibration file 'nowhere\.jsonl' does not exist"),
        ([{"question": "What?", "label": "A cup."}], SampleError, "evaluation: .*no 'answer', and a column 'label'"),
        ([], SampleError, "evaluation: there are no"),
        (7, ConfigError, "evaluation=7 must be texts"),
    ],
)
def test_what_cannot_be_read_is_refused_before_a_weight_is(
    llama_folder, quick_config, texts, unread, evaluation, error, message
):
    with pytest.raises(error, match=message):
        quantized(llama_folder, quick_config(calibration=texts, evaluation=evaluation), AutoModelForCausalLM)


def test_what_calibrates_is_no_evaluation(tmp_path):
    path = tmp_path / "mine.jsonl"
    texts = ["one", "two"]
    for data in (path, str(path), texts):
        with pytest.raises(ConfigError, match="evaluation and calibration are the same data"):
            SABConfig(calibration=data, evaluation=data)


def test_rows_that_calibrate_too_are_left_out(llama_folder, quick_config, texts):
    def own(evaluation):
        config = quick_config(calibration=texts[:4], evaluation=evaluation)
        return quantized(llama_folder, config, AutoModelForCausalLM).hf_quantizer.report.agreement["own text"]

    alone = own(texts[4:6])
    with pytest.warns(SABWarning, match="of the 4 evaluation samples 2 calibrate too and are left out"):
        mixed = own([texts[0], *texts[4:6], texts[3]])
    assert mixed == alone
    with pytest.raises(SampleError, match="all 2 evaluation samples calibrate too"):
        own(texts[1:3])


def test_more_samples_than_are_used_are_told_of(llama_folder, quick_config, texts, monkeypatch):
    monkeypatch.setattr(inputs, "EVALUATION_SAMPLES", 2)
    config = quick_config(calibration=texts[:2], evaluation=texts[2:6])
    with pytest.warns(SABWarning, match="of the evaluation samples the first 2 are used; there are more"):
        quantized(llama_folder, config, AutoModelForCausalLM)


def test_a_model_that_reads_own_samples_alone_is_compared_on_these(llama_folder, quick_config, texts, monkeypatch):
    def unseen(model, processor):
        raise ValueError("not mine")

    monkeypatch.setattr(answers, "unseen_inputs", unseen)
    config = quick_config(calibration=texts[:2], evaluation=texts[2:4])
    with pytest.warns(SABWarning, match="compared with the dense one on the evaluation samples alone, which does"):
        model = quantized(llama_folder, config, AutoModelForCausalLM)
    assert list(model.hf_quantizer.report.agreement) == ["own text"]


def test_what_is_lost_beside_ones_own_work_is_warned_of(llama_folder, quick_config, texts, monkeypatch):
    found = {"text": Agreement(3.0, 0.1), "own text": Agreement(0.01, 0.99)}
    monkeypatch.setattr(comparison.AgreementCheck, "measure", lambda self: found)
    config = quick_config(calibration=texts[:2], evaluation=texts[2:4])
    with pytest.warns(
        SABWarning, match=r"close to the dense model on the evaluation samples, and far .*\(on text KL 3"
    ):
        model = quantized(llama_folder, config, AutoModelForCausalLM)
    assert model.hf_quantizer.report.verdict.level == "close"


def test_a_plan_counts_logits_of_text_alone(smallest_example, quicker_config):
    model = PlannedModel(AutoModelForVision2Seq, AutoConfig.from_pretrained(smallest_example), torch.float32)
    processor = load_processor(smallest_example, max_pixels=10**6)

    def comparison(side):
        rows = [{"question": "What?", "answer": "A cup.", "image": Image.new("RGB", (side, side))}]
        plan = make_plan(model, quicker_config(calibration_samples=4, evaluation=rows), processor, timing=False)
        sizes = plan.work.samples
        return sizes.unseen[-1], sizes.judged[-1], next(p for p in plan.memory[0].phases if p.name == "comparison")

    (few, text, small), (many, same, large) = comparison(56), comparison(560)
    assert many > 10 * few and text == same < few
    logits = [[part.bytes for part in each.parts if part.name == "logits"] for each in (small, large)]
    assert logits[0] == logits[1]


def test_a_plan_counts_and_refuses_them(llama_folder, quick_config, texts):
    model = PlannedModel(AutoModelForCausalLM, AutoConfig.from_pretrained(llama_folder), torch.float32)
    processor = AutoTokenizer.from_pretrained(llama_folder)

    def unseen(**more):
        config = quick_config(**{"calibration": texts[:2], **more})
        return make_plan(model, config, processor, timing=False).work.samples.unseen

    assert len(unseen(evaluation=texts[2:5])) == len(unseen()) + 3
    assert len(unseen(evaluation=texts[1:5])) == len(unseen()) + 3  # the first calibrates
    for more in ({}, {"calibration": "self"}):
        with pytest.raises(SampleError, match="evaluation: "):
            unseen(evaluation=[{"nothing": 1}], **more)


def test_a_model_that_is_loaded_already_is_compared_too(llama_folder, quick_config, texts):
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    config = quick_config(calibration=texts[:2], evaluation=texts[2:4])
    assert "own text" in binarize_loaded(model, config).agreement
