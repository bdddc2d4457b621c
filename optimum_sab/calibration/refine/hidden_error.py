"""What the reconstruction of a block makes small."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def hidden_error(
    hidden: Float[Tensor, "*tokens width"], wanted: Float[Tensor, "*tokens width"]
) -> Float[Tensor, " tokens"]:
    """``‖ĥ_t − h_t‖² / ‖h_t‖²`` of every token t, fp32.

    The first token's hidden states are often hundreds of times as large as the others' (massive activations); a plain
    squared error would fit that one token and nothing else.
    """
    h = wanted.float().flatten(0, -2)
    size = h.square().sum(-1)
    # an all-zero token has nothing to be relative to: it counts by the mean size
    size = torch.where(size > 0, size, size.mean().clamp_min(torch.finfo(torch.float32).tiny))
    return (hidden.float().flatten(0, -2) - h).square().sum(-1) / size
