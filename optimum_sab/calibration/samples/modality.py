"""Which tokens of a sample are text and which come from a picture (or another modality)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimum_sab.nn.modalities import TEXT, VISUAL, model_modalities, placeholder_ids

MIXED = "mixed"  # rows that cannot be told apart, e.g. after an expert's routing


@dataclass(frozen=True)
class TokenModalities:
    """Modality of every token of one sample.

    Attributes:
        names: the modalities, text first.
        labels: int64 [tokens], index into ``names``.
    """

    names: tuple[str, ...]
    labels: Tensor

    @property
    def text(self) -> Tensor:
        """Which tokens are text, bool [tokens]: what a model predicts for the next piece of a picture nobody reads."""
        return self.labels == self.names.index(TEXT)  # which is always one of them

    def judged(self, predictions: int) -> Tensor:
        """Which of a sample's predictions are about text, bool [predictions].

        Most models make one for each token. Some put pictures before the tokens and make more, and a decoder that
        attends to an encoder makes them for tokens of its own, which are text.
        """
        text = self.text
        if not bool(text.any()) or text.numel() > predictions:
            return torch.ones(predictions, dtype=torch.bool)
        return torch.cat([torch.zeros(predictions - text.numel(), dtype=torch.bool), text])

    def count(self, name: str) -> int:
        """Tokens of a modality; 0 where it is absent."""
        return int((self.labels == self.names.index(name)).sum()) if name in self.names else 0


def token_modalities(inputs: Mapping[str, Any], config: Any) -> TokenModalities:
    """Read the modalities off a sample's model inputs.

    The model's own image, video and audio placeholder ids decide; where the config has none, the processor's
    ``mm_token_type_ids`` (non-zero = visual) do. A sample without either is text.
    """
    ids = token_ids(inputs)
    if ids is None:
        return TokenModalities((TEXT,), torch.zeros(0, dtype=torch.int64))
    ids = ids.flatten().cpu()
    labels = torch.zeros(ids.numel(), dtype=torch.int64)
    names = model_modalities(config)
    for index, modality in enumerate(names[1:], start=1):
        wanted = torch.tensor(placeholder_ids(config, modality))
        labels[torch.isin(ids, wanted)] = index
    types = inputs.get("mm_token_type_ids")
    if len(names) == 1 and types is not None:
        names = (TEXT, VISUAL)
        labels[types.flatten().cpu() != 0] = 1
    return TokenModalities(names, labels)


def token_ids(inputs: Mapping[str, Any]) -> Tensor | None:
    """The tokens that a sample's inputs are about: what is read, or where that is only a picture, what is written."""
    found: Tensor | None = inputs.get("input_ids", inputs.get("decoder_input_ids"))
    return found
