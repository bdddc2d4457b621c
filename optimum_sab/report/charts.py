"""The pictures of a report, as SVG that stands in the page: it takes its colours and its typeface from there."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optimum_sab.errors import MissingDependencyError
from optimum_sab.report.words import bytes_in_words, seconds_in_words

# What is drawn in these becomes what the page calls so, which is another in the dark.
_TEXT, _LINE = "#010101", "#020202"
_SERIES = ("#030301", "#030302", "#030303", "#030304")
_NAMED = {_TEXT: "currentColor", _LINE: "var(--line)", **{c: f"var(--series{i})" for i, c in enumerate(_SERIES)}}
_SIZE = (4.6, 3.0)  # inches; narrow, so that letters stay legible on a phone
_MARKED = 40  # blocks up to which each has a mark of its own
_SHOWN = 8  # bars at most


@dataclass(frozen=True)
class Chart:
    """A picture.

    Attributes:
        title: above it.
        svg: markup.
        alt: what is to be seen, in words.
        note: what is drawn, below it.
    """

    title: str
    svg: str
    alt: str
    note: str


def draw_charts(document: Mapping[str, Any]) -> dict[str, Chart]:
    """By name: "errors", "drift", "significance", "bytes" and "time", those for which there is something to draw.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    blocks = document["blocks"]
    modalities = list(dict.fromkeys(name for block in blocks for name in block["by_modality"]))
    errors = {name: [block["by_modality"].get(name) for block in blocks] for name in modalities}
    charts = {
        "errors": _lines(
            "Error by block",
            errors,
            "relative output error",
            "Mean over the linears of a block of Σ‖Wx − Qx̂‖² / Σ‖Wx‖² on calibration tokens of each modality.",
        ),
        "drift": _lines(
            "Drift by block",
            {"drift": [block["drift"] for block in blocks]},
            "Σ‖h − ĥ‖² / Σ‖h‖²",
            "How far hidden states behind each block are from the dense model's, on the calibration samples.",
        ),
        "significance": _lines(
            "r and ρ over depth",
            {
                "r": [_part(block["significance"], "ratio") for block in blocks],
                "ρ": [_part(block["significance"], "spatial") for block in blocks],
            },
            "share, mean",
            "Of the linears that read each block's input first: r, the share of their significance that is of one "
            "modality alone, and ρ, its mean over columns (1: one modality, 0: all alike).",
        ),
    }
    sizes = document["sizes"]
    if sizes is not None:
        parts = {"binarized linears": sizes["packed"], **sizes["dense"]}
        charts["bytes"] = _bars("Where the bytes are", parts, bytes_in_words, "Of the finished model, as it is stored.")
    times = {each["name"]: each["seconds"] for each in document["stages"]}
    charts["time"] = _bars("Where the time went", times, seconds_in_words, "Wall time of each stage of the run.")
    return {name: chart for name, chart in charts.items() if chart is not None}


def _part(of: Mapping[str, Any] | None, name: str) -> Any:
    return None if of is None else of[name]


def _lines(title: str, series: Mapping[str, Sequence[float | None]], label: str, note: str) -> Chart | None:
    """One line for each series over the blocks."""
    drawn = {name: values for name, values in series.items() if any(v is not None for v in values)}
    if not drawn:
        return None
    figure, axes = _new_axes()
    told = []
    for index, (name, values) in enumerate(drawn.items()):
        blocks = [i for i, v in enumerate(values) if v is not None]
        heights = [float(v) for v in values if v is not None]
        axes.plot(
            blocks,
            heights,
            color=_SERIES[index % len(_SERIES)],
            linestyle=("-", "--", "-.", ":")[index % 4],
            marker="o" if len(values) <= _MARKED else None,
            markersize=3.5,
            label=_plain(name),
        )
        told.append(
            f"{name} from {heights[0]:.3g} to {heights[-1]:.3g}, between {min(heights):.3g} and {max(heights):.3g}"
        )
    axes.set_ylim(bottom=0.0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("block", color=_TEXT)
    axes.set_ylabel(label, color=_TEXT)
    if len(drawn) > 1:
        axes.legend(frameon=False, labelcolor=_TEXT)
    blocks_in_words = f"over {len(next(iter(drawn.values())))} blocks"
    return Chart(title, _svg(figure, title), f"{title}, {blocks_in_words}: {'; '.join(told)}.", note)


def _bars(title: str, parts: Mapping[str, float], words: Callable[[float], str], note: str) -> Chart | None:
    """One bar for each part, the largest on top; small ones together."""
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    shown, rest = ordered[:_SHOWN], ordered[_SHOWN:]
    if rest:
        shown.append((f"{len(rest)} others", sum(size for _, size in rest)))
    if not shown or not max(size for _, size in shown) > 0:
        return None
    figure, axes = _new_axes()
    names, widths = [_plain(_shortened(name)) for name, _ in shown], [float(size) for _, size in shown]
    bars = axes.barh(range(len(shown)), widths, color=_SERIES[0], height=0.6)
    axes.set_yticks(range(len(shown)), names)
    axes.invert_yaxis()
    axes.bar_label(bars, [words(width) for width in widths], padding=3, color=_TEXT, fontsize=9)
    axes.set_xlim(right=1.35 * max(widths))
    axes.set_xticks([])
    axes.grid(visible=False)
    told = "; ".join(f"{name} {words(size)}" for name, size in shown)
    return Chart(title, _svg(figure, title), f"{title}: {told}.", note)


def _shortened(name: str) -> str:
    return name if len(name) <= 26 else f"{name[:25]}…"


def _plain(text: str) -> str:
    """A dollar sign begins a formula to matplotlib."""
    return str(text).replace("$", r"\$")


def _new_axes() -> tuple[Any, Any]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "the pictures need matplotlib: pip install optimum-sab[report], then optimum-sab report FOLDER."
        ) from error
    with rc_context({"font.size": 10}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_LINE)
    axes.tick_params(color=_LINE, labelcolor=_TEXT)
    axes.grid(axis="y", color=_LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, name: str) -> str:
    """Markup without what only a file of its own needs, the same for the same picture."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for drawn, named in _NAMED.items():
        text = text.replace(drawn, named)
    return re.sub(r'(<svg\b[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
