"""`optimum-sab bench layers MODEL` and `optimum-sab bench perplexity MODEL`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from optimum_sab.cli.settings import add_settings, read_settings

TEXTS = ("reference", "passages", "mixed")


def add_command(commands: Any) -> None:
    """Add the command's parsers."""
    parser = commands.add_parser("bench", help="measure quality on a language model's real weights")
    kinds = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")

    layers = kinds.add_parser("layers", help="held-out output error of single linears, several methods side by side")
    layers.add_argument("model", help="checkpoint of a causal language model")
    layers.add_argument("--layers", type=int, nargs="+", default=[8, 28], metavar="I")
    layers.add_argument("--linears", nargs="+", default=["q_proj", "o_proj", "gate_proj", "down_proj"], metavar="NAME")
    layers.add_argument("--samples", type=int, default=32, metavar="N", help="calibration windows (default: 32)")
    layers.add_argument("--length", type=int, default=512, metavar="N", help="tokens per window (default: 512)")
    layers.add_argument("--text", choices=TEXTS, default="mixed", help="calibration text (default: mixed)")
    layers.add_argument("--json", action="store_true", help="print one JSON object")
    layers.set_defaults(run=run_layers)

    perplexity = kinds.add_parser("perplexity", help="perplexity on held-out text, dense against packed")
    perplexity.add_argument("model", help="checkpoint of a causal language model")
    perplexity.add_argument("--text", choices=TEXTS, default="mixed", help="calibration text (default: mixed)")
    perplexity.add_argument("--samples", type=int, default=64, metavar="N", help="calibration windows (default: 64)")
    perplexity.add_argument("--length", type=int, default=512, metavar="N", help="tokens per window (default: 512)")
    perplexity.add_argument(
        "--held-out", type=int, default=24, metavar="N", help="windows per held-out text (default: 24)"
    )
    perplexity.add_argument("--json", action="store_true", help="print one JSON object")
    add_settings(perplexity)
    perplexity.set_defaults(run=run_perplexity)


def run_layers(options: argparse.Namespace) -> None:
    """Print one row per method."""
    from optimum_sab.bench.layers import compare_layers

    rows = compare_layers(options.model, options.layers, options.linears, options.samples, options.length, options.text)
    if options.json:
        print(json.dumps({"methods": [asdict(row) for row in rows]}))
        return
    sources = list(rows[0].by_source)
    print(f"{'method':<44} {'bits':>6} {'error':>8} " + " ".join(f"{s:>10}" for s in sources))
    for row in rows:
        parts = " ".join(f"{row.by_source[s]:>10.4f}" for s in sources)
        print(f"{row.method:<44} {row.bits_per_weight:>6.3f} {row.error:>8.4f} {parts}")


def run_perplexity(options: argparse.Namespace) -> None:
    """Print one row per held-out text."""
    from optimum_sab.bench.perplexity import compare_perplexity

    config = read_settings(options, progress="lines")
    change = compare_perplexity(options.model, config, options.text, options.samples, options.length, options.held_out)
    if options.json:
        print(json.dumps({**asdict(change), "ratio": change.ratio}))
        return
    for source, ratio in change.ratio.items():
        print(f"{source:<12} dense {change.dense[source]:.2f}   packed {change.packed[source]:.2f}   ratio {ratio:.2f}")
    print(f"{change.bits_per_weight:.3f} bits per weight, quantized in {change.seconds:.0f} s")
