"""`SABConfig` settings as command-line options: one option per setting, names and defaults taken from the class."""

from __future__ import annotations

import argparse
import inspect
import json
from typing import Any

from optimum_sab.calibration.samples.named_source import BUILTIN, SELF, named_source
from optimum_sab.core.settings import FEEDBACK, ROW_SCALE, SIGNIFICANCE
from optimum_sab.errors import ConfigError
from optimum_sab.hf.config import ALLOCATION, SABConfig
from optimum_sab.hf.origin import ACCESS, PLACE, Origin
from optimum_sab.hf.presets import PRESETS

_CHOICES = {"significance": SIGNIFICANCE, "feedback": FEEDBACK, "row_scale": ROW_SCALE, "allocation": ALLOCATION}
_TYPES = {"target_bits": float, "propagation": float}
_HELP = {
    "block_size": "input columns per block",
    "base_planes": "sign planes on every column",
    "residual_planes": "further sign planes on the salient columns",
    "salient_fraction": "share of the columns that carry the residual planes",
    "iterations": "rounds of the alternating fit",
    "significance": "error weight of the fit",
    "feedback": "how errors are passed on",
    "refit": "joint refit of the row scales",
    "sweeps": "rounds of sign descent after the refit",
    "row_scale": "storage of the row scales",
    "damping": "share of the Hessian's mean diagonal added to it",
    "propagation": "strength of the propagated target, 0 to 1; cross-validated when not given",
    "allocation": "where planes go: by what errors cost there, or the same everywhere",
    "target_bits": "stored bits per weight at most, instead of what the planes above would take everywhere",
    "calibration": "'builtin', 'self' (the model writes it), a .jsonl file, or a Hub dataset as owner/name[:split]",
    "calibration_samples": "how many samples to use at most",
    "sequence_length": "calibration texts are cut to this many tokens",
    "seed": "seed of the built-in set and of a dataset's order",
    "calibration_pass": "a registered calibration pass",
    "calibration_device": "device on which blocks are worked on, e.g. cuda",
    "refine": "train scales, norms and biases after solving",
    "refine_epochs": "rounds over the samples per block",
    "refine_steps": "steps of the tuning of the whole model",
    "temperature_scaling": "make the predictions as sure as the dense model's are",
    "resume_folder": "keeps what is finished, for a run that is interrupted",
}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add ``--preset`` and one option per setting; an option that is not given leaves the preset's value."""
    parser.add_argument("--preset", choices=PRESETS, default="default", help="settings to start from")
    group = parser.add_argument_group("settings")
    defaults = inspect.signature(SABConfig.__init__).parameters
    for name, text in _HELP.items():
        default = defaults[name].default
        flag = "--" + name.replace("_", "-")
        options: dict[str, Any] = {"default": None, "help": f"{text} (default: {default})", "dest": name}
        if isinstance(default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            options["type"] = _TYPES.get(name, str) if default is None else type(default)
            group.add_argument(flag, choices=_CHOICES.get(name), metavar=None if name in _CHOICES else "X", **options)
    group.add_argument(
        "--keep-dense", action="append", default=[], metavar="RULE", help="module rule to leave dense; may be repeated"
    )
    group.add_argument(
        "--dynamic", metavar="JSON", help='overrides per module, e.g. \'{"down_proj": {"base_planes": 2}}\''
    )


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add what ``from_pretrained`` takes to reach a checkpoint: model, configuration and processor are read with it."""
    group = parser.add_argument_group("where the checkpoint is, as in from_pretrained")
    group.add_argument("--revision", metavar="X", help="branch, tag or commit of a Hub repository")
    group.add_argument("--subfolder", metavar="X", help="folder in the repository")
    group.add_argument("--cache-dir", metavar="DIR", help="where downloads are kept")
    group.add_argument("--token", metavar="X", help="of the Hub; better given as HF_TOKEN, which others cannot see")
    group.add_argument("--local-files-only", action="store_true", help="download nothing")
    group.add_argument("--force-download", action="store_true", help="download again what is there")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that the checkpoint brings")


def read_origin(model: str, options: argparse.Namespace) -> Origin:
    """What `add_source` has read, of a checkpoint."""
    return Origin.of(model, {name: getattr(options, name, None) for name in (*PLACE, *ACCESS)})


def read_settings(options: argparse.Namespace, progress: str) -> SABConfig:
    """The `SABConfig` these options ask for.

    Raises:
        ConfigError: a value is out of range, or ``--dynamic`` is not a JSON object.
    """
    given = {name: getattr(options, name) for name in _HELP if getattr(options, name) is not None}
    if options.dynamic:
        try:
            given["dynamic"] = json.loads(options.dynamic)
        except json.JSONDecodeError as error:
            raise ConfigError(f"--dynamic {options.dynamic!r} is not JSON: {error}.") from error
        if not isinstance(given["dynamic"], dict) or not all(isinstance(v, dict) for v in given["dynamic"].values()):
            raise ConfigError(f"--dynamic {options.dynamic!r} must be an object of objects: rule to settings.")
    return PRESETS[options.preset](**given, modules_to_not_convert=options.keep_dense, progress=progress)


def check_calibration(calibration: str | None, *words: str) -> None:
    """Refuse a file of samples that is not there, and what names no data at all.

    Args:
        calibration: as on the command line.
        words: what may be given besides a file, a dataset, "builtin" and "self".

    Raises:
        SampleError: see `named_source`.
    """
    if calibration is not None and calibration not in (BUILTIN, SELF, *words):
        named_source(calibration)
