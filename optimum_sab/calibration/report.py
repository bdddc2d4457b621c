"""What a run has found, stage by stage."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from optimum_sab.calibration.blocks.report import BlockReport
from optimum_sab.calibration.predictions.agreement import Agreement
from optimum_sab.calibration.predictions.temperature import Temperature
from optimum_sab.calibration.predictions.verdict import LIMITS, Verdict, judge
from optimum_sab.calibration.refine.tuning import Tuning
from optimum_sab.calibration.report_entries import block_entry, sizes_entry
from optimum_sab.errors import OutputError
from optimum_sab.json_values import finite
from optimum_sab.report.files import REPORT_VERSION, write_report


@dataclass(frozen=True)
class StageReport:
    """One stage.

    Attributes:
        name: its name.
        seconds: wall time.
        section: what it found; None where it says nothing.
    """

    name: str
    seconds: float
    section: Any = None


@dataclass(frozen=True)
class BinarizationReport:
    """The whole run.

    Attributes:
        stages: in the order in which they worked; those that had nothing to do are missing.
        warnings: what was warned of, in order.
        about: which model was binarized, with which settings and versions, JSON-ready; empty where nobody said.
    """

    stages: tuple[StageReport, ...] = field(default=())
    warnings: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def section(self, name: str) -> Any:
        """What the stage of a name found; None where it said nothing or did not work."""
        return next((stage.section for stage in self.stages if stage.name == name), None)

    @property
    def seconds(self) -> float:
        """Wall time in all."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def samples(self) -> int:
        """Calibration samples that were used."""
        found = self.section("samples")
        return 0 if found is None else int(found.count)

    @property
    def tokens(self) -> dict[str, int]:
        """Calibration tokens per modality."""
        found = self.section("samples")
        return {} if found is None else dict(found.tokens)

    @property
    def blocks(self) -> tuple[BlockReport, ...]:
        """Per decoder block."""
        return self.section("blocks") or ()

    @property
    def temperature(self) -> Temperature | None:
        """Of the model's predictions; None where it was left alone."""
        found: Temperature | None = self.section("temperature")
        return found

    @property
    def tuning(self) -> Tuning | None:
        """What the refinement made of the whole model; None without it."""
        found: Tuning | None = self.section("tuning")
        return found

    @property
    def agreement(self) -> Mapping[str, Agreement]:
        """With the dense model's predictions on samples that did not calibrate it, by kind; empty if not compared."""
        return self.section("comparison") or {}

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights, all binarized linears together."""
        layers = [layer for block in self.blocks for layer in block.layers]
        return sum(la.bits_per_weight * la.weights for la in layers) / sum(la.weights for la in layers)

    @property
    def verdict(self) -> Verdict:
        """What is said of the finished model in a word."""
        return judge(self.agreement, self.bits_per_weight)

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-ready: what report.json holds (docs/report.md)."""
        samples, examples = self.section("samples"), self.section("examples")
        return finite(
            {
                "report_version": REPORT_VERSION,
                "about": dict(self.about),
                "verdict": {**asdict(self.verdict), "words": self.verdict.words},
                "limits": {kind: asdict(each) for kind, each in LIMITS.items()},
                "agreement": {kind: asdict(each) for kind, each in self.agreement.items()},
                "examples": [asdict(each) for each in examples or ()],
                "no_examples": self.section("dense examples"),
                "bits_per_weight": self.bits_per_weight,
                "blocks": [block_entry(block) for block in self.blocks],
                "sizes": sizes_entry(self.section("sizes")),
                "stages": [{"name": each.name, "seconds": each.seconds} for each in self.stages],
                "seconds": self.seconds,
                "calibration": None if samples is None else asdict(samples),
                "temperature": None if self.temperature is None else asdict(self.temperature),
                "tuning": None if self.tuning is None else asdict(self.tuning),
                "warnings": list(self.warnings),
            }
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write report.json and report.html into a folder, which is made where it is missing.

        Without the packages for report.html (``pip install optimum-sab[report]``) a warning says so, and report.json is
        written alone; ``optimum-sab report FOLDER`` makes the page of it later.

        Raises:
            OutputError: the folder cannot be written to.
        """
        try:
            os.makedirs(folder, exist_ok=True)
            write_report(folder, self.to_dict())
        except OSError as error:
            raise OutputError(
                f"the report cannot be written to {os.fspath(folder)!r} ({error.strerror}); name another folder."
            ) from error
