"""What a person sees while a model is binarized."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from optimum_sab.calibration.blocks.report import BlockReport
from optimum_sab.calibration.progress import OnStep, no_step
from optimum_sab.wording import counted

INTERVAL = 30.0  # seconds between two lines about the same stage
READING_DELAY = 5.0  # seconds, from which on one is told how many samples are read


class Progress:
    """A bar per stage, or lines.

    Args:
        style: "bar"; "lines" for a line per block and, where nobody watches a bar move (a file, a pipe), a line per
            stage in the place of the bars; "none".
    """

    def __init__(self, style: str) -> None:
        self._lines = style == "lines"
        self._bars = style != "none" and (style == "bar" or sys.stderr.isatty())
        self._open: dict[str, tqdm] = {}

    def steps(self, title: str, unit: str, delay: float = 0.0) -> OnStep:
        """What is told how far a stage is.

        Args:
            title: of the stage.
            unit: of its steps.
            delay: seconds, below which a stage is done without a word.
        """
        if self._bars:
            return self._moving(title, unit, delay)
        return _written(title, unit, delay) if self._lines else no_step

    def on_block(self, report: BlockReport, blocks: int) -> None:
        """What is told of every block."""
        if self._bars:
            bar = self._bar("Binarizing", "block")
            bar.total = blocks
            bar.set_postfix(error=f"{report.error:.4f}", refresh=False)
            bar.update()
        if self._lines:
            drift = "" if report.drift is None else f"   drift {report.drift:.4f}"
            line = f"block {report.index:3d}   error {report.error:.4f}{drift}   {report.seconds:.1f} s"
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leave the bars as they are."""
        for bar in self._open.values():
            bar.close()
        self._open.clear()

    def _moving(self, title: str, unit: str, delay: float) -> OnStep:
        def on_step(done: int, total: int) -> None:
            bar = self._bar(title, unit, delay)
            bar.total = total
            bar.update(done - bar.n)

        return on_step

    def _bar(self, title: str, unit: str, delay: float = 0.0) -> tqdm:
        if title not in self._open:
            self.close()  # one stage at a time
            self._open[title] = tqdm(desc=title, unit=unit, delay=delay)
        return self._open[title]


def _written(title: str, unit: str, delay: float) -> OnStep:
    """A line when a stage ends, and on the way where it takes long."""
    started = told = time.monotonic()

    def on_step(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - started >= delay and (done >= total or now - told >= INTERVAL):
            told = now
            tqdm.write(f"{title}: {done:,} of {counted(total, unit)}, {now - started:.0f} s", file=sys.stderr)

    return on_step


@contextmanager
def shown_progress(style: str) -> Iterator[Progress]:
    """The bars, closed whatever happens."""
    progress = Progress(style)
    try:
        yield progress
    finally:
        progress.close()
