"""The state of an interrupted tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from optimum_sab.calibration.resume.folder import ResumeFolder

_FILE = "tuning.safetensors"


class TuningStore(Protocol):
    """Where the state of the tuning is kept between runs."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        """The state; None before there is one."""
        ...

    def save(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        """Keep it in the place of the one before."""
        ...


class FolderTuningStore:
    """In the folder of a run that can be resumed."""

    def __init__(self, folder: ResumeFolder) -> None:
        self._folder = folder

    def load(self) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        return self._folder.read_tensors(_FILE) if self._folder.knows(_FILE) else None

    def save(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        self._folder.write_tensors(_FILE, tensors, numbers)
