"""What a user reads instead of a traceback. Nothing here imports torch: wrong calls are answered before it is."""

from __future__ import annotations

import errno
import os
import sys

from safetensors import SafetensorError

from optimum_sab.errors import SABError
from optimum_sab.explanation import error_number, explain, explain_import, names_torchvision

_WRITING = (errno.ENOSPC, errno.EFBIG, errno.EROFS, getattr(errno, "EDQUOT", -1))


def one_line(error: BaseException) -> str | None:
    """An error in one line, with value and remedy; None for what no user can be at fault for, but the program."""
    text = _words(error)
    return None if text is None else " ".join(text.split())


def _words(error: BaseException) -> str | None:
    if isinstance(error, SABError):
        return str(error)
    if isinstance(error, (*_device_errors(), MemoryError)):
        return (
            f"the memory is not enough ({str(error).partition('.')[0] or 'of the host'}); give fewer or shorter "
            "samples (--calibration-samples, --sequence-length), or another device."
        )
    if isinstance(error, (OSError, SafetensorError)):
        number, name = error_number(error), getattr(error, "filename", None)
        if number in _WRITING:
            return str(explain(error, os.fsdecode(name) if isinstance(name, (str, bytes)) else "the output"))
        if isinstance(error, SafetensorError):
            return f"a weight file cannot be read ({error}); it is truncated or damaged, fetch it again."
        if isinstance(name, (str, bytes)):
            return f"{os.fsdecode(name)!r} cannot be used: {error.strerror}; name another, or mend it."
        return str(error)  # Transformers' own say it in words
    if isinstance(error, ImportError) or (isinstance(error, RuntimeError) and names_torchvision(error)):
        return f"a package is missing or broken: {explain_import(error)}."
    return None


def _device_errors() -> tuple[type[BaseException], ...]:
    """Torch's error of a device without memory; none where torch, which raises it, was never imported."""
    torch = sys.modules.get("torch")
    return () if torch is None else (torch.OutOfMemoryError,)
