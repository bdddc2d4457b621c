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


def pair_streams(arrivals: Sequence[Arrival], modalities: Sequence[TokenModalities]) -> list[PairedInputs]:
    """Bring both streams of every sample together.

    The dense rows are dropped for the whole group where tokens are routed: the streams may route others, and then their
    rows are not the same tokens, even if they are as many.

    Args:
        arrivals: of one group of linears.
        modalities: of every sample's tokens, those of samples that did not arrive included.
    """
    if not arrivals:
        return []
    dense = {a.sample: a for a in arrivals if a.stream == DENSE}
    quantized = {a.sample: a for a in arrivals if a.stream != DENSE}
    if any(a.tokens is not None for a in arrivals):
        return [_by_token(a, dense.get(i), bool(dense), modalities[i]) for i, a in quantized.items()]
    routed = _are_routed(arrivals, modalities)
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


def _are_routed(arrivals: Sequence[Arrival], modalities: Sequence[TokenModalities]) -> bool:
    """Whether which tokens come here is decided token by token, as at an expert.

    That shows in a sample that comes to the block and not here, or that has fewer rows than entered the block and other
    than its tokens:
    a block that carries several hidden states per token is given more rows than its linears; those have one per token.
    """
    came = {a.sample for a in arrivals if a.stream != DENSE}
    if len(came) < (arrivals[0].company or len(modalities)):
        return True
    return any(a.rows < a.entered and a.rows != modalities[a.sample].labels.numel() for a in arrivals)


def _residuals(dense: Arrival, quantized: Arrival) -> tuple[Tensor, Tensor] | None:
    """r and r̂ where their rows match the inputs' rows."""
    r, r_hat = dense.residual, quantized.residual
    if r is None or r_hat is None or r.shape != r_hat.shape or r.shape[:-1] != quantized.inputs.shape[:-1]:
        return None
    return r, r_hat
