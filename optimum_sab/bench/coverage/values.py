"""What the table of exceptions writes in the place of tensors, and how it becomes one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimum_sab.bench.coverage.shrinking import FIRST_SPECIAL, FIRST_TEXT


@dataclass(frozen=True)
class Random:
    """Standard normal numbers of this shape."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Ids:
    """Random ids of text of this shape."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class NumberedPatches:
    """A picture's patches, a row each behind the number of its row and column: [1, rows * columns, 2 + width]."""

    rows: int
    columns: int
    width: int


@dataclass(frozen=True)
class PerToken:
    """An entry for every token: one where there is text, another where the picture's placeholders are.

    Attributes:
        text: value at text.
        picture: value at placeholders; None for the same.
        shape: of each entry.
    """

    text: float = 1
    picture: float | None = None
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Draw:
    """What values are made from.

    Attributes:
        generator: of random numbers.
        placeholders: bool [1, tokens]; None before there are tokens.
    """

    generator: torch.Generator
    placeholders: Tensor | None = None

    def pixels(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator)

    def ids(self, *shape: int) -> Tensor:
        """Ids of text."""
        return torch.randint(FIRST_TEXT, FIRST_SPECIAL, shape, generator=self.generator)

    def tensor(self, value: Any) -> Any:
        """The tensor that a value of the table stands for; a number, a text or True stays what it is."""
        if isinstance(value, Random):
            return self.pixels(*value.shape)
        if isinstance(value, Ids):
            return self.ids(*value.shape)
        if isinstance(value, NumberedPatches):
            return self._numbered(value)
        if isinstance(value, PerToken):
            return self._per_token(value)
        return torch.tensor(value) if isinstance(value, (list, tuple)) else value

    def _numbered(self, value: NumberedPatches) -> Tensor:
        places = torch.cartesian_prod(torch.arange(1, value.rows + 1), torch.arange(1, value.columns + 1)).float()
        return torch.cat((places, self.pixels(len(places), value.width)), dim=1)[None]

    def _per_token(self, value: PerToken) -> Tensor:
        assert self.placeholders is not None
        where = self.placeholders.reshape(*self.placeholders.shape, *(1 for _ in value.shape))
        where = where.expand(*self.placeholders.shape, *value.shape)
        picture = value.text if value.picture is None else value.picture
        return torch.where(where, picture, value.text)
