"""`optimum-sab demo`: the whole path on the embedded example."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from optimum_sab.cli.commands.settings import hush_libraries, read_settings
from optimum_sab.json_values import json_line


def run(options: argparse.Namespace) -> None:
    """Run the demonstration and print it."""
    from optimum_sab.example.demonstration import demonstrate

    hush_libraries(options)
    config = read_settings(options)
    with tempfile.TemporaryDirectory() as scratch:
        output = options.output or Path(scratch) / "example-sab"
        result = demonstrate(config, output, options.questions, options.question_seed)
    if options.json:
        print(json_line(result.as_json()))
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
        f"{result.seconds:.0f} s in all; "
        + ("nothing is kept" if options.output is None else f"the packed model is in {options.output}")
        + ". Your own: optimum-sab quantize MODEL --output DIR"
    )
