"""One model on its way from dense to packed, and what its stages hand on to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from optimum_sab.calibration.blocks.report import BlockReport
from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.progress import OnStep, no_step
from optimum_sab.calibration.ranks import Ranks
from optimum_sab.calibration.resume.folder import ResumeFolder
from optimum_sab.calibration.samples.calibration_samples import CalibrationSamples
from optimum_sab.calibration.streams.mapped import MappedActivations
from optimum_sab.calibration.streams.placement import home_of
from optimum_sab.errors import CalibrationError
from optimum_sab.nn.selection import Selection

Kept = TypeVar("Kept")


class Progress(Protocol):
    """What is told how a run is getting on."""

    def steps(self, title: str, unit: str) -> OnStep:
        """What is told how far one stage is; it may never be called."""
        ...

    def on_block(self, report: BlockReport, blocks: int) -> None:
        """Told of every block that is finished, of how many."""
        ...


class Silent:
    """Nobody is told."""

    def steps(self, title: str, unit: str) -> OnStep:
        return no_step

    def on_block(self, report: BlockReport, blocks: int) -> None:
        """Nothing."""


@dataclass
class Run:
    """What all stages work on.

    Args:
        model: dense, loaded; binarized in place.
        selection: the linears and their settings; the allocation puts others in their place.
        options: what is asked for.
        progress: what is told how far it is.
        resume: what an interrupted run has finished, and where this one keeps what it finishes; None without.
        processor: the model's processor or tokenizer; a stage may find it.
        ranks: the processes that share the work; all have the model and go through the same stages.

    Attributes:
        dtype: in which the linears that are binarized compute.
    """

    model: nn.Module
    selection: Selection
    options: RunOptions = field(default_factory=RunOptions)
    progress: Progress = field(default_factory=Silent)
    resume: ResumeFolder | None = None
    processor: Any = None
    ranks: Ranks = field(default_factory=Ranks)
    _kept: dict[type, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        first = self.model.get_submodule(next(iter(self.selection.settings)))
        assert isinstance(first.weight, torch.Tensor)
        self.dtype: torch.dtype = first.weight.dtype

    @property
    def home(self) -> torch.device:
        """Where the model takes its inputs."""
        return home_of(self.model)

    @property
    def two_streams(self) -> bool:
        """Whether a dense stream runs beside the quantized one."""
        return self.options.two_streams(self.selection)

    @property
    def samples(self) -> CalibrationSamples:
        """The calibration samples, on the model's device.

        Raises:
            CalibrationError: no stage has read any.
        """
        found = self.kept(CalibrationSamples)
        if found is None:
            raise CalibrationError("no stage before this one reads calibration samples; put one into the list.")
        return found

    def bound(self) -> MappedActivations | None:
        """What bounds the activations of samples that wait, a new one; None for no bound.

        The files lie in the resume folder, where room was found for work to be kept.
        """
        room, folder = self.options.activation_memory, self.options.resume_folder
        there = folder is not None and Path(folder).is_dir()  # on this rank's machine
        return None if room is None else MappedActivations(room, folder if there else None)

    def keep(self, value: Any) -> None:
        """Hand something on to later stages, which ask for it by its class."""
        self._kept[type(value)] = value

    def kept(self, kind: type[Kept]) -> Kept | None:
        """What an earlier stage has handed on; None where none has."""
        found: Kept | None = self._kept.get(kind)
        return found

    def take(self, kind: type[Kept]) -> Kept | None:
        """What `kept` gives, for the last stage that needs it: the run lets go of it."""
        found = self.kept(kind)
        self._kept.pop(kind, None)
        return found
