"""What a report says of the model it is about, and of what it was made with."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from torch import nn

from optimum_sab.hf.config import SABConfig
from optimum_sab.version import __version__

_ELSEWHERE = ("measured", "quant_method", "dynamic", "calibration")  # told in other places, or always the same


def about(model: nn.Module, config: SABConfig) -> dict[str, Any]:
    """JSON-ready. A report may be shown to others, so nothing in it tells of the machine.

    Args:
        model: as it was loaded.
        config: its own, after the work.
    """
    own: Any = getattr(model, "config", None)
    settings = {name: value for name, value in config.to_diff_dict().items() if name not in _ELSEWHERE}
    return {
        "model": _named(str(getattr(own, "_name_or_path", "") or "")),
        "class": type(model).__name__,
        "model_type": str(getattr(own, "model_type", "") or ""),
        "dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
        "settings": settings,
        "rules": len(config.dynamic),
        "left_dense": list((config.measured or {}).get("left_dense", ())),
        "versions": {"optimum-sab": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }


def _named(name: str) -> str:
    """A repository's name, or of a folder the last part."""
    return os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name
