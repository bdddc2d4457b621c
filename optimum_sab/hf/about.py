"""What a report says of the model it is about, and of what it was made with."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from optimum_sab.hf.config import SABConfig
from optimum_sab.version import __version__

_ELSEWHERE = ("measured", "quant_method", "dynamic")  # told in sections of their own, or the same in every report


def about(model: nn.Module, config: SABConfig) -> dict[str, Any]:
    """JSON-ready. Of the machine nothing but what the user named.

    Args:
        model: as it was loaded.
        config: its own, after the work.
    """
    own: Any = getattr(model, "config", None)
    settings = {name: value for name, value in config.to_diff_dict().items() if name not in _ELSEWHERE}
    return {
        "model": str(getattr(own, "_name_or_path", "") or ""),
        "class": type(model).__name__,
        "model_type": str(getattr(own, "model_type", "") or ""),
        "dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
        "settings": settings,
        "rules": len(config.dynamic),
        "left_dense": list((config.measured or {}).get("left_dense", ())),
        "versions": {"optimum-sab": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }
