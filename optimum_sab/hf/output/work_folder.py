"""The hidden folder in which a checkpoint is written before it has its name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from optimum_sab.hf.output.filesystem import lock, sync_folder, unlock

PREFIX = ".optimum-sab-"
WRITING, PLACING, KEPT = "writing", "placing", "kept"
_STATE = "state.json"


@dataclass(frozen=True)
class State:
    """What a work folder says about itself to a later run.

    Attributes:
        output: name of the folder that the checkpoint is for, beside the work folder, or around it.
        inside: whether the work folder lies in that folder.
        stage: "writing"; "placing" from when all is written and on its way to its name; "kept" where that failed.
        host: the machine it was made on; whether a process lives can be told only there.
        inode: of the finished folder, by which it is known under any name.
        names: what the finished folder holds.
    """

    output: str
    inside: bool
    stage: str = WRITING
    host: str = field(default_factory=platform.node)
    inode: int = 0
    names: tuple[str, ...] = ()


class WorkFolder:
    """A work folder that this process holds: ``new`` is for the checkpoint, ``old`` for the one that it replaces.

    Args:
        folder: its path.
        state: what it says about itself.
        handle: from `lock`; None where there are no locks.
    """

    def __init__(self, folder: Path, state: State, handle: int | None) -> None:
        self.folder = folder
        self.state = state
        self._handle = handle

    @property
    def new(self) -> Path:
        return self.folder / "new"

    @property
    def old(self) -> Path:
        return self.folder / "old"

    @property
    def target(self) -> Path:
        """The name that the checkpoint is for."""
        around = self.folder.parent
        return around if self.state.inside else around / self.state.output

    def say(self, stage: str) -> None:
        """Put down how far this is, before it is done."""
        if stage == PLACING:
            names = tuple(sorted(each.name for each in self.new.iterdir()))
            self.state = replace(self.state, inode=self.new.stat().st_ino, names=names)
        self.state = replace(self.state, stage=stage)
        partial = self.folder / f"{_STATE}.partial"
        with partial.open("w", encoding="utf-8") as file:
            json.dump(asdict(self.state), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.folder / _STATE)
        sync_folder(self.folder)

    def forget(self) -> None:
        """Say nothing any more, where not even that can be put down."""
        with suppress(OSError):
            (self.folder / _STATE).unlink()

    def release(self) -> None:
        """Leave the folder to whoever comes."""
        unlock(self._handle)
        self._handle = None


def make_work_folder(target: Path, inside: bool) -> WorkFolder:
    """Make a work folder for a target, on the same file system, and hold it.

    Raises:
        OSError: the system does not let it.
    """
    around, name = (target, target.name) if inside else (target.parent, target.name)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{tag(name)}-", dir=around))
        try:
            handle = lock(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # in the moment before it was held, another run took it for a dead one's
        work = WorkFolder(folder, State(name, inside), handle)
        try:
            work.say(WRITING)
            work.new.mkdir()  # with the mode that the user's mask gives it
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            work.release()
            raise
        return work


def tag(name: str) -> str:
    """Short for an output's name, which may itself be as long as a name can be."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:8]


def work_folders(around: Path) -> Iterator[Path]:
    """The work folders, of whomever, in a folder."""
    try:
        entries = sorted(around.iterdir())
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            return
        raise
    for each in entries:
        if each.name.startswith(PREFIX) and each.is_dir() and not each.is_symlink():
            yield each


def read_state(folder: Path) -> State | None:
    """What a work folder says about itself; None where it was ended before it could, or says what is not understood."""
    try:
        found = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        return State(**{**found, "names": tuple(found["names"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
