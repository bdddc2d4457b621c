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
        residuals: r and r̂ [..., tokens, out], what the linear's output is added to in the dense and in the quantized
            stream, or None where that is not known.
        routed: the rows are only some of the sample's tokens, or stand in another order (an expert's input), so they
            cannot be told apart by their modality.
    """

    quantized: Tensor
    dense: Tensor | None
    modalities: TokenModalities
    residuals: tuple[Tensor, Tensor] | None = None
    routed: bool = False

    @property
    def residual(self) -> Tensor | None:
        """r − r̂ [tokens, out] in float32; None where that is not known."""
        if self.residuals is None:
            return None
        r, r_hat = self.residuals
        return (r.float() - r_hat.float()).flatten(0, -2)


def pair_streams(arrivals: Sequence[Arrival], modalities: Sequence[TokenModalities]) -> list[PairedInputs]:
    """Bring both streams of every sample together.

    The dense rows are dropped for the whole group where tokens are routed, which shows in a sample that has fewer rows
    than tokens: the streams may route others, and then their rows are not the same tokens, even if they are as many.

    Args:
        arrivals: of one group of linears.
        modalities: of every sample's tokens, those of samples that did not arrive included.
    """
    dense = {a.sample: a for a in arrivals if a.stream == DENSE}
    quantized = {a.sample: a for a in arrivals if a.stream != DENSE}
    routed = len(quantized) < len(modalities) or any(_is_routed(a, modalities[a.sample]) for a in arrivals)
    paired = not routed and all(i in dense and dense[i].inputs.shape == a.inputs.shape for i, a in quantized.items())
    if not paired:
        return [PairedInputs(a.inputs.flatten(0, -2), None, modalities[i], None, routed) for i, a in quantized.items()]
    residuals = {i: _residuals(dense[i], a) for i, a in quantized.items()}
    known = all(r is not None for r in residuals.values())
    return [
        PairedInputs(
            a.inputs.flatten(0, -2), dense[i].inputs.flatten(0, -2), modalities[i], residuals[i] if known else None
        )
        for i, a in quantized.items()
    ]


def _is_routed(arrival: Arrival, modalities: TokenModalities) -> bool:
    """A block that carries several hidden states per token is given more rows than its linears; those have one each."""
    return arrival.routed and arrival.inputs.shape[:-1].numel() != modalities.labels.numel()


def _residuals(dense: Arrival, quantized: Arrival) -> tuple[Tensor, Tensor] | None:
    """r and r̂ where their rows match the inputs' rows."""
    r, r_hat = dense.residual, quantized.residual
    if r is None or r_hat is None or r.shape != r_hat.shape or r.shape[:-1] != quantized.inputs.shape[:-1]:
        return None
    return r, r_hat


class CalibrationPass(ABC):
    """Gathers statistics of the inputs that a group of linears shares.

    Attributes:
        by_modality: whether the Hessians of each modality are asked for beside the one of all; set by whoever collects.
            They are as large as that one, and only ``significance="modality"`` reads them.
    """

    by_modality = True

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
        first, second = _halves(inputs) if two_streams and len(inputs) > 1 else ([], inputs)
        part = InputMoments(width, device, two_streams, name)
        _add(part, first, two_streams)
        moments = InputMoments(width, device, two_streams, name)
        _add(moments, second, two_streams)
        return moments.statistics(self.weighting, part if first else None, self.by_modality)


def _halves(inputs: Sequence[PairedInputs]) -> tuple[list[PairedInputs], list[PairedInputs]]:
    """Two halves of the samples, drawn, because neighbouring samples often take turns in kind."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = set(order[: len(inputs) // 2])
    return [p for i, p in enumerate(inputs) if i in chosen], [p for i, p in enumerate(inputs) if i not in chosen]


def _add(moments: InputMoments, inputs: Sequence[PairedInputs], two_streams: bool, rows: int = 4096) -> None:
    """Add the samples by modality, about ``rows`` rows at a time: few large products instead of many small ones."""
    for modality, pieces in _by_modality(inputs).items():
        start = 0
        while start < len(pieces):
            end, count = start, 0
            while end < len(pieces) and count < rows:
                count += pieces[end].count
                end += 1
            batch = pieces[start:end]
            quantized = torch.cat([p.rows(p.pair.quantized) for p in batch])
            dense = (
                torch.cat([p.rows(p.pair.dense) for p in batch if p.pair.dense is not None]) if two_streams else None
            )
            residuals = [p.rows(r) for p in batch for r in [p.pair.residual] if r is not None]
            moments.add(modality, quantized, dense, torch.cat(residuals) if residuals else None)
            start = end


@dataclass(frozen=True)
class _Piece:
    """The rows of one sample that are of one modality: those of the mask, all without one."""

    pair: PairedInputs
    mask: Tensor | None = None

    @property
    def count(self) -> int:
        return self.pair.quantized.shape[0] if self.mask is None else int(self.mask.sum())

    def rows(self, of: Tensor) -> Tensor:
        return of if self.mask is None else of[self.mask.to(of.device)]


def _by_modality(inputs: Sequence[PairedInputs]) -> dict[str, list[_Piece]]:
    several = any(len(pair.modalities.names) > 1 for pair in inputs)
    pieces: dict[str, list[_Piece]] = {}
    for pair in inputs:
        labels, names = pair.modalities.labels, pair.modalities.names
        if pair.routed or labels.numel() != pair.quantized.shape[0]:
            pieces.setdefault(MIXED if several else names[0], []).append(_Piece(pair))
            continue
        for index, modality in enumerate(names):
            mask = labels == index
            if bool(mask.all()):
                pieces.setdefault(modality, []).append(_Piece(pair))
            elif bool(mask.any()):
                pieces.setdefault(modality, []).append(_Piece(pair, mask))
    return pieces
