"""Settings to start from, and what every setting is when nothing is said: known without torch.

`SABConfig` takes its defaults from here, and the command line shows them before anything is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from optimum_sab.core.bounds import check_integer, shown
from optimum_sab.core.code import TRELLIS16
from optimum_sab.core.refinement import RefineSettings
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError
from optimum_sab.wording import did_you_mean

BUILTIN, SELF = "builtin", "self"  # calibration data that is no file and no dataset
MOST_BUILTIN = 50_000  # samples of the built-in set; with pictures they take 8 GB
ALLOCATION = ("sensitivity", "uniform")
MOST_SAMPLES = 1_000_000_000
MOST_TOKENS = 2**24  # of a text; the longest context of a model is ten millions
MOST_SEED = 2**64 - 1  # of torch's generators
EXPERT_TOKENS = ("routed", "all")
BACKENDS = ("triton", "cpu", "reference")  # `optimum_sab.ops.backends` chooses among them


@dataclass(frozen=True)
class RunSettings:
    """What a run is asked besides the settings of a layer; `optimum_sab.SABConfig` says what each means.

    Raises:
        ConfigError: a value is out of range, or two do not go together; the message names them and the remedy.
    """

    allocation: str = "sensitivity"
    target_bits: float | None = None
    calibration: Any = None
    calibration_samples: int = 512
    builtin_samples: int = 0
    sequence_length: int = 256
    seed: int = 0
    calibration_pass: str = "hessian"
    expert_tokens: str = "routed"
    calibration_device: str | None = None
    refine: bool = False
    refine_epochs: int = RefineSettings.epochs
    refine_steps: int = RefineSettings.steps
    temperature_scaling: bool = True
    examples: bool = True
    evaluation: Any = None
    stream_weights: bool = False
    activation_memory: float | None = None
    resume_folder: str | None = None
    ignore_plan: bool = False
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.allocation not in ALLOCATION:
            raise ConfigError(f"allocation={self.allocation!r} must be one of {', '.join(ALLOCATION)}.")
        bits = self.target_bits
        if bits is not None and (isinstance(bits, bool) or not isinstance(bits, (int, float)) or not 1.0 < bits <= 8.0):
            raise ConfigError(
                f"target_bits={shown(bits)} must be a number above 1 and at most 8, such as 1.3 or 2.25; left "
                "out, base_planes, residual_planes and salient_fraction decide."
            )
        if bits is not None and self.allocation == "uniform":
            raise ConfigError(
                f"target_bits={bits!r} needs allocation='sensitivity'; with 'uniform' the planes decide the bits."
            )
        if self.expert_tokens not in EXPERT_TOKENS:
            raise ConfigError(
                f"expert_tokens={self.expert_tokens!r} must be one of {', '.join(EXPERT_TOKENS)}: the tokens that "
                "experts are calibrated on."
            )
        check_integer("calibration_samples", self.calibration_samples, 1, MOST_SAMPLES)
        self._check_mixture()
        self._check_evaluation()
        check_integer("sequence_length", self.sequence_length, 1, MOST_TOKENS)
        check_integer("seed", self.seed, 0, MOST_SEED)
        for name in ("refine", "temperature_scaling", "examples", "stream_weights", "ignore_plan"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be true or false.")
        RefineSettings(self.refine_epochs, self.refine_steps)
        room = self.activation_memory
        if room is not None and (isinstance(room, bool) or not isinstance(room, (int, float)) or not 0 <= room < 2**20):
            raise ConfigError(f"activation_memory={shown(room)} must be a number of GiB from 0 on; None sets no bound.")
        if self.resume_folder is not None and not isinstance(self.resume_folder, (str, os.PathLike)):
            raise ConfigError(f"resume_folder={self.resume_folder!r} must be the path of a folder.")
        if self.backend not in (None, "auto", *BACKENDS):
            raise ConfigError(f"backend={self.backend!r} is no backend; use one of auto, {', '.join(BACKENDS)}.")

    def _check_evaluation(self) -> None:
        given = self.evaluation
        named = isinstance(given, (str, os.PathLike))
        if named and given in (BUILTIN, SELF):
            raise ConfigError(
                f"evaluation={given!r} is no data of your own; the finished model is compared on samples of the "
                "package's as it is. Give a file, a dataset or samples, or leave evaluation out."
            )
        if given is not None and (given is self.calibration or (named and given == self.calibration)):
            raise ConfigError(
                "evaluation and calibration are the same data; give samples there that do not calibrate, since every "
                "model looks better on those that do than it is."
            )

    def _check_mixture(self) -> None:
        check_integer("builtin_samples", self.builtin_samples, 0, MOST_BUILTIN)
        named = self.calibration
        if self.builtin_samples and (named is None or (isinstance(named, str) and named in (BUILTIN, SELF))):
            raise ConfigError(
                f"builtin_samples={self.builtin_samples} are mixed into data of your own, and calibration is "
                f"{(named or BUILTIN)!r}; give a file, a dataset or samples there, or leave builtin_samples out."
            )
        if self.builtin_samples >= self.calibration_samples:
            raise ConfigError(
                f"builtin_samples={self.builtin_samples} leave none of calibration_samples={self.calibration_samples} "
                "to your own; calibration_samples counts both."
            )


@dataclass(frozen=True)
class Preset:
    """Changes to the defaults, by a name.

    Args:
        summary: what it is for, in a few words.
        changes: setting → value.
    """

    summary: str
    changes: Mapping[str, Any]


PRESETS: Mapping[str, Preset] = {
    "default": Preset("1.22 bits at 7B shapes", {}),
    "light": Preset("the default's bits in less time", {"calibration_samples": 64, "sweeps": 0, "iterations": 4}),
    "best": Preset(
        "the default's bits, coded and trained, in several times the time; wants many samples",
        {"code": TRELLIS16.name, "refine": True, "refine_epochs": 2, "refine_steps": 60},
    ),
    "two-bit": Preset(
        "2.18 bits at 7B shapes, near the dense model",  # sweeps pay at two bits and not at one (docs/benchmarks.md)
        {"base_planes": 2, "salient_fraction": 0.125, "sweeps": 4},
    ),
    "paper": Preset(
        "SAB-LVLM as published: the baseline, not the recommendation",
        {
            "block_size": 128,
            "base_planes": 2,
            "residual_planes": 1,
            "salient_fraction": 0.125,
            "iterations": 15,
            "significance": "modality",
            "feedback": "block",
            "refit": False,
            "sweeps": 0,
            "row_scale": "fp16",
            "damping": 0.01,
            "propagation": 0.0,
            "allocation": "uniform",
            "temperature_scaling": False,
        },
    ),
}


def preset_settings(name: str) -> dict[str, Any]:
    """Every setting of a preset, setting → value.

    Raises:
        ConfigError: there is no such preset.
    """
    return {**asdict(LayerSettings()), **asdict(RunSettings()), **find_preset(name).changes}


def check_values(settings: Mapping[str, Any]) -> None:
    """Refuse what no model and no machine is needed for to see that it cannot be used.

    Args:
        settings: every setting of `preset_settings`, and the ``dynamic`` rules where there are any.

    Raises:
        ConfigError: a value is out of range, or two do not go together; the message names them and the remedy.
    """
    layer = LayerSettings(**{each.name: settings[each.name] for each in fields(LayerSettings)})
    for changes in {repr(own): own for own in settings.get("dynamic", {}).values()}.values():  # many say the same
        layer.replace(**changes)
    RunSettings(**{each.name: settings[each.name] for each in fields(RunSettings)})


def find_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        hint = did_you_mean(name, PRESETS)
        raise ConfigError(f"preset {name!r} is unknown; use one of {', '.join(PRESETS)}{hint}")
    return PRESETS[name]
