"""The page of a report: one HTML file with everything in it, that asks for nothing from anywhere."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

from optimum_sab.errors import MissingDependencyError, ReportError
from optimum_sab.report.charts import draw_charts
from optimum_sab.report.words import bytes_in_words, number, percent, said, seconds_in_words

_TEMPLATE = "report.html"
_TURNS = re.compile("[\u202a-\u202e\u2066-\u2069]")


def render(document: Mapping[str, Any]) -> str:
    """The page of what report.json holds. All text in it is escaped: a model's words and names of files are not ours.

    Args:
        document: of `optimum_sab.report.files.REPORT_VERSION`.

    Raises:
        ReportError: something in it is not what it should be.
        MissingDependencyError: Jinja or matplotlib is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
    except ImportError as error:
        raise MissingDependencyError(
            "the page needs Jinja and matplotlib: pip install optimum-sab[report], then optimum-sab report FOLDER."
        ) from error
    environment = Environment(
        loader=PackageLoader("optimum_sab.report", "templates"),
        autoescape=True,
        finalize=_in_its_place,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=bytes_in_words, number=number, percent=percent, time=seconds_in_words, said=said, picture=_picture
    )
    try:
        template = environment.get_template(_TEMPLATE)
        return template.render(report=document, charts=draw_charts(document), modalities=_modalities(document))
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, UndefinedError) as error:
        if isinstance(error, ReportError):
            raise
        raise ReportError(
            f"report.json does not hold what this release writes ({type(error).__name__}: {error}); fetch it again."
        ) from error


def _in_its_place(value: Any) -> Any:
    """Text without the marks that turn the direction of writing for all that follows, our own words too."""
    return _TURNS.sub("", value) if type(value) is str else value


def _modalities(document: Mapping[str, Any]) -> list[str]:
    """In the order in which they come up."""
    return list(dict.fromkeys(name for block in document["blocks"] for name in block["by_modality"]))


def _picture(encoded: str) -> str:
    """A PNG as an address that holds it.

    Raises:
        ReportError: it is none.
    """
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ReportError(f"a picture in report.json is damaged ({error}); fetch it again.") from error
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ReportError("a picture in report.json is no PNG; fetch it again.")
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
