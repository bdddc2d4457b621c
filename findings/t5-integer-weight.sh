#!/usr/bin/env bash
# T5 converts the activations to the dtype of a linear's `weight`: with packed integers there, the activations are cut.
#
# Packages:  transformers 5.24.0 (the same was seen with 4.57.6), torch 2.13.0.
# Behaviour: before it calls the feed-forward's output linear `wo`, T5 casts the activations to wo.weight.dtype. It
#            leaves int8 alone and nothing else: uint8, int16 and int32 turn them into integers. 46 modeling files cast
#            to the dtype of some projection's weight, only 12 of them with an exception for int8.
# Seen:      the same quantized layer, its codes in different dtypes; what its forward is given, and the block's error
#            int8: torch.float32, 0.038 | uint8: torch.uint8, 0.618 | int32: torch.int32, 0.618
# Matters:   a replacement of nn.Linear that calls its packed tensor `weight` is given integers by the model around it.
#            Give packed tensors other names, and let `weight`, if anything reads it, have the compute dtype.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 transformers==5.24.0

cat > "$dir/show.py" <<'EOF'
import re
import sys
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import T5Config, T5EncoderModel


class Quantized(nn.Module):
    """Codes 0..30 for values from -1 to 1 times a scale, in any integer dtype."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.scale = linear.weight.abs().max().item() / 15
        codes = torch.round(linear.weight.detach() / self.scale) + 15
        self.weight = nn.Parameter(codes.to(dtype), requires_grad=False)

    def forward(self, x):
        self.given = x.dtype
        return x.float() @ ((self.weight.float() - 15) * self.scale).T


def measure(dtype: torch.dtype) -> tuple[torch.dtype, float]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    model = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.arange(2, 9)[None]
    dense = model(tokens).last_hidden_state
    feed_forward = model.encoder.block[0].layer[1].DenseReluDense
    feed_forward.wo = Quantized(feed_forward.wo, dtype)
    return feed_forward.wo, ((model(tokens).last_hidden_state - dense).norm() / dense.norm()).item()


seen = {}
for dtype in (torch.int8, torch.uint8, torch.int32):
    layer, error = measure(dtype)
    seen[dtype] = (layer.given, error > 0.1)
    print(f"codes in {dtype}: forward is given {layer.given}, relative error {error:.3f}")

cast = re.compile(r"\.to\((?:dtype=)?self\.(?:\w*proj\w*|wo|fc\d|lm_head|\w+_linear)\.weight\.dtype\)")
files = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
count = sum(bool(cast.search(path.read_text(encoding="utf-8"))) for path in files)
print(f"modeling files that cast to a projection's weight dtype: {count}")
if seen != {torch.int8: (torch.float32, False), **{d: (d, True) for d in (torch.uint8, torch.int32)}} or count < 24:
    sys.exit("not as described")
EOF
TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -I "$dir/show.py"
