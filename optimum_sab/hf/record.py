"""What is written into the configuration of a model that was binarized."""

from __future__ import annotations

from typing import Any

from optimum_sab.calibration.report import BinarizationReport
from optimum_sab.hf.config import SABConfig, describe_calibration
from optimum_sab.hf.selection import EXPERTS
from optimum_sab.json_values import finite
from optimum_sab.nn.selection import Selection


def record(config: SABConfig, selection: Selection, report: BinarizationReport) -> None:
    """Write what was chosen and measured, and leave out what belongs to the one call.

    Args:
        config: the model's own.
        selection: as it was binarized.
        report: of the run.
    """
    allocation = report.section("allocation")
    if allocation is not None:  # a reader finds the choice among the rules
        mine = config.dynamic
        config.dynamic = {**mine, **{key: {**mine.get(key, {}), **own} for key, own in allocation.rules.items()}}
    config.calibration = describe_calibration(config.calibration, report.samples)
    config.processor = config.resume_folder = None
    config.measured = finite(_measured(selection, report))  # a number that is none would make config.json no JSON
    if config.target_bits is not None:  # the choice stands in dynamic now
        config.measured["target_bits"], config.target_bits = config.target_bits, None


def _measured(selection: Selection, report: BinarizationReport) -> dict[str, Any]:
    measured: dict[str, Any] = {
        "bits_per_weight": round(report.bits_per_weight, 6),
        "calibration_tokens": report.tokens,
        "left_dense": [selection.lists.short(name) for name in selection.left_dense],
    }
    if selection.experts:
        measured[EXPERTS] = [selection.lists.short(name) for name in selection.experts]
    samples = report.section("samples")
    if samples is not None:
        measured["calibration_samples"] = {"samples": samples.count, "with_pictures": samples.with_pictures}
    measured["block_errors"] = [[_rounded(block.error), _rounded(block.drift)] for block in report.blocks]
    if report.temperature is not None:
        measured["temperature"] = round(report.temperature.value, 4)
    if report.section("comparison") is not None:
        measured["agreement"] = {
            kind: {"kl": round(each.kl, 4), "top1": round(each.top1, 4)} for kind, each in report.agreement.items()
        }
    measured["verdict"] = {"level": report.verdict.level, "words": report.verdict.words}
    return measured


def _rounded(error: float | None) -> float | None:
    """Seven digits that count: whoever shows fewer rounds them as the number itself."""
    return None if error is None else float(f"{error:.7g}")
