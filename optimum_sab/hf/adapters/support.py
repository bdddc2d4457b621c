"""Which adapters compute with a packed layer, and what is said of those that do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from optimum_sab.errors import ConfigError

# By PEFT's own names of its methods. Each was compared with the same adapter on the dequantized layer, outputs and
# gradients; what is not here reads the weight of the layer it adapts, or was not tried.
WORKING = frozenset(("LORA", "ADALORA", "IA3", "OFT", "VERA"))

INITIALISATIONS = (True, False, None, "gaussian", "eva")  # of LoRA; the others decompose the layer's weight
VARIANTS = ("use_dora", "alora_invocation_tokens")  # of LoRA, of the fields that PEFT marks as variants

DENSE = "or adapt the dense model: from_pretrained(..., quantization_config=SABConfig(dequantize=True))"


def check_adapter(config: Any, names: Iterable[str]) -> None:
    """Refuse an adapter that does not work on packed layers.

    Args:
        config: PEFT's, of the adapter.
        names: of the packed layers that it is for; with none, anything is right.

    Raises:
        ConfigError: it reads the weight of the layers it adapts.
    """
    example = next(iter(names), None)
    if example is None:
        return
    method = method_of(config)
    if method not in WORKING:
        raise ConfigError(
            f"PEFT's {method} reads the weight of the layers it adapts, and {example} is packed; use one of "
            f"{', '.join(sorted(WORKING))}, {DENSE}."
        )
    if method in ("LORA", "ADALORA"):
        _check_lora(config, example)


def method_of(config: Any) -> str:
    """PEFT's name of the method that a configuration is of, such as "LORA"."""
    kind = getattr(config, "peft_type", None)
    return str(getattr(kind, "value", kind))


def _check_lora(config: Any, example: str) -> None:
    start = config.init_lora_weights
    if not any(start is each or (isinstance(each, str) and start == each) for each in INITIALISATIONS):
        raise ConfigError(
            f"init_lora_weights={start!r} is computed from the weight of the adapted layer, and that of {example} is "
            f"packed; use True, False, 'gaussian' or 'eva', {DENSE}."
        )
    for field in dataclasses.fields(config):
        chosen = getattr(config, field.name)
        if field.metadata.get("is_lora_variant") and chosen and field.name not in VARIANTS:
            raise ConfigError(
                f"LoRA with {field.name}={chosen!r} was not made for packed layers such as {example}; leave it out, "
                f"{DENSE}."
            )


def refuse_training(what: str, name: str) -> None:
    """A packed layer is to be trained itself.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"{what} would train the weight of {name}, which is packed and has no gradients; give it an adapter by "
        f"target_modules, {DENSE}."
    )


def refuse_merging(name: str) -> None:
    """An adapter is to be added into a packed weight.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"an adapter cannot be merged into {name}: its weight is packed, and one bit per weight has no room for it. "
        "Keep the adapter beside the packed model, or merge into the dense one: load the packed model with "
        "quantization_config=SABConfig(dequantize=True), or call dequantize() on it, then merge."
    )
