"""What one of two processes finds that load a share of packed checkpoints; run by test_sharing.py.

python -m tests.hf.contract.two_shares FOLDER RESULT, where FOLDER has a folder for each checkpoint
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from optimum_sab import SABConfig
from optimum_sab.bench.coverage.samples import run
from optimum_sab.hf.shares import own_part
from optimum_sab.hf.sharing import Sharing
from optimum_sab.nn.input_group import InputGroup
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.shared import SABShare

DOWN = "model.layers.*.mlp.down_proj"
REFUSED = {
    "one head": {"distributed_config": {"tp_size": 2}},
    "narrow": {"distributed_config": {"tp_size": 2}},
    "experts with biases": {
        "distributed_config": {
            "tp_size": 2,
            "tp_plan": {
                "model.layers.*.mlp.experts": "moe_tp_experts",
                "model.layers.*.mlp.experts.gate_up_proj": "packed_colwise",
                "model.layers.*.mlp.experts.down_proj": "rowwise",
            },
        }
    },
    "fsdp": {"distributed_config": {"tp_size": 1, "fsdp_size": 2}},
    "dequantize": {"distributed_config": {"tp_size": 2}, "quantization_config": SABConfig(dequantize=True)},
    "no rules": {"distributed_config": {"tp_size": 2, "tp_plan": {}}},
    "rule for a tensor": {"distributed_config": {"tp_size": 2, "tp_plan": {f"{DOWN}.weight": "rowwise"}}},
    "another style": {"distributed_config": {"tp_size": 2, "tp_plan": {DOWN: "all_reduce"}}},
    "a style around": {"distributed_config": {"tp_size": 2, "tp_plan": {"model.layers.*.mlp": "all_reduce"}}},
    "none of the packed": {"distributed_config": {"tp_size": 2}},
}
CHECKPOINT = {"fsdp", "dequantize", "no rules", "rule for a tensor", "another style", "a style around"}  # of "llama"


def message(call, *arguments, **options):
    """What a call says that is refused."""
    try:
        call(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def load(folder, **settings):
    row, name = torch.load(folder / "sample.pt")
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, **settings), row


@contextmanager
def watched(read):
    """Notes what was read of every packed layer's weight, of the whole, before shares are made."""
    place = Sharing.place

    def placed(sharing, model):
        for name, layer in model.named_modules():
            if isinstance(layer, SABLinear):
                read[name] = own_part(layer.weight).numel() / layer.weight.numel()
        place(sharing, model)

    Sharing.place = placed
    yield
    Sharing.place = place


def held(model):
    return sum(tensor.nbytes for m in model.modules() if isinstance(m, SABLinear) for tensor in m.tensors)


def is_grouped(layer):
    return isinstance(layer.group, InputGroup)


def gradient(model, row):
    """The loss, and the gradient of the first norm."""
    loss = model(**row, labels=row["input_ids"]).loss
    loss.backward()
    found = next(p for n, p in model.named_parameters() if n.endswith("input_layernorm.weight")).grad
    return loss.item(), found.full_tensor() if hasattr(found, "full_tensor") else found


def compared(folder, **settings):
    """A model in two shares, beside the whole one."""
    read = {}
    with watched(read):
        model, row = load(folder, **settings)
    whole, _ = load(folder)
    logits = run(whole, row)
    generated = [each.generate(**row, max_new_tokens=5, do_sample=False).tolist() for each in (model, whole)]
    (loss, grad), (its_loss, its_grad) = gradient(whole, row), gradient(model, row)
    return {
        "off": float((run(model, row) - logits).abs().max()),
        "largest": float(logits.abs().max()),
        "same tokens": generated[0] == generated[1],
        "loss": abs(loss - its_loss),
        "grad": float((grad - its_grad).abs().max() / grad.abs().max()),
        "read": sorted(set(read.values())),
        "held": held(model) / held(whole),
        "parameters": [model.num_parameters(), whole.num_parameters()],
        "groups": sorted({len(m.group.members) for m in model.modules() if isinstance(m, SABLinear) and is_grouped(m)}),
        "pieces": sorted({len(m.pieces) for m in model.modules() if isinstance(m, SABShare)}),
    }


def afterwards(folder, saved):
    """What is refused of a model that is shared."""
    from peft import LoraConfig, get_peft_model

    model, _ = load(folder, distributed_config=DistributedConfig(tp_size=2))
    adapter = LoraConfig(target_modules=["q_proj"])
    return {
        "saved": message(model.save_pretrained, saved),
        "saved in parts": message(model.save_pretrained, saved, distributed_checkpoint=True),
        "dequantized": message(model.dequantize),
        "adapted": message(get_peft_model, model, adapter),
    }


def read(*_, **__):
    raise RuntimeError("weights were read")


def refusals(folder):
    loads, PreTrainedModel._load_pretrained_model = PreTrainedModel._load_pretrained_model, read
    found = {
        case: message(load, folder / ("llama" if case in CHECKPOINT else case), **settings)
        for case, settings in REFUSED.items()
    }
    PreTrainedModel._load_pretrained_model = staticmethod(loads)
    return found


def main(folder, result):
    dist.init_process_group("gloo")
    folder, two = Path(folder), DistributedConfig(tp_size=2)
    found = {
        "llama": compared(folder / "llama", distributed_config=two),
        "tp_plan": compared(folder / "llama", tp_plan="auto"),
        "pictures": compared(folder / "pictures", distributed_config=two),
        "fused": compared(folder / "fused", distributed_config=two),
        "experts": compared(folder / "experts", distributed_config=two),
        "coded": compared(folder / "coded", distributed_config=two),
        "coded experts": compared(folder / "coded experts", distributed_config=two),
        "refused": refusals(folder),
        "damaged": message(load, folder / "damaged", distributed_config=two),
        "afterwards": afterwards(folder / "llama", Path(result).with_suffix(".saved")),
    }
    Path(result).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
