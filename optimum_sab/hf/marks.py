"""Marks that Transformers leaves on the configs of a quantized model and of its parts."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig


def forget_quantized(model: nn.Module) -> None:
    """Take them off a model that is dense again.

    Transformers 5 says ``_is_quantized`` in every config, and some models and attentions go by it. 4.57 says
    ``_pre_quantization_dtype``, and takes only that of the model's own config away itself.
    """
    for part in model.modules():
        config = getattr(part, "config", None)
        if isinstance(config, PretrainedConfig):
            vars(config).pop("_is_quantized", None)
            if config is not getattr(model, "config", None):
                vars(config).pop("_pre_quantization_dtype", None)
