"""Calibration and held-out text that every installation has: Python's own reference documentation, and our passages."""

from __future__ import annotations

import pydoc_data.topics
from typing import Any

import torch
from torch import Tensor

from optimum_sab.data.passages import passages
from optimum_sab.errors import ConfigError

SOURCES = ("reference", "passages")


def mixed_windows(tokenizer: Any, text: str, part: str, count: int, length: int) -> Tensor:
    """`text_windows` of one source, or of both in equal numbers for ``text="mixed"``."""
    sources = SOURCES if text == "mixed" else (text,)
    return torch.cat([text_windows(tokenizer, s, part, count // len(sources), length) for s in sources])


def text_windows(tokenizer: Any, source: str, part: str, count: int, length: int) -> Tensor:
    """Token windows [count, length] of one half of a text source.

    ``"reference"`` is `pydoc_data.topics`, ``"passages"`` the built-in passages. Of either, every other piece belongs
    to ``part="calibration"`` and the rest to ``part="held-out"``, so the two share no sentence.

    Raises:
        ConfigError: the text has fewer tokens than asked for.
    """
    topics: dict[str, str] = pydoc_data.topics.topics
    pieces = [topics[key] for key in sorted(topics)] if source == "reference" else list(passages())
    chosen = pieces[0 if part == "calibration" else 1 :: 2]
    ids = torch.tensor(tokenizer("\n\n".join(chosen))["input_ids"])
    available = len(ids) // length
    if available < count:
        raise ConfigError(
            f"the {part} half of {source!r} has {available} windows of {length} tokens, {count} were asked for; ask "
            "for fewer or shorter ones."
        )
    return ids[: count * length].view(count, length)
