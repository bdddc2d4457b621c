"""What a configuration says about a model: which linears."""

from __future__ import annotations

import transformers
from torch import nn

from optimum_sab.errors import ConfigError
from optimum_sab.hf.config import SABConfig
from optimum_sab.nn.decoder import find_decoder_blocks
from optimum_sab.nn.selection import Selection, select_linears
from optimum_sab.nn.unfusing import experts_unfused, fused_experts

EXPERTS = "experts"  # in ``measured``: the modules whose experts were packed


def select(model: nn.Module, config: SABConfig, strict: bool) -> Selection:
    """The linears of ``model`` that ``config`` binarizes, those of fused experts included.

    Their names hold while the experts that the selection names are linears (`unfuse_experts`).

    Args:
        model: dense; it is as it was afterwards.
        config: the configuration.
        strict: for a model that is to be binarized: rules that match nothing are errors. Otherwise what was left dense
            when it was binarized is left dense again.

    Raises:
        ConfigError: see `select_linears`; or experts were packed that are not fused in this line of Transformers.
    """
    rules = list(config.modules_to_not_convert)
    left_dense = None if strict else (config.measured or {}).get("left_dense")
    rules += left_dense or []
    keep_routers = left_dense is None  # the record is complete, and may be of a release that chose otherwise
    with experts_unfused(model, None if strict else _packed_experts(model, config)):
        return select_linears(model, config.layer_settings, rules, config.dynamic, strict, keep_routers)


def _packed_experts(model: nn.Module, config: SABConfig) -> list[str]:
    """Names of the experts that were packed when the model was binarized."""
    recorded = (config.measured or {}).get(EXPERTS) or []
    if not recorded:
        return []
    lists = find_decoder_blocks(model).lists
    fused = {lists.short(name): name for name in fused_experts(model)}
    missing = next((name for name in recorded if name not in fused), None)
    if missing is not None:
        raise ConfigError(
            f"{missing}: its experts are packed, and {type(model).__name__} has none there that are fused; load it "
            f"with Transformers 5 (here: {transformers.__version__})."
        )
    return [fused[name] for name in recorded]
