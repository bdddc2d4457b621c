"""Randomly initialised Qwen models, dense or packed, made directly on the device: no checkpoint, no solver.

"7b" has the shapes of Qwen2.5-VL-7B, "13b" and "narrow" are a wider and a narrower one of its kind, "8b" and "32b" have
those of Qwen3-VL-8B and -32B, whose language models are Qwen3-8B's and Qwen3-32B's. "tiny" and "tiny-qwen3" have two
layers of one and of the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from optimum_sab.bench.random_layers import random_linear
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError
from optimum_sab.format.random_weight import SCALE
from optimum_sab.nn.modules import set_module
from optimum_sab.nn.selection import select_linears
from optimum_sab.wording import did_you_mean

_TEXT: dict[str, dict[str, Any]] = {
    "7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
    "13b": {  # of no published model: Llama-13B's widths
        "vocab_size": 152064,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
    "72b": {
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
    "narrow": {  # many small blocks
        "vocab_size": 8192,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
    "8b": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    },
    "32b": {
        "vocab_size": 151936,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    },
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    },
    "tiny-qwen3": {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,  # heads wider than the hidden size, as those of 32b
        "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    },
}
_QWEN25_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
QWEN3_VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
_VISION: dict[str, dict[str, Any]] = {
    "7b": {**_QWEN25_VISION, "out_hidden_size": 3584},
    "13b": {**_QWEN25_VISION, "out_hidden_size": 5120},
    "72b": {**_QWEN25_VISION, "intermediate_size": 3456, "out_hidden_size": 8192},
    "narrow": {**_QWEN25_VISION, "depth": 4, "fullatt_block_indexes": [3], "out_hidden_size": 1024},
    "tiny": {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 256,
        "fullatt_block_indexes": [1],
    },
    "8b": {**QWEN3_VISION, "out_hidden_size": 4096},
    "32b": {**QWEN3_VISION, "out_hidden_size": 5120},
    "tiny-qwen3": {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
        "out_hidden_size": 256,
    },
}
SIZES = tuple(_TEXT)
_QWEN3 = ("8b", "32b", "tiny-qwen3")


def model_config(size: str, blocks: int | None = None) -> Qwen2_5_VLConfig | Qwen3VLConfig:
    """The configuration of a size.

    Args:
        size: one of `SIZES`.
        blocks: decoder blocks; None for as many as the size has.

    Raises:
        ConfigError: the size is not one of `SIZES`.
    """
    if size not in SIZES:
        raise ConfigError(f"size={size!r} must be one of {', '.join(SIZES)}{did_you_mean(size, SIZES)}")
    text = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        **_TEXT[size],
    }
    if blocks is not None:
        text["num_hidden_layers"] = blocks
    vision = {"in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2, **_VISION[size]}
    if size in _QWEN3:
        text |= {"model_type": "qwen3_vl_text", "max_position_embeddings": 262144, "rope_theta": 5e6}
        vision |= {"model_type": "qwen3_vl", "hidden_act": "gelu_pytorch_tanh", "patch_size": 16}
        return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    text |= {"model_type": "qwen2_5_vl_text", "max_position_embeddings": 128000, "rope_theta": 1e6}
    text["use_sliding_window"] = False
    vision |= {"model_type": "qwen2_5_vl", "hidden_act": "silu", "patch_size": 14}
    vision |= {"tokens_per_second": 2, "window_size": 112}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def empty_model(size: str) -> Qwen2_5_VLForConditionalGeneration | Qwen3VLForConditionalGeneration:
    """The dense model of a size, its parameters on meta; raises as `model_config`."""
    config = model_config(size)
    with parameters_on_meta():
        found: Qwen2_5_VLForConditionalGeneration | Qwen3VLForConditionalGeneration = model_class(size)(config)
    return found


def model_class(size: str) -> Any:
    """The class of a size's model."""
    return Qwen3VLForConditionalGeneration if size in _QWEN3 else Qwen2_5_VLForConditionalGeneration


def random_model(
    size: str, settings: LayerSettings | None, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Qwen2_5_VLForConditionalGeneration | Qwen3VLForConditionalGeneration:
    """A model of this size with random weights in ``dtype`` on the device, in eval mode.

    Args:
        size: one of `SIZES`.
        settings: of the packed linears; None leaves all dense. What is packed is what quantization would pack.
        device: where the weights are drawn.
        dtype: of everything that is not packed.
        seed: of the weights.
    """
    model = empty_model(size)
    generator = torch.Generator(device).manual_seed(seed)
    if settings is not None:
        for index, (name, own) in enumerate(select_linears(model, settings).settings.items()):
            dense = model.get_submodule(name)
            assert isinstance(dense, nn.Linear)
            bias = None if dense.bias is None else torch.zeros(dense.out_features, dtype=dtype, device=device)
            packed = random_linear(dense.out_features, dense.in_features, own, seed + index, device, bias)
            set_module(model, name, packed)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=dtype, device=device)
                if parameter.dim() > 1:
                    values.normal_(std=SCALE, generator=generator)
                else:
                    values.fill_(0.0 if name == "bias" else 1.0)  # of a norm
                module.register_parameter(name, nn.Parameter(values, requires_grad=False))
    return model.to(device).eval()  # buffers are still on the CPU


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside hold parameters without memory. Buffers are real: Transformers computes them only here."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # declared without result
    try:
        yield
    finally:
        handle.remove()
