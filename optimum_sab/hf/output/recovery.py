"""What runs that were ended from outside have left beside an output: carried through, removed or named."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from optimum_sab.errors import warn
from optimum_sab.hf.output.filesystem import lock, unlock
from optimum_sab.hf.output.placing import move_in, settle
from optimum_sab.hf.output.work_folder import KEPT, PREFIX, WRITING, WorkFolder, read_state, tag, work_folders


def recover(target: Path) -> None:
    """Bring in order what dead runs have left of this output. What living runs hold stays as it is.

    A partial checkpoint is removed, a replacement that had begun is carried through. A finished checkpoint that never
    came to its name is named in a warning, and so is what dead runs with other outputs have left beside.

    Args:
        target: the output's folder, without links.
    """
    others = []
    for around in (target.parent, target):
        for folder in work_folders(around):
            try:
                handle = lock(folder)
            except (BlockingIOError, FileNotFoundError, PermissionError):
                continue  # it lives, has just gone, or is not for us to see
            try:
                if not folder.name.startswith(f"{PREFIX}{tag(target.name)}-"):
                    others.append(folder)
                else:
                    _recover_one(folder, target, handle)
            finally:
                unlock(handle)
    if others:
        warn(
            f"interrupted runs with other outputs have left {', '.join(repr(str(each)) for each in others)}: the next "
            "run with such an output sees to it; delete them if there will be none."
        )


def _recover_one(folder: Path, target: Path, handle: int | None) -> None:
    """Args: a work folder of this output; the output; the handle that says that nobody else holds it, if any can."""
    state = read_state(folder)
    mine = os.name != "posix" or folder.stat().st_uid == os.geteuid()
    if state is None:
        if handle is not None and mine and not any((folder / name).exists() for name in ("new", "old")):
            shutil.rmtree(folder)  # ended before it had begun
            return
        warn(f"{str(folder)!r} is left of another run and does not say of which; delete it if nothing in it is needed.")
        return
    if handle is None or not mine or state.host != platform.node() or state.output != target.name:
        warn(f"{str(folder)!r} is of another run, which may still go on elsewhere; delete it if it does not.")
        return
    work = WorkFolder(folder, state, None)
    if state.stage == WRITING:
        shutil.rmtree(folder)
    elif state.stage == KEPT or not _carried_through(work, target):
        warn(
            f"an earlier run with the output {str(target)!r} has left what it could not bring there in "
            f"{str(folder)!r}; move what you need away from it, and delete it."
        )


def _carried_through(work: WorkFolder, target: Path) -> bool:
    """Go on with a replacement from where it was ended; False where it had not begun, or cannot go on."""
    try:
        if work.state.inside:
            if all((work.new / name).exists() for name in work.state.names):
                return False
            move_in(work)
        elif work.old.exists() and not target.exists():
            work.new.rename(target)
        elif not target.exists() or target.stat().st_ino != work.state.inode:
            return False
    except OSError:
        return False  # what stands in the way is for the user to see; nothing has been touched
    return not settle(work)
