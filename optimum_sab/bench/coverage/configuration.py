"""The small random model of a family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from optimum_sab.bench.coverage.exceptions import Exceptions
from optimum_sab.bench.coverage.families import Family
from optimum_sab.bench.coverage.shrinking import shrink

_SPREAD = 0.02  # of what the family leaves at zero or unset


def small_config(family: Family, exceptions: Exceptions) -> Any:
    """The family's configuration, shrunk, with what it needs besides."""
    default = family.config_class(**exceptions.default)
    small = shrink(default.to_dict())
    if exceptions.mrope:
        _set_mrope(small.get("text_config", small), list(exceptions.mrope))
    for path, value in exceptions.config.items():
        _set(small, path.split("."), value)
    return family.config_class.from_dict(small)


def random_model(family: Family, exceptions: Exceptions, seed: int = 0) -> Any:
    """A model of the family in float32, in evaluation mode, whose every part matters.

    Parameters that begin at zero (gates, biases) or are left unset get small random numbers.
    """
    torch.manual_seed(seed)
    model = family.model_class(small_config(family, exceptions)).float().eval()
    for parameter in model.parameters():
        _fill(parameter)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id, generation.pad_token_id = None, 0  # what is generated does not end early
    return model


def _fill(parameter: nn.Parameter) -> None:
    if parameter.is_floating_point() and (not parameter.isfinite().all() or not parameter.any()):
        with torch.no_grad():
            parameter.normal_(std=_SPREAD)


def _set(config: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        if not isinstance(config.get(part), Mapping):
            config[part] = {}
        config = config[part]
    config[path[-1]] = value


def _set_mrope(text: dict[str, Any], sections: list[int]) -> None:
    """Where a line of Transformers keeps the parts of multimodal rotary positions."""
    name = "rope_parameters" if "rope_parameters" in text else "rope_scaling"  # Transformers 4.57
    parameters = text.get(name) or {"rope_type": "default"}
    by_kind = [each for each in parameters.values() if isinstance(each, dict)]
    for each in by_kind or [parameters]:
        each["mrope_section"] = sections
    text[name] = parameters
