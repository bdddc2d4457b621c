"""What the options of settings ask for."""

from __future__ import annotations

import argparse
import sys

from optimum_sab.cli.arguments.settings import given_settings
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
    progress = "none" if options.quiet else "lines"
    return SABConfig.preset(options.preset, **given_settings(options), progress=progress)


def hush_libraries(options: argparse.Namespace) -> None:
    """Turn off other packages' bars where nobody watches them move: with ``--quiet``, or in a file or a pipe."""
    if options.quiet or not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging

        disable_progress_bars()
        logging.disable_progress_bar()
