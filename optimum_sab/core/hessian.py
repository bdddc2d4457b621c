"""Second moments of a linear's inputs, per modality."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.factorization import FactoredHessian, factor_hessian
from optimum_sab.errors import CalibrationError, NonFiniteError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

STRIP = 192  # rows of a Hessian computed at a time; fewer make products slow, more compute more of the lower half


def accumulate_hessian(hessian: Float[Tensor, "in in"], inputs: Float[Tensor, "tokens in"]) -> None:
    """Add ``Σ x xᵀ`` of these tokens to ``hessian`` in place (fp32).

    Args:
        hessian: symmetric. On a CPU only its upper half is computed, a strip of rows at a time, and the other is its
            mirror image.
        inputs: x.
    """
    width = inputs.shape[1]
    strip = STRIP if hessian.device.type == "cpu" else width
    for start in range(0, width, strip):
        end = min(start + strip, width)
        hessian[start:end, start:].addmm_(inputs[:, start:end].T, inputs[:, start:])
        hessian[end:, start:end] = hessian[start:end, end:].T


@dataclass
class ModalityMoments:
    """Running sums over one modality's tokens.

    Attributes:
        hessian: ``Σ x̂ x̂ᵀ`` [in, in] of the quantized stream's inputs.
        drift: ``Σ (x − x̂) x̂ᵀ`` [in, in], x from the dense stream; None while one stream runs.
        residual: ``Σ (r − r̂) x̂ᵀ`` [out, in], r what the output is added to; None where that is unknown.
        tokens: how many tokens were added.
    """

    hessian: Float[Tensor, "in in"]
    drift: Float[Tensor, "in in"] | None
    residual: Float[Tensor, "out in"] | None = None
    tokens: int = 0

    def absorb(self, other: ModalityMoments, scale: float = 1.0) -> None:
        """Add another's sums, times ``scale``, to these in place."""
        self.hessian.add_(other.hessian, alpha=scale)
        if self.drift is not None and other.drift is not None:
            self.drift.add_(other.drift, alpha=scale)
        if other.residual is not None:
            self.residual = torch.zeros_like(other.residual) if self.residual is None else self.residual
            self.residual.add_(other.residual, alpha=scale)
        self.tokens += other.tokens

    def scale(self, factor: float) -> None:
        """Multiply the sums in place."""
        for sums in (self.hessian, self.drift, self.residual):
            if sums is not None:
                sums.mul_(factor)

    def copy(self) -> ModalityMoments:
        """The same sums in other memory."""
        drift, residual = (None if s is None else s.clone() for s in (self.drift, self.residual))
        return ModalityMoments(self.hessian.clone(), drift, residual, self.tokens)


@dataclass
class InputMoments:
    """Accumulates what a calibration pass learns of one distinct linear input, split by modality.

    Args:
        in_features: width of the input.
        device: where the sums live.
        two_streams: whether `add` is given the dense stream's inputs too.
        name: the linear's name, for messages.
        weight: W, float32 [out, in] on the device, of what will be solved from these. Then ``W C`` goes into the
            residual's sums and no drift is gathered, which for few outputs is less work and less memory.
    """

    in_features: int
    device: torch.device
    two_streams: bool
    name: str
    by_modality: dict[str, ModalityMoments] = field(default_factory=dict)
    weight: Float[Tensor, "out in"] | None = None

    def add(
        self,
        modality: str,
        quantized: Float[Tensor, "tokens in"],
        dense: Float[Tensor, "tokens in"] | None = None,
        residual: Float[Tensor, "tokens out"] | None = None,
    ) -> None:
        """Add the tokens of one modality of one sample.

        Args:
            modality: its name.
            quantized: x̂, the quantized stream's inputs.
            dense: x, the dense stream's, where two streams run.
            residual: r − r̂, by how much the streams differ in what the linear's output is added to; given for all
                samples or for none.

        Raises:
            NonFiniteError: an input holds NaN or inf.
        """
        if quantized.shape[0] == 0:
            return
        x = self._finite(modality, quantized)
        moments = self.by_modality.get(modality)
        if moments is None:
            shape = (self.in_features, self.in_features)
            drifts = self.two_streams and self.weight is None
            moments = ModalityMoments(
                torch.zeros(shape, dtype=torch.float32, device=self.device),
                torch.zeros(shape, dtype=torch.float32, device=self.device) if drifts else None,
            )
            self.by_modality[modality] = moments
        accumulate_hessian(moments.hessian, x)
        r = None if residual is None else self._finite(modality, residual)
        if self.two_streams:
            if dense is None:
                raise CalibrationError(f"{self.name}: two streams were announced and the dense one is missing.")
            apart = self._finite(modality, dense) - x
            if moments.drift is not None:
                moments.drift.addmm_(apart.T, x)
            elif self.weight is not None:
                r = apart @ self.weight.T if r is None else torch.addmm(r, apart, self.weight.T)
        if r is not None:
            if moments.residual is None:
                moments.residual = torch.zeros(r.shape[1], self.in_features, dtype=torch.float32, device=self.device)
            moments.residual.addmm_(r.T, x)
        moments.tokens += x.shape[0]

    def _finite(self, modality: str, inputs: Tensor) -> Tensor:
        x = inputs.to(self.device, torch.float32)
        if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
            raise NonFiniteError(
                f"the input of {self.name} holds NaN or inf for {modality} tokens; load the model in float32 or "
                "bfloat16 instead of float16, or leave the module dense with modules_to_not_convert."
            )
        return x

    def statistics(
        self, weighting: str = "balanced", part: InputMoments | None = None, by_modality: bool = True
    ) -> InputStatistics:
        """``H_μ = 2/N_μ Σ x xᵀ`` per modality, and their trace-balanced mean. Uses the sums up, since they are large.

        ``H = 1/z Σ_μ H_μ / tr(H_μ) · m``: every modality weighs the same however many tokens it has
        (image tokens outnumber text ten to one). The drift is scaled alike, so that ``C H⁻¹`` keeps its meaning.

        Args:
            weighting: "balanced"; or, to compare with, "tokens" (every token weighs the same) or "text" (H sees text
                alone, as the paper's compensation does). Both are scaled to a mean diagonal of 1 too.
            part: the sums of one half of the samples where these are those of the other; used up as well.
            by_modality: keep the ``H_μ`` too.
        """
        sums, halves = self.by_modality, {} if part is None else part.by_modality
        self.by_modality = {}
        if part is not None:
            part.by_modality = {}
            for modality, theirs in halves.items():
                if modality in sums:
                    sums[modality].absorb(theirs)
                else:
                    sums[modality] = theirs.copy()
        tokens = {name: m.tokens for name, m in sums.items()}
        live = {name: m for name, m in sums.items() if m.tokens and float(m.hessian.diagonal().sum()) > 0}
        if not live:
            raise CalibrationError(
                f"no calibration token with a non-zero input reached {self.name}; give more samples, or leave the "
                "module dense with modules_to_not_convert."
            )
        weights = _modality_weights(live, weighting)
        scales = {name: 2.0 / m.tokens * weights[name] for name, m in live.items()}
        hessians = {name: m.hessian * (2.0 / m.tokens) for name, m in live.items()} if by_modality else {}
        half = {name: m for name, m in halves.items() if name in scales}
        sums.clear()
        halves.clear()
        whole, share = _folded(live, scales), _folded(half, scales) if half else None
        return InputStatistics(whole.hessian, hessians, whole.drift, tokens, whole.residual, share)


def _folded(moments: dict[str, ModalityMoments], scales: dict[str, float]) -> WeightedMoments:
    """``Σ_μ s_μ · sums_μ`` of everything that was gathered, in the place of the first sums; the others are let go."""
    first = next(iter(moments))
    total = moments.pop(first)
    total.scale(scales[first])
    while moments:
        name = next(iter(moments))
        total.absorb(moments.pop(name), scales[name])
    return WeightedMoments(total.hessian, total.drift, total.residual)


@dataclass(frozen=True)
class WeightedMoments:
    """Sums over modalities in one scale; see `InputStatistics` for what they are."""

    hessian: Float[Tensor, "in in"]
    drift: Float[Tensor, "in in"] | None
    residual: Float[Tensor, "out in"] | None

    def without(self, part: WeightedMoments) -> WeightedMoments:
        """These less a part of them."""

        def less(whole: Tensor | None, taken: Tensor | None) -> Tensor | None:
            return whole if whole is None or taken is None else whole - taken

        return WeightedMoments(
            self.hessian - part.hessian, less(self.drift, part.drift), less(self.residual, part.residual)
        )


@dataclass(frozen=True)
class InputStatistics:
    """What the solver knows of a linear's inputs.

    Attributes:
        hessian: trace-balanced mean over modalities, [in, in], mean diagonal 1, undamped.
        by_modality: ``H_μ`` [in, in] per modality that has tokens, undamped; empty where they were not asked for.
        drift: ``C = (X − X̂)ᵀ X̂`` [in, in] in the scale of ``hessian``; None without a dense stream, or where
            ``residual`` holds what it is for.
        tokens: tokens seen per modality.
        residual: ``R = (r − r̂)ᵀ X̂`` [out, in] in the scale of ``hessian``: by how much the streams differ in what
            the linear's output is added to. None where that is not known, or the linear is one of a stack. Without
            ``drift`` it is ``W C + R``, of the weight that the statistics were gathered for.
        half: the part that one half of the samples makes up of ``hessian``, ``drift`` and ``residual``; None with one
            stream or one sample.
    """

    hessian: Float[Tensor, "in in"]
    by_modality: dict[str, Float[Tensor, "in in"]]
    drift: Float[Tensor, "in in"] | None
    tokens: dict[str, int]
    residual: Float[Tensor, "out in"] | None = None
    half: WeightedMoments | None = None
    _factored: dict[float, FactoredHessian] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def without_data(cls, in_features: int, device: torch.device) -> InputStatistics:
        """Of a linear that no token reached: every input as likely, so that the weight alone is approximated."""
        identity = torch.eye(in_features, dtype=torch.float32, device=device)
        return cls(identity, {"text": identity}, None, {})

    def factored(self, damping: float, name: str = "the layer") -> FactoredHessian:
        """`factor_hessian` of ``hessian``, once for every damping: several weights are solved from the same inputs."""
        if damping not in self._factored:
            self._factored[damping] = factor_hessian(self.hessian, damping, name)
        return self._factored[damping]

    @property
    def two_streams(self) -> bool:
        """Whether it is known how far the streams have drifted apart."""
        return self.drift is not None or self.residual is not None

    @property
    def whole(self) -> WeightedMoments:
        """``hessian``, ``drift`` and ``residual`` together."""
        return WeightedMoments(self.hessian, self.drift, self.residual)


def _modality_weights(moments: dict[str, ModalityMoments], weighting: str) -> dict[str, float]:
    """What each ``H_μ`` is multiplied with before they are added up."""
    mean = {name: float((m.hessian.diagonal() * (2.0 / m.tokens)).mean()) for name, m in moments.items()}
    if weighting == "balanced":
        return {name: 1.0 / (mean[name] * len(mean)) for name in mean}
    chosen = ["text"] if weighting == "text" and "text" in mean else list(mean)
    total = sum(mean[name] * moments[name].tokens for name in chosen)
    return {name: moments[name].tokens / total if name in chosen else 0.0 for name in mean}
