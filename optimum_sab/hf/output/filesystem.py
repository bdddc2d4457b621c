"""What the operating system is asked for: a swap of two names, what survives a power cut, who is alive."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_SWAP = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)  # of kernels, file systems and sandboxes
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)  # of file systems that know no sync of folders
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


def swap(one: Path, other: Path) -> bool:
    """Exchange what two names stand for, in one step (Linux's ``renameat2``).

    Returns:
        Whether that was done; False where the system or the file system cannot.

    Raises:
        OSError: it can, and refused.
    """
    if not sys.platform.startswith("linux"):
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_SWAP:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def sync_folder(folder: Path) -> None:
    """Have a folder's list of names on the disk. Nothing on systems that cannot open a folder, or cannot sync it."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Have every file below a folder on the disk, and every list of names."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(place, name)
            if path.is_symlink():
                continue
            with path.open("rb+" if os.name != "posix" else "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


def lock(folder: Path) -> int | None:
    """Hold a folder until the process ends, however it ends, or the handle is closed.

    Returns:
        The handle; None where the file system or the system has no such locks.

    Raises:
        BlockingIOError: another process holds it.
        FileNotFoundError: it is gone.
    """
    if sys.platform == "win32":
        return None
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), os.stat(folder)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    except OSError as error:
        os.close(handle)
        if error.errno in _NO_LOCKS:
            return None
        raise
    return handle


def unlock(handle: int | None) -> None:
    """Let go of what `lock` gave."""
    if handle is not None:
        os.close(handle)
