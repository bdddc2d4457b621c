"""What a run is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from optimum_sab.calibration.allocation.ladder import PLANES
from optimum_sab.calibration.samples.inputs import SampleSource
from optimum_sab.core.refinement import RefineSettings
from optimum_sab.nn.rules import found_in
from optimum_sab.nn.selection import Selection


@dataclass(frozen=True)
class AllocationSettings:
    """Bits by sensitivity.

    Args:
        target_bits: stored bits per weight at most, all binarized linears together; None for what their settings take
            as they are.
        fixed: keys of ``dynamic``; the linears in whose names one is found keep their planes.
    """

    target_bits: float | None = None
    fixed: tuple[str, ...] = ()

    def free(self, selection: Selection) -> list[str]:
        """The linears that have a choice."""
        found = found_in(self.fixed, list(selection.settings), selection.lists)
        return [name for name, rules in found.items() if not rules]

    @classmethod
    def of(cls, target_bits: float | None, dynamic: Any) -> AllocationSettings:
        """With the rules of ``dynamic`` that set planes."""
        return cls(target_bits, tuple(rule for rule, changes in dynamic.items() if set(changes) & set(PLANES)))


@dataclass(frozen=True)
class RunOptions:
    """What a run is asked for, beside the settings of its layers, which are in its selection.

    Args:
        source: where the calibration data comes from.
        calibration_pass: a registered calibration pass.
        expert_tokens: "routed": experts are calibrated on the tokens that come to them; "all": on all.
        device: where blocks are moved while they are worked on; None leaves them where they are.
        allocation: how bits are given to linears; None leaves every linear its settings.
        refine: how long to refine scales, norms and biases; None leaves them as solved.
        temperature_scaling: fit the temperature of the predictions, where there are two streams and a head.
        activation_memory: bytes of samples' activations that may wait in memory while others compute; what is beyond
            lies in memory-mapped files, in the resume folder or the system's for temporary files. None for no bound.
        resume_folder: keeps what is finished; the same run goes on from there.
        backend: what will compute with the packed layers; None or "auto" leaves it to the device.
        examples: let the model write to a few prompts before and after.
        evaluation: where samples come from on which the finished model is compared with the dense one, beside those of
            the package; None for no others.
    """

    source: SampleSource = field(default_factory=SampleSource)
    calibration_pass: str = "hessian"
    expert_tokens: str = "routed"
    device: torch.device | None = None
    allocation: AllocationSettings | None = None
    refine: RefineSettings | None = None
    temperature_scaling: bool = True
    activation_memory: int | None = None
    resume_folder: str | Path | None = None
    backend: str | None = None
    examples: bool = True
    evaluation: SampleSource | None = None

    @property
    def tuned(self) -> bool:
        """Whether the whole model is tuned at the end."""
        return self.refine is not None and self.refine.steps > 0

    def two_streams(self, selection: Selection) -> bool:
        """Whether a dense stream runs beside the quantized one."""
        return self.refine is not None or any(s.propagation != 0.0 for s in selection.settings.values())
