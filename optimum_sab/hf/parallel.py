"""A model that is to be split over processes: refused by name before its weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.modeling_utils import is_deepspeed_zero3_enabled

from optimum_sab.errors import ConfigError

_ARGUMENTS = ("tp_plan", "tp_size", "distributed_config", "device_mesh")
_REMEDY = "Every process then has the whole model. Within one, device_map='auto' spreads its blocks over the devices."


def refuse_split(call: Mapping[str, Any]) -> None:
    """Packed layers cannot be split over processes, nor a model be binarized of which each process has a part.

    Args:
        call: the variables of the running `from_pretrained`; empty where none is.

    Raises:
        ConfigError: several processes are to share the model, by any of its arguments or by DeepSpeed's ZeRO-3.
    """
    if call.get("device_mesh") is not None:  # Transformers makes it of the others, unless they ask for one process only
        name = next(each for each in _ARGUMENTS if call.get(each) is not None)
        raise ConfigError(
            f"{name} splits the model over processes ({call['device_mesh']}), which packed layers cannot be yet. "
            f"Leave it out. {_REMEDY}"
        )
    if is_deepspeed_zero3_enabled():
        raise ConfigError(
            "DeepSpeed's ZeRO-3 splits the model over processes, which nobody has tried with packed layers. Use "
            "ZeRO-2, FSDP2 or plain data parallelism."
        )
