"""A tokenizer for models without one: the texts that a finished model is compared on need some tokens."""

from __future__ import annotations

from typing import Any

import torch

from optimum_sab.bench.coverage.shrinking import FIRST_SPECIAL, FIRST_TEXT


class LetterTokenizer:
    """A token for every letter, of the ids that the samples' text is drawn from."""

    def __call__(self, text: str, max_length: int, **_: Any) -> dict[str, torch.Tensor]:
        """Ids and mask of one text, [1, tokens]; at most ``max_length`` tokens."""
        ids = torch.tensor([[FIRST_TEXT + ord(letter) % (FIRST_SPECIAL - FIRST_TEXT) for letter in text[:max_length]]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
