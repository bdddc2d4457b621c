"""Compare the finished model's answers with the dense one's."""

from __future__ import annotations

from typing import ClassVar

from optimum_sab.calibration.predictions.agreement import Agreement, AgreementCheck
from optimum_sab.calibration.predictions.verdict import FAR, forgotten, judge
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.sizes import Sizes
from optimum_sab.calibration.stage import Stage
from optimum_sab.errors import warn


class CompareAnswers(Stage):
    """Warns where they are far apart. The finished model computes with the kernels it will have."""

    name: ClassVar[str] = "comparison"
    by: ClassVar[int | None] = 0

    def wanted(self, run: Run) -> bool:
        return run.kept(AgreementCheck) is not None

    def apply(self, run: Run, on_step: OnStep) -> dict[str, Agreement] | None:
        check = run.kept(AgreementCheck)
        assert check is not None
        try:
            found = check.measure()
        except (RuntimeError, ValueError) as error:  # out of memory, say: the finished model must not be lost to that
            warn(f"the finished model could not be compared with the dense one: {error}")
            return None
        sizes = run.kept(Sizes)
        assert sizes is not None
        verdict = judge(found, sizes.bits_per_weight)
        if verdict.level == FAR:
            warn(f"the binarized model is {verdict}")
        elif lost := forgotten(found):
            told = " and ".join(f"on {kind} {found[kind]}" for kind in lost)
            warn(
                f"the binarized model is {verdict.words} on the evaluation samples, and far from it elsewhere "
                f"({told}): what neither they nor the calibration samples show is lost. If it will see such things, "
                "mix some of the built-in set into the calibration (builtin_samples)."
            )
        return found
