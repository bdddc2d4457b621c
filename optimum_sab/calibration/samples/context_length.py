"""How many tokens a model has positions for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimum_sab.errors import warn

_NAMES = ("max_position_embeddings", "n_positions")


def context_length(config: Any) -> int | None:
    """The positions of a model with this config; None where it does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(text, name, None) for name in _NAMES)
    return next(
        (value for value in found if isinstance(value, int) and not isinstance(value, bool) and value > 0), None
    )


def limited_length(wanted: int, config: Any) -> int:
    """``wanted`` tokens, or as many as the model has positions, with a warning."""
    most = context_length(config)
    if most is None or wanted <= most:
        return wanted
    warn(f"sequence_length={wanted} is more than the {most} positions of the model: calibration texts are cut to that.")
    return most


def warn_of_long_samples(lengths: Mapping[str, int], config: Any) -> None:
    """Say, once, which samples are longer than the model's positions; pictures are not cut.

    Args:
        lengths: tokens by what names the sample.
        config: of the model.
    """
    most = context_length(config)
    longer = [] if most is None else [label for label, length in lengths.items() if length > most]
    if longer:
        warn(
            f"{len(longer)} calibration samples with pictures are longer than the {most} positions of the model "
            f"({longer[0]} has {lengths[longer[0]]} tokens), which was not made for them. Give smaller pictures."
        )
