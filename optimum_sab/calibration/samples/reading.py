"""Every accepted form of calibration data, read into texts and chats."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimum_sab.calibration.samples.chat import Sample, checked_sample, is_chat
from optimum_sab.calibration.samples.hub_dataset import read_dataset
from optimum_sab.calibration.samples.jsonl import read_jsonl
from optimum_sab.data.builtin import builtin_samples
from optimum_sab.errors import SampleError

BUILTIN = "builtin"
SELF = "self"
_DATASET = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def read_samples(source: Any, count: int, seed: int, visual: bool) -> list[Sample]:
    """Read calibration data in any accepted form.

    Args:
        source: None or ``"builtin"`` for the built-in set (``"self"`` is not read but written by the model, see
            `optimum_sab.calibration.samples.self_written`); the path of a ``.jsonl`` file; a Hub dataset as
            ``"owner/name"`` or ``"owner/name:split"`` (needs the ``datasets`` package); a text; a chat (a list of
            messages with "role" and "content"); or a list of texts and chats.
        count: how many samples to take at most.
        seed: seed of the built-in set, and of the order in which a dataset is drawn.
        visual: whether the model reads pictures (the built-in set shows it some).

    Raises:
        SampleError: the source is empty, unreadable, or of an unknown form; names the sample.
    """
    if source is None or source == BUILTIN:
        return list(builtin_samples(count, seed, visual))
    if source == SELF:
        raise SampleError(
            f"calibration={SELF!r} has samples only once a model wrote them; call self_samples, or give SABConfig this "
            "value and from_pretrained does."
        )
    if isinstance(source, (str, Path)) and str(source).endswith((".jsonl", ".json")):
        samples = read_jsonl(Path(source))
    elif isinstance(source, str) and _DATASET.fullmatch(source):
        samples = read_dataset(source, count, seed)
    elif isinstance(source, str):
        samples = [source]
    elif is_chat(source):
        samples = [list(source)]
    elif isinstance(source, Sequence):
        samples = [checked_sample(sample, f"calibration sample {i}") for i, sample in enumerate(source)]
    else:
        raise SampleError(
            f"calibration={type(source).__name__} is not understood; give texts, chats, a .jsonl path, a dataset name, "
            f"{BUILTIN!r}, or {SELF!r}."
        )
    if not samples:
        raise SampleError("there are no calibration samples; give at least one, or calibration='builtin'.")
    return samples[:count]
