"""A picture of a comparison: quality against true bits, one line per family of methods."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optimum_sab.errors import ConfigError, MissingDependencyError
from optimum_sab.eval.quality import Measurement, Quality


def check_picture(path: Path) -> None:
    """Refuse what `draw_quality` could not write, before there is anything to draw.

    Raises:
        ConfigError: the ending is of no kind of picture, or the folder cannot be written to.
        MissingDependencyError: matplotlib is not installed.
    """
    kinds = _new_figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise ConfigError(
            f"--picture {str(path)!r} must end in one of {', '.join(f'.{each}' for each in sorted(kinds))}."
        )
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        raise ConfigError(
            f"--picture {str(path)!r} cannot be written ({error.strerror}); name another file."
        ) from error


def draw_quality(quality: Quality, path: Path) -> None:
    """Write the picture; the file's ending decides its format.

    Accuracy where there are tasks, else perplexity over the dense model's (mean over texts, logarithmic), else KL.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = _new_figure()
    axes = figure.subplots()
    title, value = _figure_of_merit(quality)
    families: dict[str, list[str]] = {}
    for row in quality.rows:
        names = families.setdefault(row.family, [])
        if row.method not in names:
            names.append(row.method)
    for family, names in families.items():
        points = sorted(
            (quality.spread(name, lambda row: row.bits_per_weight).mean, quality.spread(name, value), name)
            for name in names
        )
        bits, spreads = [p[0] for p in points], [p[1] for p in points]
        below = [s.mean - s.low for s in spreads]
        above = [s.high - s.mean for s in spreads]
        axes.errorbar(bits, [s.mean for s in spreads], yerr=[below, above], marker="o", capsize=3, label=family)
        for x, spread, name in points:
            axes.annotate(name, (x, spread.mean), textcoords="offset points", xytext=(5, 4), fontsize=7)
    if not quality.dense.accuracy:
        axes.set_yscale("log")
    axes.set_xlabel("true bits per weight")
    axes.set_ylabel(title)
    axes.set_title(quality.subject)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def _new_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "the picture needs matplotlib: pip install optimum-sab[report], or leave --picture out."
        ) from error
    return Figure(figsize=(7, 4.5), layout="constrained")


def _figure_of_merit(quality: Quality) -> tuple[str, Callable[[Measurement], float]]:
    dense = quality.dense
    if dense.accuracy:
        return "accuracy, mean of tasks", lambda row: row.mean_accuracy or 0.0
    if dense.perplexity:

        def ratio(row: Measurement) -> float:
            return sum(row.perplexity[s] / dense.perplexity[s] for s in dense.perplexity) / len(dense.perplexity)

        return "perplexity over the dense model's", ratio
    return "KL from the dense model, nats", lambda row: row.kl
