"""Second moments of a linear's inputs, per modality, and the damped factorizations the solver needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from optimum_sab.errors import CalibrationError, NonFiniteError, SingularHessianError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def accumulate_hessian(hessian: Float[Tensor, "in in"], inputs: Float[Tensor, "tokens in"]) -> None:
    """Add ``Σ x xᵀ`` of these tokens to ``hessian`` in place (fp32)."""
    hessian.addmm_(inputs.T, inputs)


@dataclass
class ModalityMoments:
    """Running sums over one modality's tokens.

    Attributes:
        hessian: ``Σ x̂ x̂ᵀ`` [in, in] of the quantized stream's inputs.
        drift: ``Σ (x − x̂) x̂ᵀ`` [in, in], x from the dense stream; None while one stream runs.
        tokens: how many tokens were added.
    """

    hessian: Float[Tensor, "in in"]
    drift: Float[Tensor, "in in"] | None
    tokens: int = 0


@dataclass
class InputMoments:
    """Accumulates what a calibration pass learns of one distinct linear input, split by modality.

    Args:
        in_features: width of the input.
        device: where the sums live.
        two_streams: whether `add` is given the dense stream's inputs too.
        name: the linear's name, for messages.
    """

    in_features: int
    device: torch.device
    two_streams: bool
    name: str
    by_modality: dict[str, ModalityMoments] = field(default_factory=dict)

    def add(
        self,
        modality: str,
        quantized: Float[Tensor, "tokens in"],
        dense: Float[Tensor, "tokens in"] | None = None,
    ) -> None:
        """Add the tokens of one modality of one sample.

        Raises:
            NonFiniteError: an input holds NaN or inf.
        """
        if quantized.shape[0] == 0:
            return
        x = self._finite(modality, quantized)
        moments = self.by_modality.get(modality)
        if moments is None:
            shape = (self.in_features, self.in_features)
            moments = ModalityMoments(
                torch.zeros(shape, dtype=torch.float32, device=self.device),
                torch.zeros(shape, dtype=torch.float32, device=self.device) if self.two_streams else None,
            )
            self.by_modality[modality] = moments
        accumulate_hessian(moments.hessian, x)
        if moments.drift is not None:
            if dense is None:
                raise CalibrationError(f"{self.name}: two streams were announced and the dense one is missing.")
            moments.drift.addmm_((self._finite(modality, dense) - x).T, x)
        moments.tokens += x.shape[0]

    def _finite(self, modality: str, inputs: Tensor) -> Tensor:
        x = inputs.to(self.device, torch.float32)
        if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
            raise NonFiniteError(
                f"the input of {self.name} holds NaN or inf for {modality} tokens; load the model in float32 or "
                "bfloat16 instead of float16, or leave the module dense with modules_to_not_convert."
            )
        return x

    def statistics(self) -> InputStatistics:
        """Freeze the sums: ``H_μ = 2/N_μ Σ x xᵀ`` per modality, and their trace-balanced mean.

        ``H = 1/z Σ_μ H_μ / tr(H_μ) · m``: every modality weighs the same however many tokens it has
        (image tokens outnumber text ten to one). The drift is scaled alike, so that ``C H⁻¹`` keeps its meaning.
        """
        live = {name: m for name, m in self.by_modality.items() if m.tokens and float(m.hessian.diagonal().sum()) > 0}
        if not live:
            raise CalibrationError(
                f"no calibration token with a non-zero input reached {self.name}; give more samples, or leave the "
                "module dense with modules_to_not_convert."
            )
        hessians = {name: m.hessian * (2.0 / m.tokens) for name, m in live.items()}
        balanced: Tensor | None = None
        drift: Tensor | None = None
        for name, moments in live.items():
            weight = self.in_features / float(hessians[name].diagonal().sum()) / len(live)
            term = hessians[name] * weight
            balanced = term if balanced is None else balanced.add_(term)
            if moments.drift is not None:
                term = moments.drift * (2.0 / moments.tokens * weight)
                drift = term if drift is None else drift.add_(term)
        assert balanced is not None  # `live` is not empty
        return InputStatistics(balanced, hessians, drift, {name: m.tokens for name, m in self.by_modality.items()})


@dataclass(frozen=True)
class InputStatistics:
    """What the solver knows of a linear's inputs.

    Attributes:
        hessian: trace-balanced mean over modalities, [in, in], mean diagonal 1, undamped.
        by_modality: ``H_μ`` [in, in] per modality that has tokens, undamped.
        drift: ``C = (X − X̂)ᵀ X̂`` [in, in] in the scale of ``hessian``, or None without a dense stream.
        tokens: tokens seen per modality.
    """

    hessian: Float[Tensor, "in in"]
    by_modality: dict[str, Float[Tensor, "in in"]]
    drift: Float[Tensor, "in in"] | None
    tokens: dict[str, int]


def damped(hessian: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """``H + damping · mean(diag H) · I`` (method.md section 1)."""
    result = hessian.clone()
    result.diagonal().add_(damping * hessian.diagonal().mean())
    return result


@dataclass(frozen=True)
class FactoredHessian:
    """A damped Hessian with the factor the error feedback needs.

    Attributes:
        hessian: the damped ``H`` [in, in].
        inverse: ``H⁻¹`` [in, in].
        inverse_factor: upper triangular ``U`` with ``Uᵀ U = H⁻¹``.
        dead: columns whose input was always zero, bool [in].
    """

    hessian: Float[Tensor, "in in"]
    inverse: Float[Tensor, "in in"]
    inverse_factor: Float[Tensor, "in in"]
    dead: Tensor


def factor_hessian(hessian: Float[Tensor, "in in"], damping: float, name: str = "the layer") -> FactoredHessian:
    """Damp and factor a Hessian; the damping is raised tenfold, up to twice, while no factor exists.

    Raises:
        NonFiniteError: the Hessian holds NaN or inf.
        SingularHessianError: no Cholesky factor at a hundred times the damping.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise NonFiniteError(f"the Hessian of {name} holds NaN or inf; its inputs overflow, try dtype=torch.float32.")
    dead = hessian.diagonal() == 0
    for raised in (1.0, 10.0, 100.0):
        H = damped(hessian, damping * raised)
        factor, failed = torch.linalg.cholesky_ex(H)
        if int(failed):
            continue
        inverse = torch.cholesky_inverse(factor)
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not int(failed):
            return FactoredHessian(H, inverse, upper, dead)
    raise SingularHessianError(
        f"the Hessian of {name} is still singular with damping={100 * damping:g}; give more calibration samples or "
        "raise damping."
    )
