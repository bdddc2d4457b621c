"""From what `SABConfig` calls calibration data to the model's forward arguments, whoever supplies the data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from optimum_sab.calibration.progress import OnStep, no_step
from optimum_sab.calibration.samples.chat import Sample
from optimum_sab.calibration.samples.context_length import limited_length, warn_of_long_samples
from optimum_sab.calibration.samples.decoder_inputs import with_decoder_inputs
from optimum_sab.calibration.samples.encoding import Encoding, can_be_shown_pictures, encode_sample
from optimum_sab.calibration.samples.forward_arguments import ForwardArguments
from optimum_sab.calibration.samples.forward_inputs import is_prepared, token_count
from optimum_sab.calibration.samples.reading import labelled_builtin, labelled_samples
from optimum_sab.calibration.samples.self_written import self_samples
from optimum_sab.calibration.samples.vocabulary import check_tokens
from optimum_sab.data.named_source import recorded_source
from optimum_sab.data.unseen import unseen_chats, unseen_texts
from optimum_sab.errors import SABError, SampleError, warn, warnings_heard
from optimum_sab.nn.modalities import VISUAL, model_modalities
from optimum_sab.presets import BUILTIN, SELF

UNSEEN_LENGTH = 256  # tokens of a text
EVALUATION_SAMPLES = 64  # of somebody's own, at most
GIVEN = "given as objects"


@dataclass(frozen=True)
class SampleSource:
    """Where calibration data comes from.

    Args:
        data: any form `read_samples` takes, or ``"self"`` for what the model writes.
        count: samples at most, those of the built-in set included.
        sequence_length: texts are cut to this many tokens; see `encode_samples` and `self_samples`.
        seed: of what is drawn or written.
        builtin: samples of the built-in set that are taken beside ``data``'s own, behind them.
    """

    data: Any = None
    count: int = 512
    sequence_length: int = 256
    seed: int = 0
    builtin: int = 0

    @property
    def written(self) -> bool:
        """Whether the model writes the samples, so that there are none before it is loaded."""
        return isinstance(self.data, str) and self.data == SELF

    @property
    def described(self) -> str:
        """What it is, as it was named, of a file without the folders; of objects only that they were given."""
        if self.data is None:
            return BUILTIN
        named = recorded_source(self.data) if isinstance(self.data, (str, os.PathLike)) else GIVEN
        return f"{named}, and {self.builtin:,} of the built-in set" if self.builtin else named


def calibration_inputs(
    model: Any, processor: Any, source: SampleSource, on_step: OnStep = no_step
) -> list[dict[str, Any]]:
    """Forward arguments, one sample each: read, or written by the model.

    Args:
        model: dense.
        processor: its processor or tokenizer.
        source: where from.
        on_step: told how far the model is, where it writes.

    Raises:
        SampleError: see `read_samples`, `encode_samples` and `self_samples`.
    """
    if source.written:
        length = limited_length(source.sequence_length, model.config)
        return self_samples(model, processor, source.count, length, source.seed, on_step)
    return given_inputs(model, processor, source)


def given_inputs(model: Any, processor: Any, source: SampleSource, on_step: OnStep = no_step) -> list[dict[str, Any]]:
    """Forward arguments, one sample each, of samples that no model has to write: none of its weights is needed.

    Args:
        model: may be on meta.
        processor: its processor or tokenizer.
        source: where from.
        on_step: told how many are read, of the most that will be.

    Raises:
        SampleError: see `read_samples`, `encode_samples` and `ForwardArguments.check`; or a token is none of the
            model's.
    """
    config, arguments = model.config, ForwardArguments(model, processor)
    encoding = Encoding(processor, limited_length(source.sequence_length, config))
    visual = VISUAL in model_modalities(config)
    encoded = {}
    with warnings_heard():  # each is told once
        for label, sample in _labelled(source, visual):
            if is_prepared(sample):
                arguments.check(sample, label)
            encoded[label] = with_decoder_inputs(encode_sample(sample, encoding, label), config)
            check_tokens(encoded[label], config, label)
            on_step(len(encoded), source.count)
        encoding.watch.warn()
    if len(encoded) < source.count:
        on_step(len(encoded), len(encoded))
    warn_of_long_samples({label: token_count(inputs) for label, inputs in encoded.items()}, config)
    return list(encoded.values())


def _labelled(source: SampleSource, visual: bool) -> Iterator[tuple[str, Sample]]:
    yield from labelled_samples(source.data, source.count - source.builtin, source.seed, visual)
    if source.builtin:
        yield from labelled_builtin(source.builtin, source.seed, visual)


def evaluation_source(data: Any, sequence_length: int) -> SampleSource:
    """Where somebody's own evaluation samples come from.

    Args:
        data: any form `read_samples` takes.
        sequence_length: texts are cut to this many tokens.
    """
    return SampleSource(data, EVALUATION_SAMPLES + 1, sequence_length)  # one more tells whether there are more


def evaluation_inputs(model: Any, processor: Any, source: SampleSource) -> list[dict[str, Any]]:
    """Forward arguments of somebody's own evaluation samples, `EVALUATION_SAMPLES` at most, of which a warning tells.

    Args:
        model: may be on meta.
        processor: its processor or tokenizer.
        source: of `evaluation_source`.

    Raises:
        SampleError: as `given_inputs`, in words about the evaluation.
    """
    try:
        found = given_inputs(model, processor, source)
    except SampleError as error:
        raise type(error)(f"evaluation: {error}") from error
    if len(found) > EVALUATION_SAMPLES:
        warn(f"of the evaluation samples the first {EVALUATION_SAMPLES} are used; there are more.")
    return found[:EVALUATION_SAMPLES]


def unseen_inputs(model: Any, processor: Any) -> dict[str, list[dict[str, Any]]]:
    """Forward arguments that no calibration set of ours holds, by kind: "text", and "pictures" if the model reads any.

    Args:
        model: the model.
        processor: its processor or tokenizer. Pictures that it does not prepare are left out, with a warning.

    Raises:
        SampleError, MissingDependencyError: see `encode_sample`, of a text.
    """
    encoding = Encoding(processor, UNSEEN_LENGTH)
    encoded = {"text": [encode_sample(each, encoding, "an unseen text") for each in unseen_texts()]}
    if can_be_shown_pictures(model.config, processor):
        try:
            encoded["pictures"] = [encode_sample(each, encoding, "an unseen picture") for each in unseen_chats()]
        except SABError as error:  # a template may know pictures in a way of its own
            warn(f"the finished model will be compared with the dense one on texts alone: {error}")
    return {kind: [with_decoder_inputs(each, model.config) for each in some] for kind, some in encoded.items()}
