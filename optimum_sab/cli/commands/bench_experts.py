"""The experts of `optimum-sab bench kernels`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from optimum_sab.wording import counted

if TYPE_CHECKING:
    from optimum_sab.bench.conditions import Conditions
    from optimum_sab.bench.experts import ExpertsReport, ExpertsTiming
    from optimum_sab.bench.shapes import ExpertsShape


def run_experts(shapes: list[ExpertsShape], conditions: Conditions, options: argparse.Namespace) -> ExpertsReport:
    """Print one row per shape and number of tokens, as soon as it is measured."""
    from optimum_sab.bench.experts import TOKENS, compare_experts

    shown: list[ExpertsTiming] = []

    def show(row: ExpertsTiming) -> None:
        coded = row.coded_seconds
        if not shown:
            print(
                f"{'experts':<24} {'sizes':>16} {'M':>5} {'active':>6} {'bits':>6} {'us':>10} {'dense us':>10} "
                f"{'fastest':>10} {'speedup':>8} {'MB':>8} {'dense MB':>9} {'error':>8}"
                + (f" {'coded us':>10} {'x plain':>8}" if coded is not None else ""),
                flush=True,
            )
        shown.append(row)
        sizes = f"{row.experts}x{row.top_k}x{row.hidden}x{row.intermediate}"
        print(
            f"{row.name:<24} {sizes:>16} {row.m:>5} {row.active:>6.1f} {row.bits_per_weight:>6.3f} "
            f"{1e6 * row.seconds:>10.1f} {1e6 * row.dense_seconds:>10.1f} {row.dense_implementation:>10} "
            f"{row.speedup:>8.2f} {row.packed_bytes / 1e6:>8.2f} {row.dense_bytes / 1e6:>9.2f} {row.error:>8.1e}"
            + (f" {1e6 * coded:>10.1f} {coded / row.seconds:>8.2f}" if coded is not None else ""),
            flush=True,
        )

    tokens = options.tokens or TOKENS
    report = compare_experts(shapes, tokens, conditions, on_row=None if options.json else show)
    if not options.json:
        print(
            f"{report.environment.device}, backend {report.rows[0].backend}, {options.dtype}, torch "
            f"{report.environment.torch}, {counted(report.environment.threads, 'thread')}"
        )
    return report
