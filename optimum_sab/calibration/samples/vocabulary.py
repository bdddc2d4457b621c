"""The token ids that mean something to a model that writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optimum_sab.calibration.samples.modality import token_ids, token_modalities
from optimum_sab.errors import SampleError


@dataclass(frozen=True)
class Vocabulary:
    """The ids that mean something to the generation.

    Attributes:
        ends: end tokens; may be empty.
        forbidden: never chosen, such as the placeholders of pictures.
        padding: fills the shorter prompts of a batch.
        size: ids from here on have no text; None if unknown.
    """

    ends: frozenset[int]
    forbidden: frozenset[int]
    padding: int
    size: int | None = None


def read_vocabulary(model: Any, processor: Any) -> Vocabulary:
    """End, forbidden and padding tokens of a model that generates.

    End tokens are the generation config's and the tokenizer's. Every other token that the model's config names (begin,
    padding, placeholders and borders of pictures) is forbidden: the model's forward would look for what it announces.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    config, generation = model.config, model.generation_config
    ends = {*_ids(generation.eos_token_id), *_ids(getattr(tokenizer, "eos_token_id", None))}
    named = [v for k, v in config.to_dict().items() if k.endswith(("_token_id", "_token_index"))]
    named += [generation.bos_token_id, generation.pad_token_id, getattr(processor, "image_token_id", None)]
    own = getattr(tokenizer, "pad_token_id", None)
    padding = [*_ids(own), *_ids(generation.pad_token_id), *sorted(ends), 0][0]
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    return Vocabulary(frozenset(ends), frozenset(i for v in named for i in _ids(v)) - ends, padding, size)


def _ids(value: Any) -> list[int]:
    """Token ids out of a config entry: one, several, or none; a negative one means none."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]


def check_tokens(inputs: Mapping[str, Any], config: Any, label: str) -> None:
    """Every token is one of the model's: an entry of its vocabulary, or a placeholder.

    Raises:
        SampleError: one is not; ``label`` names the sample.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    if not isinstance(size, int):
        return
    modalities = token_modalities(inputs, config)
    given = token_ids(inputs)
    if given is None:
        return
    ids = given.flatten().cpu()[modalities.text]
    foreign = ids[(ids < 0) | (ids >= size)]
    if len(foreign):
        raise SampleError(
            f"{label} has the token {int(foreign[0])}, and the model's vocabulary {size} entries; the processor is not "
            "this model's: give its own (--processor PATH, SABConfig(processor=...))."
        )
