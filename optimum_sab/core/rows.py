"""What a calibration pass learns of an input that few tokens reach: the rows themselves, and no second moments.

A Hessian [in, in] of r rows has rank r at most. Where r is below the width, rows are less memory than second moments,
are gathered for nothing, and make everything that is solved from them less work (core/by_rows.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.hessian import (
    InputMoments,
    InputStatistics,
    WeightedMoments,
    accumulate_hessian,
    modality_weights,
)
from optimum_sab.core.magnitude import times_power
from optimum_sab.errors import CalibrationError, NonFiniteError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class _Piece:
    """One call of `InputRows.add`."""

    modality: str
    quantized: Tensor
    dense: Tensor | None
    residual: Tensor | None
    half: bool


@dataclass(frozen=True)
class WeightedRows:
    """Rows in one scale: ``H = X̂ᵀ X̂``, ``C = Dᵀ X̂`` and ``R = rᵀ X̂`` are those of `InputStatistics`.

    Attributes:
        quantized: X̂ [rows, in], fp32.
        apart: ``D = X − X̂`` [rows, in]; None with one stream.
        residual: by how much the streams differ in what the output is added to, [rows, out]; None where unknown.
        half: so many of the first rows are one half of the samples; 0 where the samples have no halves.
    """

    quantized: Float[Tensor, "rows in"]
    apart: Float[Tensor, "rows in"] | None
    residual: Float[Tensor, "rows out"] | None
    half: int

    def statistics(self) -> InputStatistics:
        """Their second moments, of no modality and without a count of tokens."""
        whole = self._moments(slice(None))
        half = self._moments(slice(0, self.half)) if self.half else None
        return InputStatistics(whole.hessian, {}, whole.drift, {}, whole.residual, half)

    def _moments(self, some: slice) -> WeightedMoments:
        X = self.quantized[some]
        H = X.new_zeros(X.shape[1], X.shape[1])
        accumulate_hessian(H, X)
        drift, residual = (None if each is None else each[some].T @ X for each in (self.apart, self.residual))
        return WeightedMoments(H, drift, residual)

    def with_outputs_scaled(self, power: int) -> WeightedRows:
        """Of a linear whose weight, and whatever its output is added to, is multiplied by ``2^power``."""
        return self if self.residual is None else replace(self, residual=times_power(self.residual, power))


@dataclass
class InputRows:
    """Gathers the rows of one linear input, as `InputMoments` does their second moments.

    Args:
        in_features: width of the input.
        device: where rows are brought when they are used; they are held as they were given.
        two_streams: whether `add` is given the dense stream's rows too.
        name: the linear's name, for messages.
    """

    in_features: int
    device: torch.device
    two_streams: bool
    name: str
    _pieces: list[_Piece] = field(default_factory=list)

    def add(
        self,
        modality: str,
        quantized: Float[Tensor, "tokens in"],
        dense: Float[Tensor, "tokens in"] | None = None,
        residual: Float[Tensor, "tokens out"] | None = None,
        half: bool = False,
    ) -> None:
        """Add the tokens of one modality of one sample.

        Args:
            modality: its name.
            quantized: x̂, the quantized stream's inputs, any float dtype.
            dense: x, the dense stream's, where two streams run.
            residual: r − r̂, given for all samples or for none.
            half: whether the sample belongs to the first half, for cross-validation.

        Raises:
            CalibrationError: two streams were announced and one is given; or their shapes differ.
        """
        if quantized.shape[0] == 0:
            return
        if self.two_streams and dense is None:
            raise CalibrationError(f"{self.name}: two streams were announced and the dense one is missing.")
        dense = dense if self.two_streams else None
        if quantized.shape[1] != self.in_features or (dense is not None and dense.shape != quantized.shape):
            shapes = [tuple(each.shape) for each in (quantized, dense) if each is not None]
            raise CalibrationError(f"{self.name} has {self.in_features} inputs and was given rows of shape {shapes}.")
        self._pieces.append(_Piece(modality, quantized.detach(), dense, residual, half))

    @property
    def count(self) -> int:
        """Rows so far."""
        return sum(len(piece.quantized) for piece in self._pieces)

    @property
    def tokens(self) -> dict[str, int]:
        """Rows so far, by modality."""
        found: dict[str, int] = {}
        for piece in self._pieces:
            found[piece.modality] = found.get(piece.modality, 0) + len(piece.quantized)
        return found

    def statistics(self, weighting: str = "balanced", by_modality: bool = True) -> InputStatistics:
        """Second moments, as `InputMoments` gathers them from the same rows: see `InputMoments.statistics`.

        Without a row they are those of an input that is not known, `InputStatistics.without_data`.
        """
        if not self._pieces:
            return InputStatistics.without_data(self.in_features, self.device)
        halves = [InputMoments(self.in_features, self.device, self.two_streams, self.name) for _ in range(2)]
        for piece in self._pieces:
            halves[0 if piece.half else 1].add(piece.modality, piece.quantized, piece.dense, piece.residual)
        first, second = halves
        return second.statistics(weighting, first if first.by_modality else None, by_modality)

    def weighted(self, weighting: str = "balanced") -> WeightedRows:
        """All rows, those of the first half first, each times the root of what its modality weighs.

        Raises:
            NonFiniteError: an input holds NaN or inf.
            CalibrationError: there is no row that is not zero.
        """
        pieces = sorted(self._pieces, key=lambda piece: not piece.half)
        x = self._cat(pieces, lambda piece: piece.quantized)
        apart = self._cat(pieces, lambda piece: piece.dense) if self.two_streams else None
        known = bool(pieces) and pieces[0].residual is not None
        residual = self._cat(pieces, lambda piece: piece.residual) if known else None
        self._check(x, *(each for each in (apart, residual) if each is not None))
        tokens, energy = self.tokens, x.square().mean(1)
        order = [name for piece in pieces for name in [piece.modality] * len(piece.quantized)]
        mean: dict[str, float] = {}
        for name in tokens:
            chosen = torch.tensor([each == name for each in order], device=x.device)
            mean[name] = 2.0 / tokens[name] * float(energy[chosen].sum())
        live = {name: value for name, value in mean.items() if value > 0}
        if not live:
            raise CalibrationError(
                f"no calibration token with a non-zero input reached {self.name}; give more samples, or leave the "
                "module dense with modules_to_not_convert."
            )
        weights = modality_weights(live, tokens, weighting)
        root = torch.tensor([(2.0 / tokens[name] * weights.get(name, 0.0)) ** 0.5 for name in order], device=x.device)
        scaled = [None if each is None else each.mul_(root[:, None]) for each in (x, apart, residual)]
        half = sum(len(piece.quantized) for piece in pieces if piece.half)
        assert scaled[0] is not None
        return WeightedRows(scaled[0], _less(scaled[1], scaled[0]), scaled[2], half if self.two_streams else 0)

    def _cat(self, pieces: Iterable[_Piece], part: Callable[[_Piece], Tensor | None]) -> Tensor:
        """Of all pieces, in fp32 and other memory."""
        found = [each.to(self.device, torch.float32) for piece in pieces for each in [part(piece)] if each is not None]
        return torch.cat(found) if found else torch.zeros(0, self.in_features, device=self.device)

    def _check(self, *rows: Tensor) -> None:
        if not all(bool(torch.isfinite(each.sum())) or bool(torch.isfinite(each).all()) for each in rows):
            raise NonFiniteError(
                f"the input of {self.name} holds NaN or inf; load the model in float32 or bfloat16 instead of "
                "float16, or leave the module dense with modules_to_not_convert."
            )


def _less(dense: Tensor | None, quantized: Tensor) -> Tensor | None:
    return None if dense is None else dense.sub_(quantized)
