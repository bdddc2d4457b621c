"""What a language model says at the tokens that are learnt, and what it should have said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64


@dataclass(frozen=True)
class Predictions:
    """Predictions of the tokens that are learnt, row by row.

    Attributes:
        logits: float32.
        targets: the tokens themselves.
    """

    logits: Float[Tensor, "learnt vocabulary"]
    targets: Int64[Tensor, " learnt"]


def predict_learnt(
    model: Any,
    hidden: Float[Tensor, "rows tokens width"],
    ids: Int64[Tensor, "rows tokens"],
    learnt: Bool[Tensor, "rows tokens"],
) -> Predictions:
    """Predict every learnt token from the token before it; the head computes for those only.

    Args:
        model: the language model, for its head.
        hidden: its last hidden states.
        ids: the tokens.
        learnt: which of them to predict; the first of a row cannot be.
    """
    counts = learnt[:, 1:]
    return Predictions(model.lm_head(hidden[:, :-1][counts]).float(), ids[:, 1:][counts])
