"""Write a checkpoint so that its name stands for all of it, and so that what is finished is not lost."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from optimum_sab.errors import OutputError, OutputExistsError, warn
from optimum_sab.explanation import explain
from optimum_sab.hf.hub.authorship import CARD, keeps
from optimum_sab.hf.output.filesystem import sync_tree
from optimum_sab.hf.output.place import OutputPlace, content_of
from optimum_sab.hf.output.placing import place, settle
from optimum_sab.hf.output.work_folder import KEPT, WorkFolder, make_work_folder
from optimum_sab.report.files import write_report


@contextmanager
def written_whole(where: OutputPlace) -> Iterator[Path]:
    """A folder to write into, which gets its name at the end, and goes if there is an error on the way.

    Where a checkpoint is replaced, whatever else lies in its folder is kept. When the written folder cannot get its
    name, it stays where it is.

    Args:
        where: from `check_output`, before the work.

    Raises:
        OutputError: the last step failed; the message says where the written folder is.
    """
    where.folder.parent.mkdir(parents=True, exist_ok=True)
    work = make_work_folder(where.folder, where.inside)
    try:
        try:
            yield work.new
            sync_tree(work.new)
        except BaseException:
            shutil.rmtree(work.folder)
            raise
        try:
            if content_of(where.folder) and not where.overwrite:
                raise OutputExistsError(f"{where.named!r} has been filled meanwhile.")
            place(work)
        except OSError as error:
            raise _finished(error, where, work) from error
        kept = settle(work)
    finally:
        work.release()
    if kept:
        warn(f"{where.named!r} is written; left of what it replaces: {', '.join(repr(str(each)) for each in kept)}.")


def save_packed(model: Any, processor: Any, where: OutputPlace) -> None:
    """Save model, processor, and the report of a model that was just made; they appear only when all is written.

    Args:
        model: packed.
        processor: or tokenizer.
        where: from `check_output`, before the work.

    Raises:
        OutputError: the place cannot be written to any more; the message says where the checkpoint is instead.
    """

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        _save_report(model, folder)
        if keeps(where.folder / CARD):
            (folder / CARD).unlink(missing_ok=True)  # the user's comes along, or stays

    try:
        with written_whole(where) as folder:
            save(folder)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise  # it is finished, and said to be somewhere
        raise _saved_elsewhere(error, where, save) from error


def _save_report(model: Any, folder: Path) -> None:
    """A disk that is full is for the caller to see; nothing else about a report may cost the model."""
    report = getattr(getattr(model, "hf_quantizer", None), "report", None)
    if report is None:
        return
    try:
        write_report(folder, report.to_dict())
    except OSError:
        raise
    except Exception as error:
        warn(f"the report of this run could not be written ({type(error).__name__}: {error}); the model is.")


def _finished(error: OSError, where: OutputPlace, work: WorkFolder) -> OutputError:
    try:
        work.say(KEPT)
    except OSError:
        work.forget()  # the next run leaves alone what says nothing about itself
    reason = error if isinstance(error, OutputExistsError) else explain(error, where.named, "rename the checkpoint to")
    return OutputError(f"{reason} The checkpoint is finished and lies in {str(work.new)!r}; move it from there.")


def _saved_elsewhere(error: Exception, where: OutputPlace, save: Callable[[Path], None]) -> OutputError:
    """Hours of work are in memory only, and the place is not what it was: try the system's folder for such things."""
    reason = explain(error, where.named)
    elsewhere = Path(tempfile.mkdtemp(prefix="optimum-sab-"))
    try:
        save(elsewhere)
    except (OSError, SafetensorError) as second:
        shutil.rmtree(elsewhere)
        return OutputError(f"{reason} It could not be saved in {tempfile.gettempdir()!r} either ({second}).")
    return OutputError(f"{reason} The checkpoint was saved to {str(elsewhere)!r} instead; move it from there.")
