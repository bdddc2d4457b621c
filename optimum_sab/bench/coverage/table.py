"""The outcomes as rows of text, as a table for the documentation, and in numbers."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import date
from typing import Any

import torch
import transformers

from optimum_sab.bench.coverage.outcome import Outcome, totals
from optimum_sab.version import __version__
from optimum_sab.wording import counted

HEADER = f"{'family':<24} {'outcome':<10} {'pictures':>8} {'sound':>6} {'share':>6} {'seconds':>8}  reason"


def row(outcome: Outcome) -> str:
    """One line of the table."""
    share = "-" if outcome.share is None else f"{outcome.share:.2f}"
    return (
        f"{outcome.family:<24} {outcome.outcome:<10} {_yes(outcome.pictures):>8} {_yes(outcome.sound):>6} {share:>6} "
        f"{outcome.seconds:>8.1f}  {_reason(outcome)}"
    ).rstrip()


def total_line(outcomes: Sequence[Outcome]) -> str:
    """How many there are of each outcome."""
    counts = ", ".join(f"{count} {name}" for name, count in totals(outcomes).items())
    families = counted(len(outcomes), "family", "families")
    return f"{families}: {counts} (Transformers {transformers.__version__})"


def as_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All of it, for another program."""
    return {
        "totals": totals(outcomes),
        "environment": {
            "optimum_sab": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": date.today().isoformat(),
        },
        "rows": [each.as_json() for each in outcomes],
    }


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """A table with versions and date, as docs/models.md shows it."""
    lines = [
        f"{date.today().isoformat()}, optimum-sab {__version__}, Transformers {transformers.__version__}, "
        f"torch {torch.__version__}: {total_line(outcomes).partition(' (')[0]}.",
        "",
        "| family | outcome | pictures | sound | share | seconds | reason |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in outcomes:
        share = "" if each.share is None else f"{each.share:.2f}"
        reason = _reason(each).replace("|", "\\|").replace("<", "&lt;")
        cells = (each.family, each.outcome, _yes(each.pictures), _yes(each.sound), share, f"{each.seconds:.1f}", reason)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _yes(count: int) -> str:
    return "yes" if count else "no"


def _reason(outcome: Outcome) -> str:
    said = f"{outcome.stage}: {outcome.reason}" if outcome.stage and outcome.reason else outcome.reason
    if outcome.left_out:
        cannot = f"the dense model cannot {' or '.join(outcome.left_out)} here"
        said = f"{said}; {cannot}" if said else cannot
    return said
