"""What one of two processes finds that share a model; run by test_processes.py, which gives it its rank.

python -m tests.hf.contract.two_processes DENSE PACKED RESULT
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_sab import SABConfig
from optimum_sab.hf.compat import RENAMES as FIVE
from optimum_sab.hf.compat import SHARES_LAYERS
from tests.hf.contract.test_training import give_adapters


def refusal(folder, **arguments):
    """The error that stops from_pretrained before it reads weights."""
    try:
        AutoModelForCausalLM.from_pretrained(folder, **arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def read(*_, **__):
    raise RuntimeError("weights were read")


def refusals(dense, packed):
    whole, PreTrainedModel._load_pretrained_model = PreTrainedModel._load_pretrained_model, read
    config = SABConfig(calibration=["a text"], calibration_samples=1, progress="none")
    found = {"dense tp_plan": refusal(dense, tp_plan="auto", quantization_config=config)}
    if not SHARES_LAYERS:  # test_sharing.py
        found["packed tp_plan"] = refusal(packed, tp_plan="auto")
    if FIVE:
        for size in ("tp_size", "fsdp_size", "pp_size"):
            found[f"dense {size}"] = refusal(dense, distributed_config={size: 2}, quantization_config=config)
            if not (size == "tp_size" and SHARES_LAYERS):
                found[f"packed {size}"] = refusal(packed, distributed_config={size: 2})
    PreTrainedModel._load_pretrained_model = staticmethod(whole)
    return found


def step(model, ids):
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grad = model.model.layers[0].self_attn.q_proj.up.weight.grad
    return loss.item(), grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def shards(packed):
    """How far a model that FSDP2 shards after loading is from the whole one: loss, and an adapter's gradient."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    give_adapters(model)
    ids = torch.arange(20, 28)[None]
    loss, grad = step(model, ids)
    for block in model.model.layers:
        fully_shard(block, shard_placement_fn=lambda p: Shard(1) if p.dtype == torch.int32 else None)  # planes first
    fully_shard(model)
    held = model.model.layers[0].mlp.up_proj.weight.to_local().numel()
    sharded, its_grad = step(model, ids)
    return {
        "loss": abs(sharded - loss),
        "grad": float((its_grad - grad).abs().max()),
        "scale": float(grad.abs().max()),
        "held": held,
    }


def main(dense, packed, result):
    dist.init_process_group("gloo")
    found = {**refusals(dense, packed), "fsdp": shards(packed)}
    Path(result).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
