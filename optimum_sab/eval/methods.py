"""What `eval quality` compares: our presets through `from_pretrained`, and the baselines through the same lockstep."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from optimum_sab.errors import ConfigError
from optimum_sab.eval import weightings as weightings  # registers calibration passes to compare with
from optimum_sab.eval.baselines import BASELINES, Baseline
from optimum_sab.hf.config import SABConfig
from optimum_sab.presets import PRESETS
from optimum_sab.wording import did_you_mean

DENSE = "dense"


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Attributes:
        name: as it was asked for.
        family: the line of the picture it belongs to.
        settings: of `SABConfig`, for ours; None for a baseline.
        preset: the preset the settings start from.
        baseline: the function, for a baseline.
    """

    name: str
    family: str
    preset: str | None = None
    settings: dict[str, Any] | None = None
    baseline: Baseline | None = None

    def config(self, **more: Any) -> SABConfig:
        """The configuration of one of ours.

        Raises:
            ConfigError: a setting is unknown or out of range.
        """
        settings = {"examples": False, **(self.settings or {}), **more}
        return SABConfig.preset(self.preset or "default", **settings)


def read_method(spec: str) -> Method:
    """A method by name: a baseline's, or a preset's with changed settings, such as ``default,sweeps=0,feedback=block``.

    Values are read as JSON where they are JSON, else as text.

    Raises:
        ConfigError: the name or a setting is unknown.
    """
    name, *changes = spec.split(",")
    if name in BASELINES:
        if changes:
            raise ConfigError(f"the baseline {name!r} takes no settings; remove {', '.join(changes)!r}.")
        return Method(spec, name.split("-")[0], baseline=BASELINES[name])
    if name not in PRESETS:
        known = (*PRESETS, *BASELINES)
        hint = did_you_mean(name, known, f"; use one of {', '.join(known)}.")
        raise ConfigError(f"method {name!r} is unknown{hint}")
    settings: dict[str, Any] = {}
    for change in changes:
        key, sign, value = change.partition("=")
        if not sign:
            raise ConfigError(f"method {spec!r}: {change!r} must be SETTING=VALUE.")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    method = Method(spec, "sab", preset=name, settings=settings)
    method.config()  # an unknown setting is an error now, not after an hour
    return method
