import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from optimum_sab.example import checkpoint_path
from optimum_sab.example.evaluation import evaluate
from optimum_sab.example.tasks import TASKS, held_out_questions
from optimum_sab.hf.processor import load_processor


@pytest.fixture(scope="module")
def processor():
    return load_processor(checkpoint_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(checkpoint_path())


@pytest.fixture(scope="module")
def computing():
    """In float32: many CPUs multiply bfloat16 tens of times slower."""
    return AutoModelForImageTextToText.from_pretrained(checkpoint_path(), dtype=torch.float32)


def user(*content):
    return {"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def picture(width, height):
    return {"type": "image", "image": Image.new("RGB", (width, height), (200, 100, 50))}


def encode(processor, messages):
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )


@pytest.mark.parametrize("task", TASKS)
def test_checkpoint_answers_held_out_questions(computing, processor, task):
    evaluation = evaluate(computing, processor, held_out_questions(task, 100, seed=2024))
    assert evaluation.score(task).accuracy >= 0.9


def test_checkpoint_is_small_and_bfloat16(model):
    assert sum(file.stat().st_size for file in checkpoint_path().iterdir()) <= 16e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_checkpoint_decoder_fills_whole_blocks_of_128(model):
    linears = [each for each in model.model.language_model.modules() if isinstance(each, torch.nn.Linear)]
    assert len(linears) == 7 * model.config.text_config.num_hidden_layers
    assert all(each.in_features % 128 == 0 for each in linears)


def test_checkpoint_config_is_in_the_layout_both_transformers_lines_read():
    config = json.loads((checkpoint_path() / "config.json").read_text())
    assert "rope_parameters" not in config["text_config"]
    assert config["text_config"]["rope_scaling"]["type"] == "mrope"
    assert "rope_theta" in config["text_config"]


def test_checkpoint_loads_every_weight():
    _, report = AutoModelForImageTextToText.from_pretrained(checkpoint_path(), output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("size", [(112, 112), (336, 448), (30, 40), (1000, 90)])
def test_processor_brings_any_picture_within_the_models_size(processor, size):
    inputs = encode(processor, [user(picture(*size), "What is this?")])
    patches = inputs["image_grid_thw"].prod().item()
    assert inputs["pixel_values"].shape[0] == patches <= 64
    assert (inputs["input_ids"] == processor.image_token_id).sum() == patches // 4


def test_processor_encodes_several_turns_and_plain_text(processor):
    messages = [
        user(picture(112, 112), "What colour is the star?"),
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        user("And the ring?"),
    ]
    text = processor.tokenizer.decode(encode(processor, messages)["input_ids"][0])
    pictured = "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"
    assert text == (
        f"<|im_start|>user\n{pictured}What colour is the star?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nAnd the ring?<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = encode(processor, [user("Who has the key?")])
    assert "pixel_values" not in plain
    expected = "<|im_start|>user\nWho has the key?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.tokenizer.decode(plain["input_ids"][0]) == expected


@pytest.mark.parametrize(
    "text", ["naïve café", "漢字とかな", "Привет, мир", "🙂 emoji", "tab\tand\n\nlines", "{1: 'a'}"]
)
def test_tokenizer_encodes_any_text_without_loss(processor, text):
    ids = processor.tokenizer.encode(text)
    assert processor.tokenizer.decode(ids) == text


def test_model_answers_a_follow_up_question(model, processor):
    question = held_out_questions("counting", 1, seed=7)[0]
    messages = [
        user({"type": "image", "image": question.image}, question.prompt),
        {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
        user("Zoe has the lamp. Dan has the map. Who has the map?"),
    ]
    inputs = encode(processor, messages)
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    reply = processor.tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert reply == "Dan"
