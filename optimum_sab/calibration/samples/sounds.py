"""Sound in the forms that datasets and servers hand it around in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optimum_sab.calibration.samples.pictures import local_name
from optimum_sab.errors import SampleError


@dataclass(frozen=True)
class Sound:
    """A wave form.

    Attributes:
        wave: float32 [samples], one channel.
        rate: samples a second; None where it is not known, and then taken to be what the model's processor wants.
    """

    wave: np.ndarray[Any, Any]
    rate: int | None = None


def load_sound(source: Any, label: str, folder: Path | None = None) -> str | Sound:
    """A sound as a `Sound`, or the path or address of a file, which the processor reads.

    Args:
        source: a path, ``file://`` or web address; an array, tensor or list [samples]; datasets' ``{"array",
            "sampling_rate"}``, or what it decodes now (an object with ``get_all_samples``).
        label: names the sample in errors.
        folder: paths are relative to it.

    Raises:
        SampleError: it is something else, a file does not exist, or there are several channels.
    """
    if isinstance(source, Sound):
        return source
    if isinstance(source, (str, os.PathLike)):
        return str(local_name(source, label, folder))
    if hasattr(source, "get_all_samples"):
        decoded = source.get_all_samples()
        return Sound(_wave(decoded.data, label), int(decoded.sample_rate))
    if isinstance(source, Mapping):
        if source.get("array") is not None and isinstance(source.get("sampling_rate"), int):
            return Sound(_wave(source["array"], label), source["sampling_rate"])
        if source.get("bytes") is None and isinstance(source.get("path"), str):
            return str(local_name(source["path"], label, folder))
    elif hasattr(source, "__array__") or isinstance(source, (list, tuple)):
        return Sound(_wave(source, label))
    raise SampleError(
        f"{label} has a sound given as {_kind(source)}, which is not understood; give a path, an address, an array "
        "[samples], or {'array': ..., 'sampling_rate': ...}."
    )


def sound_for(sound: Any, rate: int | None, label: str) -> Any:
    """What a processor takes for a sound: its wave form, or the path it is read from.

    Args:
        sound: from `load_sound`.
        rate: samples a second that the processor wants; None where it does not say.
        label: names the sample in errors.

    Raises:
        SampleError: it has another rate. Resampling is a choice of filters that is not ours.
    """
    if not isinstance(sound, Sound):
        return sound
    if rate is not None and sound.rate not in (None, rate):
        raise SampleError(
            f"{label} has a sound with {sound.rate} samples a second and the model's processor wants {rate}; resample "
            f"it (with datasets: cast_column('audio', Audio(sampling_rate={rate})))."
        )
    return sound.wave


def _wave(source: Any, label: str) -> np.ndarray[Any, Any]:
    if hasattr(source, "detach"):  # a tensor, wherever it is
        source = source.detach().float().cpu()
    try:
        wave = np.asarray(source, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise SampleError(f"{label} has a sound that cannot be made an array: {error}") from error
    if wave.ndim == 2 and 1 in wave.shape:
        wave = wave.reshape(-1)
    if wave.ndim != 1 or not wave.size or not np.isfinite(wave).all():
        raise SampleError(
            f"{label} has a sound of shape {list(wave.shape)}; give finite numbers [samples], one channel."
        )
    return wave


def _kind(source: Any) -> str:
    return f"a mapping of {', '.join(map(str, source))}" if isinstance(source, Mapping) else type(source).__name__
