"""What a person sees while a model is binarized."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from optimum_sab.calibration.pipeline import BlockReport

OnBlock = Callable[[BlockReport, int], None]


@contextmanager
def block_progress(style: str) -> Iterator[OnBlock | None]:
    """A callback for `binarize`: a bar over the blocks, a bar with one line per block, or nothing."""
    if style == "none":
        yield None
        return
    with tqdm(desc="Binarizing", unit="block") as bar:

        def on_block(report: BlockReport, blocks: int) -> None:
            bar.total = blocks
            bar.set_postfix(error=f"{report.error:.4f}", refresh=False)
            bar.update()
            if style == "lines":
                drift = "" if report.drift is None else f"   drift {report.drift:.4f}"
                bar.write(
                    f"block {report.index:3d}   error {report.error:.4f}{drift}   {report.seconds:.1f} s",
                    file=sys.stderr,
                )

        yield on_block
