#!/usr/bin/env bash
# A packed checkpoint whose plugin was not imported loads all the same: with random weights, or with codes as weights.
#
# Packages:  transformers 5.24.0, torch 2.13.0, safetensors 0.8.0.
# Behaviour: an unknown quant_method passed to from_pretrained is a ValueError. The same one in a checkpoint's
#            config.json is a log line, and loading goes on as for a dense model: packed tensors are "UNEXPECTED", the
#            weights they stand for are made up at random, and int8 codes stored as `weight` in the dense shape become
#            the weights. 4.57.6 does the same, but stops at the int8 ones because integers cannot require gradients.
# Seen:      as an argument: ValueError; in config.json, packed names: two loads, two different weights, no error
#            in config.json, int8 codes under `weight`: float32 weights -128.0 .. 127.0
# Matters:   forgetting `import my_plugin` gives a model that runs and answers nonsense. Save under names and shapes
#            that cannot be taken for dense ones, and look at output_loading_info in whatever loads for users.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 transformers==5.24.0

cat > "$dir/show.py" <<'EOF'
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

NAME = "model.layers.0.mlp.gate_proj.weight"
folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_key_value_heads=2)).save_pretrained(folder)
tensors = load_file(folder / "model.safetensors")
codes = torch.arange(-128, 128, dtype=torch.int8).repeat(6).view(48, 32)


def weight() -> torch.Tensor:
    return LlamaForCausalLM.from_pretrained(folder).get_parameter(NAME).detach()


def store(name: str, tensor: torch.Tensor) -> None:
    kept = {key: value for key, value in tensors.items() if key != NAME}
    save_file({**kept, name: tensor}, folder / "model.safetensors", metadata={"format": "pt"})


try:
    LlamaForCausalLM.from_pretrained(folder, quantization_config={"quant_method": "my_packed"})
    argument = "loads"
except ValueError as error:
    argument = "ValueError"
print("unknown method as an argument:", argument)

config = json.loads((folder / "config.json").read_text())
config["quantization_config"] = {"quant_method": "my_packed", "bits": 2}
(folder / "config.json").write_text(json.dumps(config))
store(NAME.replace("weight", "packed"), torch.arange(96, dtype=torch.int32).view(48, 2))
first, second = weight(), weight()
print("in config.json, packed names: two loads are equal:", torch.equal(first, second))

store(NAME, codes)
taken = weight()
print(f"in config.json, int8 codes: {taken.dtype}, {taken.min().item()} .. {taken.max().item()}")
if argument != "ValueError" or torch.equal(first, second) or not torch.equal(taken, codes.float()):
    sys.exit("not as described")
EOF
TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_OFFLINE=1 \
    "$dir/venv/bin/python" -I "$dir/show.py" "$dir"
