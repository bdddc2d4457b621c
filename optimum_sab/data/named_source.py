"""What a string that is given as calibration data names: a file, or a dataset of the Hub; nothing else is guessed."""

from __future__ import annotations

import difflib
import json
import mimetypes
import os
import re
from collections.abc import Iterable
from pathlib import Path

from optimum_sab.errors import SampleError
from optimum_sab.presets import BUILTIN, SELF
from optimum_sab.sources import is_barred
from optimum_sab.wording import nearest

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
"""Of the files that are read."""
OTHER_SUFFIXES = (
    ".txt",
    ".csv",
    ".tsv",
    ".md",
    ".yaml",
    ".yml",
    ".arrow",
    ".gz",
    ".zst",
    ".zip",
    ".bz2",
    ".xz",
    ".tar",
)
"""Of files that hold data and are not read."""

_DATASET = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_TO_GIVE = (
    f"a list of texts or chats, the path of a {' or '.join((SUFFIXES[0], *SUFFIXES[2:]))} file, a Hub dataset as "
    f"'owner/name', {BUILTIN!r} or {SELF!r}"
)


def named_source(source: str | os.PathLike[str]) -> Path | str:
    """The file that is named, as a path, or the name of a dataset.

    Raises:
        SampleError: it is a folder, a file of another kind, looks like a path and leads nowhere or where it may not be
            looked at, or is just a text.
    """
    name = os.path.expanduser(os.fspath(source))
    suffix = os.path.splitext(name)[1].lower()
    if is_barred(name):
        raise SampleError(
            f"the calibration file {_shown(str(source))} may not be looked at; have the permissions of its folder "
            "changed, or name another file."
        )
    if os.path.isdir(name):
        inside = sorted(each for each in _entries(name) if each.lower().endswith(SUFFIXES))
        hint = f"name a file in it, such as {inside[0]!r}" if inside else "name a file"
        raise SampleError(f"calibration={str(source)!r} is a folder; {hint}.")
    if os.path.isfile(name):
        if suffix in SUFFIXES:
            return Path(name)
        if (mimetypes.guess_type(name)[0] or "").startswith("image/"):
            row = json.dumps({"question": "What is it?", "answer": "...", "image": str(source)})
            raise SampleError(
                f"calibration={str(source)!r} is a picture; name it in a row, such as {row}, and give a .jsonl file of "
                "such rows, or a list of them."
            )
        raise SampleError(
            f"calibration={str(source)!r} is a file of a kind that is not read; the kinds are {', '.join(SUFFIXES)}. "
            'On the command line give a .jsonl file with a line such as {"text": "..."} for each text; in Python also '
            f"a list of texts, such as calibration={opened(str(source), suffix)}."
        )
    if isinstance(source, str) and names_dataset(name):
        return name
    if os.path.isfile(name.rpartition(":")[0]):
        raise SampleError(
            f"calibration={_shown(name)} names a split of a file, which has none; give {name.rpartition(':')[0]!r}."
        )
    if not isinstance(source, str) or (_names_file(name) and "\n" not in name) or _looks_like_path(name):
        raise SampleError(f"the calibration file {_shown(str(source))} does not exist{_nearest(name)}")
    close = nearest(name.lower(), (BUILTIN, SELF))
    hint = f"did you mean {close!r}? Otherwise give" if close else "give"
    raise SampleError(f"calibration={_shown(name)} is one text, which is no calibration data; {hint} {_TO_GIVE}.")


def names_dataset(name: str) -> bool:
    """Whether a name that is no file's here is a dataset's on the Hub: ``owner/name``, or ``owner/name:split``."""
    return bool(_DATASET.fullmatch(name)) and not _names_file(name) and not name.startswith(".")


def recorded_source(source: str | os.PathLike[str]) -> str:
    """How a source is told of to others: a file without its folders, which are nobody else's, a dataset as it is."""
    name = os.path.expanduser(os.fspath(source))
    return os.path.basename(name) if os.path.isfile(name) else name


def _names_file(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()
    known = (*SUFFIXES, *OTHER_SUFFIXES)
    return bool(suffix) and (suffix in known or nearest(suffix, SUFFIXES) is not None)


def _looks_like_path(name: str) -> bool:
    return name.startswith(("~", "./", "../", "/", ".\\")) or (
        not re.search(r"\s", name) and ("/" in name or "\\" in name or "\0" in name)
    )


def _nearest(name: str) -> str:
    folder, file = os.path.split(name)
    if folder and not os.path.isdir(folder):
        return f", nor does its folder {_shown(folder)}."
    close = _near_file(file, _entries(folder or "."))
    if close is None:
        return "; name one that is there, or an absolute path: others count from the working directory."
    return f"; did you mean {os.path.join(folder, close)!r}?"


def _near_file(file: str, entries: Iterable[str]) -> str | None:
    """The file that was meant, by its name without the suffix, which makes any two .jsonl files look alike."""
    stems: dict[str, list[str]] = {}
    for each in entries:
        stems.setdefault(os.path.splitext(each)[0], []).append(each)
    stem = nearest(os.path.splitext(file)[0], stems)
    return None if stem is None else difflib.get_close_matches(file, stems[stem], 1, 0.0)[0]


def opened(name: str, suffix: str) -> str:
    """Python that makes a list of texts of a file: of rows where it is a table, else of paragraphs."""
    if suffix in (".csv", ".tsv"):
        delimiter = ", delimiter='\\t'" if suffix == ".tsv" else ""
        return f'[row["text"] for row in csv.DictReader(open({name!r}){delimiter})]'
    return f'open({name!r}).read().split("\\n\\n")'


def _entries(folder: str) -> list[str]:
    """Names in a folder, for a hint; none where they may not be read."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 200 else repr(text[:60]) + "…"
