"""The levels a linear can choose from: planes, and what error to expect of them from a few that are measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from optimum_sab.core.code import NO_CODE, code_for
from optimum_sab.core.settings import MAX_PLANES, LayerSettings

PLANES = ("base_planes", "residual_planes", "salient_fraction")  # what is chosen
FRACTIONS = (0.0, 0.03125, 0.0625, 0.09375, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.75)
LADDER = (*((base, f) for base in (1, 2, 3) for f in FRACTIONS), (4, 0.0))
ANCHOR_FRACTION = 0.125
# Levels at which errors are measured; those at the others lie on curves through these.
ANCHORS = ((1, 0.0), (1, ANCHOR_FRACTION), (2, 0.0), (2, ANCHOR_FRACTION))


def ladder_of(settings: LayerSettings) -> dict[tuple[int, float], LayerSettings]:
    """The levels a linear with these settings can choose from, by base planes and share of columns.

    Without the code where there would be too many planes with it.
    """
    steps = {}
    for base, fraction in LADDER:
        if round(fraction * settings.block_size) < 1:
            steps[base, 0.0] = with_planes(settings, base_planes=base, residual_planes=0)
        else:
            steps[base, fraction] = with_planes(
                settings, base_planes=base, residual_planes=1, salient_fraction=fraction
            )
    return steps


@lru_cache
def probed_settings(settings: LayerSettings, level: tuple[int, float]) -> LayerSettings:
    """What a linear with these settings is solved with to measure its error at a level: quickly, with its code.

    Args:
        settings: of the linear.
        level: one of `ANCHORS`; without residual planes where blocks are too narrow for its share of columns.
    """
    base, fraction = level
    found = ladder_of(settings).get((base, fraction))
    if found is None:  # blocks too narrow for an eighth
        found = with_planes(settings, base_planes=base, residual_planes=0)
    return found.replace(iterations=3, sweeps=0, propagation=0.0)


def with_planes(settings: LayerSettings, **planes: Any) -> LayerSettings:
    """These settings with other planes: with the code that is best for those, or none where it leaves them no room."""
    plain = settings.replace(code=NO_CODE, **planes)
    if settings.code == NO_CODE:
        return plain
    code = code_for(plain.base_planes)
    return plain if code.computed(plain.planes) > MAX_PLANES else plain.replace(code=code.name)


def expected_error(anchors: Mapping[tuple[int, float], float], step: tuple[int, float]) -> float:
    """Relative output error at a level, from those at the anchors.

    A plane more on the share f of the columns, the salient ones first, takes the part ``f^p`` of what it takes off the
    logarithm of the error on all of them; p comes from the anchor at an eighth.
    """
    base, fraction = step
    first, eighth, second, last = (math.log(max(anchors[key], 1e-12)) for key in ANCHORS)
    plane = min(second - first, -1e-6)  # what a whole plane changes
    begins, early = (first, eighth - first) if base == 1 else (second + (base - 2) * plane, last - second)
    power = math.log(min(max(early / plane, 1e-3), 0.999)) / math.log(ANCHOR_FRACTION)
    return math.exp(begins + plane * fraction**power)
