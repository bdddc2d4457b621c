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
        residual: r − r̂ [tokens, out], by how much the streams differ in what the linear's output is added to, or None
            where that is not known.
    """

    quantized: Tensor
    dense: Tensor | None
    modalities: TokenModalities
    residual: Tensor | None = None


def pair_streams(arrivals: Sequence[Arrival], modalities: Sequence[TokenModalities]) -> list[PairedInputs]:
    """Bring both streams of every sample together.

    The dense rows are dropped for the whole group when the streams were routed differently (other token counts).
    """
    dense = {a.sample: a for a in arrivals if a.stream == DENSE}
    quantized = {a.sample: a for a in arrivals if a.stream != DENSE}
    paired = all(i in dense and dense[i].inputs.shape == a.inputs.shape for i, a in quantized.items())
    if not paired:
        return [PairedInputs(a.inputs.flatten(0, -2), None, modalities[i]) for i, a in quantized.items()]
    residual = {i: _difference(dense[i], a) for i, a in quantized.items()}
    known = all(r is not None for r in residual.values())
    return [
        PairedInputs(
            a.inputs.flatten(0, -2), dense[i].inputs.flatten(0, -2), modalities[i], residual[i] if known else None
        )
        for i, a in quantized.items()
    ]


def _difference(dense: Arrival, quantized: Arrival) -> Tensor | None:
    """r − r̂ as rows that match the inputs' rows."""
    r, r_hat = dense.residual, quantized.residual
    if r is None or r_hat is None or r.shape != r_hat.shape or r.shape[:-1] != quantized.inputs.shape[:-1]:
        return None
    return (r.float() - r_hat.float()).flatten(0, -2)


class CalibrationPass(ABC):
    """Gathers statistics of the inputs that a group of linears shares."""

    @abstractmethod
    def collect(self, name: str, inputs: Sequence[PairedInputs], device: torch.device) -> InputStatistics:
        """Statistics of these inputs. ``name`` is the first linear's, for messages."""


@register_pass("hessian")
class HessianPass(CalibrationPass):
    """Second moments per modality, ``H_μ = 2/N_μ Σ x xᵀ``, and the drift between the streams (method.md section 1)."""

    weighting = "balanced"

    def collect(self, name: str, inputs: Sequence[PairedInputs], device: torch.device) -> InputStatistics:
        two_streams = bool(inputs) and all(pair.dense is not None for pair in inputs)
        width = inputs[0].quantized.shape[-1] if inputs else 0
        moments = InputMoments(width, device, two_streams, name)
        if not two_streams or len(inputs) < 2:
            _add(moments, inputs, two_streams)
            return moments.statistics(self.weighting)
        first, second = _halves(inputs)
        part = InputMoments(width, device, two_streams, name)
        _add(part, first, two_streams)
        _add(moments, second, two_streams)
        moments.absorb(part)
        return moments.statistics(self.weighting, part)


def _halves(inputs: Sequence[PairedInputs]) -> tuple[list[PairedInputs], list[PairedInputs]]:
    """Two halves of the samples, drawn, because neighbouring samples often take turns in kind."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = set(order[: len(inputs) // 2])
    return [p for i, p in enumerate(inputs) if i in chosen], [p for i, p in enumerate(inputs) if i not in chosen]


def _add(moments: InputMoments, inputs: Sequence[PairedInputs], two_streams: bool) -> None:
    for modality, quantized, dense, residual in _batches(inputs, two_streams):
        moments.add(modality, quantized, dense, residual)


def _batches(
    inputs: Sequence[PairedInputs], two_streams: bool, rows: int = 4096
) -> list[tuple[str, Tensor, Tensor | None, Tensor | None]]:
    """Rows of many samples by modality, in pieces of about ``rows``: few large products instead of many small ones."""
    pieces: dict[str, list[PairedInputs]] = {}
    for pair in inputs:
        labels = pair.modalities.labels
        if labels.numel() != pair.quantized.shape[0]:
            names = pair.modalities.names
            whole = names[0] if len(names) == 1 else MIXED
            pieces.setdefault(whole, []).append(pair)
            continue
        for index, modality in enumerate(pair.modalities.names):
            mask = (labels == index).to(pair.quantized.device)
            if bool(mask.all()):
                pieces.setdefault(modality, []).append(pair)
            elif bool(mask.any()):
                pieces.setdefault(modality, []).append(_rows(pair, mask))
    batches: list[tuple[str, Tensor, Tensor | None, Tensor | None]] = []
    for modality, rows_of in pieces.items():
        start = 0
        while start < len(rows_of):
            end, count = start, 0
            while end < len(rows_of) and count < rows:
                count += rows_of[end].quantized.shape[0]
                end += 1
            part = rows_of[start:end]
            dense = torch.cat([p.dense for p in part if p.dense is not None]) if two_streams else None
            residual = [p.residual for p in part if p.residual is not None]
            batches.append(
                (modality, torch.cat([p.quantized for p in part]), dense, torch.cat(residual) if residual else None)
            )
            start = end
    return batches


def _rows(pair: PairedInputs, mask: Tensor) -> PairedInputs:
    """The masked rows of every tensor."""
    return PairedInputs(
        pair.quantized[mask],
        None if pair.dense is None else pair.dense[mask],
        pair.modalities,
        None if pair.residual is None else pair.residual[mask],
    )
