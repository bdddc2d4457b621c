"""Whether a checkpoint's files were all written by one save: Transformers writes them in place, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from optimum_sab.errors import FormatError, warn
from optimum_sab.hf.stored_files import INDEX, SHARD, WEIGHTS, StoredFile, read_index

_REMEDY = (
    "the folder holds a mixture of two saves, or one that was interrupted. Save the model again into an empty folder, "
    "or fetch the checkpoint again."
)


def check_one_save(files: Sequence[StoredFile], expected: str | None) -> None:
    """The files must belong to each other and to the configuration, and none may be missing.

    Args:
        files: of the checkpoint.
        expected: the save that the configuration was written by; None where it does not say.

    Raises:
        FormatError: files of different saves, a missing shard, tensors that a file lost or gained, an index that says
            otherwise than the files.
    """
    for file in files:
        if file.save != files[0].save:
            raise FormatError(f"{files[0].name} and {file.name} were not written by one save: {_REMEDY}")
        if file.save is not None and file.save != expected:
            raise FormatError(f"config.json and {file.name} were not written by one save: {_REMEDY}")
        if file.save is not None:
            _check_content(file)
    _check_shards(files)
    if files and files[0].save is None and expected is not None:
        warn(
            f"{files[0].name} has no digests although config.json was saved with them: another program wrote it again, "
            "or a save was interrupted. It is loaded unverified; save the model again to have digests."
        )


def _check_content(file: StoredFile) -> None:
    lost = sorted(set(file.digests) - set(file.tensors))
    if lost:
        raise FormatError(f"{lost[0]}: missing, though {file.name} was saved with it; fetch the checkpoint again.")
    gained = sorted(set(file.tensors) - set(file.digests))
    if gained:
        raise FormatError(f"{gained[0]}: in {file.name}, which was saved without it; fetch the checkpoint again.")


def _check_shards(files: Sequence[StoredFile]) -> None:
    """A shard's name says how many there are."""
    names = {file.name for file in files}
    for file in files:
        match = SHARD.fullmatch(file.name)
        if match is None:
            continue
        stem, count = match[1], int(match[3])
        wanted = {f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)}
        if wanted - names:
            raise FormatError(
                f"{min(wanted - names)!r} is not among the files that are read, though {file.name} names {count}: "
                f"{_REMEDY}"
            )
    index = Path(files[0].path).parent / INDEX if files else None
    if index is None or not index.is_file() or WEIGHTS in names:
        return  # an index beside a single file is a leftover that nobody reads
    where = {name: file.name for file in files for name in file.tensors}
    for tensor, name in read_index(index).items():
        if where.get(tensor) != name:
            raise FormatError(f"{tensor}: {INDEX} has it in {name!r}, where it is not: {_REMEDY}")
