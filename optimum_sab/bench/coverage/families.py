"""The model types that are tried: all that read pictures, and some that read text or sound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from optimum_sab.errors import ConfigError
from optimum_sab.wording import did_you_mean

TEXT = (
    "llama",
    "qwen3",
    "gemma3_text",
    "phi3",
    "mamba2",
    "falcon_h1",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
    "deepseek_v32",
)
SOUND = {
    "voxtral": "VoxtralForConditionalGeneration",
    "granite_speech": "GraniteSpeechForConditionalGeneration",
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration",
}


@dataclass(frozen=True)
class Family:
    """One model type of the installed Transformers.

    Attributes:
        name: its ``model_type``.
        class_name: of the model that is built.
        pictures: whether it stands in the image-text-to-text mapping.
        sound: whether its samples are to hold sound.
    """

    name: str
    class_name: str
    pictures: bool = False
    sound: bool = False

    @property
    def model_class(self) -> Any:
        """The model's class in Transformers."""
        return getattr(transformers, self.class_name)

    @property
    def config_class(self) -> Any:
        """The configuration's class in Transformers."""
        return CONFIG_MAPPING[self.name]


def all_families() -> tuple[Family, ...]:
    """Every family of the installed Transformers, those that read pictures first, in the order of its mapping."""
    pictures = {
        name: Family(name, _one(found), pictures=True, sound=name in SOUND)
        for name, found in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
    }
    text = [
        Family(name, _one(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]))
        for name in TEXT
        if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name not in pictures
    ]
    sound = [
        Family(name, found, sound=True)
        for name, found in SOUND.items()
        if name not in pictures and name in CONFIG_MAPPING and hasattr(transformers, found)
    ]
    return (*pictures.values(), *text, *sound)


def find_families(names: Sequence[str] = ()) -> tuple[Family, ...]:
    """The families of these names, in `all_families`' order; all without any.

    Raises:
        ConfigError: there is none of a name.
    """
    there = all_families()
    known = [family.name for family in there]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known, f"; there are {', '.join(known)}.")
            raise ConfigError(f"Transformers {transformers.__version__} has no family {name!r} that is tried{hint}")
    return tuple(family for family in there if not names or family.name in names)


def _one(found: str | Sequence[str]) -> str:
    """A mapping names one class, or several of which the first is the default."""
    return found if isinstance(found, str) else found[0]
