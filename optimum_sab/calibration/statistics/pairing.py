"""The rows of both streams of a sample, side by side, and whether they are its tokens at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_sab.calibration.samples.modality import TokenModalities
from optimum_sab.calibration.streams.arrival import DENSE, Arrival


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


@dataclass(frozen=True)
class GroupFacts:
    """By what the rows of both streams are brought together, which must be the same on all ranks of a run.

    Attributes:
        came: samples whose quantized stream came to the group, in the order of the run.
        dense: the dense stream came, too.
        by_token: it is known which tokens the rows are of.
        fewer: a sample has fewer rows than entered the block, and other than its tokens.
        apart: a sample's streams have not the same rows.
        strange: of a sample it is not known what the linear's output is added to.
    """

    came: tuple[int, ...] = ()
    dense: bool = False
    by_token: bool = False
    fewer: bool = False
    apart: bool = False
    strange: bool = False

    @classmethod
    def of(cls, arrivals: Sequence[Arrival], modalities: Sequence[TokenModalities]) -> GroupFacts:
        """Of one group of linears."""
        dense = {a.sample: a for a in arrivals if a.stream == DENSE}
        quantized = {a.sample: a for a in arrivals if a.stream != DENSE}
        here = {i: dense.get(i) for i in quantized}
        return cls(
            tuple(quantized),
            bool(dense),
            any(a.tokens is not None for a in arrivals),
            any(a.rows < a.entered and a.rows != modalities[a.sample].labels.numel() for a in arrivals),
            any(d is None or d.inputs.shape != quantized[i].inputs.shape for i, d in here.items()),
            any(d is None or _residuals(d, quantized[i]) is None for i, d in here.items()),
        )

    @classmethod
    def of_all(cls, parts: Sequence[GroupFacts]) -> GroupFacts:
        """Of several ranks' samples together."""
        if len(parts) == 1:
            return parts[0]
        came = tuple(sorted(sample for each in parts for sample in each.came))
        names = ("dense", "by_token", "fewer", "apart", "strange")
        return cls(came, *(any(getattr(each, name) for each in parts) for name in names))

    def routed(self, company: int) -> bool:
        """Whether which tokens come here is decided token by token, as at an expert.

        That shows in a sample that comes to the block and not here, or that has fewer rows than entered the block and
        other than its tokens: a block that carries several hidden states per token is given more rows than its linears;
        those have one per token.

        Args:
            company: samples that came to the block.
        """
        return len(self.came) < company or self.fewer

    def paired(self, company: int) -> bool:
        """Whether there is a dense row for every row."""
        return self.dense if self.by_token else not self.routed(company) and not self.apart


def pair_streams(
    arrivals: Sequence[Arrival], modalities: Sequence[TokenModalities], facts: GroupFacts | None = None
) -> list[PairedInputs]:
    """Bring both streams of every sample together.

    The dense rows are dropped for the whole group where tokens are routed: the streams may route others, and then their
    rows are not the same tokens, even if they are as many.

    Args:
        arrivals: of one group of linears.
        modalities: of every sample's tokens, those of samples that did not arrive included.
        facts: of the samples of all ranks; None where these are all.
    """
    if not arrivals:
        return []
    facts = facts or GroupFacts.of(arrivals, modalities)
    company = arrivals[0].company or len(modalities)
    dense = {a.sample: a for a in arrivals if a.stream == DENSE}
    quantized = {a.sample: a for a in arrivals if a.stream != DENSE}
    if facts.by_token:
        return [_by_token(a, dense.get(i), facts.dense, modalities[i]) for i, a in quantized.items()]
    if not facts.paired(company):
        routed = facts.routed(company)
        return [PairedInputs(a.inputs.flatten(0, -2), None, modalities[i], None, routed) for i, a in quantized.items()]
    return [
        PairedInputs(
            a.inputs.flatten(0, -2),
            dense[i].inputs.flatten(0, -2),
            modalities[i],
            None if facts.strange else _residuals(dense[i], a),
        )
        for i, a in quantized.items()
    ]


def _by_token(
    quantized: Arrival, dense: Arrival | None, two_streams: bool, modalities: TokenModalities
) -> PairedInputs:
    """Rows that are known to be of certain tokens: those of one token side by side.

    Where the dense stream has no row of a token, the streams are taken not to differ.
    """
    rows, tokens = quantized.inputs, quantized.tokens
    assert tokens is not None
    labels, routed = modalities.labels, True
    if labels.numel() == quantized.entered:
        labels, routed = labels[tokens.to(labels.device)], False
    found = TokenModalities(modalities.names, labels)
    if not two_streams:
        return PairedInputs(rows, None, found, None, routed)
    other = rows.clone()
    if dense is not None and dense.tokens is not None:
        mine = tokens if quantized.keys is None else quantized.keys
        theirs = dense.tokens if dense.keys is None else dense.keys
        last = int(torch.cat([mine, theirs]).max())
        place = torch.full((last + 1,), -1, dtype=torch.long, device=rows.device)
        place[theirs] = torch.arange(dense.rows, device=rows.device)
        at = place[mine]
        other[at >= 0] = dense.inputs[at[at >= 0]]
    return PairedInputs(rows, other, found, None, routed)


def _residuals(dense: Arrival, quantized: Arrival) -> tuple[Tensor, Tensor] | None:
    """r and r̂ where their rows match the inputs' rows."""
    r, r_hat = dense.residual, quantized.residual
    if r is None or r_hat is None or r.shape != r_hat.shape or r.shape[:-1] != quantized.inputs.shape[:-1]:
        return None
    return r, r_hat
