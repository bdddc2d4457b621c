"""From what `SABConfig` calls calibration data to the model's forward arguments, whoever supplies the data."""

from __future__ import annotations

from typing import Any

from optimum_sab.calibration.modality import VISUAL, model_modalities
from optimum_sab.calibration.progress import OnStep, no_step
from optimum_sab.calibration.samples import SELF, encode_samples, has_chat_template, read_samples
from optimum_sab.calibration.self_samples import self_samples
from optimum_sab.data.unseen import unseen_chats, unseen_texts

UNSEEN_LENGTH = 256  # tokens of a text


def calibration_inputs(
    model: Any,
    processor: Any,
    source: Any,
    count: int,
    sequence_length: int,
    seed: int,
    on_step: OnStep = no_step,
) -> list[dict[str, Any]]:
    """Forward arguments, one sample each: read from ``source``, or written by the model for ``"self"``.

    Args:
        model: dense.
        processor: its processor or tokenizer.
        source: any form `read_samples` takes, or ``"self"``.
        count: samples at most.
        sequence_length: see `encode_samples` and `self_samples`.
        seed: of what is drawn or written.
        on_step: told how far the model is, where it writes.

    Raises:
        SampleError: see `read_samples`, `encode_samples` and `self_samples`.
    """
    if isinstance(source, str) and source == SELF:
        return self_samples(model, processor, count, sequence_length, seed, on_step)
    samples = read_samples(source, count, seed, VISUAL in model_modalities(model.config))
    return encode_samples(samples, processor, sequence_length)


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
