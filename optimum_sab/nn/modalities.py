"""Which modalities a model's tokens can have, by its configuration."""

from __future__ import annotations

from typing import Any

TEXT, VISUAL, AUDIO = "text", "visual", "audio"

_TOKEN_IDS = {
    VISUAL: ("image_token_id", "image_token_index", "video_token_id", "video_token_index"),
    AUDIO: ("audio_token_id", "audio_token_index"),
}


def model_modalities(config: Any) -> tuple[str, ...]:
    """The modalities a model's tokens can have: text, and those it has placeholder token ids for."""
    return (TEXT, *(m for m in _TOKEN_IDS if placeholder_ids(config, m)))


def placeholder_ids(config: Any, modality: str) -> list[int]:
    """The ids of the tokens in whose place a modality stands; none where the model does not read it."""
    found = (getattr(config, name, None) for name in _TOKEN_IDS[modality])
    return [value for value in found if isinstance(value, int)]
