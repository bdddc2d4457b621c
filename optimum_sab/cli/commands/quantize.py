"""`optimum-sab quantize MODEL --output DIR`."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from optimum_sab.calibration.joining import joined
from optimum_sab.calibration.ranks import Ranks
from optimum_sab.cli.commands.settings import hush_libraries, read_origin, read_settings
from optimum_sab.cli.spelling import as_options
from optimum_sab.errors import ConfigError
from optimum_sab.hf.devices import check_device_map
from optimum_sab.hf.estimate import expected_bytes
from optimum_sab.hf.hub.push import check_push, push_folder
from optimum_sab.hf.hub.remote_code import add_remote_code, check_remote_code
from optimum_sab.hf.load import auto_class, model_config, reads_pictures
from optimum_sab.hf.output.place import OutputPlace, check_output, check_size
from optimum_sab.hf.output.saving import save_packed
from optimum_sab.hf.processor import find_processor
from optimum_sab.hf.stored_files import local_files, read_headers
from optimum_sab.json_values import json_line
from optimum_sab.nn.scratch import staying_shared
from optimum_sab.report.files import REPORT_HTML, REPORT_JSON


def run(options: argparse.Namespace) -> None:
    """Quantize and save; whatever can be seen to fail is refused before a weight is read.

    Of several processes the first writes and prints.
    """
    with joined() as ranks:
        options.silent = not ranks.first
        options.quiet = options.quiet or options.silent
        _run(options, ranks)


def _run(options: argparse.Namespace, ranks: Ranks) -> None:
    hush_libraries(options)
    config = read_settings(options)
    check_device_map(options.device_map)
    started = time.perf_counter()
    read_headers(local_files(Path(options.model)))  # a truncated file is seen by its header
    where = None
    if ranks.first:
        where = check_output(options.output, options.overwrite, sources=read_from(options))
        check_resume_folder(config.resume_folder, where)
    origin = read_origin(options.model, options)
    source = model_config(options.model, **origin.arguments)
    if getattr(source, "quantization_config", None) is not None:
        raise ConfigError(f"{options.model!r} is quantized already; start from the dense checkpoint.")
    if options.remote_code:
        check_remote_code(source)
    processor = find_processor(options.processor, origin, reads_pictures(source))
    config.processor = processor
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    factory = auto_class(source)
    if where is not None:
        check_size(where, expected_bytes(factory, source, config, dtype))
    target = None
    if options.push_to_hub is not None and ranks.first:  # last, since it may make a repository
        target = check_push(options.push_to_hub, options.private, options.token, sources=[options.model])
    with staying_shared():  # pages of a streamed model's files are given back while it is saved
        model = factory.from_pretrained(
            options.model, dtype=dtype, quantization_config=config, device_map=options.device_map, **origin.arguments
        )
        if options.remote_code:
            add_remote_code(model)
        if where is not None:
            save_packed(model, processor, where)
    ranks.exchange("saving", None)  # all end together
    if where is None:
        return
    commit = None if target is None else push_folder(where.folder, target)
    report = model.hf_quantizer.report
    summary = {
        "output": str(options.output),
        "bits_per_weight": report.bits_per_weight,
        "bytes": sum(p.stat().st_size for p in options.output.glob("*.safetensors")),
        "calibration_tokens": report.tokens,
        "verdict": {"level": report.verdict.level, "words": report.verdict.words},
        "agreement": {kind: {"kl": each.kl, "top1": each.top1} for kind, each in report.agreement.items()},
        "seconds": time.perf_counter() - started,
        "blocks": [{"index": b.index, "error": b.error, "drift": b.drift, "seconds": b.seconds} for b in report.blocks],
    }
    if target is not None:
        summary |= {"repository": target.repo_id, "commit": commit}
    if options.json:
        print(json_line(summary))
    elif not options.quiet:
        print(
            f"{options.output}: {summary['bits_per_weight']:.3f} bits per weight in the binarized linears, "
            f"{summary['bytes'] / 1e6:.1f} MB in all, {summary['seconds']:.0f} s"
        )
        for kind, each in report.agreement.items():
            print(f"against the dense model, on {kind} that did not calibrate it: {each}")
        page = options.output / REPORT_HTML
        shown = page if page.exists() else options.output / REPORT_JSON
        verdict = report.verdict
        decided = f", judged on {verdict.kind}" if verdict.kind else ""
        print(f"verdict: {verdict.words}{decided}. {as_options(verdict.advice)} See {shown}")
        if target is not None:
            print(f"uploaded: {target.url}")


def read_from(options: argparse.Namespace) -> list[str]:
    """What the run reads, as far as it may lie in a folder of this machine."""
    further = (options.processor, options.calibration, options.evaluation)
    return [options.model, *(each for each in further if each is not None and Path(each).exists())]


def check_resume_folder(folder: str | Path | None, where: OutputPlace) -> None:
    """Refuse a resume folder in the output's place, which it would fill before the checkpoint comes, or nowhere.

    Raises:
        ConfigError: it is the output, lies in it, or cannot be written to.
    """
    if folder is None:
        return
    resolved = Path(folder).resolve()
    if where.folder in (resolved, *resolved.parents):
        raise ConfigError(f"--resume-folder {str(folder)!r} lies in the output {where.named!r}; name one elsewhere.")
    try:
        resolved.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=resolved):
            pass
    except OSError as error:
        raise ConfigError(
            f"--resume-folder {str(folder)!r} cannot be written to ({error.strerror}); name another."
        ) from error
