"""Samples a model writes itself: what they are made of, within which bounds, and what is refused."""

import copy
import json
import random

import pytest
import torch
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from optimum_sab import AutoModelForVision2Seq, SABConfig
from optimum_sab.calibration.samples.modality import token_modalities
from optimum_sab.calibration.samples.reading import SELF, read_samples
from optimum_sab.calibration.samples.self_written import self_samples
from optimum_sab.data.builtin import builtin_samples
from optimum_sab.errors import CalibrationError, NonFiniteError, SABWarning, SampleError
from optimum_sab.example import checkpoint_path
from optimum_sab.hf.processor import load_processor

LENGTH = 96
PICTURED, TEXT, CHAT = slice(0, None, 2), slice(1, None, 4), slice(3, None, 4)  # of the built-in rotation


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForVision2Seq.from_pretrained(checkpoint_path(), dtype=torch.float32)


@pytest.fixture
def model(shipped):
    """The example, to break as one likes."""
    return copy.deepcopy(shipped)


@pytest.fixture
def processor():
    return load_processor(checkpoint_path())


@pytest.fixture
def llama(processor):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def written(shipped):
    """Two turns of the rotation."""
    return self_samples(shipped, load_processor(checkpoint_path()), 8, LENGTH, seed=3)


def decode(processor, sample):
    return processor.tokenizer.decode(sample["input_ids"][0].tolist())


def end_at_once(model, token=2):
    """Have the head answer nothing but one token (the example's end of turn)."""

    def favour(module, args, output):
        output[..., token] = 1e4
        return output

    model.lm_head.register_forward_hook(favour)


def same(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


# -- what they are ------------------------------------------------------------------------------------------------


def test_samples_follow_the_built_in_rotation(written, shipped):
    assert len(written) == 8
    assert all("pixel_values" in sample for sample in written[PICTURED])
    assert all("pixel_values" not in sample for sample in [*written[TEXT], *written[CHAT]])
    visual = [token_modalities(sample, shipped.config).count("visual") for sample in written]
    assert [n > 0 for n in visual] == [True, False] * 4


def test_texts_go_on_from_the_words_of_a_built_in_text(written, processor):
    for sample, given in zip(written[TEXT], builtin_samples(8, 3)[TEXT], strict=True):
        text = decode(processor, sample)
        assert text[:4] in given
        assert text not in given
        assert sample["input_ids"].shape[1] > 8


def test_chats_ask_the_built_in_questions_and_keep_the_models_answers(written, processor):
    for sample, given in zip(written[PICTURED], builtin_samples(8, 3)[PICTURED], strict=True):
        first, *turns = decode(processor, sample).split("<|im_start|>assistant\n")
        questions = [m["content"][-1]["text"] for m in given if m["role"] == "user"]
        assert len(turns) > 1
        for before, question in zip([first, *turns[:-1]], questions, strict=False):
            assert before.endswith(f"{question}<|im_end|>\n")
        for answer in turns:
            assert not answer.startswith("<|im_")


def test_a_sample_ends_with_the_end_token_that_was_drawn(written, processor):
    ends = [int(sample["input_ids"][0, -1]) == processor.tokenizer.eos_token_id for sample in written]
    assert any(ends)


def test_samples_have_no_more_tokens_of_text_than_asked_for(written, shipped):
    lengths = [token_modalities(sample, shipped.config).count("text") for sample in written]
    assert max(lengths) <= LENGTH
    assert sum(lengths) > 4 * LENGTH


@pytest.mark.parametrize("length", [2, 20])
def test_long_questions_are_cut_and_pictures_are_not(model, processor, length):
    written = self_samples(model, processor, 4, length)
    assert [sample["input_ids"].shape[1] for sample in written[CHAT]] == [length]
    assert written[1]["input_ids"].shape[1] <= length
    for sample in written[PICTURED]:
        assert token_modalities(sample, model.config).count("visual") == 16  # as the example's processor makes them


def test_every_per_token_input_is_as_long_as_the_sample(written):
    for sample in written:
        names = set(sample) - {"pixel_values", "image_grid_thw"}
        assert {"input_ids", "attention_mask"} <= names
        assert {sample[name].shape for name in names} == {sample["input_ids"].shape}
        assert bool((sample["attention_mask"] == 1).all())


# -- chance -------------------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_samples(written, model, processor):
    torch.manual_seed(9)
    random.seed(9)
    assert same(self_samples(model, processor, 8, LENGTH, seed=3), written)
    assert not same(self_samples(model, processor, 8, LENGTH, seed=4), written)


def test_a_text_is_not_the_likeliest_one(llama, processor):
    """Sampled: a random model's greedy text would come back for every seed."""
    texts = {decode(processor, self_samples(llama, processor.tokenizer, 1, 40, seed)[0])[-40:] for seed in range(4)}
    assert len(texts) == 4


# -- models and processors ----------------------------------------------------------------------------------------


def test_a_language_model_writes_texts(llama, processor):
    written = self_samples(llama, processor.tokenizer, 5, 30)
    assert [set(sample) for sample in written] == [{"input_ids", "attention_mask"}] * 5
    assert {sample["input_ids"].shape[1] for sample in written} == {30}  # it knows no end


def test_without_a_chat_template_there_are_texts_only(model, processor):
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.warns(SABWarning, match=r"shown texts alone .* \w+ has no chat template; give a processor"):
        written = self_samples(model, processor, 4, 24)
    assert len(written) == 4
    assert all("pixel_values" not in sample for sample in written)


def test_with_a_tokenizer_alone_there_are_texts_only(model, processor):
    with pytest.warns(SABWarning, match=r"shown texts alone .* \w+ is a tokenizer alone; give a processor"):
        written = self_samples(model, processor.tokenizer, 4, 24)
    assert len(written) == 4
    assert all("pixel_values" not in sample for sample in written)


def test_a_missing_padding_token_is_no_hindrance(model, processor):
    expected = self_samples(model, processor, 4, 40)
    processor.tokenizer.pad_token = None
    model.generation_config.pad_token_id = None
    assert same(self_samples(model, processor, 4, 40), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision_write_samples(model, processor, dtype):
    written = self_samples(model.to(dtype), processor, 4, 40)
    assert len(written) == 4
    assert "pixel_values" in written[0]


def test_an_answer_that_spells_a_placeholder_ends_the_chat(model, processor, monkeypatch):
    tokenizer = type(processor.tokenizer)
    monkeypatch.setattr(tokenizer, "decode", lambda self, *args, **kwargs: "see <|image_pad|>")
    (sample,) = self_samples(model, processor, 1, LENGTH, seed=3)
    monkeypatch.undo()
    assert decode(processor, sample).count("assistant\n") == 1


# -- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("breaking", ["ends at once", "no room"])
def test_a_model_that_writes_nothing_is_refused(model, processor, breaking):
    length = 1 if breaking == "no room" else 64
    if breaking == "ends at once":
        end_at_once(model)
    with pytest.raises(SampleError, match=rf"wrote nothing.*sequence_length={length} .*calibration='builtin'"):
        self_samples(model, processor, 4, length)


def test_a_model_without_a_head_is_refused(processor):
    headless = AutoModel.from_pretrained(checkpoint_path())
    with pytest.raises(CalibrationError, match="cannot generate"):
        self_samples(headless, processor, 4, 32)


def test_a_damaged_model_is_refused(model, processor):
    model.get_decoder().layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="logits hold NaN"):
        self_samples(model, processor, 2, 32)


def test_self_is_no_source_to_read():
    with pytest.raises(SampleError, match=r"calibration='self'.*self_samples"):
        read_samples(SELF, 4, 0, True)


# -- the whole way ------------------------------------------------------------------------------------------------


def test_from_pretrained_calibrates_on_what_the_model_writes(small_example, tmp_path):
    settings = {"calibration_samples": 4, "sequence_length": 48, "iterations": 2, "sweeps": 0, "progress": "none"}
    settings |= {"allocation": "uniform", "temperature_scaling": False}
    config = SABConfig(calibration="self", seed=1, **settings)
    model = AutoModelForVision2Seq.from_pretrained(small_example, dtype=torch.float32, quantization_config=config)
    dense = AutoModelForVision2Seq.from_pretrained(small_example, dtype=torch.float32)
    written = self_samples(dense, load_processor(small_example), 4, 48, seed=1)
    counted = [token_modalities(sample, dense.config) for sample in written]
    assert model.config.quantization_config.measured["calibration_tokens"] == {
        kind: sum(each.count(kind) for each in counted) for kind in ("text", "visual")
    }
    assert model.generation_config.to_dict() == dense.generation_config.to_dict()
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["calibration"] == "self"
    reloaded = AutoModelForVision2Seq.from_pretrained(tmp_path, dtype=torch.float32)
    assert reloaded.config.quantization_config.calibration == "self"
    assert SABConfig.from_dict(stored).calibration == "self"
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, reloaded(input_ids=ids).logits)
