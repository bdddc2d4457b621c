"""Several processes: that they can share the run, and that all do the same one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

from torch import nn

from optimum_sab.calibration.joining import launched
from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.resume.difference import difference
from optimum_sab.calibration.resume.fingerprint import Fingerprint, WeightsDigest, fingerprint
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.stage import Stage
from optimum_sab.calibration.statistics.gathering import require_sums
from optimum_sab.calibration.statistics.passes import calibration_pass
from optimum_sab.errors import RankError

_PACKAGES = ("transformers", "safetensors")  # beside those in the fingerprint


class AgreeOnRun(Stage):
    """Compares fingerprints; leaves the `Fingerprint`, since reading the weights once is enough."""

    name: ClassVar[str] = "ranks"

    def check(self, model: nn.Module, options: RunOptions) -> None:
        if launched()[1] > 1:
            require_shareable(options)

    def prepare(self, run: Run) -> None:
        """Refuse what several processes cannot do yet.

        Raises:
            ConfigError: a calibration pass that is not "hessian".
        """
        if run.ranks.size > 1:
            require_shareable(run.options)

    def wanted(self, run: Run) -> bool:
        return run.ranks.size > 1

    def apply(self, run: Run, on_step: OnStep) -> None:
        """Compare.

        Raises:
            RankError: a rank has other weights, samples, settings or versions.
        """
        weights = run.kept(WeightsDigest) or WeightsDigest.of(run.model)
        marks = fingerprint(weights, run.selection, run.samples.inputs, run.options)
        mine = {**_versions(), **marks, "model": marks["model"][:16], **_steps(run.options)}  # a digest
        digests = run.ranks.exchange("agreement", hashlib.sha256(json.dumps(mine).encode()).hexdigest())
        if len(set(digests)) > 1:
            usual = Counter(digests).most_common(1)[0][0]  # of two that differ, the first rank's
            other = next(rank for rank, each in enumerate(digests) if each != usual)
            all_marks = run.ranks.exchange("what differs", mine)
            what = difference(all_marks[digests.index(usual)], all_marks[other], words=("on the others", "there"))
            raise RankError(
                f"rank {other} of {run.ranks.size} does another run than the others: {what}. All need the same "
                "checkpoint, samples, settings and versions.",
                told=True,
            )
        run.keep(Fingerprint(marks))


def require_shareable(options: RunOptions) -> None:
    """Refuse what several processes cannot do yet.

    Raises:
        ConfigError: a calibration pass that is not "hessian".
    """
    require_sums(calibration_pass(options.calibration_pass), options.calibration_pass)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _steps(options: RunOptions) -> dict[str, Any]:
    """What decides which stages there are, beside the fingerprint."""
    return {
        "examples": options.examples,
        "resume_folder": options.resume_folder is not None,
        "device": None if options.device is None else options.device.type,
    }
