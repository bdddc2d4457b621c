"""From who waits at a group of linears to the statistics that their settings need."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optimum_sab.calibration.ranks import Ranks
from optimum_sab.calibration.samples.modality import TokenModalities
from optimum_sab.calibration.statistics.group_inputs import GroupInputs
from optimum_sab.calibration.statistics.hessian import HessianPass
from optimum_sab.calibration.statistics.passes import CalibrationPass
from optimum_sab.calibration.streams.arrival import Arrival
from optimum_sab.core.factorization import WIDE
from optimum_sab.core.hessian import InputMoments, InputStatistics, ModalityMoments
from optimum_sab.core.magnitude import extreme_power
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError


@dataclass(frozen=True)
class Gathering:
    """A calibration pass over the samples of a run.

    Args:
        collector: the pass.
        modalities: of every sample's tokens.
        ranks: who has the samples.
    """

    collector: CalibrationPass
    modalities: Sequence[TokenModalities]
    ranks: Ranks = field(default_factory=Ranks)

    def inputs(self, arrivals: Sequence[Arrival]) -> GroupInputs:
        """What a group of linears is given, the streams of every sample side by side.

        Args:
            arrivals: who waits there on this rank.
        """
        return GroupInputs.of(arrivals, self.modalities, self.ranks)

    def statistics(
        self,
        weights: Mapping[str, Tensor],
        group: GroupInputs,
        settings: Collection[LayerSettings],
        device: torch.device,
        by_modality: bool = False,
        owner: int | None = 0,
    ) -> InputStatistics | None:
        """Statistics of what a group of linears is given.

        Args:
            weights: of the linears, by dotted name; the first name is for messages.
            group: from `inputs`.
            settings: of the linears. Hessians of each modality, as large as that of all, are made only if one reads
                them, ...
            device: where to compute.
            by_modality: ... or whoever asks does.
            owner: the rank that is to have them; None for all.

        Returns:
            None on the other ranks.
        """
        self.collector.by_modality = by_modality or any(each.significance == "modality" for each in settings)
        self.collector.weight = _few_outputs(weights, group, device)
        try:
            if self.ranks.size == 1:
                return self.collector.collect(next(iter(weights)), list(group.pairs.values()), device)
            return self._summed(weights, group, device, owner)
        finally:
            self.collector.weight = None

    def _summed(
        self, weights: Mapping[str, Tensor], group: GroupInputs, device: torch.device, owner: int | None
    ) -> InputStatistics | None:
        name, weight = next(iter(weights.items()))
        assert isinstance(self.collector, HessianPass)
        sums = self.collector.sums(name, group, weight.shape[1], device)
        mine = owner is None or self.ranks.rank == owner
        self.ranks.exchange(f"the sums of {name}", None)
        for half, moments in ((True, sums.part), (False, sums.rest)):
            for modality, tokens in group.tokens[half].items():
                found = moments.by_modality.pop(modality, None) or _nothing(moments, group.known, weight.shape[0])
                self.ranks.sum_symmetric_to(owner, found.hessian)
                for each in (found.drift, found.residual):
                    if each is not None:
                        self.ranks.sum_to(owner, each)
                found.tokens = tokens
                if mine:
                    moments.by_modality[modality] = found
        return self.collector.statistics(sums, bool(group.half)) if mine else None


def fewer_as_correction(out: int, width: int, known: bool) -> bool:
    """Whether ``W C + R`` of a linear alone is gathered in the place of C, since that is less work.

    Args:
        out, width: outputs and inputs.
        known: whether R is, with which there is a product anyway.
    """
    return width >= WIDE and width + known * out > 2 * out


def require_sums(collector: type[CalibrationPass], name: str) -> None:
    """Several ranks need a pass whose findings can be added up.

    Raises:
        ConfigError: it is not the pass "hessian", or one that leaves what that gathers as it is.
    """
    ours = issubclass(collector, HessianPass) and all(
        getattr(collector, each) is getattr(HessianPass, each) for each in ("collect", "sums", "statistics")
    )
    if not ours or collector.of_expert is not CalibrationPass.of_expert:
        raise ConfigError(
            f"calibration_pass={name!r} gathers what cannot be added up over several processes; use 'hessian', or one "
            "process."
        )


def _nothing(moments: InputMoments, known: bool, outputs: int) -> ModalityMoments:
    """Of a modality that no sample of this rank shows."""

    def zeros(rows: int) -> Tensor:
        return torch.zeros(rows, moments.in_features, dtype=torch.float32, device=moments.device)

    drifts = moments.two_streams and moments.weight is None
    residual = known or (moments.two_streams and moments.weight is not None)
    width = moments.in_features
    return ModalityMoments(zeros(width), zeros(width) if drifts else None, zeros(outputs) if residual else None)


def _few_outputs(weights: Mapping[str, Tensor], group: GroupInputs, device: torch.device) -> Tensor | None:
    """The weight where it saves work: ``(x − x̂) Wᵀ`` and its product with x̂ in the place of those with ``x − x̂``."""
    if len(weights) > 1 or not group.count:
        return None
    [weight] = weights.values()
    out, width = weight.shape
    if not fewer_as_correction(out, width, group.known):
        return None
    found = weight.detach().to(device, torch.float32)
    return None if extreme_power(found) else found  # whose products fp32 may not hold
