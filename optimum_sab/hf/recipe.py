"""A configuration that was stored with a finished model, given again for the next one."""

from __future__ import annotations

from optimum_sab.errors import warn
from optimum_sab.hf.config import SABConfig, is_record


def as_recipe(config: SABConfig) -> None:
    """Leave out what was measured on the finished model; its samples, of which only the number is stored, are named.

    Args:
        config: the quantizer's own copy.
    """
    config.measured = None
    if is_record(config.calibration):
        warn(
            f"calibration={config.calibration!r} says how many samples calibrated a finished model, not which: "
            "the built-in set is used. Give them again as SABConfig(calibration=...)."
        )
        config.calibration, config.builtin_samples = None, 0
