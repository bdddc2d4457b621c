"""Whether a device has room for a model, said before it is made."""

from __future__ import annotations

from optimum_sab.bench.conditions import Conditions
from optimum_sab.bench.qwen import empty_model
from optimum_sab.calibration.streams.memory import free_memory
from optimum_sab.errors import ConfigError


def check_room(size: str, conditions: Conditions, tokens: int, models: int = 1) -> None:
    """Whether the dense weights find room, with a key-value cache for so many tokens; activations come on top.

    Args:
        size: one of `qwen.SIZES`.
        conditions: of which device and dtype count.
        tokens: of all sequences together that the cache can hold.
        models: that are there at the same time, each counted as dense.

    Raises:
        ConfigError: they do not, or the size is unknown.
    """
    model = empty_model(size)
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * tokens * text.num_hidden_layers * text.num_key_value_heads * width
    needed = (cache + models * sum(p.numel() for p in model.parameters())) * conditions.dtype.itemsize
    free = free_memory(conditions.device)
    if free is not None and needed > free:
        raise ConfigError(
            f"--size {size} takes {needed / 1e9:.1f} GB dense with its cache, and {conditions.device} has "
            f"{free / 1e9:.1f} GB free; choose a smaller --size, or a device with more memory."
        )
