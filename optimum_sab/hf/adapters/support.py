"""Which adapters compute with a packed layer, and what is said of those that do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from optimum_sab.errors import ConfigError

# By PEFT's names of its methods. Each is held to the same adapter on the dequantized layer, outputs and gradients
# (tests/adapters/test_methods.py). A method that is not here reads the weight of the layer it adapts, or was not tried.
WORKING = (
    "LORA", "ADALORA", "BEFT", "BOFT", "C3A", "FOURIERFT", "GRALORA", "IA3", "LILY", "MISS", "OFT", "POLY", "PVERA",
    "RANDLORA", "ROAD", "SHIRA", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip

INITIALISATIONS = (True, False, None, "gaussian", "eva")  # of LoRA; the others decompose the layer's weight
VARIANTS = ("use_dora", "alora_invocation_tokens")  # of LoRA, of the fields that PEFT marks as variants

DENSE = "or call dequantize() on the model first and adapt the dense one"


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
            f"PEFT's {method} is not for packed layers such as {example}: it reads the weight of what it adapts. Use "
            f"one of {', '.join(WORKING)}, {DENSE}."
        )
    if method in ("LORA", "ADALORA"):
        _check_lora(config, example)
    elif method == "MISS" and config.init_weights == "bat":
        raise ConfigError(
            f"MISS with init_weights='bat' computes with the weight of {example}, which is packed; use True, False or "
            f"'mini', {DENSE}."
        )


def method_of(config: Any) -> str:
    """PEFT's name of the method that a configuration is of, such as "LORA"."""
    kind = config.peft_type
    return str(getattr(kind, "value", kind))


def _check_lora(config: Any, example: str) -> None:
    start = config.init_lora_weights
    if start not in INITIALISATIONS:
        raise ConfigError(
            f"init_lora_weights={start!r} is computed from the weight of the adapted layer, and that of {example} is "
            f"packed; use True, False, 'gaussian' or 'eva', {DENSE}."
        )
    for field in dataclasses.fields(config):
        chosen = getattr(config, field.name)
        if field.metadata.get("is_lora_variant") and chosen and field.name not in VARIANTS:
            raise ConfigError(
                f"LoRA with {field.name}={chosen!r} is not for packed layers such as {example}; leave it out, {DENSE}."
            )


def refuse_training(what: str, name: str) -> None:
    """A packed layer is to be trained itself.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"{what} would train the weight of {name}, which is packed and has no gradients; name the layer in "
        f"target_modules, which gives it an adapter, {DENSE}."
    )


def refuse_merging(name: str) -> None:
    """An adapter is to be added into a packed weight.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"an adapter cannot be merged into {name}, whose weight is packed: a bit per weight has no room for it. Keep "
        "the adapter beside the packed model, or call dequantize() on the model and merge then."
    )
