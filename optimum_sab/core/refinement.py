"""Settings of the refinement."""

from __future__ import annotations

from dataclasses import dataclass

from optimum_sab.core.bounds import check_integer
from optimum_sab.errors import ConfigError

MOST_EPOCHS, MOST_STEPS = 10_000, 1_000_000


@dataclass(frozen=True)
class RefineSettings:
    """How long to refine.

    Args:
        epochs: rounds over the samples for every block's reconstruction; 0 leaves it out.
        steps: Adam steps of the tuning of the whole model after the last block; 0 leaves it out.

    Raises:
        ConfigError: a value is no integer, is negative or beyond `MOST_EPOCHS` or `MOST_STEPS`, or both are 0.
    """

    epochs: int = 10
    steps: int = 200

    def __post_init__(self) -> None:
        for name, value, most in (
            ("refine_epochs", self.epochs, MOST_EPOCHS),
            ("refine_steps", self.steps, MOST_STEPS),
        ):
            check_integer(name, value, 0, most, "; 0 leaves that part out")
        if not self.epochs and not self.steps:
            raise ConfigError(
                "refine_epochs=0 and refine_steps=0 leave nothing to refine; use refine=False, or one of them."
            )
