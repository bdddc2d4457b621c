"""What both trainings through the language model share: rows of tokens that end in an answer, and the answers' loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a piece of a chat, with nothing put in front or behind."""
    return list(tokenizer.encode(text, add_special_tokens=False))


@dataclass(frozen=True)
class AnsweredRows:
    """Token rows of unequal length, filled up at the end.

    Attributes:
        ids: the tokens; what fills up is the end token.
        learnt: which of them belong to an answer, its end token among them.
        lengths: of the answers.
    """

    ids: Int64[Tensor, "rows tokens"]
    learnt: Bool[Tensor, "rows tokens"]
    lengths: tuple[int, ...]


def answered_rows(starts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], end: int) -> AnsweredRows:
    """Rows of a start, an answer and the end token each."""
    closed = [[*answer, end] for answer in answers]
    rows = [[*start, *answer] for start, answer in zip(starts, closed, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[end] * (longest - len(row))] for row in rows])
    learnt = torch.zeros_like(ids, dtype=torch.bool)
    for mask, row, answer in zip(learnt, rows, closed, strict=True):
        mask[len(row) - len(answer) : len(row)] = True
    return AnsweredRows(ids, learnt, tuple(map(len, closed)))


def answer_loss(
    model: Any, hidden: Float[Tensor, "rows tokens width"], rows: AnsweredRows
) -> tuple[Tensor, Bool[Tensor, " rows"]]:
    """Cross-entropy of the answers' tokens, and whose answers are right token by token.

    Args:
        model: the language model, for its head.
        hidden: its last hidden states at the rows' tokens.
        rows: the tokens.
    """
    logits = model.lm_head(hidden[:, :-1][rows.learnt[:, 1:]]).float()
    targets = rows.ids[:, 1:][rows.learnt[:, 1:]]
    hits = (logits.argmax(-1) == targets).split(list(rows.lengths))
    return nn.functional.cross_entropy(logits, targets), torch.stack([each.all() for each in hits])
