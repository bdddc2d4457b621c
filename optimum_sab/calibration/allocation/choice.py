"""Choose the planes of every linear under a budget of stored bits, from sensitivities and measured errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from optimum_sab.calibration.allocation.ladder import PLANES, expected_error, ladder_of
from optimum_sab.calibration.allocation.probe import AnchorErrors
from optimum_sab.core.allocation import Level, allocate_levels
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError
from optimum_sab.format.layout import stored_bits_per_weight
from optimum_sab.nn.rules import rules_for
from optimum_sab.nn.selection import Selection


@dataclass(frozen=True)
class Allocation:
    """Planes per linear; linears of one shape that share an input have the same.

    Attributes:
        settings: of every linear that has chosen.
        sensitivity: expected KL per relative output error, nats (`output_sensitivity`).
        bits_per_weight: stored bits over weights, the linears that had no choice included.
    """

    settings: dict[str, LayerSettings]
    sensitivity: dict[str, float]
    bits_per_weight: float

    def rules(self, selection: Selection) -> dict[str, dict[str, Any]]:
        """The same as rules for ``dynamic``, one for each linear, by its name from the decoder's block list on.

        Args:
            selection: all linears that will be binarized.
        """
        keys = rules_for(list(self.settings), list(selection.settings), selection.lists)
        asked = selection.settings
        return {
            keys[name]: {each: getattr(own, each) for each in PLANES}
            | ({} if own.code == asked[name].code else {"code": own.code})
            for name, own in self.settings.items()
        }


def allocate(
    model: nn.Module,
    selection: Selection,
    sensitivity: Mapping[str, float],
    probed: AnchorErrors,
    target_bits: float | None = None,
) -> Allocation:
    """Find the planes of the linears that were probed such that all selected ones take at most the budget.

    Expected loss of a linear at a level = its sensitivity times its relative output error there (`expected_error`).
    Linears of one group choose together (k and v; gate and up): they are solved as one stack and run in one launch.

    Args:
        model: dense; not changed.
        selection: all linears that will be binarized; the settings of those probed give everything but planes.
        sensitivity: of every linear that was probed, at least.
        probed: groups and their errors.
        target_bits: stored bits per weight at most; None for what ``selection`` takes as it is.

    Raises:
        ConfigError: the budget is below the cheapest choice; the message says what that needs.
    """
    costs = _Costs(model, selection, sensitivity, probed.errors)
    groups = {names[0]: names for names in probed.groups}
    ladders = {first: ladder_of(selection.settings[first]) for first in groups}
    levels = {first: [costs.level(groups[first], *each) for each in ladders[first].items()] for first in groups}
    measured = {name for names in groups.values() for name in names}
    fixed = sum(costs.bits(name, own) for name, own in selection.settings.items() if name not in measured)
    weights = sum(costs.weights(name) for name in selection.settings)
    bits = selected_bits(model, selection) if target_bits is None else target_bits
    least = (fixed + sum(min(level.bits for level in of) for of in levels.values())) / weights
    if bits < least - 1e-9:
        raise ConfigError(
            f"target_bits={bits:g} is less than the {least:.3f} bits that this model's linears take at least; "
            "raise it, or use larger blocks (block_size)."
        )
    chosen = allocate_levels(levels, bits * weights - fixed)
    total = (fixed + sum(levels[first][index].bits for first, index in chosen.items())) / weights
    picked = {first: list(ladders[first].values())[index] for first, index in chosen.items()}
    by_name = {name: picked[first] for first, names in groups.items() for name in names}
    return Allocation({n: by_name[n] for n in selection.settings if n in by_name}, dict(sensitivity), total)


def selected_bits(model: nn.Module, selection: Selection) -> float:
    """Stored bits per weight, biases among them, that a selection takes with its own settings."""
    linears = {name: model.get_submodule(name) for name in selection.settings}
    bits = sum(_bits(linears[name], own) for name, own in selection.settings.items())
    return bits / sum(_weights(linear) for linear in linears.values())


@dataclass(frozen=True)
class _Costs:
    """What a linear costs at a level, in bits and in expected loss."""

    model: nn.Module
    selection: Selection
    sensitivity: Mapping[str, float]
    errors: Mapping[str, Mapping[tuple[int, float], float]]

    def weights(self, name: str) -> int:
        return _weights(self.model.get_submodule(name))

    def bits(self, name: str, settings: LayerSettings) -> float:
        """Stored bits of the linear."""
        return _bits(self.model.get_submodule(name), settings)

    def level(self, names: Sequence[str], step: tuple[int, float], settings: LayerSettings) -> Level:
        """Of linears that choose together."""
        loss = sum(self.sensitivity[name] * expected_error(self.errors[name], step) for name in names)
        return Level(sum(self.bits(name, settings) for name in names), loss)


def _bits(linear: nn.Module, settings: LayerSettings) -> float:
    """Of a linear, its bias among them, which stays as it is."""
    bias = linear.bias
    kept = bias.element_size() * bias.numel() if isinstance(bias, Tensor) else 0
    return stored_bits_per_weight(*_shape(linear), settings) * _weights(linear) + 8 * kept


def _weights(linear: nn.Module) -> int:
    return math.prod(_shape(linear))


def _shape(linear: nn.Module) -> tuple[int, int]:
    return int(linear.out_features), int(linear.in_features)  # type: ignore[arg-type]
