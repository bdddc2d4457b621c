"""From what `SABConfig` calls calibration data to the model's forward arguments, whoever supplies the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optimum_sab.calibration.progress import OnStep, no_step
from optimum_sab.calibration.samples.encoding import encode_samples, has_chat_template
from optimum_sab.calibration.samples.modality import VISUAL, model_modalities
from optimum_sab.calibration.samples.reading import SELF, read_samples
from optimum_sab.calibration.samples.self_written import self_samples
from optimum_sab.data.unseen import unseen_chats, unseen_texts

UNSEEN_LENGTH = 256  # tokens of a text


@dataclass(frozen=True)
class SampleSource:
    """Where calibration data comes from.

    Args:
        data: any form `read_samples` takes, or ``"self"`` for what the model writes.
        count: samples at most.
        sequence_length: texts are cut to this many tokens; see `encode_samples` and `self_samples`.
        seed: of what is drawn or written.
    """

    data: Any = None
    count: int = 512
    sequence_length: int = 256
    seed: int = 0


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
    if isinstance(source.data, str) and source.data == SELF:
        return self_samples(model, processor, source.count, source.sequence_length, source.seed, on_step)
    samples = read_samples(source.data, source.count, source.seed, VISUAL in model_modalities(model.config))
    return encode_samples(samples, processor, source.sequence_length)


def unseen_inputs(model: Any, processor: Any) -> dict[str, list[dict[str, Any]]]:
    """Forward arguments that no calibration set of ours holds, by kind: "text", and "pictures" if the model reads any.

    Args:
        model: the model.
        processor: its processor or tokenizer; without a chat template there are no pictures.
    """
    samples: dict[str, list[Any]] = {"text": list(unseen_texts())}
    if VISUAL in model_modalities(model.config) and has_chat_template(processor):
        samples["pictures"] = list(unseen_chats())
    return {kind: encode_samples(some, processor, UNSEEN_LENGTH) for kind, some in samples.items()}
