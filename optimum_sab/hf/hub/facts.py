"""What the card says of a packed model, read off the model as it is saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.hub.remote_code import brings_code
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.modalities import AUDIO, model_modalities


@dataclass(frozen=True)
class ModelFacts:
    """A packed model in figures.

    Attributes:
        config: its settings and what was measured.
        architecture: name of its class.
        auto_class: name of the class that loads it.
        pipeline_tag: the Hub's name of what it does.
        linears: packed linears.
        weights: of those linears, when they were dense.
        packed_bytes: that those linears take, scales and biases included.
        dense_bytes: that they took in ``dtype``, biases included.
        other_bytes: of every other stored tensor.
        dtype: of what stays dense.
        brings_code: whether the checkpoint holds the file for ``trust_remote_code``.
    """

    config: SABConfig
    architecture: str
    auto_class: str
    pipeline_tag: str
    linears: int
    weights: int
    packed_bytes: int
    dense_bytes: int
    other_bytes: int
    dtype: str
    brings_code: bool

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.packed_bytes / self.weights


def model_facts(model: Any, config: SABConfig) -> ModelFacts:
    """The facts of a model with packed layers.

    Args:
        model: as it is now; its weights may be anywhere, meta included.
        config: its settings.
    """
    packed = [module for module in model.modules() if isinstance(module, SABLinear)]
    weights = sum(module.out_features * module.in_features for module in packed)
    biases = sum(_bytes(module.bias) for module in packed if module.bias is not None)
    inside = {id(tensor) for module in packed for tensor in module.parameters()}
    others = [tensor for tensor in _stored(model) if id(tensor) not in inside]
    base = (config.measured or {}).get("base", {})
    auto = _auto_class(type(model).__name__)
    return ModelFacts(
        config=config,
        architecture=type(model).__name__,
        auto_class=auto,
        pipeline_tag=base.get("pipeline_tag") or _pipeline_tag(auto, model),
        linears=len(packed),
        weights=weights,
        packed_bytes=sum(sum(module.stored_bytes.values()) for module in packed),
        dense_bytes=weights * model.dtype.itemsize + biases,
        other_bytes=sum(map(_bytes, others)),
        dtype=str(model.dtype).removeprefix("torch."),
        brings_code=brings_code(model.config),
    )


def _stored(model: nn.Module) -> list[Any]:
    """Parameters and buffers that are saved, what is shared once."""
    persistent = set(model.state_dict(keep_vars=True))
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [tensor for name, tensor in named.items() if name in persistent]


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def _auto_class(architecture: str) -> str:
    """The class that reads a checkpoint of this architecture; the architecture itself where no auto class does."""
    pictures = "AutoModelForImageTextToText"
    for name, mapping in (
        (
            pictures if hasattr(transformers, pictures) else "AutoModelForVision2Seq",
            modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        ),
        ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("AutoModelForSpeechSeq2Seq", modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES),
        ("AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ):
        if architecture in mapping.values():
            return name
    return architecture


def _pipeline_tag(auto_class: str, model: Any) -> str:
    if auto_class in ("AutoModelForImageTextToText", "AutoModelForVision2Seq"):
        return "image-text-to-text"
    if auto_class == "AutoModelForSpeechSeq2Seq":
        return "automatic-speech-recognition"
    return "audio-text-to-text" if AUDIO in model_modalities(model.config) else "text-generation"
