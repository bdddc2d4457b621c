"""What the system's reasons for not writing, and Python's for not importing, mean, and what to do about each."""

from __future__ import annotations

import errno
import re

from safetensors import SafetensorError

from optimum_sab.errors import OutputError

TORCHVISION = (
    "install the torchvision that belongs to the installed torch (0.28 to torch 2.13), from the index that torch came "
    "from; pip install torchvision from another replaces torch, or does not fit it"
)
"""The remedy where torchvision is missing, or was compiled for another torch."""
_REMEDIES = {
    errno.ENOSPC: "no space is left there; free some, or name a folder on another disk",
    getattr(errno, "EDQUOT", -1): "your quota there is used up; free some, or name a folder on another disk",
    errno.EFBIG: "files may not become that large here; raise the limit (ulimit -f unlimited)",
    errno.EROFS: "it is read-only; name a folder that can be written to",
    errno.EACCES: "you may not write there; name another folder, or have its permissions changed",
    errno.EPERM: "you may not write there; name another folder, or have its permissions changed",
    errno.ENAMETOOLONG: "the name is too long; name a shorter one",
    errno.ENOTDIR: "it lies below a file; name a folder",
    errno.EEXIST: "a file is in the way; name another folder",
    errno.ENOTEMPTY: "it has been filled meanwhile; name another folder",
    errno.ELOOP: "its links lead in a circle; name another folder",
    errno.EBUSY: "it is a mount point or in use; name a folder in it",
}
_OTHER = "name another folder"
_EXTRA = ("accelerate", "greenlet", "jinja2", "PIL", "tqdm")  # modules of the packages of optimum-sab[quantize]
_NUMBER = re.compile(r"os error (\d+)")


def explain(error: Exception, named: str, doing: str = "write to") -> OutputError:
    """The error that says what cannot be done, why, and the remedy.

    Args:
        error: the system's, or safetensors', which hands it on in words.
        named: the place as the user wrote it.
        doing: what was tried with it.
    """
    code = error_number(error)
    reason = str(getattr(error, "strerror", None) or error)
    return OutputError(f"cannot {doing} {named!r}: {_REMEDIES.get(code or 0, _OTHER)} ({reason}).")


def error_number(error: Exception) -> int | None:
    """The system's number for an error, also where safetensors has put it into words."""
    if isinstance(error, OSError):
        return error.errno
    found = _NUMBER.search(str(error)) if isinstance(error, SafetensorError) else None
    return int(found.group(1)) if found else None


def explain_import(error: BaseException) -> str:
    """Why something cannot be imported, and the remedy, without the full stop.

    Transformers says of a module only that it could not be imported; what it could not be for is the error's cause.

    Args:
        error: of the import; the errors it came from hang on it.
    """
    cause = _first_cause(error)
    said = " ".join(str(cause).split()).rstrip(".") or type(cause).__name__
    missing = (cause.name or "").partition(".")[0] if isinstance(cause, ModuleNotFoundError) else ""
    if names_torchvision(cause):
        return f"{said}; {TORCHVISION}"
    if missing in _EXTRA:
        return f"{said}; pip install 'optimum-sab[quantize]' installs what is needed"
    return f"{said}; install {'it' if missing else 'what it names, in a version that fits the other packages'}"


def names_torchvision(error: BaseException) -> bool:
    """Whether an error is about torchvision: missing, or compiled for another torch than is installed."""
    return "torchvision" in f"{error} {getattr(error, 'name', None)}".lower()


def _first_cause(error: BaseException) -> BaseException:
    """The error that others were raised from, or while it was handled where both are about imports."""
    seen = [error]
    while True:
        last = seen[-1]
        before = None if last.__suppress_context__ else last.__context__
        cause = last.__cause__ or (before if isinstance(before, ImportError) else None)
        if cause is None or cause in seen:
            return last
        seen.append(cause)
