"""What a run reads must not be what it replaces."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from optimum_sab.errors import OutputError


def refuse_source(folder: Path, named: str, sources: Sequence[str | Path]) -> None:
    """Refuse an output that is what the run reads, that holds it, or that lies in it, by whatever links and mounts.

    Args:
        folder: of the output, without links; need not exist.
        named: the output as the user wrote it.
        sources: folders, files, or names on the Hub, which stand for their folder in the cache.

    Raises:
        OutputError: it is one of the three.
    """
    output, above = _identity(folder), _identities(folder.parents)
    for source in sources:
        for place in _places(source):
            if output is not None and output == _identity(place):
                relation = "is"
            elif output is not None and output in _identities(place.parents):
                relation = "holds"
            elif place.is_dir() and _identity(place) in above:
                relation = "lies in"
            else:
                continue
            raise OutputError(
                f"the output {named!r} {relation} {str(source)!r}, which is read from; name a folder outside of it."
            )
        for file in _linked_files(source):
            if output is not None and output in _identities(file.parents):
                raise OutputError(
                    f"the output {named!r} holds {str(file)!r}, which {str(source)!r} links to and is read from; name "
                    "a folder outside of it."
                )


def _places(source: str | Path) -> list[Path]:
    """Where a source lies, without links; nothing for what is not on this machine."""
    path = Path(source)
    if path.exists():
        return [path.resolve()]
    name = str(source)
    if isinstance(source, Path) or name.count("/") > 1 or name.startswith((".", "/", "~")):
        return []
    cached = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))
    return [cached.resolve()] if cached.is_dir() else []


def _linked_files(source: str | Path) -> list[Path]:
    """What the links of a source folder lead to."""
    folder = Path(source)
    return [each.resolve() for each in folder.iterdir() if each.is_symlink()] if folder.is_dir() else []


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None  # not there, or not to be seen: then it is no folder of ours either
    return found.st_dev, found.st_ino


def _identities(paths: Sequence[Path]) -> set[tuple[int, int]]:
    return {each for each in map(_identity, paths) if each is not None}
