"""The paper's significance-aware binarization map Λ (method.md sections 2 to 4).

With the saliency of section 2 the ratio between modalities depends on the column only, because every map is
normalised by one number per layer. ρ and Λ are therefore vectors over the input columns here; `hoyer_sparsity`
takes maps of any shape, for sensitivities that do not factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SALIENT_TOP_P = 0.05
DIFF_QUANTILE = 0.5
SPARSITY_THRESHOLD = 0.005


@dataclass(frozen=True)
class Significance:
    """Λ of one layer and what it came from.

    Attributes:
        spatial: ρ [in] in [0, 1]; 1 = active under a single modality, 0 = equally under all.
        ratio: r in [0, 1], share of the layer's significance mass that is unimodal.
        map: ``Λ = r ρ + (1 − r)(1 − ρ)`` [in] in [0, 1].
    """

    spatial: Float[Tensor, " in"]
    ratio: float
    map: Float[Tensor, " in"]


def hoyer_sparsity(sensitivities: Float[Tensor, "modalities ..."]) -> Float[Tensor, "..."]:
    """``ρ = (√z − ‖S‖₁ / ‖S‖₂) / (√z − 1)`` over the z modalities, clamped to [0, 1].

    All-zero entries, and a single modality (z = 1, for which the formula is 0/0), give 0.
    """
    z = sensitivities.shape[0]
    if z == 1:
        return torch.zeros_like(sensitivities[0])
    sensitivities = sensitivities / sensitivities.amax(0).clamp_min(torch.finfo(sensitivities.dtype).tiny)
    l1 = sensitivities.sum(0)
    l2 = sensitivities.square().sum(0).sqrt()
    rho = (math.sqrt(z) - l1 / l2) / (math.sqrt(z) - 1.0)
    return torch.where(l2 > 0, rho, torch.zeros_like(rho)).clamp(0.0, 1.0)


def unimodal_ratio(
    total: Float[Tensor, "out in"],
    spatial: Float[Tensor, " in"],
    salient_top_p: float = SALIENT_TOP_P,
    diff_quantile: float = DIFF_QUANTILE,
    sparsity_threshold: float = SPARSITY_THRESHOLD,
) -> float:
    """``r = Σ_unimodal ΣS / Σ_all ΣS`` (method.md section 4).

    Args:
        total: ``Σ_μ S_μ`` [out, in], each map normalised by its mean.
        spatial: ρ [in].
        salient_top_p: share of the entries, by ``total``, that may be unimodal.
        diff_quantile: an entry is unimodal when its ρ is at or above this quantile of the salient entries' ρ ...
        sparsity_threshold: ... and above this value.
    """
    mass = float(total.sum(dtype=torch.float64))
    if mass <= 0:
        return 0.0
    count = max(1, round(salient_top_p * total.numel()))
    salient = torch.zeros(total.numel(), dtype=torch.bool, device=total.device)
    salient[total.flatten().topk(count).indices] = True
    salient = salient.view_as(total)
    rho = spatial.expand_as(total)
    ordered = rho[salient].sort().values
    position = diff_quantile * (ordered.numel() - 1)
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    cut = low + (high - low) * (position - math.floor(position))
    unimodal = salient & (rho >= cut) & (rho > sparsity_threshold)
    return float(total[unimodal].sum(dtype=torch.float64)) / mass


def significance_map(
    weight: Float[Tensor, "out in"], inverse_diagonals: Float[Tensor, "modalities in"]
) -> Significance:
    """Λ of a layer from ``W`` and ``[H_μ⁻¹]_jj`` of every modality (z ≥ 1; one modality gives Λ = 1)."""
    column = inverse_diagonals.square().reciprocal()  # S_μ[i,j] = W[i,j]² · column[μ,j]
    energy = weight.square().mean(0)
    mean = (column * energy).mean(1, keepdim=True)
    column = torch.where(mean > 0, column / mean, torch.zeros_like(column))
    spatial = hoyer_sparsity(column)
    ratio = unimodal_ratio(weight.square() * column.sum(0), spatial)
    return Significance(spatial, ratio, ratio * spatial + (1.0 - ratio) * (1.0 - spatial))
