"""The two files of a report: report.json, and report.html that is made of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimum_sab.errors import MissingDependencyError, OutputError, ReportError, warn
from optimum_sab.version import QUANT_METHOD

REPORT_JSON, REPORT_HTML = "report.json", "report.html"
REPORT_VERSION = 1


def write_report(folder: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """Write both files; report.json alone, with a warning, where the page cannot be made.

    Args:
        folder: exists.
        document: what report.json is to hold.

    Raises:
        OSError: the folder cannot be written to.
    """
    where = Path(folder)
    _write(where / REPORT_JSON, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    try:
        page = _page(document)
    except (MissingDependencyError, ReportError) as error:
        warn(f"{REPORT_JSON} is written, {REPORT_HTML} is not: {error}")
        return
    _write(where / REPORT_HTML, page)


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What the report.json of a checkpoint holds.

    Raises:
        ReportError: there is no such folder, no report.json in it, or one that this release does not read.
    """
    named = os.fspath(folder)
    where = Path(folder)
    if not where.is_dir():
        raise ReportError(f"{named!r} is no folder; name the folder of a packed checkpoint.")
    if (where / REPORT_JSON).exists() and not (where / REPORT_JSON).is_file():  # reading a pipe would wait for ever
        raise ReportError(f"{REPORT_JSON} in {named!r} is no file; remove it, and fetch the checkpoint's again.")
    try:
        found = json.loads((where / REPORT_JSON).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if _packed(where) is None:
            raise ReportError(
                f"{named!r} holds no packed checkpoint, of which alone there are reports; name the output of "
                "`optimum-sab quantize`."
            ) from error
        raise ReportError(
            f"{named!r} holds no {REPORT_JSON}: an earlier release made it, or save_pretrained alone. It is written by "
            "`optimum-sab quantize`, and by model.hf_quantizer.report.save(folder) of a model that was just made."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{REPORT_JSON} in {named!r} cannot be read ({error}); fetch it again.") from error
    version = found.get("report_version") if isinstance(found, dict) else None
    if version != REPORT_VERSION:
        raise ReportError(
            f"{REPORT_JSON} in {named!r} has the report_version {version!r}, and this release reads {REPORT_VERSION}; "
            "upgrade optimum-sab, or quantize the model again."
        )
    return dict(found)


def _packed(folder: Path) -> dict[str, Any] | None:
    """How a config.json there says that the model was packed; None where none says so."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    own = config.get("quantization_config") if isinstance(config, dict) else None
    return own if isinstance(own, dict) and own.get("quant_method") == QUANT_METHOD else None


def _check_of_this_model(folder: Path, document: Mapping[str, Any]) -> None:
    """A model that was saved over another one has left that one's report where it was."""
    measured = (_packed(folder) or {}).get("measured")
    own, told = (each.get("agreement") if isinstance(each, Mapping) else None for each in (measured, document))
    if own and told and _divergences(own) != _divergences(told):
        raise ReportError(
            f"{REPORT_JSON} in {os.fspath(folder)!r} is of another model than the one that was saved there since; "
            "model.hf_quantizer.report.save(folder) of the one that was just made writes it anew, and so does "
            "`optimum-sab quantize`. Remove it otherwise."
        )


def _divergences(agreement: Any) -> Any:
    """By kind, in the digits that a config.json keeps; anything that is none of ours as it is."""
    try:
        return {kind: None if each["kl"] is None else round(each["kl"], 4) for kind, each in agreement.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        return agreement


def write_page(folder: str | os.PathLike[str]) -> Path:
    """Make report.html anew from report.json.

    Returns:
        Where it is.

    Raises:
        ReportError: see `read_report`, something in the file is not what it should be, or it is of another model.
        MissingDependencyError: see `optimum_sab.report.page.render`.
        OutputError: the folder cannot be written to.
    """
    document = read_report(folder)
    _check_of_this_model(Path(folder), document)
    page = _page(document)
    path = Path(folder) / REPORT_HTML
    try:
        _write(path, page)
    except OSError as error:
        raise OutputError(
            f"{REPORT_HTML} cannot be written to {os.fspath(folder)!r} ({error.strerror}); copy {REPORT_JSON} to a "
            "folder that can be written to, and name that one."
        ) from error
    return path


def _page(document: Mapping[str, Any]) -> str:
    from optimum_sab.report.page import render  # whose packages are slow to import

    return render(document)


def _write(path: Path, text: str) -> None:
    """Under its name there is the whole file, or what was there before.

    What is no Unicode, as in the name of a folder that is not in UTF-8, is written as JSON spells it.
    """
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
