#!/usr/bin/env bash
# Transformers 5.24 asks for a release of PEFT that is not published, in some of its adapter functions and not in others.
#
# Packages:  transformers 5.24.0, peft 0.21.2 (the newest in November 2026), torch 2.13.0.
# Behaviour: `model.add_adapter`, `set_adapter`, `disable_adapters`, `active_adapters` and `save_pretrained` of a model
#            with adapters raise ValueError "please use a version >= 0.22.0" for every model and every published PEFT.
#            `model.load_adapter` has no such check and works, but what it loaded cannot be switched or saved by the model.
#            4.57.6 works throughout with the same PEFT.
# Seen:      add_adapter: ValueError
#            load_adapter: the adapter's logits
#            save_pretrained after load_adapter: ValueError
# Matters:   use PEFT's own `get_peft_model` and `PeftModel` under 5.24; a test of `add_adapter` has to lower
#            transformers.integrations.peft.MIN_PEFT_VERSION.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2

cat > "$dir/show.py" <<'EOS'
import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

folder = tempfile.mkdtemp(dir=sys.argv[1])
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_key_value_heads=2)).eval()


def outcome(call) -> str:
    try:
        call()
    except ValueError as error:
        print(f"  {error}")
        return "ValueError"
    return "works"


config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
ids = torch.arange(8)[None]
adapted = get_peft_model(model(), config)
adapted.save_pretrained(folder)
added = outcome(lambda: model().add_adapter(config))
print("add_adapter:", added)
loaded = model()
loaded.load_adapter(folder)
equal = torch.equal(loaded(ids).logits, adapted(ids).logits)
print("load_adapter:", "the adapter's logits" if equal else "other logits")
saved = outcome(lambda: loaded.save_pretrained(tempfile.mkdtemp(dir=sys.argv[1])))
print("save_pretrained after load_adapter:", saved)
if (added, equal, saved) != ("ValueError", True, "ValueError"):
    sys.exit("not as described")
EOS
TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_OFFLINE=1 \
    "$dir/venv/bin/python" -I "$dir/show.py" "$dir"
