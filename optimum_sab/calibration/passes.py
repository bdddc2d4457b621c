"""Calibration passes by name: what is gathered from a linear's inputs before it is binarized."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_sab.calibration.lockstep import DENSE, Arrival
from optimum_sab.calibration.modality import MIXED, TokenModalities
from optimum_sab.core.hessian import InputMoments, InputStatistics
from optimum_sab.errors import ConfigError

PASSES: dict[str, type[CalibrationPass]] = {}


def register_pass(name: str) -> Callable[[type[CalibrationPass]], type[CalibrationPass]]:
    """Class decorator: make a `CalibrationPass` available as ``SABConfig(calibration_pass=name)``.

    Registering the same class again does nothing; another class under a taken name raises `ConfigError`.
    """

    def register(cls: type[CalibrationPass]) -> type[CalibrationPass]:
        taken = PASSES.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"a calibration pass named {name!r} is registered already ({taken.__qualname__}).")
        PASSES[name] = cls
        return cls

    return register


def calibration_pass(name: str) -> type[CalibrationPass]:
    """The pass registered under ``name``; `ConfigError` names the known ones."""
    if name not in PASSES:
        raise ConfigError(f"calibration_pass={name!r} is not registered; known are {', '.join(sorted(PASSES))}.")
    return PASSES[name]


@dataclass(frozen=True)
class PairedInputs:
    """One sample's input of a group of linears, as rows.

    Attributes:
        quantized: x̂ [tokens, in] of the quantized stream.
        dense: x [tokens, in] of the dense stream, or None.
        modalities: of the sample's tokens.
    """

    quantized: Tensor
    dense: Tensor | None
    modalities: TokenModalities


def pair_streams(arrivals: Sequence[Arrival], modalities: Sequence[TokenModalities]) -> list[PairedInputs]:
    """Bring both streams of every sample together.

    The dense rows are dropped for the whole group when the streams were routed differently (other token counts).
    """
    dense = {a.sample: a.inputs.flatten(0, -2) for a in arrivals if a.stream == DENSE}
    quantized = {a.sample: a.inputs.flatten(0, -2) for a in arrivals if a.stream != DENSE}
    paired = all(i in dense and dense[i].shape == x.shape for i, x in quantized.items())
    return [PairedInputs(x, dense[i] if paired else None, modalities[i]) for i, x in quantized.items()]


class CalibrationPass(ABC):
    """Gathers statistics of the inputs that a group of linears shares."""

    @abstractmethod
    def collect(self, name: str, inputs: Sequence[PairedInputs], device: torch.device) -> InputStatistics:
        """Statistics of these inputs. ``name`` is the first linear's, for messages."""


@register_pass("hessian")
class HessianPass(CalibrationPass):
    """Second moments per modality, ``H_μ = 2/N_μ Σ x xᵀ``, and the drift between the streams (method.md section 1)."""

    def collect(self, name: str, inputs: Sequence[PairedInputs], device: torch.device) -> InputStatistics:
        two_streams = bool(inputs) and all(pair.dense is not None for pair in inputs)
        width = inputs[0].quantized.shape[-1] if inputs else 0
        moments = InputMoments(width, device, two_streams, name)
        for batch in _batches(inputs, two_streams):
            moments.add(*batch)
        return moments.statistics()


def _batches(
    inputs: Sequence[PairedInputs], two_streams: bool, rows: int = 4096
) -> list[tuple[str, Tensor, Tensor | None]]:
    """Rows of many samples by modality, in pieces of about ``rows``: few large products instead of many small ones."""
    pieces: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
    for pair in inputs:
        labels = pair.modalities.labels
        if labels.numel() != pair.quantized.shape[0]:
            names = pair.modalities.names
            whole = names[0] if len(names) == 1 else MIXED
            pieces.setdefault(whole, []).append((pair.quantized, pair.dense))
            continue
        for index, modality in enumerate(pair.modalities.names):
            mask = (labels == index).to(pair.quantized.device)
            if bool(mask.all()):
                pieces.setdefault(modality, []).append((pair.quantized, pair.dense))
            elif bool(mask.any()):
                dense = None if pair.dense is None else pair.dense[mask]
                pieces.setdefault(modality, []).append((pair.quantized[mask], dense))
    batches: list[tuple[str, Tensor, Tensor | None]] = []
    for modality, rows_of in pieces.items():
        start = 0
        while start < len(rows_of):
            end, count = start, 0
            while end < len(rows_of) and count < rows:
                count += rows_of[end][0].shape[0]
                end += 1
            quantized = torch.cat([q for q, _ in rows_of[start:end]])
            dense = torch.cat([d for _, d in rows_of[start:end] if d is not None]) if two_streams else None
            batches.append((modality, quantized, dense))
            start = end
    return batches
