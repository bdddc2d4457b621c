"""Calibration samples for a small random model: ready-made forward arguments with pictures, sound and text."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optimum_sab.bench.coverage.exceptions import Exceptions
from optimum_sab.bench.coverage.families import Family
from optimum_sab.bench.coverage.pictures import picture_arguments
from optimum_sab.bench.coverage.values import Draw

COUNT, WITH_PICTURES = 12, 8
_SHORTEST = 16  # tokens of text
_BEFORE = ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index")
_AFTER = ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index")
_PICTURE = ("image_token_id", "image_token_index", "video_token_index", "image_patch_id")
_SOUND = ("audio_token_id", "audio_token_index")
_OF_TEXT = {"input_ids", "attention_mask"}
_MISMATCH = re.compile(r"tokens:? (\d+),?.* features:? (\d+)", re.DOTALL)


@dataclass(frozen=True)
class Samples:
    """What a model is calibrated on.

    Attributes:
        rows: forward arguments, one sample each.
        pictures: how many hold a picture.
        sound: how many hold sound.
    """

    rows: list[dict[str, Any]] = field(repr=False)
    pictures: int = 0
    sound: int = 0


def build_samples(model: Any, family: Family, exceptions: Exceptions) -> Samples:
    """`COUNT` samples, `WITH_PICTURES` of which hold a picture (all, where the model does not take text alone).

    Args:
        model: dense; it is asked how many tokens a picture takes, and whether it takes text alone.
        family: what it reads.
        exceptions: what the family needs besides.
    """
    builder = _Builder(model, family, exceptions)
    text_alone = not (family.pictures or family.sound) or builder.takes(builder.sample(0, picture=False, sound=False))
    rows, pictures, sound = [], 0, 0
    for index in range(COUNT):
        picture = family.pictures and exceptions.reads_pictures and (index < WITH_PICTURES or not text_alone)
        heard = family.sound and (index % 2 == 0 or not (text_alone or picture))
        rows.append(builder.sample(index, picture, heard))
        pictures, sound = pictures + picture, sound + heard
    return Samples(rows, pictures, sound)


class _Builder:
    def __init__(self, model: Any, family: Family, exceptions: Exceptions) -> None:
        self._model, self._exceptions = model, exceptions
        self._names = set(inspect.signature(model.forward).parameters)
        self._tokens: dict[str, int] = {}  # of a picture, of a sound
        self._mended = False
        if family.pictures and exceptions.reads_pictures:
            self._mend()

    def sample(self, index: int, picture: bool, sound: bool) -> dict[str, Any]:
        """Forward arguments, the same for the same index."""
        draw = Draw(torch.Generator().manual_seed(index))
        media: dict[str, Any] = {}
        pieces = [draw.ids(1, _SHORTEST + index)]
        marked = [torch.zeros_like(pieces[0])]
        if picture:
            media |= self._picture(draw)
            self._place(pieces, marked, self._count("picture", media), _PICTURE)
        if sound:
            heard = {name: draw.tensor(value) for name, value in self._exceptions.sound.items()}
            self._place(pieces, marked, self._count("sound", heard), _SOUND)
            media |= heard
        pieces.append(draw.ids(1, _SHORTEST))
        marked.append(torch.zeros_like(pieces[-1]))
        ids, types = torch.cat(pieces, dim=1), torch.cat(marked, dim=1)
        found = {**self._per_token(ids, types), **media, **self._always(draw, types > 0, picture)}
        if "input_ids" not in self._names:
            found = {name: value for name, value in found.items() if name in self._names - _OF_TEXT}
        return {name: value for name, value in found.items() if value is not None}

    def takes(self, sample: Mapping[str, Any]) -> bool:
        """Whether the dense model computes with these arguments."""
        try:
            run(self._model, sample)
        except Exception:  # whatever a model raises at what it was not made for
            return False
        return True

    def _mend(self) -> None:
        """Believe the model's own complaint about how many tokens a picture takes."""
        try:
            run(self._model, self.sample(0, picture=True, sound=False))
        except Exception as error:  # a wrong sample fails again, in the open, when it is used
            found = _MISMATCH.search(str(error))
            if found:
                self._tokens["picture"] = int(found[2])

    def _picture(self, draw: Draw) -> dict[str, Any]:
        given = self._exceptions.picture
        made = {} if "pixel_values" in given else picture_arguments(self._model.config, self._names, draw)
        made |= {name: draw.tensor(value) for name, value in given.items()}
        return {name: value for name, value in made.items() if name in self._names and value is not None}

    def _place(self, pieces: list[Tensor], marked: list[Tensor], count: int, names: tuple[str, ...]) -> None:
        """Placeholders, between the marks that the configuration names."""
        config = self._model.config
        token = self._exceptions.placeholder
        token = _named(config, names) if token is None or names is _SOUND else token
        before, after = (_named(config, _BEFORE), _named(config, _AFTER)) if names is _PICTURE else (None, None)
        for value, number, kind in ((before, 1, 0), (token, count, 1 if names is _PICTURE else 3), (after, 1, 0)):
            if value is not None and number:
                pieces.append(torch.full((1, number), value))
                marked.append(torch.full((1, number), kind))

    def _count(self, kind: str, media: Mapping[str, Any]) -> int:
        if kind not in self._tokens:
            given = self._exceptions.tokens if kind == "picture" else self._exceptions.sound_tokens
            self._tokens[kind] = self._features(kind, media) if given is None else given
        return self._tokens[kind]

    def _features(self, kind: str, media: Mapping[str, Any]) -> int:
        """How many vectors the model makes of a picture or of a sound, which is how many placeholders it wants."""
        name = "get_image_features" if kind == "picture" else "get_audio_features"
        owners = (getattr(self._model, "model", None), self._model)  # the inner one is what a forward calls
        method = next((getattr(each, name) for each in owners if hasattr(each, name)), None)
        if method is None:
            return 0
        given = {}
        for key, parameter in inspect.signature(method).parameters.items():
            if key in media:
                given[key] = media[key]
            elif parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                given[key] = _setting(self._model.config, key)
        with torch.no_grad():
            return count_vectors(method(**given))

    def _per_token(self, ids: Tensor, types: Tensor) -> dict[str, Tensor]:
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in self._names:
                found[name] = types
        return found

    def _always(self, draw: Draw, placeholders: Tensor, picture: bool) -> dict[str, Any]:
        draw = Draw(draw.generator, placeholders)
        found = {name: draw.tensor(value) for name, value in self._exceptions.always.items()}
        if picture:
            found |= {name: draw.tensor(value) for name, value in self._exceptions.beside_picture.items()}
        if getattr(self._model.config, "is_encoder_decoder", False) and "decoder_input_ids" in self._names:
            found.setdefault("decoder_input_ids", draw.ids(1, _SHORTEST))
        return found


def count_vectors(features: Any) -> int:
    """Rows of all tensors that a model's ``get_…_features`` gives for one picture or sound."""
    found = features
    for name in ("last_hidden_state", "pooler_output"):
        found = found if getattr(features, name, None) is None else getattr(features, name)
    if isinstance(found, Tensor):
        return found.numel() // found.shape[-1]
    if isinstance(found, tuple) and found and isinstance(found[0], (list, tuple)):
        found = found[0]  # the features themselves, before what goes into later blocks
    return sum(each.numel() // each.shape[-1] for each in found if isinstance(each, Tensor))


def run(model: Any, sample: Mapping[str, Any]) -> Tensor:
    """Logits of one sample, without gradient and without a cache.

    Raises:
        TypeError: the model gives no logits.
    """
    with torch.no_grad():
        output = model(**sample)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"{type(model).__name__} gives no logits.")
    return logits


def _setting(config: Any, name: str) -> Any:
    """An argument that a model's own forward takes from the configuration."""
    parts = (config, getattr(config, "vision_config", None))
    return next((getattr(part, name) for part in parts if hasattr(part, name)), None)


def _named(config: Any, names: tuple[str, ...]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((each for each in found if isinstance(each, int) and not isinstance(each, bool) and each >= 0), None)
