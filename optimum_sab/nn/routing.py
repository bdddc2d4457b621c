"""Which experts tokens go to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Which experts the tokens go to. A pair is a token and an expert.

    Attributes:
        experts: of each pair, [pairs]; those that there are none of compute nothing.
        top_k: pairs of each token, whose pairs follow each other; 0 where they come expert by expert.
        tokens: how many.
    """

    experts: Tensor
    top_k: int
    tokens: int

    @property
    def token(self) -> Tensor:
        """The token of each pair, [pairs]."""
        each = torch.arange(self.experts.shape[0], device=self.experts.device)
        return each // self.top_k if self.top_k else each % self.tokens

    def repeats(self, inputs: Tensor) -> int:
        """Pair s reads row s // repeats of inputs [rows, in]: those of tokens, or of pairs."""
        return max(1, self.experts.shape[0] // max(inputs.shape[0], 1)) if self.top_k else 1
