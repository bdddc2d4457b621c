#!/usr/bin/env bash
# Setting `past_key_values` to None no longer keeps a replayed decoder block from reading and filling a cache.
#
# Packages:  transformers 5.23.0 and 5.24.0, torch 2.13.0.
# Behaviour: 5.24 renames the argument `past_key_values` to `cache` in model and block forwards. The old name alone
#            still works. Where both are given the new one wins, also over an explicit None under the old name;
#            `cache=None` beside a real cache under the old name drops that cache. Both only raise a FutureWarning. Up
#            to 5.23 `cache=` is swallowed by **kwargs without a word.
# Seen:      a block is replayed with the keyword arguments a hook caught and past_key_values=None, on another input
#            5.23.0: caught past_key_values, differs from a run without cache by 0.0
#            5.24.0: caught cache, keys in the cache 5 -> 10, differs by about 16
# Matters:   layer-by-layer calibration (GPTQ and its relatives) catches a block's arguments once and replays them with
#            new inputs: on 5.24 these attend to the old inputs' keys. Drop both names, or forward with use_cache=False.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
pip() { "$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check "$@"; }

cat > "$dir/show.py" <<'EOF'
import sys
import warnings

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore", FutureWarning)
torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
config = LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2, initializer_range=0.3)
model = LlamaForCausalLM(config).eval()
block = model.model.layers[1]
caught = {}
hook = block.register_forward_pre_hook(lambda module, args, kwargs: caught.update(kwargs), with_kwargs=True)
with torch.no_grad():
    model(torch.arange(5)[None])
    hook.remove()
    name = "cache" if "cache" in caught else "past_key_values"
    before = caught[name].get_seq_length(1)
    x = torch.randn(1, 5, 32)
    replayed = block(x, **{**caught, "past_key_values": None})
    alone = block(x, **{key: value for key, value in caught.items() if key != name})
gap = (replayed - alone).abs().max().item()
after = caught[name].get_seq_length(1)
print(f"transformers {transformers.__version__}: caught {name}, keys {before} -> {after}, differs by {gap:.3f}")
if (name, after, gap > 0.1) != {"old": ("past_key_values", 5, False), "new": ("cache", 10, True)}[sys.argv[1]]:
    sys.exit("not as described")
EOF

show() { HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -I "$dir/show.py" "$1"; }
pip torch==2.13.0 numpy==2.4.6 transformers==5.23.0
show old
pip transformers==5.24.0
show new
