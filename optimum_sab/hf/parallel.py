"""A model that is to be split over processes: what is refused by name before its weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.modeling_utils import is_deepspeed_zero3_enabled

from optimum_sab.errors import ConfigError
from optimum_sab.hf.compat import SHARES_LAYERS

_ARGUMENTS = ("tp_plan", "tp_size", "distributed_config", "device_mesh")
_OTHERS = ("pp_size", "dp_replicate_size", "fsdp_size", "ep_size")
_WHOLE = "Every process then has the whole model. Within one, device_map='auto' spreads its blocks over the devices."


def refuse_split(call: Mapping[str, Any], packed: bool, dequantize: bool) -> None:
    """Only a packed model can be split, by tensor parallelism alone, and by a Transformers that is known.

    Args:
        call: the variables of the running `from_pretrained`; empty where none is.
        packed: the checkpoint is; else it is to be binarized.
        dequantize: the packed layers are to become dense.

    Raises:
        ConfigError: several processes are to share the model in a way that does not work.
    """
    if call.get("device_mesh") is not None:  # Transformers makes it of the others, unless they ask for one process only
        reason = _reason(call, packed, dequantize)
        if reason:
            name = next(each for each in _ARGUMENTS if call.get(each) is not None)
            raise ConfigError(f"{name} splits the model over processes ({call['device_mesh']}), {reason}")
    if is_deepspeed_zero3_enabled():
        raise ConfigError(
            "DeepSpeed's ZeRO-3 splits the model over processes, which nobody has tried with packed layers. Use "
            "ZeRO-2, FSDP2 or plain data parallelism."
        )


def _reason(call: Mapping[str, Any], packed: bool, dequantize: bool) -> str | None:
    """Why this model cannot be split so, and what to do; None where it can."""
    config = call.get("distributed_config")
    others = [name for name in _OTHERS if getattr(config, name, 1) > 1]
    if not packed:
        return (
            "and a model cannot be binarized of which each process has a part. Leave it out, and split the packed "
            f"checkpoint when it is loaded. {_WHOLE}"
        )
    if not SHARES_LAYERS:
        return f"which packed layers can be from Transformers 5.24 on. Upgrade it, or leave this out. {_WHOLE}"
    if others or call.get("mesh_manager") is None:
        what = f"with {others[0]}={getattr(config, others[0])}" if others else "with a mesh of its own"
        return (
            f"{what}, which packed layers cannot be. Give distributed_config=DistributedConfig(tp_size=…) alone, or "
            f"leave it out. {_WHOLE}"
        )
    if dequantize:
        return (
            "and dequantize=True wants dense layers of whole ones. Dequantize in one process, save, and split what you "
            "have saved."
        )
    if call.get("_adapter_model_path") is not None:
        return (
            "and adapters are not split with packed layers. Load the packed checkpoint itself without its adapter, or "
            f"leave this out. {_WHOLE}"
        )
    return None
