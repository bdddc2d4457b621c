"""Every accepted form of calibration data, read into samples."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from optimum_sab.calibration.samples.chat import Sample, is_chat
from optimum_sab.calibration.samples.hub_dataset import hub_rows, parquet_rows
from optimum_sab.calibration.samples.jsonl import json_rows, jsonl_rows
from optimum_sab.calibration.samples.rows import FORMS, KNOWN_COLUMNS, missing_answer, read_row
from optimum_sab.data.builtin import builtin_samples
from optimum_sab.data.named_source import named_source
from optimum_sab.errors import SampleError, warn, warnings_heard
from optimum_sab.presets import BUILTIN, SELF
from optimum_sab.wording import did_you_mean


def read_samples(source: Any, count: int, seed: int, visual: bool) -> list[Sample]:
    """Read calibration data in any accepted form.

    Args:
        source: None or ``"builtin"`` for the built-in set (``"self"`` is not read but written by the model, see
            `optimum_sab.calibration.samples.self_written`); the path of a ``.jsonl``, ``.json`` or ``.parquet`` file; a
            Hub dataset as ``"owner/name"`` or ``"owner/name:split"`` (Parquet and the Hub need the ``datasets``
            package); one row; or rows, in a list, a generator, a ``datasets.Dataset`` or anything else that can be gone
            through. What a row can be is in `optimum_sab.calibration.samples.rows.read_row`.
        count: how many samples to take at most; no more are looked at.
        seed: seed of the built-in set, and of the order in which a Hub dataset is drawn.
        visual: whether the model reads pictures (the built-in set shows it some).

    Returns:
        Texts, chats, chats with tools and forward arguments; pictures are PIL pictures or web addresses. Read again,
        they stay the same.

    Raises:
        SampleError: the source is empty, unreadable, or of an unknown form; names the sample.
        MissingDependencyError: a package is missing that reads it.
    """
    with warnings_heard():  # each is told once
        return [sample for _, sample in labelled_samples(source, count, seed, visual)]


def labelled_samples(source: Any, count: int, seed: int, visual: bool) -> Iterator[tuple[str, Sample]]:
    """`read_samples` one by one, so that only one is held with its pictures; each with what names it in errors."""
    if source is None or (isinstance(source, str) and source == BUILTIN):
        yield from labelled_builtin(count, seed, visual)
        return
    found, told = 0, set[str]()
    folder, rows = _rows(source, count, seed)
    for label, row in islice(rows, count):
        sample, unused = read_row(row, label, folder)
        found += 1
        if set(unused) - told:
            told |= set(unused)
            named = ", ".join(map(repr, unused))
            warn(f"{label} has columns that are not calibrated on: {named}{_hint(row, unused)}")
        yield label, sample
    if not found:
        where = f" in {os.fspath(source)!r}" if isinstance(source, (str, os.PathLike)) else ""
        raise SampleError(f"there are no calibration samples{where}; give at least one, or calibration='builtin'.")


def _hint(row: Any, unused: Sequence[str]) -> str:
    """The end of the sentence about columns that are not read."""
    strange = [name for name in unused if name not in KNOWN_COLUMNS]
    close = next(filter(None, (did_you_mean(name, KNOWN_COLUMNS, "") for name in strange)), ".")
    missing = missing_answer(row)
    if missing is None or close != "." or not any(isinstance(row.get(name), str) for name in unused):
        return close
    return f". It has {missing[0]!r} and no {missing[1]!r}: if one of these columns holds the answers, call it that."


def labelled_builtin(count: int, seed: int, visual: bool) -> Iterator[tuple[str, Sample]]:
    """Samples of the built-in set, each with what names it in errors."""
    yield from _numbered(builtin_samples(count, seed, visual), "built-in sample")


def _rows(source: Any, count: int, seed: int) -> tuple[Path | None, Iterator[tuple[str, Any]]]:
    """Rows with their labels, and the folder that their paths are relative to."""
    if isinstance(source, str) and source == SELF:
        raise SampleError(
            f"calibration={SELF!r} has samples only once a model wrote them; call self_samples, or give SABConfig this "
            "value and from_pretrained does."
        )
    if isinstance(source, (str, os.PathLike)):
        named = named_source(source)
        if isinstance(named, str):
            return None, hub_rows(named, count, seed)
        suffix = named.suffix.lower()
        if suffix == ".parquet":
            return named.parent, parquet_rows(named, count)
        return named.parent, json_rows(named) if suffix == ".json" else jsonl_rows(named)
    if isinstance(source, Mapping):
        return None, _numbered([_single_row(source)])
    if is_chat(source):
        return None, _numbered([source])
    if isinstance(source, (bytes, bytearray, set, frozenset, io.IOBase)) or not _can_be_gone_through(source):
        raise SampleError(
            f"calibration={type(source).__name__} is not understood; give texts, chats or rows with {FORMS}, a .jsonl "
            f"path, a dataset name, {BUILTIN!r}, or {SELF!r}."
        )
    return None, _numbered(source)


def _single_row(source: Mapping[Any, Any]) -> Mapping[Any, Any]:
    if set(source) == {"samples"}:
        raise SampleError(
            f"calibration={dict(source)!r} is what a finished model records of samples that were given as objects; "
            "give the samples again."
        )
    if source and all(hasattr(each, "column_names") for each in source.values()):
        raise SampleError(
            f"calibration has the splits {', '.join(map(str, source))}; give one, as data[{next(iter(source))!r}]."
        )
    return source


def _can_be_gone_through(source: Any) -> bool:
    return isinstance(source, Iterable) or (hasattr(source, "__getitem__") and hasattr(source, "__len__"))


def _numbered(rows: Any, noun: str = "calibration sample") -> Iterator[tuple[str, Any]]:
    each = rows if isinstance(rows, Iterable) else (rows[number] for number in range(len(rows)))
    for number, row in enumerate(each):
        yield f"{noun} {number}", row
