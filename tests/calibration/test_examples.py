"""What the model says before and after: a few words, and no trace of having said them."""

import base64
import copy
import io
import random
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.progress import no_step
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.samples.inputs import unseen_inputs
from optimum_sab.calibration.samples.prompts import EACH, example_prompts
from optimum_sab.calibration.stages.examples import NEW_TOKENS, DenseExamples, WriteAfter, WriteBefore
from optimum_sab.core.settings import LayerSettings
from optimum_sab.data.unseen import unseen_texts
from optimum_sab.errors import SABWarning
from optimum_sab.example import checkpoint_path
from optimum_sab.hf.auto import AutoModelForVision2Seq
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.processor import load_processor
from optimum_sab.nn.selection import select_linears


@pytest.fixture(scope="module")
def processor():
    return load_processor(checkpoint_path())


@pytest.fixture
def example(smallest_example):
    return AutoModelForVision2Seq.from_pretrained(smallest_example, dtype=torch.float32)


def run_of(model, processor, **options):
    return Run(model, select_linears(model, LayerSettings()), RunOptions(**options), processor=processor)


def state_of(model):
    """Everything a module keeps: attributes that are no modules, and every number."""
    attributes = [
        {k: v for k, v in vars(module).items() if k not in ("_modules", "_parameters", "_buffers")}
        for module in model.modules()
    ]
    tensors = {name: each.clone() for name, each in (*model.named_parameters(), *model.named_buffers())}
    return attributes, tensors


def test_prompts_are_the_beginnings_of_unseen_texts_and_questions_about_pictures(example, processor):
    prompts = example_prompts(example, processor)
    assert [each.kind for each in prompts] == ["text"] * EACH + ["pictures"] * EACH
    for each, text in zip(prompts[:EACH], unseen_texts()[:EACH], strict=True):
        assert text.startswith(each.prompt) and text[len(each.prompt) :].startswith(each.expected)
        assert each.prompt and each.expected and each.picture is None
    for each in prompts[EACH:]:
        assert each.prompt.endswith("?") and each.expected and each.picture.size[0] > 0
        assert "pixel_values" in each.inputs
        told = processor.tokenizer.decode(each.inputs["input_ids"][0])
        assert each.prompt in told and not told.rstrip().endswith(each.expected)


def test_the_same_model_says_the_same_before_and_after_greedily(example, processor):
    run = run_of(example, processor)
    assert WriteBefore().apply(run, no_step) is None
    found = WriteAfter().apply(run, no_step)
    assert [each.dense for each in found] == [each.packed for each in found]
    prompt = example_prompts(example, processor)[EACH]
    wanted = example.generate(**prompt.inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    new = wanted[0, prompt.inputs["input_ids"].shape[1] :]
    assert found[EACH].dense == processor.tokenizer.decode(new, skip_special_tokens=True)
    assert base64.b64decode(found[EACH].picture).startswith(b"\x89PNG")


def test_another_model_says_something_else_afterwards(example, processor):
    run = run_of(example, processor)
    WriteBefore().apply(run, no_step)
    with torch.no_grad():
        example.get_decoder().norm.weight.neg_()  # the least likely token is the likeliest now
    assert all(each.dense != each.packed for each in WriteAfter().apply(run, no_step))


def test_no_trace_is_left_in_the_model_or_in_generators(example, processor):
    example.train()
    example.rope_deltas = example.model.rope_deltas = "as it was"
    attributes, tensors = state_of(example)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    WriteBefore().apply(run_of(example, processor), no_step)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])
    after, numbers = state_of(example)
    assert after == attributes
    assert list(numbers) == list(tensors) and all(torch.equal(numbers[k], tensors[k]) for k in tensors)


def test_buffers_that_writing_makes_longer_or_changes_are_put_back(example, processor, monkeypatch):
    inner = example.get_decoder()
    inner.register_buffer("seen", torch.zeros(3))
    original, before = example.generate, inner.seen

    def generate(**inputs):
        inner.seen += 1
        inner.seen = torch.ones(9)
        return original(**inputs)

    monkeypatch.setattr(example, "generate", generate)
    WriteBefore().apply(run_of(example, processor), no_step)
    assert inner.seen is before and torch.equal(before, torch.zeros(3))


def test_a_model_that_cannot_write_steps_aside_with_a_word(example, processor):
    class Silent(torch.nn.Module):
        pass

    run = run_of(example, processor)
    run.model = Silent()
    assert WriteBefore().apply(run, no_step) == "Silent cannot generate"
    assert not WriteAfter().wanted(run)


def test_a_model_with_a_decoder_of_its_own_steps_aside(example, processor):
    example.config.is_encoder_decoder = True
    run = run_of(example, processor)
    assert "decoder of its own" in WriteBefore().apply(run, no_step)
    assert run.kept(DenseExamples) is None


def test_a_model_that_fails_to_write_is_binarized_all_the_same(example, processor, monkeypatch):
    def fail(**inputs):
        raise ValueError("no words")

    run = run_of(example, processor)
    with monkeypatch.context() as patch:
        patch.setattr(example, "generate", fail)
        with pytest.warns(SABWarning, match="dense one does not write.*no words"):
            assert "no words" in WriteBefore().apply(run, no_step)
    WriteBefore().apply(run, no_step)
    monkeypatch.setattr(example, "generate", fail)
    with pytest.warns(SABWarning, match="finished one does not write.*no words"):
        assert WriteAfter().apply(run, no_step) is None


def test_examples_can_be_left_out(example, processor):
    run = run_of(example, processor, examples=False)
    assert not WriteBefore().wanted(run) and not WriteAfter().wanted(run)


def test_a_language_model_is_given_texts_alone(build):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    prompts = example_prompts(build("llama").model, tokenizer)
    assert [each.kind for each in prompts] == ["text"] * EACH


def test_pictures_that_the_template_does_not_take_leave_texts(example, processor, monkeypatch):
    monkeypatch.setattr(processor, "chat_template", "{{ raise_exception('no such role') }}")
    with pytest.warns(SABWarning, match="says about pictures: an unseen picture .* no such role"):
        assert [each.kind for each in example_prompts(example, processor)] == ["text"] * EACH
    with pytest.warns(SABWarning, match="on texts alone: an unseen picture .* no such role"):
        assert set(unseen_inputs(example, processor)) == {"text"}


def blind(processor, how):
    if how == "a tokenizer alone":
        return processor.tokenizer
    processor = copy.copy(processor)
    processor.chat_template = None
    return processor


BLIND = pytest.mark.parametrize("how", ["a tokenizer alone", "no chat template"])


@BLIND
def test_pictures_that_the_processor_cannot_show_are_told_to_be_left_out(example, processor, how):
    for ask, kinds in ((example_prompts, lambda found: {each.kind for each in found}), (unseen_inputs, set)):
        with pytest.warns(SABWarning, match=rf"shown texts alone .*: \w+ (is|has) {how}; give a processor"):
            assert kinds(ask(example, blind(processor, how))) == {"text"}


@BLIND
def test_what_is_left_out_is_told_once_in_a_run_and_is_in_its_report(smallest_example, processor, how):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = AutoModelForVision2Seq.from_pretrained(
            smallest_example,
            dtype=torch.float32,
            quantization_config=SABConfig.light(
                calibration=["The red boat left the harbour at noon."], progress="none", processor=blind(processor, how)
            ),
        )
    said = [str(each.message) for each in told if "shown texts alone" in str(each.message)]
    assert len(said) == 1 and "comparison with the dense model, in the report's examples and in samples" in said[0]
    assert said[0] in model.hf_quantizer.report.warnings


def test_a_model_that_reads_pictures_in_a_way_of_its_own_is_told_of(build, processor):
    model = build("llama").model
    model.config.vision_config = {"depth": 1}
    with pytest.warns(SABWarning, match="the configuration of llama names no token in the place of a picture"):
        assert set(unseen_inputs(model, processor.tokenizer)) == {"text"}


def test_a_model_that_reads_no_pictures_is_told_nothing(build, processor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(unseen_inputs(build("llama").model, processor.tokenizer)) == {"text"}
        assert {each.kind for each in example_prompts(build("llama").model, processor.tokenizer)} == {"text"}


def test_a_picture_can_be_looked_at(example, processor):
    from PIL import Image

    run = run_of(example, processor)
    WriteBefore().apply(run, no_step)
    shown = WriteAfter().apply(run, no_step)[EACH].picture
    asked = example_prompts(example, processor)[EACH].picture
    assert Image.open(io.BytesIO(base64.b64decode(shown))).tobytes() == asked.tobytes()
