"""A finished checkpoint comes to its name: in one step where the file system can, and never by halves."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

from optimum_sab.hf.hub.authorship import CARD, keeps
from optimum_sab.hf.output.filesystem import swap, sync_folder
from optimum_sab.hf.output.members import CONFIG, is_member
from optimum_sab.hf.output.work_folder import KEPT, PLACING, WorkFolder


def place(work: WorkFolder) -> None:
    """Bring the finished checkpoint of a work folder to its name, in the place of what is there.

    Args:
        work: with everything written below `WorkFolder.new`, and on the disk.

    Raises:
        OSError: it could not be placed. Then everything is as it was: the name as before, the checkpoint in ``new``.
    """
    target = work.target
    if not work.state.inside and target.is_dir():
        work.new.chmod(stat.S_IMODE(target.stat().st_mode))  # who may read the folder is for its owner to say
    work.say(PLACING)
    if work.state.inside:
        move_in(work)
    elif target.is_dir() and any(target.iterdir()):
        if not swap(work.new, target):
            target.rename(work.old)
            try:
                work.new.rename(target)
            except OSError:
                work.old.rename(target)
                raise
    else:
        work.new.rename(target)  # takes the place of an empty folder, and is refused by any other


def move_in(work: WorkFolder) -> None:
    """The folder cannot be exchanged (a mount point, say), so its files come in, what makes them a model last.

    Raises:
        OSError: then none has come in.
    """
    target = work.target
    names = sorted((each.name for each in work.new.iterdir()), key=lambda name: (name == CONFIG, name))
    for name in names:
        if os.path.lexists(target / name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target / name))
    moved = []
    try:
        for name in names:
            if name == CONFIG:
                sync_folder(target)
            (work.new / name).rename(target / name)
            moved.append(name)
    except OSError:
        for name in reversed(moved):
            (target / name).rename(work.new / name)
        raise


def settle(work: WorkFolder) -> list[Path]:
    """After the new checkpoint has its name: bring along what was not the old one's, and delete the rest.

    Returns:
        What could not be brought along or deleted, and is kept.
    """
    target = work.target
    kept: list[Path] = []
    try:
        sync_folder(target)
        sync_folder(target.parent)
        for old in (work.new, work.old):  # where the swap, or the renaming, has put it
            for entry in sorted(old.iterdir()) if old.is_dir() else ():
                theirs = not is_member(entry) and not _is_our_card(entry)
                if entry.name not in work.state.names and theirs and not _brought(entry, target):
                    kept.append(entry)
        if kept:
            work.say(KEPT)
            return kept
        sync_folder(target)
        shutil.rmtree(work.folder)
    except OSError:
        return [work.folder]  # the checkpoint is where it belongs; what is left is for the user to see
    return []


def _is_our_card(entry: Path) -> bool:
    return entry.name == CARD and not keeps(entry)


def _brought(entry: Path, target: Path) -> bool:
    """Move an entry to the folder that has replaced its own, unless something of its name has come there."""
    if os.path.lexists(target / entry.name):
        return False
    try:
        entry.rename(target / entry.name)
    except OSError:
        return False
    return True
