"""`optimum-sab bench`: speed and memory on random weights, and which model families work."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from optimum_sab.cli.arguments.common import add_common, add_described, check_amounts, check_counts, check_seeds
from optimum_sab.core.code import CODES, NO_CODE
from optimum_sab.presets import PRESETS
from optimum_sab.wording import page


def add_command(commands: Any, arguments: Sequence[str] = ()) -> None:
    """Add the command's parsers."""
    parser = add_described(commands, "bench", "measure speed, memory, and which model families work")
    kinds = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")

    kernels = kinds.add_parser(
        "kernels",
        help="time of single packed linears against a dense weight, checked and beside the memory roofline",
        description="Random packed linears against torch.nn.functional.linear with a dense weight, in turns in one "
        "run. Every packed result is first checked against the dequantized weight.",
    )
    kernels.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help="qwen2.5-vl-7b, qwen2.5-vl-72b or OUTxIN (default: both models on CUDA, 4096x4096 on the CPU); the "
        "experts of qwen3-30b-a3b, qwen3-235b-a22b or EXPERTSxTOPxHIDDENxINTERMEDIATE",
    )
    kernels.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        metavar="M",
        help="rows of the input (default: 1 4 16 64 256 on the CPU; on CUDA also 1024 4096; for experts 1 16 256)",
    )
    kernels.add_argument(
        "--int4", action="store_true", help="time torch's int4 kernel too, base plane alone (CPU, bf16)"
    )
    kernels.add_argument(
        "--code",
        choices=(NO_CODE, *CODES),
        default=NO_CODE,
        help="time packed linears with this code too, in turns with those without",
    )
    kernels.add_argument("--gemlite", action="store_true", help="time gemlite's 1-, 2- and 4-bit linears too (CUDA)")
    kernels.add_argument("--humming", action="store_true", help="time Humming's 1- and 2-bit linears too (CUDA)")
    kernels.add_argument(
        "--busy",
        type=int,
        default=0,
        metavar="N",
        help="time everything once more while N other processes compute without end (CPU)",
    )
    _add_speed_options(kernels, repeats=20)
    add_common(kernels, quiet=False)
    kernels.set_defaults(run="bench.run_kernels", check=partial(check_call, ("tokens", "repeats")))

    generate = kinds.add_parser(
        "generate",
        help="prefill and decode tokens per second of a random vision-language model, dense against packed",
        description="A randomly initialised Qwen2.5-VL or Qwen3-VL, dense and then packed: greedy decoding of a text "
        "prompt over a static cache.",
    )
    generate.add_argument(
        "--size",
        metavar="SIZE",
        help="7b (Qwen2.5-VL), 8b, 32b (Qwen3-VL), tiny or tiny-qwen3 (default: 7b on CUDA, tiny on the CPU)",
    )
    generate.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="per sequence (default: 512)")
    generate.add_argument("--new-tokens", type=int, default=64, metavar="N", help="per sequence (default: 64)")
    generate.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default: 1)")
    generate.add_argument(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        help="replay the decode step as a CUDA graph (default: on CUDA)",
    )
    generate.add_argument(
        "--compile",
        action="store_true",
        help="on the CPU: decode with steps that torch.compile compiled, in turns with eager ones",
    )
    _add_speed_options(generate, repeats=3)
    add_common(generate, quiet=False)
    counts = ("prompt-tokens", "new-tokens", "batch", "repeats")
    generate.set_defaults(run="bench.run_generate", check=partial(check_call, counts))
    _add_quantize(kinds)
    _add_solving(kinds)
    _add_checkpoint(kinds)
    _add_coverage(kinds)


def check_call(counts: Sequence[str], options: argparse.Namespace) -> None:
    """Refuse numbers that cannot be used before torch is imported.

    Args:
        counts: names of the options that count something.
        options: as they were parsed.

    Raises:
        ConfigError: names the first.
    """
    check_counts(options, counts)
    check_seeds(options, "seed")


def check_coverage(options: argparse.Namespace) -> None:
    """`check_call` of the families.

    Raises:
        ConfigError: names the first number that cannot be used.
    """
    check_counts(options, ("jobs",))
    check_amounts(options, ("timeout", "memory"))


def _add_quantize(kinds: Any) -> None:
    quantize = kinds.add_parser(
        "quantize",
        help="seconds and peak memory of quantizing, by stage and by part",
        description="Quantizes a checkpoint, or a model of random weights on random tokens, and says where time and "
        "memory go: by stage, and inside of those that solve linears by what is done. The result is thrown away.",
    )
    quantize.add_argument("model", nargs="?", metavar="MODEL", help="folder of a dense checkpoint")
    quantize.add_argument(
        "--size", metavar="SIZE", help="a random model instead: smollm2 (135M), 7b-block (one block of a 7B) or tiny"
    )
    quantize.add_argument("--samples", type=int, default=64, metavar="N", help="that calibrate (default: 64)")
    quantize.add_argument("--length", type=int, default=512, metavar="N", help="tokens of a sample (default: 512)")
    quantize.add_argument(
        "--stream-weights", action="store_true", help="leave a checkpoint's weights in its files, as quantize does"
    )
    quantize.add_argument("--preset", choices=PRESETS, default="default", help="how to quantize")
    quantize.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:0 (default: cuda where there is one)")
    quantize.add_argument("--dtype", default="float32", metavar="DTYPE", help="of the model (default: float32)")
    quantize.add_argument("--seed", type=int, default=0, metavar="N", help="of the random content (default: 0)")
    add_common(quantize, quiet=False)
    quantize.set_defaults(run="bench.run_quantize", check=partial(check_call, ("samples", "length")))


def _add_solving(kinds: Any) -> None:
    solving = kinds.add_parser(
        "solve-experts",
        help="seconds and peak memory of solving the experts of a block, one by one and together",
        description="Random experts with statistics of random tokens are solved one after the other and together, as "
        "quantizing does, in turns in one run; says whether both found the same. Nothing is kept.",
    )
    solving.add_argument(
        "--shapes",
        nargs="+",
        default=["qwen3-30b-a3b"],
        metavar="SHAPE",
        help="qwen3-30b-a3b (the default), qwen3-235b-a22b or EXPERTSxTOPxHIDDENxINTERMEDIATE",
    )
    solving.add_argument("--experts", type=int, default=4, metavar="N", help="how many (default: 4; a block has 128)")
    solving.add_argument("--tokens", type=int, default=4096, metavar="N", help="of each expert (default: 4096)")
    solving.add_argument("--preset", choices=PRESETS, default="default", help="settings of the linears")
    solving.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:0 (default: cuda where there is one)")
    solving.add_argument("--dtype", default="bfloat16", metavar="DTYPE", help="of the weights (default: bfloat16)")
    solving.add_argument("--repeats", type=int, default=2, metavar="N", help="turns per median (default: 2)")
    solving.add_argument("--seed", type=int, default=0, metavar="N", help="of the random content (default: 0)")
    add_common(solving, quiet=False)
    counts = ("experts", "tokens", "repeats")
    solving.set_defaults(run="bench_solving.run_solving", check=partial(check_call, counts))


def _add_checkpoint(kinds: Any) -> None:
    checkpoint = kinds.add_parser(
        "checkpoint",
        help="write a checkpoint of random weights in a large model's shapes, of which a shard is in memory at a time",
        description="Writes random weights in the shapes of a model, with the embedded example's processor: for "
        "quantizing what is larger than memory. Its predictions mean nothing.",
    )
    checkpoint.add_argument("output", type=Path, metavar="DIR", help="where it goes")
    checkpoint.add_argument(
        "--size",
        required=True,
        metavar="SIZE",
        help="7b, 13b or 72b (as Qwen2.5-VL), 8b or 32b (Qwen3-VL), 30b-a3b or 235b-a22b (Qwen3-VL-MoE), narrow (64 "
        "small blocks), tiny or tiny-qwen3",
    )
    checkpoint.add_argument(
        "--headers", action="store_true", help="files of headers and holes, which take no room: enough for plan"
    )
    checkpoint.add_argument("--blocks", type=int, metavar="N", help="decoder blocks (default: all that the size has)")
    checkpoint.add_argument("--dtype", default="bfloat16", metavar="DTYPE", help="of the weights (default: bfloat16)")
    checkpoint.add_argument("--seed", type=int, default=0, metavar="N", help="of the random content (default: 0)")
    checkpoint.add_argument("--overwrite", action="store_true", help="replace a checkpoint in DIR; other files stay")
    add_common(checkpoint)
    checkpoint.set_defaults(run="bench.run_checkpoint", check=check_checkpoint)


def check_checkpoint(options: argparse.Namespace) -> None:
    """`check_call` of a checkpoint.

    Raises:
        ConfigError: names the first number that cannot be used.
    """
    check_call(() if options.blocks is None else ("blocks",), options)


def _add_coverage(kinds: Any) -> None:
    coverage = kinds.add_parser(
        "coverage",
        help="which model families of the installed Transformers are binarized, saved, reloaded and go on",
        description="Every model type that reads pictures, and some for text and sound, built small and random, each "
        "in a process of its own: quantized with pictures and text, saved, reloaded in a fresh process and compared "
        "bit for bit, then generation, training mode, a second save and dequantizing.",
    )
    coverage.add_argument("families", nargs="*", metavar="FAMILY", help="model types (default: all)")
    coverage.add_argument("--jobs", type=int, default=1, metavar="N", help="families at a time (default: 1)")
    coverage.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="S",
        help="seconds of computing, each half (default: 120)",
    )
    coverage.add_argument("--memory", type=float, default=6.0, metavar="GB", help="of each family (default: 6)")
    coverage.add_argument("--markdown", action="store_true", help=f"print the table of {page('models')}")
    add_common(coverage, quiet=False)
    coverage.set_defaults(run="bench.run_coverage", check=check_coverage)


def _add_speed_options(parser: argparse.ArgumentParser, repeats: int) -> None:
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:0 (default: cuda where there is one)")
    parser.add_argument("--dtype", default="bfloat16", metavar="DTYPE", help="bfloat16, float16 or float32")
    parser.add_argument("--backend", default="auto", metavar="NAME", help="of the packed linears (default: auto)")
    parser.add_argument("--preset", choices=PRESETS, default="default", help="settings of the packed linears")
    parser.add_argument("--repeats", type=int, default=repeats, metavar="N", help=f"per median (default: {repeats})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random content (default: 0)")
