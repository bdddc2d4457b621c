"""Datasets, of the Hub or in Parquet files, as calibration data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optimum_sab.errors import MissingDependencyError, SampleError


def hub_rows(source: str, count: int, seed: int) -> Iterator[tuple[str, Any]]:
    """At most ``count`` rows of ``"owner/name"`` or ``"owner/name:split"``, in an order that the seed draws.

    Raises:
        MissingDependencyError: the datasets package is missing.
        SampleError: the dataset cannot be read.
    """
    datasets = _package(f"calibration={source!r} is no file here and names a Hub dataset")
    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        taken = list(rows.shuffle(seed=seed, buffer_size=1000).take(count))
    except (OSError, ValueError, RuntimeError) as error:
        raise SampleError(f"calibration={source!r} cannot be read as a Hub dataset: {error}") from error
    yield from ((f"{name} row {number}", row) for number, row in enumerate(taken))


def parquet_rows(path: Path, count: int) -> Iterator[tuple[str, Any]]:
    """The first ``count`` rows of a Parquet file.

    Raises:
        MissingDependencyError: the datasets package is missing.
        SampleError: the file cannot be read.
    """
    datasets = _package(f"the calibration file {str(path)!r} is a Parquet file")
    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        taken = list(rows.take(count))
    except (OSError, ValueError, RuntimeError) as error:
        raise SampleError(f"the calibration file {str(path)!r} cannot be read: {error}") from error
    yield from ((f"{path.name} row {number}", row) for number, row in enumerate(taken))


def check_readable(source: str) -> None:
    """Refuse a Hub dataset that no package here could read, without asking the Hub.

    Raises:
        MissingDependencyError: see `hub_rows`.
    """
    _package(f"calibration={source!r} is no file here and names a Hub dataset")


def _package(reason: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(f"{reason}, and the datasets package is missing: pip install datasets.") from error
    return datasets
