"""`optimum-sab bench solve-experts`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from optimum_sab.errors import ConfigError
from optimum_sab.json_values import json_line
from optimum_sab.wording import counted

if TYPE_CHECKING:
    from optimum_sab.bench.solving import SolvingTiming


def run_solving(options: argparse.Namespace) -> None:
    """Print one row per shape and matrix, as soon as it is measured."""
    from optimum_sab.bench.conditions import Conditions
    from optimum_sab.bench.environment import find_device, find_dtype
    from optimum_sab.bench.shapes import parse_experts
    from optimum_sab.bench.solving import compare_solving
    from optimum_sab.hf.config import SABConfig

    shapes, others = parse_experts(options.shapes)
    if others:
        raise ConfigError(
            f"--shapes {others[0]!r} are no experts; use qwen3-30b-a3b, qwen3-235b-a22b, or sizes as "
            "EXPERTSxTOPxHIDDENxINTERMEDIATE."
        )
    conditions = Conditions(
        settings=SABConfig.preset(options.preset).layer_settings,
        device=find_device(options.device),
        dtype=find_dtype(options.dtype),
        repeats=options.repeats,
        seed=options.seed,
    )
    shown: list[SolvingTiming] = []

    def show(row: SolvingTiming) -> None:
        if not shown:
            print(
                f"{'experts':<24} {'shape':>10} {'N':>4} {'one by one s':>12} {'CPU s':>8} {'peak GB':>8} "
                f"{'together s':>10} {'CPU s':>8} {'peak GB':>8} {'speedup':>8} {'differ':>8} {'error':>8}",
                flush=True,
            )
        shown.append(row)
        one, all_ = row.one_by_one, row.together
        differ = "none" if row.agreement.bit_for_bit else f"{row.agreement.differing_signs:.1e}"
        print(
            f"{row.name:<24} {f'{row.out_features}x{row.in_features}':>10} {row.experts:>4} {one.seconds:>12.3f} "
            f"{one.cpu_seconds:>8.3f} {one.peak_memory_bytes / 1e9:>8.3f} {all_.seconds:>10.3f} "
            f"{all_.cpu_seconds:>8.3f} {all_.peak_memory_bytes / 1e9:>8.3f} {row.speedup:>8.2f} {differ:>8} "
            f"{row.error:>8.5f}",
            flush=True,
        )

    report = compare_solving(shapes, options.experts, options.tokens, conditions, on_row=None if options.json else show)
    asked = {name: getattr(options, name) for name in ("preset", "dtype", "tokens", "repeats")}
    if options.json:
        print(json_line({**asked, **report.as_json()}))
        return
    where = report.environment
    print(
        "seconds are of an expert; differ: share of signs that the two ways chose otherwise, none: bit for bit the same"
    )
    print(
        f"{where.device}, {options.preset}, {counted(options.tokens, 'token')}, {options.dtype}, "
        f"{counted(options.repeats, 'turn')}, torch {where.torch}, triton {where.triton or 'none'}, "
        f"{counted(where.threads, 'thread')}; copies move {where.bandwidth_bytes_per_second / 1e9:.1f} GB/s"
    )
