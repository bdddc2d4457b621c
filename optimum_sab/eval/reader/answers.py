"""What both trainings through the language model share: the chat around a picture, its rows of tokens, their loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimum_sab.example.chatml import ANSWER_START, TURN_END, TURN_START
from optimum_sab.example.predictions import predict_learnt

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64


BEFORE_PICTURE = f"{TURN_START}user\n"


def after_picture(question: str) -> str:
    """The chat's text between the picture and the answer, as the reader's chat template writes it."""
    return f"\n{question}{TURN_END}\n{ANSWER_START}"


def make_optimizer(parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Adam, for what is moved by gradients that come back through the language model."""
    return torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.95))


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
    predicted = predict_learnt(model, hidden, rows.ids, rows.learnt)
    hits = (predicted.logits.argmax(-1) == predicted.targets).split(list(rows.lengths))
    loss = nn.functional.cross_entropy(predicted.logits, predicted.targets)
    return loss, torch.stack([each.all() for each in hits])
