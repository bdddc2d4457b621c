"""Read the calibration samples, or let the model write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.ranks import require_samples
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.samples.calibration_samples import CalibrationSamples
from optimum_sab.calibration.samples.continuation import require_language_head
from optimum_sab.calibration.samples.forward_arguments import ForwardArguments
from optimum_sab.calibration.samples.inputs import GIVEN, calibration_inputs
from optimum_sab.calibration.samples.modality import TokenModalities, token_modalities
from optimum_sab.calibration.stage import Stage
from optimum_sab.calibration.streams.placement import map_tensors
from optimum_sab.calibration.streams.targets import target_linear
from optimum_sab.errors import SampleError, warn
from optimum_sab.nn.modalities import TEXT, VISUAL, model_modalities
from optimum_sab.nn.selection import Selection


@dataclass(frozen=True)
class SampleReport:
    """What calibrates.

    Attributes:
        count: samples.
        tokens: of each modality that there is.
        with_pictures: samples that show a picture or a video.
        source: where they are from, as it was named.
        sequence_length: tokens of a text at most.
        seed: of what is drawn.
    """

    count: int
    tokens: dict[str, int]
    with_pictures: int
    source: str
    sequence_length: int
    seed: int


class ReadSamples(Stage):
    """Leaves `CalibrationSamples`."""

    name: ClassVar[str] = "samples"
    title: ClassVar[str] = "Writing samples"
    unit: ClassVar[str] = "answer"

    def check(self, model: nn.Module, options: RunOptions) -> None:
        if options.source.written:
            require_language_head(model)

    def apply(self, run: Run, on_step: OnStep) -> SampleReport:
        inputs = self.inputs(run, on_step)
        if not inputs:
            raise SampleError(
                "no calibration samples; give at least one text or chat message, or calibration='builtin'."
            )
        require_samples(len(inputs), run.ranks.size)
        given = map_tensors([dict(sample) for sample in inputs], run.home)
        samples = CalibrationSamples.of(given, _config(run), run.ranks)
        tokens = count_tokens(samples.modalities, _config(run))
        warn_of_few_tokens(sum(tokens.values()), run.model, run.selection)
        run.keep(samples)
        source = run.options.source
        return SampleReport(
            count=len(samples),
            tokens=tokens,
            with_pictures=sum(shows_pictures(each, _config(run)) for each in samples.inputs),
            source=self.described(run),
            sequence_length=source.sequence_length,
            seed=source.seed,
        )

    def described(self, run: Run) -> str:
        """Where the samples are from."""
        return run.options.source.described

    def inputs(self, run: Run, on_step: OnStep) -> Sequence[Mapping[str, Any]]:
        """Forward arguments, one sample each. What the model is to write, it writes on the first rank."""

        def found() -> Sequence[Mapping[str, Any]]:
            return calibration_inputs(run.model, run.processor, run.options.source, on_step)

        return run.ranks.give("samples", 0, found) if run.options.source.written else found()


class GivenSamples(ReadSamples):
    """Samples that whoever starts the run has encoded already.

    Args:
        inputs: keyword arguments of the model's forward, one dict per sample; see `ForwardArguments.check`.
    """

    def __init__(self, inputs: Sequence[Mapping[str, Any]]) -> None:
        self._inputs = inputs

    def inputs(self, run: Run, on_step: OnStep) -> Sequence[Mapping[str, Any]]:
        arguments = ForwardArguments(run.model, run.processor)
        for number, sample in enumerate(self._inputs):
            arguments.check(sample, f"calibration sample {number}")
        return self._inputs

    def described(self, run: Run) -> str:
        return GIVEN


def _config(run: Run) -> Any:
    return getattr(run.model, "config", None)


def shows_pictures(inputs: Mapping[str, Any], config: Any) -> bool:
    """By a sample's tokens, or, for models whose pictures have none, by what is called after pixels."""
    return token_modalities(inputs, config).count(VISUAL) > 0 or any("pixel" in name for name in inputs)


def count_tokens(modalities: Sequence[TokenModalities], config: Any) -> dict[str, int]:
    """The tokens of each modality that there is; warns of one that the model reads and no sample has.

    Args:
        modalities: of every sample's tokens.
        config: of the model.
    """
    expected = model_modalities(config)
    names = dict.fromkeys([*expected, *(n for m in modalities for n in m.names)])
    tokens = {name: sum(m.count(name) for m in modalities) for name in names}
    for name in expected:
        if not tokens[name] and name != TEXT:
            warn(
                f"no calibration sample has {name} tokens: that modality is left out of the Hessians and of the "
                f"significance map. Give samples with {name} input if the model will see it."
            )
    return {name: count for name, count in tokens.items() if count}


def warn_of_few_tokens(tokens: int, model: nn.Module, selection: Selection) -> None:
    """Warn where a linear's Hessian has not full rank.

    Args:
        tokens: of all samples.
        model: may be on meta.
        selection: the linears that are binarized.
    """
    width, widest = max((target_linear(model, name).in_features, name) for name in selection.settings)
    if tokens < width:
        warn(
            f"{tokens} calibration tokens are fewer than the {width} input features of {widest}: its Hessian is "
            "rank-deficient and the result will overfit. Give more samples."
        )
