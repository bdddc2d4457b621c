"""Calibration passes by name: what is gathered from a linear's inputs before it is binarized."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optimum_sab.calibration.statistics.pairing import PairedInputs
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.mixture import mixed_statistics
from optimum_sab.errors import ConfigError
from optimum_sab.wording import did_you_mean

PASSES: dict[str, type[CalibrationPass]] = {}


def register_pass(name: str) -> Callable[[type[CalibrationPass]], type[CalibrationPass]]:
    """Class decorator: make a `CalibrationPass` available as ``SABConfig(calibration_pass=name)``.

    Registering the same class again does nothing; another class under a taken name raises `ConfigError`.
    """

    def register(cls: type[CalibrationPass]) -> type[CalibrationPass]:
        taken = PASSES.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"a calibration pass named {name!r} is registered already ({taken.__qualname__}).")
        PASSES[name] = cls
        return cls

    return register


def calibration_pass(name: str) -> type[CalibrationPass]:
    """The pass registered under ``name``; `ConfigError` names the known ones."""
    if name not in PASSES:
        hint = did_you_mean(name, PASSES, f"; known are {', '.join(sorted(PASSES))}.")
        raise ConfigError(f"calibration_pass={name!r} is not registered{hint}")
    return PASSES[name]


class CalibrationPass(ABC):
    """Gathers statistics of the inputs that a group of linears shares.

    Attributes:
        by_modality: whether the Hessians of each modality are asked for beside the one of all; set by whoever collects.
            They are as large as that one, and only ``significance="modality"`` reads them.
        weight: float32 [out, in], of the linear where only one has this input and its outputs are few; else None. A
            pass may gather ``W C`` for it in the place of C (`InputMoments`), or leave that.
    """

    by_modality = True
    weight: Tensor | None = None

    @abstractmethod
    def collect(self, name: str, inputs: Sequence[PairedInputs], device: torch.device) -> InputStatistics:
        """Statistics of these inputs. ``name`` is the first linear's, for messages."""

    def of_expert(self, own: InputStatistics, shared: Callable[[], InputStatistics], full: int) -> InputStatistics:
        """What an expert's linear is solved with: its own statistics, mixed with the shared ones if its tokens are few.

        Args:
            own: of what comes to the expert.
            shared: gives those of what comes to any of them, gathered when first asked for.
            full: from so many tokens on the expert's own are enough.
        """
        return own if sum(own.tokens.values()) >= full else mixed_statistics(own, shared(), full)
