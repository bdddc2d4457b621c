"""The presets by the names the command line knows them under."""

from __future__ import annotations

from collections.abc import Callable

from optimum_sab.hf.config import SABConfig

PRESETS: dict[str, Callable[..., SABConfig]] = {
    "default": SABConfig,
    "two-bit": SABConfig.two_bit,
    "paper": SABConfig.paper,
}
