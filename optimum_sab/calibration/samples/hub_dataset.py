"""Datasets of the Hub as calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimum_sab.calibration.samples.chat import Sample, is_chat
from optimum_sab.errors import MissingDependencyError, SampleError


def read_dataset(source: str, count: int, seed: int) -> list[Sample]:
    """At most ``count`` rows of ``"owner/name"`` or ``"owner/name:split"``, in an order that the seed draws.

    Raises:
        MissingDependencyError: the datasets package is missing.
        SampleError: the dataset cannot be read, or has no column that holds a sample.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"calibration={source!r} names a Hub dataset and the datasets package is missing: pip install datasets."
        ) from error
    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        taken = list(rows.shuffle(seed=seed, buffer_size=1000).take(count))
    except (OSError, ValueError) as error:
        raise SampleError(f"calibration={source!r} cannot be read as a Hub dataset: {error}") from error
    return [_read_row(row, f"{name} row {i}") for i, row in enumerate(taken)]


def _read_row(row: Mapping[str, Any], label: str) -> Sample:
    """A dataset row: 'messages', or 'text'/'question' with 'image'(s) where there are any."""
    if is_chat(row.get("messages")):
        return list(row["messages"])
    text = next((row[k] for k in ("text", "question", "caption", "prompt") if isinstance(row.get(k), str)), None)
    images = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
    if text is None:
        raise SampleError(f"{label} has columns {', '.join(row)}; one of 'messages', 'text', 'question' is needed.")
    if not images:
        return str(text)
    return [
        {"role": "user", "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]}
    ]
