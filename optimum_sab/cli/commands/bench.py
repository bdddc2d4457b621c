"""`optimum-sab bench`: speed and memory on random weights, and which model families work."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from optimum_sab.cli.arguments.common import FoundWrong
from optimum_sab.cli.commands.bench_experts import run_experts
from optimum_sab.core.code import NO_CODE
from optimum_sab.errors import ConfigError
from optimum_sab.json_values import json_line
from optimum_sab.wording import counted

if TYPE_CHECKING:
    from optimum_sab.bench.conditions import Conditions
    from optimum_sab.bench.kernels import KernelReport, KernelTiming


def _conditions(options: argparse.Namespace) -> Conditions:
    from optimum_sab.bench.conditions import Conditions
    from optimum_sab.bench.environment import find_device, find_dtype
    from optimum_sab.hf.config import SABConfig

    return Conditions(
        settings=SABConfig.preset(options.preset).layer_settings,
        device=find_device(options.device),
        dtype=find_dtype(options.dtype),
        backend=options.backend,
        repeats=options.repeats,
        seed=options.seed,
    )


def run_kernels(options: argparse.Namespace) -> None:
    """Print one row per shape and number of tokens, as soon as it is measured: linears first, then experts."""
    from optimum_sab.bench.kernels import SHAPES
    from optimum_sab.bench.other_linears import OTHERS
    from optimum_sab.bench.shapes import parse_experts, parse_shapes

    conditions = _conditions(options)
    experts, words = parse_experts(options.shapes or SHAPES[conditions.device.type])
    parse_shapes(words)
    others = [name for name in OTHERS if getattr(options, name)]
    if experts and (others or options.busy):
        asked = "--busy" if options.busy else f"--{others[0]}"
        raise ConfigError(f"{asked} is for linears, and {experts[0].name} are experts; measure them by themselves.")
    conditions = replace(conditions, busy=options.busy, code=options.code)
    found: dict[str, Any] = {}
    if words:
        found |= asdict(_run_linears(words, conditions, others, options))
    if experts:
        routed = asdict(run_experts(experts, conditions, options))
        found |= {"environment": routed["environment"], "experts": routed["rows"]}
    if options.json:
        print(json_line(found))


def _run_linears(
    words: list[str], conditions: Conditions, others: list[str], options: argparse.Namespace
) -> KernelReport:
    from optimum_sab.bench.kernels import TOKENS, compare_kernels
    from optimum_sab.bench.other_linears import chosen_linears
    from optimum_sab.bench.shapes import parse_shapes

    shown: list[KernelTiming] = []
    coded = options.code != NO_CODE

    def show(row: KernelTiming) -> None:
        if not shown:
            columns = "".join(f" {other.title:>10}" for other in chosen_linears(others))
            columns += f" {'coded us':>10} {'x plain':>8}" if coded else ""
            columns += (
                f" {'quiet us':>10} {'busy us':>10} {'x':>7} {'x mean':>7} {'dense x':>8}" if options.busy else ""
            )
            print(
                f"{'linear':<24} {'shape':>12} {'M':>5} {'bits':>6} {'us':>10} {'dense us':>10} {'speedup':>8} "
                f"{'roofline':>9} {'MB':>8} {'error':>8}{columns}",
                flush=True,
            )
        shown.append(row)
        shape = f"{row.out_features}x{row.in_features}"
        times: list[float | None] = [getattr(row, f"{other.name}_seconds") for other in chosen_linears(others)]
        columns = "".join(f" {'-' if s is None else f'{1e6 * s:.1f}':>10}" for s in times)
        if row.coded_seconds is not None:
            columns += f" {1e6 * row.coded_seconds:>10.1f} {row.coded_seconds / row.seconds:>8.2f}"
        if options.busy:
            columns += _busy_columns(row)
        print(
            f"{row.name:<24} {shape:>12} {row.m:>5} {row.bits_per_weight:>6.3f} {1e6 * row.seconds:>10.1f} "
            f"{1e6 * row.dense_seconds:>10.1f} {row.speedup:>8.2f} {row.roofline_fraction:>9.3f} "
            f"{row.bytes / 1e6:>8.2f} {row.error:>8.1e}{columns}",
            flush=True,
        )

    report = compare_kernels(
        shapes=parse_shapes(words),
        tokens=options.tokens or TOKENS[conditions.device.type],
        conditions=conditions,
        others=others,
        on_row=None if options.json else show,
    )
    if options.json:
        return report
    where = report.environment
    if report.busy:
        busy = counted(report.busy, "process", "processes")
        print(f"quiet, busy: calls one after the other, alone and beside {busy} that never rest")
    print(
        f"{where.device}, backend {report.rows[0].backend}, {options.dtype}, torch {where.torch}, "
        f"triton {where.triton or 'none'}, {counted(where.threads, 'thread')}; copies move "
        f"{where.bandwidth_bytes_per_second / 1e9:.1f} GB/s"
    )
    return report


def _busy_columns(row: KernelTiming) -> str:
    quiet, busy, mean = row.quiet_seconds or 0.0, row.busy_seconds or 0.0, row.busy_mean_seconds or 0.0
    dense = (row.dense_busy_seconds or 0.0) / (row.dense_quiet_seconds or 1.0)
    return f" {1e6 * quiet:>10.1f} {1e6 * busy:>10.1f} {busy / quiet:>7.2f} {mean / quiet:>7.2f} {dense:>8.2f}"


def run_generate(options: argparse.Namespace) -> None:
    """Print one row per model."""
    from optimum_sab.bench.generate import compare_generation

    conditions = _conditions(options)
    size = options.size or ("7b" if conditions.device.type == "cuda" else "tiny")
    if options.compile:
        _run_compiled(options, size, conditions)
        return
    report = compare_generation(
        size=size,
        conditions=conditions,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        batch=options.batch,
        cuda_graphs=options.cuda_graphs,
    )
    if options.json:
        asked = {name: getattr(options, name) for name in ("dtype", "prompt_tokens", "new_tokens", "batch")}
        print(json_line({"size": size, **asked, **asdict(report)}))
        return
    print(f"{'model':<8} {'prefill tok/s':>14} {'decode tok/s':>14} {'peak GB':>9} {'weights GB':>11}")
    for row in report.rows:
        peak = "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e9:.3f}"
        print(
            f"{row.model:<8} {row.prefill_tokens_per_second:>14.1f} {row.decode_tokens_per_second:>14.1f} {peak:>9} "
            f"{row.weight_bytes / 1e9:>11.3f}"
        )
    ratio = report.ratios
    peak = "-" if ratio["peak_memory_bytes"] is None else f"{ratio['peak_memory_bytes']:.3f}"
    print(
        f"{'ratio':<8} {ratio['prefill_tokens_per_second']:>14.2f} {ratio['decode_tokens_per_second']:>14.2f} "
        f"{peak:>9} {ratio['weight_bytes']:>11.3f}"
    )
    graphs = "one CUDA graph per step" if report.cuda_graphs else "eager steps"
    print(
        f"{report.environment.device}, size {size}, backend {report.backend}, {options.dtype}, batch "
        f"{options.batch}, {options.prompt_tokens}+{options.new_tokens} tokens, {graphs}"
    )


def _run_compiled(options: argparse.Namespace, size: str, conditions: Conditions) -> None:
    """Print one row per model and way."""
    from optimum_sab.bench.compiled_generation import compare_compiled

    if options.cuda_graphs:
        raise ConfigError("--compile and --cuda-graphs are two ways to make a step one call; give one of them.")
    report = compare_compiled(size, conditions, options.prompt_tokens, options.new_tokens, options.batch)
    if options.json:
        asked = {name: getattr(options, name) for name in ("dtype", "prompt_tokens", "new_tokens", "batch")}
        print(json_line({"size": size, **asked, **asdict(report)}))
        return
    heads = f"{'decode tok/s':>13} {'first s':>9} {'Python us per linear':>21} {'of nothing':>11}"
    print(f"{'model':<8} {'steps':<9} {heads}")
    for row in report.rows:
        python, nothing = (
            "-" if seconds is None else f"{1e6 * seconds:.1f}"
            for seconds in (row.python_seconds_per_linear, row.nothing_seconds_per_linear)
        )
        print(
            f"{row.model:<8} {'compiled' if row.compiled else 'eager':<9} {row.decode_tokens_per_second:>13.1f} "
            f"{row.first_seconds:>9.1f} {python:>21} {nothing:>11}"
        )
    for steps, ratio in report.ratios.items():
        print(f"{'ratio':<8} {steps:<9} {ratio:>13.2f}")
    print(
        f"{report.environment.device}, size {size}, backend {report.backend}, {options.dtype}, batch {options.batch}, "
        f"{options.prompt_tokens}+{options.new_tokens} tokens, {counted(report.environment.threads, 'thread')}"
    )


def run_quantize(options: argparse.Namespace) -> None:
    """Print one row per stage and per part of it."""
    from optimum_sab.bench.environment import find_device, find_dtype
    from optimum_sab.bench.quantize import QuantizingConditions, measure_checkpoint, measure_random, rows
    from optimum_sab.hf.config import SABConfig

    if (options.model is None) == (options.size is None):
        raise ConfigError("bench quantize takes a checkpoint's folder, or --size for a random model.")
    if options.stream_weights and options.model is None:
        raise ConfigError("--stream-weights reads a checkpoint's files, and --size has none; give a folder.")
    asked = {"calibration_samples": options.samples, "sequence_length": options.length, "progress": "none"}
    asked["stream_weights"] = options.stream_weights
    config = SABConfig.preset(options.preset, **asked)
    conditions = QuantizingConditions(config, find_device(options.device), find_dtype(options.dtype), options.seed)
    if options.model is not None:
        report = measure_checkpoint(options.model, conditions)
    else:
        report = measure_random(options.size, options.samples, options.length, conditions)
    found = report.as_json()
    if options.json:
        told = {name: getattr(options, name) for name in ("preset", "dtype", "samples", "length")}
        print(json_line({**told, **found}))
        return
    print(f"{'part':<28} {'s':>9} {'CPU s':>9} {'peak GB':>9} {'own GB':>9} {'mapped GB':>9} {'calls':>8}")
    for name, each in rows(report.parts):
        print(f"{name:<28} {_use_columns(each.as_json())} {each.use.calls:>8}")
    print(f"{'in all':<28} {_use_columns(found)}")
    where = report.environment
    print(
        f"{report.model}, {options.preset}, {options.samples} x {options.length} tokens, {options.dtype}, "
        f"{report.bits_per_weight:.4f} bits, error {report.error:.5f}; {where.device}, "
        f"{counted(where.threads, 'thread')}, torch {where.torch}"
    )


def _use_columns(found: Mapping[str, Any]) -> str:
    memory = [found[name] / 1e9 for name in ("peak_memory_bytes", "own_memory_bytes", "mapped_memory_bytes")]
    return f"{found['seconds']:>9.2f} {found['cpu_seconds']:>9.2f} " + " ".join(f"{each:>9.3f}" for each in memory)


def run_checkpoint(options: argparse.Namespace) -> None:
    """Write one, and say how large it is."""
    from optimum_sab.bench.environment import find_dtype
    from optimum_sab.bench.random_checkpoint import RandomCheckpoint
    from optimum_sab.hf.output.place import check_output, check_size
    from optimum_sab.hf.output.saving import written_whole

    dtype = find_dtype(options.dtype)
    wanted = RandomCheckpoint(options.size, options.blocks, dtype, options.seed, values=not options.headers)
    model = wanted.model()
    size = sum(each.numel() for each in model.parameters()) * dtype.itemsize
    where = check_output(options.output, options.overwrite)
    if not options.headers:
        check_size(where, size)
    with written_whole(where) as folder:
        wanted.write(folder)
    if options.json:
        print(json_line({"output": str(options.output), "size": options.size, "bytes": size}))
    elif not options.quiet:
        blocks = model.config.get_text_config().num_hidden_layers
        what = "headers for the weights" if options.headers else "random weights"
        print(f"{options.output}: {what} of {options.size} with {counted(blocks, 'block')}, {size / 1e9:.3f} GB")


def run_coverage(options: argparse.Namespace) -> None:
    """Print one row per family, as soon as it is known."""
    from optimum_sab.bench.coverage.families import find_families
    from optimum_sab.bench.coverage.isolation import Limits, try_families
    from optimum_sab.bench.coverage.outcome import FamiliesFailedError, Outcome, check_outcomes
    from optimum_sab.bench.coverage.table import HEADER, as_json, as_markdown, row, total_line

    if options.json and options.markdown:
        raise ConfigError("--json and --markdown are two ways to print the same; leave one out.")
    families = find_families(options.families)
    limits = Limits(options.timeout, options.memory, options.jobs)
    rows = not (options.json or options.markdown)
    if rows:
        print(HEADER, flush=True)
    found: dict[str, Outcome] = {}
    for each in try_families(families, limits):
        found[each.family] = each
        if rows:
            print(row(each), flush=True)
    outcomes = [found[family.name] for family in families]
    if options.markdown:
        print(as_markdown(outcomes))
    elif not options.json:
        print(total_line(outcomes))
    try:
        check_outcomes(outcomes)
    except FamiliesFailedError as error:
        raise FoundWrong(str(error), as_json(outcomes)) from error
    if options.json:
        print(json_line(as_json(outcomes)))
