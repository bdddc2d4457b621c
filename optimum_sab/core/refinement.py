"""Settings of the refinement."""

from __future__ import annotations

from dataclasses import dataclass

from optimum_sab.errors import ConfigError


@dataclass(frozen=True)
class RefineSettings:
    """How long to refine.

    Args:
        epochs: rounds over the samples for every block's reconstruction; 0 leaves it out.
        steps: Adam steps of the tuning of the whole model after the last block; 0 leaves it out.

    Raises:
        ConfigError: a value is no integer, is negative, or both are 0.
    """

    epochs: int = 10
    steps: int = 200

    def __post_init__(self) -> None:
        for name, value in (("refine_epochs", self.epochs), ("refine_steps", self.steps)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name}={value!r} must be an integer of at least 0; 0 leaves that part out.")
        if not self.epochs and not self.steps:
            raise ConfigError(
                "refine_epochs=0 and refine_steps=0 leave nothing to refine; use refine=False, or one of them."
            )
