"""What a person sees while a model is binarized."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from optimum_sab.calibration.blocks.report import BlockReport
from optimum_sab.calibration.progress import OnStep, no_step


class Progress:
    """A bar per stage.

    Args:
        style: "bar"; "lines" for a line per block beside the bars; "none".
    """

    def __init__(self, style: str) -> None:
        self._style = style
        self._bars: dict[str, tqdm] = {}

    def steps(self, title: str, unit: str) -> OnStep:
        """What is told how far a stage is."""
        if self._style == "none":
            return no_step

        def on_step(done: int, total: int) -> None:
            bar = self._bar(title, unit)
            bar.total = total
            bar.update(done - bar.n)

        return on_step

    def on_block(self, report: BlockReport, blocks: int) -> None:
        """What is told of every block."""
        if self._style == "none":
            return
        bar = self._bar("Binarizing", "block")
        bar.total = blocks
        bar.set_postfix(error=f"{report.error:.4f}", refresh=False)
        bar.update()
        if self._style == "lines":
            drift = "" if report.drift is None else f"   drift {report.drift:.4f}"
            line = f"block {report.index:3d}   error {report.error:.4f}{drift}   {report.seconds:.1f} s"
            bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leave the bars as they are."""
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()

    def _bar(self, title: str, unit: str) -> tqdm:
        if title not in self._bars:
            self.close()  # one stage at a time
            self._bars[title] = tqdm(desc=title, unit=unit)
        return self._bars[title]


@contextmanager
def shown_progress(style: str) -> Iterator[Progress]:
    """The bars, closed whatever happens."""
    progress = Progress(style)
    try:
        yield progress
    finally:
        progress.close()
