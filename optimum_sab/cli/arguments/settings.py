"""`SABConfig` settings as command-line options: one option per setting, under its name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optimum_sab.core.code import CODES, NO_CODE
from optimum_sab.core.settings import FEEDBACK, ROW_SCALE, SIGNIFICANCE
from optimum_sab.data.named_source import named_source
from optimum_sab.errors import ConfigError
from optimum_sab.presets import ALLOCATION, BUILTIN, EXPERT_TOKENS, PRESETS, SELF, check_values, preset_settings


@dataclass(frozen=True)
class Setting:
    """How a setting is given.

    Args:
        help: what it does.
        metavar: what is to be given.
        type: what makes a value of it.
        choices: what it may be.
        unset: what is done where a preset says nothing.
    """

    help: str
    metavar: str = "N"
    type: type = int
    choices: tuple[str, ...] | None = None
    unset: str = ""


SETTINGS = {
    "block_size": Setting("input columns per block"),
    "base_planes": Setting("sign planes on every column"),
    "residual_planes": Setting("further sign planes on the salient columns"),
    "salient_fraction": Setting("share of the columns that carry the residual planes", "SHARE", float),
    "iterations": Setting("rounds of the alternating fit"),
    "significance": Setting("error weight of the fit", choices=SIGNIFICANCE),
    "feedback": Setting("how errors are passed on", choices=FEEDBACK),
    "refit": Setting("joint refit of the row scales", type=bool),
    "sweeps": Setting("rounds of sign descent after the refit"),
    "row_scale": Setting("storage of the row scales", choices=ROW_SCALE),
    "damping": Setting("share of the Hessian's mean diagonal added to it", "SHARE", float),
    "propagation": Setting("strength of the propagated target, 0 to 1", "ALPHA", float, unset="cross-validated"),
    "code": Setting(
        "trellis code of the first base plane: four levels from one stored bit; x2 is for two base planes",
        choices=(NO_CODE, *CODES),
    ),
    "allocation": Setting("where planes go: by what errors cost there, or the same everywhere", choices=ALLOCATION),
    "target_bits": Setting("stored bits per weight at most", "BITS", float, unset="what the planes above take"),
    "calibration": Setting(
        "'builtin', 'self' (the model writes it), a .jsonl, .ndjson, .json or .parquet file, or a dataset "
        "owner/name[:split]",
        "DATA",
        str,
        unset="builtin",
    ),
    "calibration_samples": Setting("how many samples to use at most"),
    "builtin_samples": Setting("of these, how many of the built-in set are mixed into data of your own"),
    "sequence_length": Setting("calibration texts are cut to this many tokens", "TOKENS"),
    "seed": Setting("of the built-in set and of a dataset's order"),
    "calibration_pass": Setting("a registered calibration pass", "NAME", str),
    "expert_tokens": Setting("what fused experts are calibrated on", choices=EXPERT_TOKENS),
    "calibration_device": Setting("where blocks are worked on, e.g. cuda", "DEVICE", str, unset="where they are"),
    "refine": Setting("train scales, norms and biases after solving", type=bool),
    "refine_epochs": Setting("rounds over the samples per block"),
    "refine_steps": Setting("steps of the tuning of the whole model"),
    "temperature_scaling": Setting("make the predictions as sure as the dense model's are", type=bool),
    "examples": Setting("let the model write to a few prompts before and after, for the report", type=bool),
    "evaluation": Setting(
        "samples of your own, not those of --calibration, on which the result is compared with the dense model",
        "DATA",
        str,
        unset="the package's alone",
    ),
    "stream_weights": Setting("leave dense weights in their files and read one decoder block at a time", type=bool),
    "activation_memory": Setting(
        "of samples that wait; what is beyond lies in memory-mapped files", "GIB", float, unset="no bound"
    ),
    "resume_folder": Setting("keeps what is finished, for a run that is interrupted", "DIR", str, unset="none"),
    "ignore_plan": Setting("begin although the plan says that it cannot fit", type=bool),
    "backend": Setting(
        "what computes with the packed layers: auto, triton, cpu or reference", "NAME", str, unset="auto"
    ),
}


def add_settings(parser: argparse.ArgumentParser, arguments: Sequence[str] = ()) -> None:
    """Add ``--preset`` and one option per setting; an option that is not given leaves the preset's value.

    Args:
        parser: of the command.
        arguments: what will be parsed; the help shows the defaults of the preset that is named there.
    """
    presets = "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())
    parser.add_argument(
        "--preset", choices=PRESETS, default="default", help=f"settings to start from (default). {presets}"
    )
    group = parser.add_argument_group("settings")
    shown = _preset(arguments)
    defaults = preset_settings(shown)
    for name, setting in SETTINGS.items():
        flag = "--" + name.replace("_", "-")
        default = defaults[name]
        value = ("off", "on")[default] if isinstance(default, bool) else setting.unset if default is None else default
        words = f"{setting.help} ({shown}: {value})"
        options: dict[str, Any] = {"default": None, "dest": name, "help": words}
        if setting.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif setting.choices is not None:
            group.add_argument(flag, choices=setting.choices, **options)
        else:
            group.add_argument(flag, type=setting.type, metavar=setting.metavar, **options)
    group.add_argument(
        "--modules-to-not-convert",
        "--keep-dense",
        action="append",
        default=[],
        metavar="RULE",
        help="module rule to leave dense; may be repeated",
    )
    group.add_argument(
        "--dynamic", metavar="JSON", help='overrides per module, e.g. \'{"down_proj": {"base_planes": 2}}\''
    )


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that options of `add_settings` give beside the preset's, setting → value.

    Raises:
        ConfigError: ``--dynamic`` is not a JSON object of objects.
    """
    given = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    if options.modules_to_not_convert:
        given["modules_to_not_convert"] = options.modules_to_not_convert
    if options.dynamic:
        try:
            given["dynamic"] = json.loads(options.dynamic)
        except json.JSONDecodeError as error:
            raise ConfigError(f"--dynamic {options.dynamic!r} is not JSON: {error}.") from error
        if not isinstance(given["dynamic"], dict) or not all(isinstance(v, dict) for v in given["dynamic"].values()):
            raise ConfigError(f"--dynamic {options.dynamic!r} must be an object of objects: rule to settings.")
    return given


def check_settings(options: argparse.Namespace) -> None:
    """Refuse values of settings before torch is imported.

    Raises:
        ConfigError: see `check_values` and `given_settings`.
        SampleError: see `check_calibration`.
    """
    check_values({**preset_settings(options.preset), **given_settings(options)})
    check_calibration(options.calibration)
    check_calibration(options.evaluation)


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


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add what ``from_pretrained`` takes to reach a checkpoint: model, configuration and processor are read with it."""
    group = parser.add_argument_group("where the checkpoint is, as in from_pretrained")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub repository")
    group.add_argument("--subfolder", metavar="NAME", help="folder in the repository")
    group.add_argument("--cache-dir", metavar="DIR", help="where downloads are kept")
    group.add_argument("--token", metavar="TOKEN", help="of the Hub; better given as HF_TOKEN, which others cannot see")
    group.add_argument("--local-files-only", action="store_true", help="download nothing")
    group.add_argument("--force-download", action="store_true", help="download again what is there")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that the checkpoint brings")


def _preset(arguments: Sequence[str]) -> str:
    """The preset that is named in arguments which are not parsed yet."""
    found = "default"
    for index, argument in enumerate(arguments):
        if argument == "--preset" and index + 1 < len(arguments):
            found = arguments[index + 1]
        elif argument.startswith("--preset="):
            found = argument.partition("=")[2]
    return found if found in PRESETS else "default"
