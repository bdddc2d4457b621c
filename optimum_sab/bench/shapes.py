"""Shapes of the linears that kernels are timed on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from optimum_sab.errors import ConfigError


@dataclass(frozen=True)
class LinearShape:
    """One linear's shape; ``name`` says where it comes from."""

    name: str
    out_features: int
    in_features: int


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


def model_shapes(model: str) -> list[LinearShape]:
    """The distinct linears of a model's decoder block.

    Raises:
        ConfigError: the model is not one of `MODELS`.
    """
    decoder = _DECODERS.get(model)
    if decoder is None:
        raise ConfigError(f"{model!r} is not a known model; use {', '.join(MODELS)}, or a shape as OUTxIN.")
    return [
        LinearShape(f"{model} q/o", decoder.hidden, decoder.hidden),
        LinearShape(f"{model} k/v", decoder.keys, decoder.hidden),
        LinearShape(f"{model} gate/up", decoder.intermediate, decoder.hidden),
        LinearShape(f"{model} down", decoder.hidden, decoder.intermediate),
    ]


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
