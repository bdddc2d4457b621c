"""Load a model of whatever kind a checkpoint holds."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from optimum_sab.errors import ConfigError
from optimum_sab.hf.auto import AutoModelForVision2Seq
from optimum_sab.sources import check_folder


def model_config(source: str, **arguments: Any) -> Any:
    """The config of a checkpoint.

    Args:
        source: folder, or Hub repository.
        arguments: as in ``from_pretrained``: revision, token and the like.

    Raises:
        ConfigError: it cannot be read.
    """
    check_folder(source, arguments.get("subfolder") or "")
    try:
        return AutoConfig.from_pretrained(source, **arguments)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        if not os.path.exists(source):
            reason = f"there is no such folder here, and from the Hub it cannot be had ({reason})"
        raise ConfigError(f"no model can be read from {source!r}: {reason}") from error


def auto_class(config: Any) -> Any:
    """The auto class for a config: image–text to text where it is a vision-language model's, else causal LM."""
    return AutoModelForVision2Seq if reads_pictures(config) else AutoModelForCausalLM


def reads_pictures(config: Any) -> bool:
    """Whether the config is one of a vision-language model."""
    return config.model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
