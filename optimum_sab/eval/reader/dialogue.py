"""Last stage of the training: questions and answers through the frozen language model.

The first stage's tower emits captions and a prompt that are nearly right. Here the gradient of the answers' tokens
comes back through the language model, whose weights stay, and moves the tower and the connector to what it understands.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimum_sab.eval.reader.answers import (
    BEFORE_PICTURE,
    AnsweredRows,
    after_picture,
    answer_loss,
    answered_rows,
    make_optimizer,
)
from optimum_sab.eval.reader.cifar import Pictures
from optimum_sab.eval.reader.language import Language
from optimum_sab.eval.reader.sight import CANDIDATES, Sight, SightBatch, SightSettings, sight_batches
from optimum_sab.eval.reader.tasks import NAMING_PROMPTS, READING_PROMPTS
from optimum_sab.example.chatml import token_ids
from optimum_sab.example.learning_rate import linear_rates
from optimum_sab.example.optimization import Journal, Outcome, optimize, write_line


@dataclass(frozen=True)
class DialogueSettings:
    """How long to train, and on how many pictures of each sort in a step."""

    steps: int = 150
    signs: int = 8
    pictures: int = 8
    learning_rate: float = 3e-4
    warmup: int = 10
    seed: int = 1


def teach_dialogue(
    speaker: Language,
    sight: Sight,
    pictures: Pictures,
    settings: DialogueSettings,
    report: Callable[[str], None] = write_line,
    save: Callable[[], None] | None = None,
) -> None:
    """Train tower and connector in place.

    Args:
        speaker: the language model, in any dtype, whose weights stay, and its tokenizer.
        sight: as the first stage left it.
        pictures: CIFAR-10's training half.
        settings: how long and on what.
        report: called with a line of progress every ten steps.
        save: called every fifty steps and at the end.
    """
    model, tokenizer = speaker.model, speaker.tokenizer
    model.requires_grad_(False)
    trained = [*sight.tower.parameters(), *sight.connector.parameters()]
    drawn = SightSettings(signs=settings.signs, pictures=settings.pictures, seed=settings.seed)
    rng = random.Random(f"dialogue {settings.seed}")

    def converse(batch: SightBatch) -> Outcome:
        rows = _rows(tokenizer, batch, settings.signs, rng)
        loss, hits = _dialogue_loss(model, tokenizer, sight, batch, rows)
        return Outcome(loss, {"signs": hits[: settings.signs], "pictures": hits[settings.signs :]})

    optimize(
        Journal("dialogue", report, report_every=10, save=save, save_every=50),
        converse,
        sight_batches(pictures, drawn),
        [make_optimizer(trained, settings.learning_rate)],
        linear_rates(settings.learning_rate, settings.steps, settings.warmup, last=0.02),
    )


def _rows(tokenizer: Any, batch: SightBatch, signs: int, rng: random.Random) -> AnsweredRows:
    """A question about every picture, from behind the picture on, with its answer."""
    answers = ["".join(CANDIDATES[index] for index in row if index).strip() for row in batch.captions.tolist()]
    prompts = [READING_PROMPTS if number < signs else NAMING_PROMPTS for number in range(len(answers))]
    starts = [token_ids(tokenizer, after_picture(rng.choice(each))) for each in prompts]
    return answered_rows(starts, [token_ids(tokenizer, answer) for answer in answers], tokenizer.eos_token_id)


def _dialogue_loss(
    model: Any, tokenizer: Any, sight: Sight, batch: SightBatch, rows: AnsweredRows
) -> tuple[Tensor, Tensor]:
    table = model.get_input_embeddings()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = sight.connector(sight(batch.pixels)[2])
    opening = table(torch.tensor([token_ids(tokenizer, BEFORE_PICTURE)]))
    embedded = [opening.expand(len(seen), -1, -1), seen.to(opening.dtype), table(rows.ids)]
    hidden = model.model(inputs_embeds=torch.cat(embedded, dim=1), use_cache=False).last_hidden_state
    return answer_loss(model, hidden[:, -rows.ids.shape[1] :], rows)
