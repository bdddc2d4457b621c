"""`optimum-sab demo`: the whole path on the embedded example."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from optimum_sab.cli.settings import add_settings, check_calibration, read_settings


def add_command(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "demo", help="binarize the embedded example, reload it in a fresh process, compare accuracy per task"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="keep the packed checkpoint here")
    parser.add_argument(
        "--questions", type=int, default=100, metavar="N", help="held-out questions per task (default: 100)"
    )
    parser.add_argument("--question-seed", type=int, default=0, metavar="N", help="seed of the questions (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the demonstration and print it."""
    from optimum_sab.example.demonstration import demonstrate

    config = read_settings(options, progress="lines")
    check_calibration(config.calibration)
    with tempfile.TemporaryDirectory() as scratch:
        output = options.output or Path(scratch) / "example-sab"
        result = demonstrate(config, output, options.questions, options.question_seed)
    if options.json:
        print(json.dumps(result.as_json()))
        return
    print(f"\n{'task':<12} {'dense':>8} {'packed':>8}   right answers on {options.questions} held-out questions")
    for task, score in result.tasks.items():
        print(f"{task:<12} {score.dense:>8.1%} {score.packed:>8.1%}")
    print(
        f"\nbinarized linears   {result.linear_bytes_dense:,} → {result.linear_bytes_packed:,} bytes, "
        f"{result.bits_per_weight:.3f} bits per weight\n"
        f"whole checkpoint    {result.bytes_dense:,} → {result.bytes_packed:,} bytes "
        "(embeddings and vision tower stay dense, and are large in a model this small)\n"
        f"reloaded in a fresh process: logits {'bit-identical' if result.reload_identical else 'DIFFER'}\n"
        f"{result.seconds:.0f} s in all"
    )
