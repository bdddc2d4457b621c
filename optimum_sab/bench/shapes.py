"""Shapes of the linears that kernels are timed on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from optimum_sab.errors import ConfigError
from optimum_sab.wording import did_you_mean


@dataclass(frozen=True)
class LinearShape:
    """One linear's shape; ``name`` says where it comes from."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class ExpertsShape:
    """The experts of one block, each a gated MLP.

    Attributes:
        name: where the shape comes from.
        experts: how many there are.
        top_k: how many a token goes to.
        hidden: features that go in and come out.
        intermediate: features between the two matrices.
    """

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int


@dataclass(frozen=True)
class _Decoder:
    hidden: int
    intermediate: int
    keys: int


_DECODERS = {
    "qwen2.5-vl-7b": _Decoder(3584, 18944, 512),
    "qwen2.5-vl-72b": _Decoder(8192, 29568, 1024),
}
MODELS = tuple(_DECODERS)
_EXPERTS = {
    "qwen3-30b-a3b": ExpertsShape("qwen3-30b-a3b", 128, 8, 2048, 768),
    "qwen3-235b-a22b": ExpertsShape("qwen3-235b-a22b", 128, 8, 4096, 1536),
}


def model_shapes(model: str) -> list[LinearShape]:
    """The distinct linears of a model's decoder block.

    Raises:
        ConfigError: the model is not one of `MODELS`.
    """
    decoder = _DECODERS.get(model)
    if decoder is None:
        known = (*MODELS, *_EXPERTS)
        hint = did_you_mean(model, known, f"; use {', '.join(known)}, or a shape as OUTxIN.")
        raise ConfigError(f"{model!r} is not a known model{hint}")
    return [
        LinearShape(f"{model} q/o", decoder.hidden, decoder.hidden),
        LinearShape(f"{model} k/v", decoder.keys, decoder.hidden),
        LinearShape(f"{model} gate/up", decoder.intermediate, decoder.hidden),
        LinearShape(f"{model} down", decoder.hidden, decoder.intermediate),
    ]


def parse_experts(words: Sequence[str]) -> tuple[list[ExpertsShape], list[str]]:
    """Names of models with experts, and explicit ``EXPERTSxTOPxHIDDENxINTERMEDIATE``, in order; and the other words.

    Raises:
        ConfigError: a size is 0, or a token would go to more experts than there are.
    """
    found, others = [], []
    for word in words:
        explicit = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", word)
        if explicit is not None:
            shape = ExpertsShape(word, *map(int, explicit.groups()))
            if not shape.hidden or not shape.intermediate or not 1 <= shape.top_k <= shape.experts:
                raise ConfigError(
                    f"the shape {word!r} is EXPERTSxTOPxHIDDENxINTERMEDIATE: sizes are at least 1, and TOP is at most "
                    "EXPERTS."
                )
            found.append(shape)
        elif word in _EXPERTS:
            found.append(_EXPERTS[word])
        else:
            others.append(word)
    return found, others


def parse_shapes(words: Sequence[str]) -> list[LinearShape]:
    """Model names and explicit ``OUTxIN`` as shapes, in order.

    Raises:
        ConfigError: a word is neither, or a size is 0.
    """
    shapes: list[LinearShape] = []
    for word in words:
        explicit = re.fullmatch(r"(\d+)x(\d+)", word)
        if explicit is None:
            shapes += model_shapes(word)
            continue
        out_features, in_features = int(explicit[1]), int(explicit[2])
        if not out_features or not in_features:
            raise ConfigError(f"the shape {word!r} is empty; OUT and IN must be at least 1.")
        shapes.append(LinearShape(word, out_features, in_features))
    return shapes
