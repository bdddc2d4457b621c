"""Pictures and videos in every form that trainers, datasets and servers hand them around in."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np

from optimum_sab.errors import MissingDependencyError, SampleError
from optimum_sab.sources import is_barred

_FETCHED = re.compile(r"https?://", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{40,}={0,2}\s*")
_WIDE_MODES = ("I", "F")  # and "I;16" and so on: more than 8 bits a channel


def load_picture(source: Any, label: str, folder: Path | None = None) -> Any:
    """A picture in RGB, upright; a web address stays one, which the processor fetches.

    Args:
        source: a PIL picture; a path; ``file://``, ``data:`` or a web address; base64; the bytes of a file; datasets'
            ``{"bytes", "path"}``; or an array or tensor, [height, width, channels] or [channels, height, width], of
            uint8 or of floats from 0 to 1.
        label: names the sample in errors.
        folder: paths are relative to it.

    Raises:
        SampleError: it is something else, or cannot be read.
        MissingDependencyError: Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("pictures need Pillow: pip install 'optimum-sab[quantize]'.") from error
    if isinstance(source, Image.Image):
        return _rgb(source, label, getattr(source, "filename", "") or "that is given")
    if isinstance(source, Mapping) and {"bytes", "path"} >= set(source):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decoded(bytes(source), label, f"of {len(source)} bytes")
    if isinstance(source, (str, os.PathLike)):
        return _named_picture(os.fspath(source), label, folder)
    if hasattr(source, "__array__"):
        return Image.fromarray(_pixels(source, label))
    raise SampleError(
        f"{label} has a picture given as {type(source).__name__}, which is not understood; give a path, an address, a "
        "PIL picture, its file's bytes, or an array."
    )


def load_video(source: Any, label: str, folder: Path | None = None) -> Any:
    """A video as processors take it: a path, an address, an array, or a list of frames, which are pictures.

    Raises:
        SampleError: a file does not exist, or a frame cannot be read.
    """
    if isinstance(source, (list, tuple)):
        return [load_picture(frame, label, folder) for frame in source]
    return local_name(source, label, folder)


def local_name(source: Any, label: str, folder: Path | None = None) -> Any:
    """The path of a file on this machine as a string; everything else as it is.

    Raises:
        SampleError: the file does not exist.
    """
    if not isinstance(source, (str, os.PathLike)) or _FETCHED.match(os.fspath(source)):
        return source
    path = _local_path(os.fspath(source), folder)
    if not os.path.isfile(path):
        raise SampleError(f"{label}: the file {_shown(path)} {_missing(path, folder)}.")
    return path


def _named_picture(name: str, label: str, folder: Path | None) -> Any:
    if _FETCHED.match(name):
        return name
    if name.startswith("data:"):
        head, comma, data = name.partition(",")
        if not comma:
            raise SampleError(f"{label}: the picture {_shown(name)} is a data address without data.")
        content = _from_base64(data, label) if head.endswith(";base64") else unquote_to_bytes(data)
        return _decoded(content, label, _shown(name))
    path = _local_path(name, folder)
    if os.path.isfile(path):
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise SampleError(f"{label}: the picture {_shown(path)} cannot be read: {error}") from error
        return _decoded(content, label, _shown(path))
    if _BASE64.fullmatch(name):
        return _decoded(_from_base64(name, label), label, _shown(name))
    raise SampleError(f"{label}: the picture {_shown(path)} {_missing(path, folder)}.")


def _local_path(name: str, folder: Path | None) -> str:
    if name.startswith("file:"):
        name = url2pathname(urlsplit(name).path)
    path = os.path.expanduser(name)
    return path if folder is None else os.path.join(folder, path)  # an absolute one stays


def _missing(path: str, folder: Path | None) -> str:
    """What is wrong with a path, and what to do; of a folder it is relative to, `_local_path` made it a part."""
    if is_barred(path):
        return "may not be looked at; have the permissions of its folder changed"
    start = "the working directory" if folder is None else "the folder of the calibration file"
    return f"does not exist; mend the path, which counts from {start} unless it is absolute, or remove the sample"


def _from_base64(text: str, label: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError(f"{label}: the picture {_shown(text)} is not base64: {error}.") from error


def _decoded(content: bytes, label: str, shown: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:  # whose words are of an object in memory
        raise SampleError(
            f"{label}: the picture {shown} cannot be read: it is no picture file of a kind that Pillow knows, such as "
            "PNG or JPEG; convert it, or remove the sample."
        ) from error
    except Exception as error:  # decoders fail on a damaged file in any way they like
        raise SampleError(
            f"{label}: the picture {shown} cannot be read: {error}; fetch it again, or remove the sample."
        ) from error
    with picture:
        return _rgb(picture, label, shown)


def _rgb(picture: Any, label: str, shown: str) -> Any:
    """As Transformers' own loader makes it, except that nothing is clipped to 8 bits."""
    from PIL import ImageOps

    if picture.mode.startswith(_WIDE_MODES):
        raise SampleError(
            f"{label}: the picture {shown} has the mode {picture.mode!r}, more than 8 bits a channel, which would be "
            "cut off; scale it to 8 bits."
        )
    try:
        return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # pixels are decoded only now
        raise SampleError(
            f"{label}: the picture {shown} cannot be read: {error}; fetch it again, or remove the sample."
        ) from error


def _pixels(source: Any, label: str) -> Any:
    """uint8 [height, width, 3]."""
    if hasattr(source, "detach"):  # a tensor, wherever it is
        source = source.detach().cpu()
        source = source.float() if source.is_floating_point() else source
    array = np.asarray(source)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise SampleError(f"{label} has a picture of shape {list(array.shape)}; give [height, width, 3].")
    if array.dtype.kind == "f" and np.all((array >= 0) & (array <= 1)):
        array = np.round(array * 255.0).astype(np.uint8)
    if array.dtype != np.uint8:
        raise SampleError(
            f"{label} has a picture of {array.dtype} from {array.min()} to {array.max()}; give uint8, or floats from 0 "
            "to 1."
        )
    return np.ascontiguousarray(np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array[..., :3])


def _shown(name: str) -> str:
    return repr(name) if len(name) <= 200 else repr(name[:60]) + "…"
