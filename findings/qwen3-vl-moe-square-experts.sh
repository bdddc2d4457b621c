#!/usr/bin/env bash
# A Qwen3-VL-MoE checkpoint of Transformers 4.57 whose experts are square is read transposed by 5, without a word.
#
# Packages:  transformers 4.57.6 (writes) and 5.24.0 (reads), torch 2.13.0, safetensors 0.8.0.
# Behaviour: 4.57 stores gate_up_proj as (experts, hidden, 2*inner) and down_proj as (experts, inner, hidden); 5 stores
#            both the other way round, under the same names. On loading, 5 transposes a tensor only if its shape does
#            not fit: 2*inner == hidden (or inner == hidden, for down_proj) fits as it is and is taken untransposed.
# Seen:      largest difference of the logits after the move, inner 40 hidden 32: 1e-7
#                                                             inner 16 hidden 32: 1.6e-1
#                                                             inner 32 hidden 32: 1.6e-1
# Matters:   tiny test models are often square, and published small ones may be. A reader of such files cannot tell the
#            layout from the shape either: it needs `transformers_version` of config.json.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
pip() { "$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check "$@"; }

cat > "$dir/show.py" <<'EOF'
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

HIDDEN = 32
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
TEXT = {"vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "rope_scaling": ROPE}
TEXT |= {"num_experts_per_tok": 2}
VISION = {"hidden_size": 16, "intermediate_size": 16, "patch_size": 4, "depth": 1, "num_heads": 2}
VISION |= {"out_hidden_size": HIDDEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
tokens = torch.arange(2, 9)[None]
wrong = {}
for inner in (40, 16, 32):
    folder = Path(sys.argv[2]) / str(inner)
    if sys.argv[1] == "write":
        torch.manual_seed(0)
        config = Qwen3VLMoeConfig(text_config={**TEXT, "moe_intermediate_size": inner}, vision_config=VISION)
        model = Qwen3VLMoeForConditionalGeneration(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
        torch.save(model(input_ids=tokens).logits.detach(), folder / "logits.pt")
    else:
        model = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder).eval()
        gap = (model(input_ids=tokens).logits - torch.load(folder / "logits.pt")).abs().max().item()
        print(f"inner {inner} hidden {HIDDEN}: logits differ by {gap:.1e}")
        wrong[inner] = gap > 1e-3
if sys.argv[1] == "read" and wrong != {40: False, 16: True, 32: True}:
    sys.exit("not as described")
EOF

show() {
    TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_OFFLINE=1 \
        "$dir/venv/bin/python" -I "$dir/show.py" "$1" "$dir/models"
}
pip torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 transformers==4.57.6
show write
pip transformers==5.24.0
show read
