"""What the decoder of an encoder–decoder model reads, where a sample does not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from optimum_sab.calibration.samples.modality import token_modalities


def with_decoder_inputs(inputs: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """A sample's forward arguments, for an encoder–decoder with the sample's own text for the decoder to write.

    Args:
        inputs: of the encoder.
        config: of the model.
    """
    if "decoder_input_ids" in inputs or "input_ids" not in inputs or not is_encoder_decoder(config):
        return dict(inputs)
    ids = inputs["input_ids"]
    text = ids[:, token_modalities(inputs, config).text.to(ids.device)]
    start = torch.full_like(ids[:, :1], _start_token(config))
    return {**inputs, "decoder_input_ids": torch.cat([start, text[:, :-1]], dim=1)}


def is_encoder_decoder(config: Any) -> bool:
    """Whether a model with this config has a decoder that reads other tokens than its encoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def _start_token(config: Any) -> int:
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        for each in (config, text):
            value = getattr(each, name, None)
            if isinstance(value, int):
                return value
    return 0
