"""`optimum-sab plan MODEL`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from optimum_sab.calibration.plan.expectation import Fit
from optimum_sab.calibration.plan.fit import refuse_what_cannot_fit
from optimum_sab.calibration.plan.memory import MACHINE
from optimum_sab.cli.commands.settings import hush_libraries, read_origin, read_settings
from optimum_sab.cli.spelling import as_options
from optimum_sab.errors import ConfigError, warn
from optimum_sab.hf.devices import check_device_map
from optimum_sab.hf.load import auto_class, model_config, reads_pictures
from optimum_sab.hf.plan import Plan, PlannedModel, make_plan
from optimum_sab.hf.processor import find_processor
from optimum_sab.hf.progress import READING_DELAY, shown_progress
from optimum_sab.hf.stored_files import StoredFile, local_files, read_headers
from optimum_sab.hf.streaming import check_stored, check_streaming
from optimum_sab.json_values import json_line
from optimum_sab.report.words import seconds_in_words
from optimum_sab.wording import counted

A_WHILE = 120  # seconds, from which on they are told in larger units too
_FIT = {
    Fit.UNKNOWN: "whether it fits is not known: what is free there cannot be asked",
    Fit.FITS: "fits",
    Fit.TIGHT: "tight: weights will be read again and again",
    Fit.NOT: "does not fit in what is free",
}


def run(options: argparse.Namespace) -> None:
    """Print the plan, then what `quantize` will warn of; what it refuses by name is refused the same way."""
    hush_libraries(options)
    config = read_settings(options)
    check_device_map(options.device_map, here=False)
    folder = Path(options.model, options.subfolder or "")
    files = local_files(folder)
    headers = read_headers(files)
    if config.stream_weights:
        check_streaming({}, options.device_map)
        check_stored(files or sorted(map(str, folder.glob("*.bin"))))
    origin = read_origin(options.model, options)
    source = model_config(options.model, **origin.arguments)
    if getattr(source, "quantization_config", None) is not None:
        raise ConfigError(f"{options.model!r} is quantized already; start from the dense checkpoint.")
    processor = find_processor(options.processor, origin, reads_pictures(source))
    dtype = _own_dtype(source, headers) if options.dtype == "auto" else getattr(torch, options.dtype)
    model = PlannedModel(auto_class(source), source, dtype, files or None, options.device_map)
    with shown_progress("none" if options.json or options.quiet else "lines") as progress:
        on_read = progress.steps("Reading samples", "sample", READING_DELAY)
        plan = make_plan(model, config, processor, options.timing, on_read)
    refusal = _refusal(plan)
    if options.json:
        print(json_line(as_json(options.model, plan, refusal)))
        return
    if not options.quiet:
        print("\n".join(_lines(options.model, plan, refusal)), flush=True)
    for message in plan.warnings:
        warn(message)


def as_json(model: str, plan: Plan, refusal: str | None) -> dict[str, Any]:
    """The plan as one JSON-ready object; sizes are bytes."""
    work = plan.work
    return {
        "model": model,
        "binarized": {
            "linears": plan.linears,
            "share_of_decoder": plan.share,
            "bits_per_weight": plan.bits_per_weight,
            "dense": dict(plan.dense),
        },
        "output_bytes": plan.output,
        "calibration": {
            "samples": len(work.samples.tokens),
            "tokens": work.samples.total,
            "exact": work.samples.exact,
            "from": plan.tokens_from,
        },
        "memory": [
            {
                "device": each.device,
                "peak_bytes": each.peak.bytes,
                "peak_in": each.peak.name,
                "certain_bytes": each.certain.certain,
                "total_bytes": plan.rooms[each.device].total,
                "held_bytes": plan.held if each.device == MACHINE else 0,
                "free_bytes": plan.rooms[each.device].free,
                "mapped_bytes": each.peak.mapped,
                "fit": plan.fits[each.device].value,
                "phases": [
                    {"name": phase.name, "bytes": phase.bytes, "parts": [asdict(part) for part in phase.parts]}
                    for phase in each.phases
                ],
            }
            for each in plan.memory
        ],
        "disk": [asdict(each) for each in plan.disks],
        "reads": {
            "passes": [asdict(each) for each in plan.reads],
            "bytes": sum(each.times for each in plan.reads) * work.model.block_bytes,
        },
        "measured": None if plan.speeds is None else asdict(plan.speeds),
        "stages": [asdict(each) for each in plan.times],
        "seconds": plan.seconds if plan.times else None,
        "refused": refusal,
        "warnings": list(plan.warnings),
    }


def _own_dtype(source: Any, headers: Sequence[StoredFile]) -> torch.dtype:
    """Of a checkpoint: as its config has it, else as it is stored."""
    stored = (tensor.dtype_name for file in headers for tensor in file.tensors.values() if tensor.is_floating)
    named = getattr(source, "dtype", None) or next(stored, "float32")
    found = getattr(torch, named) if isinstance(named, str) else named
    assert isinstance(found, torch.dtype)
    return found


def _refusal(plan: Plan) -> str | None:
    """What `quantize` would refuse it with."""
    try:
        refuse_what_cannot_fit(plan.work, plan.rooms, plan.disks)
    except ConfigError as error:
        return str(error)
    return None


def _lines(name: str, plan: Plan, refusal: str | None) -> Iterator[str]:
    work = plan.work
    yield f"{name}: a plan; no weight was read"
    yield "\nBinarized (arithmetic)"
    yield f"  {counted(plan.linears, 'linear')}, {plan.share:.2%} of the weights in the decoder blocks"
    yield f"  {plan.bits_per_weight:.3f} bits per weight, {plan.output / 1e6:,.1f} MB in all"
    for why, count in sorted(plan.dense.items(), key=lambda each: -each[1]):
        yield f"  dense: {count / 1e6:,.2f} million in {why}"
    bound = "" if work.samples.exact else "at most "
    yield "\nCalibration"
    samples, tokens = counted(len(work.samples.tokens), "sample"), counted(work.samples.total, "token")
    yield f"  {samples}, {bound}{tokens} ({plan.tokens_from})"
    for memory in plan.memory:
        room, peak = plan.rooms[memory.device], memory.peak
        yield f"\nMemory: {memory.device} (arithmetic; the process as measured here)"
        for part in sorted(peak.parts, key=lambda each: -each.bytes):
            yield f"  {part.bytes / 1e9:>9.3f} GB  {part.name}"
        held = plan.held if memory.device == MACHINE else 0
        coming = f"; of that {(peak.bytes - held) / 1e9:.3f} GB are still to come" if held else ""
        free = "" if room.free is None else f", and {room.free / 1e9:.3f} GB are free"
        yield f"  {peak.bytes / 1e9:>9.3f} GB  at the peak, in the stage {peak.name!r}{coming}{free}"
        if peak.mapped:
            yield f"  {peak.mapped / 1e9:>9.3f} GB  of that, weights mapped from files: the system can let go of them"
        yield f"  {_FIT[plan.fits[memory.device]]}"
        others = ", ".join(f"{phase.name} {phase.bytes / 1e9:.3f}" for phase in memory.phases if phase is not peak)
        yield f"  other stages, GB: {others}" if others else "  no other stage takes memory there"
    yield "\nDisk (arithmetic)"
    yield f"  {plan.output / 1e9:>9.3f} GB  the packed checkpoint"
    for disk in plan.disks:
        yield f"  {disk.bytes / 1e9:>9.3f} GB  {disk.name}, in {disk.folder!r}; {disk.free / 1e9:.1f} GB are free"
    if plan.reads:
        times = sum(each.times for each in plan.reads)
        yield "\nReads of the decoder blocks (arithmetic)"
        yield f"  {counted(times, 'pass', 'passes')}, {times * work.model.block_bytes / 1e9:,.2f} GB:"
        yield "  " + ", ".join(f"{each.name} {each.times}" for each in plan.reads)
    if plan.speeds is None:
        yield "\nTime: not measured"
    else:
        yield from _time_lines(plan)
    if refusal is not None:
        yield f"\nRefused by quantize: {as_options(refusal)}"


def _time_lines(plan: Plan) -> Iterator[str]:
    speeds = plan.speeds
    assert speeds is not None
    out, n = speeds.shape
    shapes = ", ".join(str(list(each)) for each in dict.fromkeys(speeds.dense_shapes))
    yield "\nTime (operation counts, over what was measured here; reading from disk is not in it)"
    for each in plan.times:
        yield f"  {each.seconds:>9.1f} s   {each.name}"
    whole = "" if plan.seconds < A_WHILE else f", {seconds_in_words(plan.seconds)}"
    yield f"  {plan.seconds:>9.1f} s   in all{whole}"
    dtype = str(plan.work.model.dtype).removeprefix("torch.")
    yield (
        f"  measured in {speeds.seconds:.1f} s on {speeds.device}: products with {shapes} in "
        f"{dtype} {speeds.forward / 1e9:.1f} GFLOP/s, second moments of {n} features "
        f"in float32 {speeds.moments / 1e9:.1f}, their Cholesky factors and inverse "
        f"{speeds.factorization / 1e9:.1f}; one solve of [{out}, {n}], extrapolated part by part"
    )
