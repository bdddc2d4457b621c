"""Calibration and held-out text that every installation has: Python's own reference documentation, and our passages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimum_sab.data.passages import passages
from optimum_sab.data.reference import reference_topics
from optimum_sab.errors import ConfigError
from optimum_sab.wording import did_you_mean

SOURCES = ("reference", "passages")
MIXED = "mixed"


def mixed_windows(tokenizer: Any, text: str, part: str, count: int, length: int, seed: int | None = None) -> Tensor:
    """`text_windows` of one source, or for ``text="mixed"`` of both: as many of either while the shorter one lasts."""
    if text != MIXED:
        return text_windows(tokenizer, text, part, count, length, seed)
    windows = {source: _windows(tokenizer, source, part, length) for source in SOURCES}
    shorter = min(SOURCES, key=lambda source: len(windows[source]))
    few = min(count // 2, len(windows[shorter]))
    counts = {source: few if source == shorter else count - few for source in SOURCES}
    return torch.cat([_drawn(windows[s], s, part, n, seed) for s, n in counts.items()])


def text_windows(tokenizer: Any, source: str, part: str, count: int, length: int, seed: int | None = None) -> Tensor:
    """Token windows [count, length] of one half of a text source.

    ``"reference"`` is `pydoc_data.topics`, ``"passages"`` the built-in passages. Of either, every other piece belongs
    to ``part="calibration"`` and the rest to ``part="held-out"``, so the two share no sentence.

    Args:
        tokenizer: of the model.
        source: one of `SOURCES`.
        part: "calibration" or "held-out".
        count: windows.
        length: tokens per window.
        seed: draws ``count`` of the windows there are; None takes the first ones.

    Raises:
        ConfigError: the source is unknown, or the text has fewer tokens than asked for.
    """
    if source not in SOURCES:
        hint = did_you_mean(source, (*SOURCES, MIXED), f"; use one of {', '.join(SOURCES)}, or {MIXED!r} for both.")
        raise ConfigError(f"text={source!r} is unknown{hint}")
    return _drawn(_windows(tokenizer, source, part, length), source, part, count, seed)


def _windows(tokenizer: Any, source: str, part: str, length: int) -> Tensor:
    """Every window [available, length] of one half of a text."""
    pieces = reference_topics() if source == "reference" else passages()
    chosen = pieces[0 if part == "calibration" else 1 :: 2]
    ids = torch.tensor(tokenizer("\n\n".join(chosen))["input_ids"])
    available = len(ids) // length
    return ids[: available * length].view(available, length)


def _drawn(windows: Tensor, source: str, part: str, count: int, seed: int | None) -> Tensor:
    """``count`` of the windows: drawn by the seed, in their order, or without one the first."""
    available, length = windows.shape
    if available < count:
        raise ConfigError(
            f"the {part} half of {source!r} has {available} windows of {length} tokens, {count} were asked for; ask "
            "for fewer or shorter ones."
        )
    if seed is None:
        return windows[:count]
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return windows[order[:count].sort().values]
