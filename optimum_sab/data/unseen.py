"""Texts and pictures that no built-in calibration set holds, to look at a binarized model with."""

from __future__ import annotations

from importlib import resources

from optimum_sab.data.builtin import builtin_samples
from optimum_sab.data.chat import Message
from optimum_sab.data.passages import SEPARATOR

UNSEEN_SEED = 2**20  # of built-in samples; calibration seeds are small numbers
PICTURES = 4


def unseen_texts() -> list[str]:
    """A few texts of different kinds, about 130 words each."""
    text = resources.files("optimum_sab.data").joinpath("unseen.txt").read_text(encoding="utf-8")
    return [each.strip() for each in text.split(SEPARATOR)]


def unseen_chats() -> list[list[Message]]:
    """Questions and answers about a few drawn scenes and documents, all with a picture."""
    with_picture = builtin_samples(2 * PICTURES, UNSEEN_SEED)[::2]
    return [sample for sample in with_picture if not isinstance(sample, str)]
