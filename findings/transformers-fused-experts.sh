#!/usr/bin/env bash
# In Transformers 5 a mixture of experts has almost no nn.Linear, and its file has other names than its state_dict.
#
# Packages:  transformers 4.57.6 and 5.24.0, torch 2.13.0, safetensors 0.8.0.
# Behaviour: 4.57 has three nn.Linear per expert. 5 has one 3-D parameter for all experts' gate and up projections and
#            one for the down projections, so isinstance(module, nn.Linear) finds attention only. save_pretrained splits
#            these again and writes 4.57's names, which model.state_dict() does not have; loading joins them.
# Seen:      Qwen3-MoE, 2 layers of 8 experts
#            4.57.6: 56 linears hold 99.0 % of the blocks' weights; 69 tensors in the file, 69 in state_dict, 69 in both
#            5.24.0:  8 linears hold  9.0 % of the blocks' weights; 69 tensors in the file, 25 in state_dict, 21 in both
# Matters:   "quantize every nn.Linear" runs through and leaves nine tenths dense, without an error. And a plugin that
#            maps file names to modules by prefix finds no module for most of the names.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
pip() { "$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check "$@"; }

cat > "$dir/show.py" <<'EOF'
import sys
import tempfile

import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
sizes |= {"num_hidden_layers": 2, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2}
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, moe_intermediate_size=40))
# Routers are nn.Linear in one line and not in the other; they are left out of the count.
blocks = model.model.layers
linears = [m for n, m in blocks.named_modules() if isinstance(m, nn.Linear) and not n.endswith("mlp.gate")]
share = sum(linear.weight.numel() for linear in linears) / sum(p.numel() for p in blocks.parameters())
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    stored = set(load_file(f"{folder}/model.safetensors"))
names = set(model.state_dict())
print(
    f"transformers {transformers.__version__}: {len(linears)} linears hold {share:.1%} of the blocks' weights; "
    f"{len(stored)} tensors in the file, {len(names)} in state_dict, {len(stored & names)} in both"
)
if (len(linears), len(stored), len(names), len(stored & names)) != tuple(map(int, sys.argv[1:])):
    sys.exit(f"not as described: expected {sys.argv[1:]}")
EOF

show() {
    TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_OFFLINE=1 \
        "$dir/venv/bin/python" -I "$dir/show.py" "$@"
}
pip torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 transformers==4.57.6
show 56 69 69 69
pip transformers==5.24.0
show 8 69 25 21
