"""The stages that need the checkpoint's processor: finding it, and encoding samples before weights are read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from optimum_sab.calibration.joining import launched
from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.predictions.verdict import PICTURES, TEXT, own
from optimum_sab.calibration.progress import OnStep, no_step
from optimum_sab.calibration.ranks import require_samples
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.samples.calibration_samples import CalibrationSamples
from optimum_sab.calibration.samples.held_out import held_out
from optimum_sab.calibration.samples.inputs import evaluation_inputs, given_inputs, unseen_inputs
from optimum_sab.calibration.stage import Stage
from optimum_sab.calibration.stages.answers import EvaluationSamples
from optimum_sab.calibration.stages.samples import ReadSamples, shows_pictures
from optimum_sab.calibration.streams.placement import map_tensors
from optimum_sab.errors import SABWarning
from optimum_sab.hf.origin import Origin, origin_of
from optimum_sab.hf.processor import find_processor
from optimum_sab.nn.modalities import VISUAL, model_modalities


class FindProcessor(Stage):
    """From here on `Run.processor` is there.

    Args:
        given: `SABConfig.processor`.
        origin: of the model; None to ask it.
    """

    name: ClassVar[str] = "processor"

    def __init__(self, given: Any, origin: Origin | None = None) -> None:
        self._given = given
        self._origin = origin
        self._found: Any = None

    def check(self, model: nn.Module, options: RunOptions) -> None:
        self.processor_of(model)

    def apply(self, run: Run, on_step: OnStep) -> None:
        run.processor = self.processor_of(run.model)

    def processor_of(self, model: nn.Module) -> Any:
        """The processor, which is looked for once."""
        if self._found is None:
            origin = origin_of(model) if self._origin is None else self._origin
            self._found = find_processor(self._given, origin, VISUAL in model_modalities(model.config))
        return self._found


class ReadUnseen(Stage):
    """Before a model spends its time on writing samples, others go through it, to see that it bears packed layers.

    A model that does not read them is tried on what it has written.

    Args:
        processor: the stage that finds it.
    """

    name: ClassVar[str] = "unseen"

    def __init__(self, processor: FindProcessor) -> None:
        self._processor = processor
        self._inputs: list[Mapping[str, Any]] | None = None

    def check(self, model: nn.Module, options: RunOptions) -> None:
        self.early(model)

    def apply(self, run: Run, on_step: OnStep) -> None:
        inputs = [map_tensors(each, run.home) for each in self.early(run.model)]
        if inputs:
            run.keep(CalibrationSamples.of(inputs, getattr(run.model, "config", None)))

    def early(self, model: nn.Module) -> Sequence[Mapping[str, Any]]:
        """Forward arguments; none where they cannot be prepared."""
        if self._inputs is None:
            try:
                with warnings.catch_warnings():  # all of it is said where the finished model is compared by them
                    warnings.simplefilter("ignore", SABWarning)
                    kinds = unseen_inputs(model, self._processor.processor_of(model))
            except Exception:  # a processor is anybody's code
                kinds = {}
            self._inputs = [each for some in kinds.values() for each in some]
        return self._inputs


class ReadEvaluation(Stage):
    """Evaluation samples are read and encoded before weights are; leaves `EvaluationSamples` where there are any.

    Those that calibrate too are left out, with a warning.

    Args:
        processor: the stage that finds it.
        reader: the stage, before this one, that has the samples that calibrate.
    """

    name: ClassVar[str] = "evaluation samples"

    def __init__(self, processor: FindProcessor, reader: ReadSamplesEarly) -> None:
        self._processor, self._reader = processor, reader
        self._inputs: Sequence[Mapping[str, Any]] | None = None

    def check(self, model: nn.Module, options: RunOptions) -> None:
        self.early(model, options)

    def wanted(self, run: Run) -> bool:
        return run.options.evaluation is not None

    def apply(self, run: Run, on_step: OnStep) -> None:
        run.keep(EvaluationSamples(by_kind(self.early(run.model, run.options), run.model.config)))

    def early(self, model: nn.Module, options: RunOptions) -> Sequence[Mapping[str, Any]]:
        """Forward arguments; none where there is no evaluation."""
        if self._inputs is None and options.evaluation is not None:
            found = evaluation_inputs(model, self._processor.processor_of(model), options.evaluation)
            self._inputs = held_out(found, self._reader.early(model))
        return self._inputs or ()


def by_kind(inputs: Sequence[Mapping[str, Any]], config: Any) -> dict[str, list[Mapping[str, Any]]]:
    """Somebody's own samples by what they show."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for each in inputs:
        found.setdefault(own(PICTURES if shows_pictures(each, config) else TEXT), []).append(each)
    return found


class ReadSamplesEarly(ReadSamples):
    """Samples are read and encoded before weights are, where no model has to write them.

    Args:
        processor: the stage that finds it.
        on_read: told how many are read.
    """

    def __init__(self, processor: FindProcessor, on_read: OnStep = no_step) -> None:
        self._processor = processor
        self._on_read = on_read
        self._inputs: Sequence[Mapping[str, Any]] | None = None

    def check(self, model: nn.Module, options: RunOptions) -> None:
        super().check(model, options)
        if not options.source.written:
            processor = self._processor.processor_of(model)
            self._inputs = given_inputs(model, processor, options.source, self._on_read)
            require_samples(len(self._inputs), launched()[1])

    def early(self, model: nn.Module) -> Sequence[Mapping[str, Any]]:
        """Forward arguments that were read by `check`; none where the model is to write them."""
        return self._inputs or ()

    def inputs(self, run: Run, on_step: OnStep) -> Sequence[Mapping[str, Any]]:
        early, self._inputs = self._inputs, None  # the run keeps them from here on
        return super().inputs(run, on_step) if early is None else early
