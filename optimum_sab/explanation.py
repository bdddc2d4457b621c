"""What the system's reasons for not writing mean, and what to do about each."""

from __future__ import annotations

import errno
import re

from safetensors import SafetensorError

from optimum_sab.errors import OutputError

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
