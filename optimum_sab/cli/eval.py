"""`optimum-sab eval quality MODEL`: methods side by side on the same calibration data and the same questions."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optimum_sab.cli.settings import add_source, check_calibration, read_origin
from optimum_sab.errors import ConfigError

if TYPE_CHECKING:
    from optimum_sab.eval.quality import Measurement, Quality

DTYPES = ("float32", "bfloat16")


def add_command(commands: Any) -> None:
    """Add the command's parsers."""
    parser = commands.add_parser("eval", help="measure what quantization costs, several methods side by side")
    kinds = parser.add_subparsers(title="evaluations", required=True, metavar="EVALUATION")
    quality = kinds.add_parser(
        "quality",
        help="perplexity, accuracy, layer errors and divergence of many methods on one model",
        description="Quantizes the model by every method on the same calibration data, ours through from_pretrained, "
        "the baselines as dense simulations through the same lockstep calibration, and measures each result.",
    )
    quality.add_argument("model", help="'example' for the embedded model, or a checkpoint: folder or Hub repository")
    quality.add_argument(
        "--methods",
        nargs="+",
        default=["default", "two-bit", "paper"],
        metavar="METHOD",
        help="presets (default, two-bit, paper), with settings as in 'default,sweeps=0'; or baselines: rtn-sign, "
        "gptq-2, gptq-3, gptq-4, pb-llm, billm, arb-rc, arb-rc-cgb, arb-rc-cgb-rows, sab-published",
    )
    quality.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="calibration seeds")
    quality.add_argument(
        "--calibration",
        metavar="SOURCE",
        help="mixed, reference or passages for a language model (default: mixed); tasks, or mixed with the built-in "
        "set, for the example and the reader; or what SABConfig takes: builtin (default where there are pictures), "
        "self, a .jsonl file, a Hub dataset",
    )
    quality.add_argument("--cifar", type=Path, metavar="DIR", help="CIFAR-10, for the reader's second task")
    for name, default, text in (
        ("samples", 64, "calibration samples"),
        ("length", 512, "calibration tokens per text"),
        ("held-out", 24, "windows per held-out text"),
        ("window", 512, "tokens of a held-out window"),
        ("questions", 100, "questions per task"),
        ("probes", 8, "inputs on which predictions and layers are compared with the dense model's"),
    ):
        quality.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    quality.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (default: float32)")
    quality.add_argument("--picture", type=Path, metavar="FILE", help="draw quality against bits (needs matplotlib)")
    quality.add_argument("--json", action="store_true", help="print one JSON object")
    add_source(quality)
    quality.set_defaults(run=run_quality)


def run_quality(options: argparse.Namespace) -> None:
    """Measure and print; each row goes to stderr as soon as it is there."""
    from optimum_sab.eval.methods import read_method
    from optimum_sab.eval.quality import compare_quality
    from optimum_sab.eval.subject import Budget, find_subject

    if options.picture is not None:
        from optimum_sab.eval.picture import check_picture

        check_picture(options.picture)
    for name in ("samples", "length", "held_out", "window", "questions", "probes"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1.")
    check_calibration(options.calibration, "tasks", "mixed", "reference", "passages")
    methods = [read_method(spec) for spec in options.methods]
    budget = Budget(
        options.samples, options.length, options.held_out, options.window, options.questions, options.probes
    )
    origin = read_origin(options.model, options)
    subject = find_subject(origin, options.calibration, budget, getattr(torch, options.dtype), options.cifar)

    def on_row(row: Measurement) -> None:
        sys.stderr.write(f"{row.method}, seed {row.seed}: {row.bits_per_weight:.3f} bits, {row.seconds:.0f} s\n")

    quality = compare_quality(subject, methods, options.seeds, on_row)
    if options.json:
        print(json.dumps({"model": quality.subject, "rows": [asdict(r) for r in (quality.dense, *quality.rows)]}))
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
    modalities = quality.rows[0].layer_error if quality.rows else {}
    compared = [_Column(f"error {m}", "{:.4f}", partial(_entry, of="layer_error", key=m)) for m in modalities]
    compared.append(_Column("KL", "{:.3f}", lambda row: row.kl))
    compared.append(_Column("top-1 %", "{:.1f}", lambda row: 100 * row.top1))
    compared.append(_Column("s", "{:.0f}", lambda row: row.seconds))
    return plain, compared


def _entry(row: Measurement, of: str, key: str, unit: float = 1.0) -> float:
    """One value of a measurement's dictionary, in the unit given."""
    return float(getattr(row, of)[key]) / unit
