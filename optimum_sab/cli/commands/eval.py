"""`optimum-sab eval quality MODEL`: methods side by side on the same calibration data and the same questions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from optimum_sab.cli.commands.settings import hush_libraries, read_origin
from optimum_sab.json_values import json_line

if TYPE_CHECKING:
    from optimum_sab.eval.quality import Measurement, Quality


def run_quality(options: argparse.Namespace) -> None:
    """Measure and print; each row goes to stderr as soon as it is there."""
    from optimum_sab.eval.methods import read_method
    from optimum_sab.eval.quality import compare_quality
    from optimum_sab.eval.subject import Budget, find_subject

    hush_libraries(options)
    if options.picture is not None:
        from optimum_sab.eval.picture import check_picture

        check_picture(options.picture)
    methods = [read_method(spec) for spec in options.methods]
    counts = ("samples", "length", "held_out", "window", "questions", "probes", "continuations")
    budget = Budget(**{name: getattr(options, name) for name in counts})
    origin = read_origin(options.model, options)
    subject = find_subject(origin, options.calibration, budget, getattr(torch, options.dtype), options.cifar)

    def on_row(row: Measurement) -> None:
        if not options.quiet:
            sys.stderr.write(f"{row.method}, seed {row.seed}: {row.bits_per_weight:.3f} bits, {row.seconds:.0f} s\n")

    quality = compare_quality(subject, methods, options.seeds, on_row)
    if options.json:
        print(json_line({"model": quality.subject, "rows": [asdict(r) for r in (quality.dense, *quality.rows)]}))
    else:
        print(table(quality))
    if options.picture is not None:
        from optimum_sab.eval.picture import draw_quality

        draw_quality(quality, options.picture)


def table(quality: Quality) -> str:
    """One line per method, mean over seeds and the range behind it where there are several."""
    plain, compared = _columns(quality)
    lines = [["method", *(c.title for c in plain), *(c.title for c in compared)]]
    lines.append(["dense", *(c.form.format(c.figure(quality.dense)) for c in plain), *("" for _ in compared)])
    for method in quality.methods():
        cells = [method]
        for column in (*plain, *compared):
            spread = quality.spread(method, column.figure)
            mean, low, high = (column.form.format(value) for value in (spread.mean, spread.low, spread.high))
            cells.append(mean if low == high else f"{mean} ({low}–{high})")
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


@dataclass(frozen=True)
class _Column:
    title: str
    form: str
    figure: Callable[[Measurement], float]


def _columns(quality: Quality) -> tuple[list[_Column], list[_Column]]:
    """Columns that the dense model has too, and those that compare with it."""
    dense = quality.dense
    plain = [_Column("bits", "{:.3f}", lambda row: row.bits_per_weight)]
    for text, before in dense.perplexity.items():
        plain.append(_Column(f"ppl {text}", "{:.1f}", partial(_entry, of="perplexity", key=text)))
        plain.append(_Column(f"× {text}", "{:.2f}", partial(_entry, of="perplexity", key=text, unit=before)))
    for task in dense.accuracy:
        plain.append(_Column(task, "{:.0f}", partial(_entry, of="accuracy", key=task, unit=0.01)))
    if dense.accuracy:
        plain.append(_Column("mean", "{:.1f}", lambda row: 100 * (row.mean_accuracy or 0.0)))
    if dense.continuations is not None:
        plain.append(_Column("4-grams again %", "{:.1f}", partial(_continuation, of="repeated")))
        plain.append(_Column("followed %", "{:.1f}", partial(_continuation, of="followed")))
        plain.append(_Column("same %", "{:.0f}", partial(_continuation, of="same")))
    modalities = quality.rows[0].layer_error if quality.rows else {}
    compared = [_Column(f"error {m}", "{:.4f}", partial(_entry, of="layer_error", key=m)) for m in modalities]
    compared.append(_Column("KL", "{:.3f}", lambda row: row.kl))
    compared.append(_Column("top-1 %", "{:.1f}", lambda row: 100 * row.top1))
    compared.append(_Column("s", "{:.0f}", lambda row: row.seconds))
    return plain, compared


def _continuation(row: Measurement, of: str) -> float:
    return 100 * float(getattr(row.continuations, of))


def _entry(row: Measurement, of: str, key: str, unit: float = 1.0) -> float:
    """One value of a measurement's dictionary, in the unit given."""
    return float(getattr(row, of)[key]) / unit
