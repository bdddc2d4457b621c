"""`optimum-sab eval quality MODEL`: methods side by side on the same calibration data and the same questions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimum_sab.cli.arguments.common import add_common, add_described, check_counts, check_seeds
from optimum_sab.cli.arguments.settings import add_source, check_calibration
from optimum_sab.core.bounds import check_integer
from optimum_sab.example import EXAMPLE
from optimum_sab.presets import MOST_SAMPLES
from optimum_sab.sources import check_folder

DTYPES = ("float32", "bfloat16")
COUNTS = {
    "samples": (64, "calibration samples"),
    "length": (512, "calibration tokens per text"),
    "held-out": (24, "windows per held-out text"),
    "window": (512, "tokens of a held-out window"),
    "questions": (100, "questions per task"),
    "probes": (8, "inputs on which predictions and layers are compared with the dense model's"),
}


def add_command(commands: Any, arguments: Sequence[str] = ()) -> None:
    """Add the command's parsers."""
    parser = add_described(commands, "eval", "measure what quantization costs, several methods side by side")
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
        help="presets (default, light, best, two-bit, paper), with settings as in 'default,sweeps=0'; or baselines: "
        "rtn-sign, gptq-2, gptq-3, gptq-4, pb-llm, billm, arb-rc, arb-rc-cgb, arb-rc-cgb-rows, sab-published",
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
    for name, (default, text) in COUNTS.items():
        quality.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    quality.add_argument(
        "--continuations",
        type=int,
        default=0,
        metavar="N",
        help="go on greedily from N prompts for 64 tokens, and compare with the dense model (default: 0)",
    )
    quality.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (default: float32)")
    quality.add_argument("--picture", type=Path, metavar="FILE", help="draw quality against bits (needs matplotlib)")
    add_source(quality)
    add_common(quality)
    quality.set_defaults(run="eval.run_quality", check=check_call)


def check_call(options: argparse.Namespace) -> None:
    """Refuse what is wrong before torch is imported.

    Raises:
        ConfigError: a number cannot be used, or there is no such folder.
        SampleError: see `check_calibration`.
    """
    check_counts(options, COUNTS)
    check_integer("--continuations", options.continuations, 0, MOST_SAMPLES)
    check_seeds(options, "seeds")
    if options.model != EXAMPLE:
        check_folder(options.model, options.subfolder or "")
    check_calibration(options.calibration, "tasks", "mixed", "reference", "passages")
