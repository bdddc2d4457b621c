"""`from_config` with the config of a packed checkpoint: refused.

It would make a dense model of random weights whose config says that it is packed, and what is saved of that nobody can
load. Transformers asks no quantizer there, so `install` puts the question around the one method that it goes through.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

from optimum_sab.errors import ConfigError
from optimum_sab.hf.config import QUANT_METHOD
from optimum_sab.hf.origin import loading_call


def install() -> None:
    """Have `from_config` refuse packed models. Doing it again changes nothing."""
    building: Any = PreTrainedModel._from_config.__func__
    refusing = unless_packed(getattr(building, "without_refusal", building))
    PreTrainedModel._from_config = classmethod(refusing)


def unless_packed(build: Callable[..., Any]) -> Callable[..., Any]:
    """`PreTrainedModel._from_config` that raises `ConfigError` where the config is of a packed model."""

    @functools.wraps(build)
    def _from_config(cls: type[PreTrainedModel], config: Any, **arguments: Any) -> Any:
        if _is_packed(config) and loading_call() is None:  # a part of a model that is being loaded
            raise ConfigError(
                f"{cls.__name__}: the config holds a quantization_config of {QUANT_METHOD!r}, and from_config makes "
                "random dense weights. Load the packed ones with from_pretrained, or delete config.quantization_config "
                "for a dense model."
            )
        return build(cls, config, **arguments)

    _from_config.without_refusal = build  # type: ignore[attr-defined]
    return _from_config


def _is_packed(config: Any) -> bool:
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return bool(method == QUANT_METHOD)
