"""Where a checkpoint is to go: everything that can be known or tried of a place before the work begins."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from optimum_sab.errors import OutputError, OutputExistsError
from optimum_sab.explanation import explain
from optimum_sab.hf.output.filesystem import sync_folder
from optimum_sab.hf.output.members import ADAPTER, is_member
from optimum_sab.hf.output.recovery import recover
from optimum_sab.hf.output.sources import refuse_source
from optimum_sab.hf.output.work_folder import PREFIX, make_work_folder

if sys.platform != "win32":
    import resource

_NOT_CONTENT = ("lost+found",)  # what a disk's own folder holds from the start
_CANNOT_BE_RENAMED = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)
_TRIED = 1 << 20  # bytes that are written on trial


@dataclass(frozen=True)
class OutputPlace:
    """Where a checkpoint is written.

    Attributes:
        folder: without links.
        named: as the user wrote it.
        inside: whether the folder cannot be replaced as a whole (a mount point, the working folder), so that the files
            are written in a hidden folder inside of it.
        overwrite: whether a checkpoint that is there will be replaced.
    """

    folder: Path
    named: str
    inside: bool
    overwrite: bool


def check_output(output: Path, overwrite: bool = False, sources: Sequence[str | Path] = ()) -> OutputPlace:
    """Refuse a place that a checkpoint cannot be written to, now instead of after the work.

    A folder is made there on trial, written to, brought to the disk, renamed and removed again; what is there stays as
    it is. What dead runs have left of this output is brought in order first (`recover`).

    Args:
        output: the folder to be; links are followed. It, and those above it, need not exist.
        overwrite: whether a checkpoint that is there will be replaced.
        sources: what is read for it: folders, files, or names on the Hub.

    Raises:
        OutputExistsError: ``output`` is a file, or holds files and ``overwrite`` was not asked for.
        OutputError: it is, holds or lies in a source; or it cannot be written to, be named so, or be
            replaced.
    """
    named = str(output)
    folder = _resolve(output)
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{named!r} is a file; name a folder.")
    try:
        refuse_source(folder, named, sources)
        recover(folder)
        content = content_of(folder)
    except PermissionError as error:  # one may write to a folder and not see what is in it
        raise OutputError(
            f"nothing can be written to {named!r}, as {str(error.filename)!r} may not be looked into; name another "
            "folder, or have its permissions changed."
        ) from error
    if content and not overwrite:
        raise OutputExistsError(f"{named!r} is not empty; name another folder, or overwrite it (--overwrite).")
    if any(each.name == ADAPTER for each in content):
        raise OutputError(
            f"{named!r} holds an adapter ({ADAPTER}), which would be loaded in the place of the model; move it away, "
            "or name another folder."
        )
    try:
        with _parents_of(folder):
            inside = _try(folder, named)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise explain(error, named) from error
    if inside and any(is_member(each) for each in content):
        raise OutputError(
            f"{named!r} holds a checkpoint, and the folder cannot be exchanged for another in one step, as it is a "
            "mount point, the working folder, or in a folder that you may not write to; name a new folder, for example "
            f"{os.path.join(named, 'packed')!r}."
        )
    return OutputPlace(folder, named, inside, overwrite)


def check_size(where: OutputPlace, size: int) -> None:
    """Refuse a place without room for a checkpoint.

    Args:
        where: from `check_output`.
        size: bytes that the checkpoint takes, about.

    Raises:
        OutputError: less is free there, or the process may not write files that large.
    """
    there = next(each for each in (where.folder, *where.folder.parents) if each.is_dir())
    free = shutil.disk_usage(there).free
    if size > free:
        raise OutputError(
            f"{where.named!r} has {free / 1e9:.3g} GB free, and the checkpoint takes about {size / 1e9:.3g} GB; free "
            "some space, or name a folder on another disk."
        )
    if sys.platform == "win32":
        return
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and size > limit:
        raise OutputError(
            f"files may have at most {limit / 1e9:.3g} GB here, and the checkpoint takes about {size / 1e9:.3g} GB; "
            "raise the limit (ulimit -f unlimited)."
        )


def content_of(folder: Path) -> list[Path]:
    """What lies in a folder, without what this package or the file system keeps there."""
    if not folder.is_dir():
        return []
    return [each for each in folder.iterdir() if not each.name.startswith(PREFIX) and each.name not in _NOT_CONTENT]


def _resolve(output: Path) -> Path:
    try:
        os.stat(output)
    except FileNotFoundError as error:
        if output.is_symlink():
            raise OutputError(
                f"the output {str(output)!r} is a link to {os.readlink(output)!r}, which does not exist; make that "
                "folder, or name another one."
            ) from error
    except OSError as error:
        raise explain(error, str(output)) from error
    return Path(os.path.realpath(output))


@contextmanager
def _parents_of(folder: Path) -> Iterator[None]:
    """The folders above, made where they are missing, and taken away again."""
    missing = [each for each in folder.parents if not each.exists()]
    made: list[Path] = []
    try:
        for each in reversed(missing):
            each.mkdir()
            made.append(each)
        yield
    finally:
        for each in reversed(made):
            each.rmdir()


def _try(folder: Path, named: str) -> bool:
    """Write on trial, and find out whether the folder can be replaced or has to be filled where it is.

    Raises:
        OSError: neither can be done.
    """
    if folder.is_dir() and Path.cwd() == folder:
        _try_at(folder, inside=True)  # whoever stands in it would stand in a deleted folder
        return True
    try:
        _try_at(folder, inside=False)
    except OSError as error:
        if error.errno not in _CANNOT_BE_RENAMED or not folder.is_dir():
            raise
        try:
            _try_at(folder, inside=True)
        except OSError as inner:
            # of two refusals, the one that says more about the place that was named
            raise inner if error.errno in (errno.EBUSY, errno.EXDEV) else error from None
        return True
    return False


def _try_at(folder: Path, inside: bool) -> None:
    work = make_work_folder(folder, inside)
    try:
        with (work.new / "trial").open("wb") as file:
            file.write(bytes(_TRIED))
            file.flush()
            os.fsync(file.fileno())
        sync_folder(work.new)
        if inside:
            return
        if not folder.exists():
            (work.new / "trial").unlink()
            work.new.rename(folder)
            folder.rename(work.new)
            return
        try:
            # Not meant to succeed: a folder cannot be renamed to one that is not empty. That is the last thing to be
            # looked at, so any other answer says that the folder cannot be renamed.
            folder.rename(work.new)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            work.new.rename(folder)
    finally:
        shutil.rmtree(work.folder)
        work.release()
