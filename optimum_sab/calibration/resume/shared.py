"""The folder of a run of several processes: the first reads and writes, the others learn what it read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from optimum_sab.calibration.ranks import Ranks
from optimum_sab.calibration.resume.folder import ResumeFolder


class SharedResumeFolder(ResumeFolder):
    """A `ResumeFolder` of which all ranks call the same methods in the same order.

    Args:
        folder: its path on the first rank.
        own: the folder, on the first rank; not used on others, which need not see it.
        ranks: of the run.
    """

    def __init__(self, folder: str | Path, own: ResumeFolder | None, ranks: Ranks) -> None:
        self.folder = Path(folder)
        self._own, self._ranks = own, ranks

    def knows(self, name: str) -> bool:
        return self._ranks.give(f"whether {name} is there", 0, lambda: self._first.knows(name))

    def read_json(self, name: str) -> Any:
        return self._ranks.give(f"reading {name}", 0, lambda: self._first.read_json(name))

    def write_json(self, name: str, value: Any) -> None:
        if self._ranks.first:
            self._first.write_json(name, value)

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self._ranks.give(f"reading {name}", 0, lambda: self._first.read_tensors(name))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        if self._ranks.first:
            self._first.write_tensors(name, tensors, about)

    @property
    def _first(self) -> ResumeFolder:
        assert self._own is not None
        return self._own
