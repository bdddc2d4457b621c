"""ChatML, the chat format of the example and of the reader: its marks, its template, and where the answers are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
ANSWER_START = f"{TURN_START}assistant\n"

_BEFORE_PICTURES = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
"""
_AFTER_PICTURES = """\
{%- elif part['type'] == 'text' %}
{{- part['text'] }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def chat_template(image: str, video: str | None = None) -> str:
    """The Jinja template of a processor whose messages hold texts and pictures.

    Args:
        image: what stands for a picture in the text.
        video: what stands for a video; None where the model reads none.
    """
    pictures = f"{{%- if part['type'] == 'image' %}}\n{{{{- {image!r} }}}}\n"
    if video is not None:
        pictures += f"{{%- elif part['type'] == 'video' %}}\n{{{{- {video!r} }}}}\n"
    return _BEFORE_PICTURES + pictures + _AFTER_PICTURES


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a piece of a chat, with nothing put in front or behind."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def answer_mask(input_ids: Tensor, tokenizer: Any) -> Tensor:
    """Which tokens belong to an assistant's answer, its closing token included.

    Args:
        input_ids: token ids, [batch, length].
        tokenizer: the tokenizer that made them.

    Returns:
        Booleans, [batch, length].
    """
    opening = token_ids(tokenizer, ANSWER_START)
    closing = tokenizer.convert_tokens_to_ids(TURN_END)
    begins = torch.zeros_like(input_ids, dtype=torch.bool)
    windows = input_ids.unfold(1, len(opening), 1)
    begins[:, len(opening) :] = (windows == torch.tensor(opening)).all(-1)[:, :-1]
    closed_before = (input_ids == closing).long().cumsum(1) - (input_ids == closing).long()
    opened = begins.long().cumsum(1)
    latest = torch.where(begins, closed_before, 0).cummax(1).values
    return (opened > 0) & (closed_before == latest)
