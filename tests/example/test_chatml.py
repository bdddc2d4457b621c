import pytest
import torch

from optimum_sab.example import checkpoint_path
from optimum_sab.example.chatml import answer_mask, chat_template, token_ids
from optimum_sab.example.tokenization import IMAGE, VIDEO
from optimum_sab.hf.processor import load_processor


@pytest.fixture(scope="module")
def processor():
    return load_processor(checkpoint_path())


def test_chat_template_is_the_shipped_checkpoints():
    assert chat_template(IMAGE, VIDEO) == (checkpoint_path() / "chat_template.jinja").read_text(encoding="utf-8")


def test_chat_template_writes_what_stands_for_a_picture_and_knows_no_videos_unless_told(processor):
    parts = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "It's a cat."}]
    options = {"tokenize": False, "add_generation_prompt": True}
    text = processor.tokenizer.apply_chat_template(chat, chat_template=chat_template("<it's>\n"), **options)
    said = "What?<|im_end|>\n<|im_start|>assistant\nIt's a cat.<|im_end|>\n<|im_start|>assistant\n"
    assert text == f"<|im_start|>user\n<it's>\n{said}"
    text = processor.tokenizer.apply_chat_template(chat, chat_template=chat_template("<i>", "<v>"), **options)
    assert text == f"<|im_start|>user\n<i><v>{said}"


def test_token_ids_add_nothing(processor):
    ids = token_ids(processor.tokenizer, "Who has the key?<|im_end|>")
    assert processor.tokenizer.decode(ids) == "Who has the key?<|im_end|>"


def test_answer_mask_marks_answers_and_their_closing_tokens_only(processor):
    text = (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nAnn<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\ntop left<|im_end|>\n"
    )
    ids = torch.tensor([processor.tokenizer.encode(text)])
    marked = ids[answer_mask(ids, processor.tokenizer)]
    assert processor.tokenizer.decode(marked) == "Ann<|im_end|>top left<|im_end|>"


def test_answer_mask_is_empty_without_an_answer(processor):
    text = "<|im_start|>user\nWho?<|im_end|>\nplain prose, nothing else at all"
    ids = torch.tensor([processor.tokenizer.encode(text)])
    assert not answer_mask(ids, processor.tokenizer).any()
