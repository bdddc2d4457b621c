"""`optimum-sab quantize MODEL --output DIR`."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from optimum_sab.cli.settings import add_settings, check_calibration_file, read_settings
from optimum_sab.errors import ConfigError
from optimum_sab.hf.checkpoint import local_files, stored_tensors
from optimum_sab.hf.devices import check_device_map
from optimum_sab.hf.estimate import expected_bytes
from optimum_sab.hf.load import auto_class, reads_pictures
from optimum_sab.hf.output.place import OutputPlace, check_output, check_size
from optimum_sab.hf.output.saving import save_packed
from optimum_sab.hf.processor import find_processor

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_command(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("quantize", help="binarize a checkpoint and save it packed")
    parser.add_argument("model", help="checkpoint folder or Hub repository")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the packed checkpoint goes")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in the output; other files stay")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of everything that stays dense")
    parser.add_argument("--device-map", metavar="MAP", help="as in from_pretrained: cpu, auto, cuda:0")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Quantize and save; whatever can be seen to fail is refused before a weight is read."""
    config = read_settings(options, progress="lines")
    check_device_map(options.device_map)
    check_calibration_file(config.calibration)
    started = time.perf_counter()
    factory = auto_class(options.model)
    stored_tensors(local_files(options.model))  # a truncated file is seen by its header
    where = check_output(options.output, options.overwrite, sources=(options.model,))
    check_resume_folder(config.resume_folder, where)
    source = AutoConfig.from_pretrained(options.model)
    if getattr(source, "quantization_config", None) is not None:
        raise ConfigError(f"{options.model!r} is quantized already; start from the dense checkpoint.")
    processor = find_processor(None, options.model, reads_pictures(source))
    config.processor = processor
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    check_size(where, expected_bytes(factory, source, config, dtype))
    model = factory.from_pretrained(
        options.model, dtype=dtype, quantization_config=config, device_map=options.device_map
    )
    save_packed(model, processor, where)
    report = model.hf_quantizer.report
    summary = {
        "output": str(options.output),
        "bits_per_weight": report.bits_per_weight,
        "bytes": sum(p.stat().st_size for p in options.output.glob("*.safetensors")),
        "calibration_tokens": report.tokens,
        "agreement": {kind: {"kl": each.kl, "top1": each.top1} for kind, each in report.agreement.items()},
        "seconds": time.perf_counter() - started,
        "blocks": [{"index": b.index, "error": b.error, "drift": b.drift, "seconds": b.seconds} for b in report.blocks],
    }
    if options.json:
        print(json.dumps(summary))
    else:
        print(
            f"{options.output}: {summary['bits_per_weight']:.3f} bits per weight in the binarized linears, "
            f"{summary['bytes'] / 1e6:.1f} MB in all, {summary['seconds']:.0f} s"
        )
        for kind, each in report.agreement.items():
            print(f"against the dense model, on {kind} that did not calibrate it: {each}")


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
