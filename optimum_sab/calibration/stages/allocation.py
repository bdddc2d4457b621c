"""Give every linear its planes: measure what its errors cost, then choose under the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from optimum_sab.calibration.allocation.choice import Allocation, allocate
from optimum_sab.calibration.allocation.probe import measure_errors
from optimum_sab.calibration.allocation.recomputation import Recomputation
from optimum_sab.calibration.allocation.sensitivity import (
    GradientEnergy,
    gradient_energy,
    refuse_inference_mode,
    sample_seed,
    sensitivity_of,
)
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.samples.calibration_samples import CalibrationSamples
from optimum_sab.calibration.stage import Stage
from optimum_sab.calibration.streams.mapped import Place
from optimum_sab.calibration.streams.memory import held_activations
from optimum_sab.calibration.streams.targets import decoder_targets
from optimum_sab.errors import CalibrationError, ConfigError, NonFiniteError, RankError, StreamError, warn

SAMPLES = 16
_RULES = "rules.json"


@dataclass(frozen=True)
class Sensitivities:
    """Of the linears that have a choice: expected KL per relative output error, in nats."""

    of: Mapping[str, float]


@dataclass(frozen=True)
class AllocationReport:
    """Which planes were chosen.

    Attributes:
        rules: for ``dynamic``, in which a reader of the packed model finds them.
        choice: how they came about; None where an interrupted run had made it.
    """

    rules: dict[str, dict[str, Any]]
    choice: Allocation | None


class MeasureSensitivities(Stage):
    """Leaves `Sensitivities`."""

    name: ClassVar[str] = "sensitivities"
    title: ClassVar[str] = "Measuring sensitivities"
    unit: ClassVar[str] = "sample"

    def prepare(self, run: Run) -> None:
        asked = run.options.allocation
        if asked is not None and asked.target_bits is not None and not asked.free(run.selection):
            raise ConfigError(
                f"target_bits={asked.target_bits} has nothing to choose: dynamic sets the planes of every linear. "
                "Leave one of the two out."
            )
        if asked is not None and not _known(run):
            refuse_inference_mode(run.model)

    def wanted(self, run: Run) -> bool:
        return bool(_free(run)) and not _known(run)

    def apply(self, run: Run, on_step: OnStep) -> Sensitivities | None:
        try:
            parts = run.ranks.exchange("sensitivities", self._own(run, on_step))
            failed = next((each for each in parts if isinstance(each, str)), None)
            if failed is not None:
                raise CalibrationError(failed)
            found = sensitivity_of(run.model, [each for each in parts if not isinstance(each, str)])
        except (NonFiniteError, RankError):
            raise
        except CalibrationError as error:  # it can be binarized all the same
            equal = run.options.allocation is not None and run.options.allocation.target_bits is not None
            then = "all are taken to be equally sensitive" if equal else "every linear keeps the bits of its settings"
            kind = type(run.model).__name__
            warn(f"it cannot be measured which linears of {kind} need more bits, so {then}: {error}")
            if not equal:
                return None
            found = dict.fromkeys(_free(run), 1.0)
        sensitivities = Sensitivities(found)
        run.keep(sensitivities)
        return sensitivities

    def _own(self, run: Run, on_step: OnStep) -> GradientEnergy | str:
        """Of this rank's samples; why there is none, if so."""
        blocks = decoder_targets(run.model, run.selection).blocks
        few = _few_samples(run)
        inputs = [run.samples.inputs[index] for index in run.samples.own]
        room = held_activations(run.model, run.selection, inputs, run.two_streams)
        recomputation = Recomputation(blocks, run.options.device, room, run.bound())
        seeds = [sample_seed(0, index) for index in few.own]
        own = [few.inputs[index] for index in few.own]
        try:
            return gradient_energy(run.model, _free(run), own, recomputation, seeds, on_step)
        except (NonFiniteError, StreamError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a model's backward pass may raise
            return str(error)


class AllocateBits(Stage):
    """Puts other settings in the place of the selection's, and reports them as rules.

    The rules are kept for a run that is resumed, since rounding on an accelerator could make them others then.
    """

    name: ClassVar[str] = "allocation"
    title: ClassVar[str] = "Allocating bits"
    unit: ClassVar[str] = "block"

    def wanted(self, run: Run) -> bool:
        return bool(_free(run)) and (_known(run) or run.kept(Sensitivities) is not None)

    def apply(self, run: Run, on_step: OnStep) -> AllocationReport:
        report = self._read(run) if _known(run) else self._choose(run, on_step)
        run.selection = run.selection.with_rules(report.rules)
        return report

    def _choose(self, run: Run, on_step: OnStep) -> AllocationReport:
        sensitivities, asked = run.kept(Sensitivities), run.options.allocation
        assert sensitivities is not None and asked is not None
        place = Place(run.options.device, run.bound())
        probed = measure_errors(run.model, run.selection, _free(run), _few_samples(run), place, on_step)

        def chosen() -> Allocation:
            return allocate(run.model, run.selection, sensitivities.of, probed, asked.target_bits)

        choice = run.ranks.give("allocation", 0, chosen)
        rules = choice.rules(run.selection)
        if run.resume is not None:
            run.resume.write_json(_RULES, rules)
        return AllocationReport(rules, choice)

    def _read(self, run: Run) -> AllocationReport:
        assert run.resume is not None
        return AllocationReport(run.resume.read_json(_RULES), None)


def _free(run: Run) -> list[str]:
    return [] if run.options.allocation is None else run.options.allocation.free(run.selection)


def _known(run: Run) -> bool:
    """Whether an interrupted run has chosen."""
    return run.resume is not None and run.resume.knows(_RULES)


def _few_samples(run: Run) -> CalibrationSamples:
    return run.samples.spread(SAMPLES)
