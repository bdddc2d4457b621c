"""What the options of settings ask for."""

from __future__ import annotations

import argparse
import json
import sys

from optimum_sab.calibration.samples.named_source import BUILTIN, SELF, named_source
from optimum_sab.cli.arguments.settings import SETTINGS
from optimum_sab.errors import ConfigError
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.origin import ACCESS, PLACE, Origin


def read_origin(model: str, options: argparse.Namespace) -> Origin:
    """What `add_source` has read, of a checkpoint."""
    return Origin.of(model, {name: getattr(options, name, None) for name in (*PLACE, *ACCESS)})


def read_settings(options: argparse.Namespace) -> SABConfig:
    """The `SABConfig` these options ask for.

    Raises:
        ConfigError: a value is out of range, or ``--dynamic`` is not a JSON object.
    """
    given = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    if options.dynamic:
        try:
            given["dynamic"] = json.loads(options.dynamic)
        except json.JSONDecodeError as error:
            raise ConfigError(f"--dynamic {options.dynamic!r} is not JSON: {error}.") from error
        if not isinstance(given["dynamic"], dict) or not all(isinstance(v, dict) for v in given["dynamic"].values()):
            raise ConfigError(f"--dynamic {options.dynamic!r} must be an object of objects: rule to settings.")
    progress = "none" if options.quiet else "lines"
    rules = options.modules_to_not_convert
    return SABConfig.preset(options.preset, **given, modules_to_not_convert=rules, progress=progress)


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


def hush_libraries(options: argparse.Namespace) -> None:
    """Turn off other packages' bars where nobody watches them move: with ``--quiet``, or in a file or a pipe."""
    if options.quiet or not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging

        disable_progress_bars()
        logging.disable_progress_bar()
