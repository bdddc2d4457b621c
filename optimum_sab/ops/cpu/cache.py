"""Where compiled libraries are kept, and which of them may be loaded: a library is code that runs as this user."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optimum_sab.errors import SABWarning

VARIABLE = "OPTIMUM_SAB_CACHE"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_directory() -> Path:
    """Where compiled libraries are kept: $OPTIMUM_SAB_CACHE, or `optimum_sab` in the user's cache folder."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "optimum_sab"


@contextmanager
def library_folder() -> Iterator[Path]:
    """The cache, made if it is not there; a private folder for as long as the ``with`` block, and a warning, where
    somebody else could put a library into the cache."""
    cache = cache_directory()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    problem = distrust(cache.stat())
    if problem is None:
        yield cache
        return
    warnings.warn(
        f"the folder for compiled kernels, {cache}, {problem}: nothing is loaded from there, and each process compiles "
        f"the kernel again. Make it yours alone (chmod 700), or name another folder in ${VARIABLE}.",
        SABWarning,
        stacklevel=2,
    )
    with tempfile.TemporaryDirectory(prefix="optimum-sab-") as private:
        yield Path(private)


def find_library(folder: Path, name: str) -> Path | None:
    """The library of that name, if nobody else could write it and its content is what was written.

    A file's own digest is the end of its name, because mapping a damaged library can end the process.
    """
    for path in sorted(folder.glob(f"{name}-*.so")):
        try:
            with path.open("rb") as file:
                if distrust(os.fstat(file.fileno())) is None and path.stem == f"{name}-{digest(file.read())}":
                    return path
        except OSError:  # no file, or one that this user may not read: it is compiled again
            continue
    return None


def keep_library(folder: Path, name: str, linked: Path) -> Path:
    """Move a library into the folder in one step: several processes may do this at once."""
    linked.chmod(0o700)
    path = folder / f"{name}-{digest(linked.read_bytes())}.so"
    os.replace(linked, path)
    return path


def distrust(status: os.stat_result) -> str | None:
    """Why what is at a place may be somebody else's work, as the end of a sentence; None where it cannot."""
    if status.st_uid not in trusted_owners():
        return f"belongs to another user (uid {status.st_uid})"
    if status.st_mode & _OTHERS_WRITE:
        return f"may be written by other users (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def trusted_owners() -> set[int]:
    """This user, and the one who can do anything anyway."""
    return {0, os.geteuid()}


def digest(content: bytes) -> str:
    """Of a library or of what it is made from, for its name."""
    return hashlib.sha256(content).hexdigest()[:32]
