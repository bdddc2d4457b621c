"""What a configuration says about a model: which linears."""

from __future__ import annotations

from torch import nn

from optimum_sab.hf.config import SABConfig
from optimum_sab.nn.selection import Selection, select_linears


def select(model: nn.Module, config: SABConfig, strict: bool) -> Selection:
    """The linears of ``model`` that ``config`` binarizes.

    Args:
        model: dense.
        config: the configuration.
        strict: for a model that is to be binarized: rules that match nothing are errors. Otherwise what was left dense
            when it was binarized is left dense again.

    Raises:
        ConfigError: see `select_linears`.
    """
    rules = list(config.modules_to_not_convert)
    left_dense = None if strict else (config.measured or {}).get("left_dense")
    rules += left_dense or []
    keep_routers = left_dense is None  # the record is complete, and may be of a release that chose otherwise
    return select_linears(model, config.layer_settings, rules, config.dynamic, strict, keep_routers)
