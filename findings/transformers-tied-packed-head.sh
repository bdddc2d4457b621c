#!/usr/bin/env bash
# A packed output head in a model with tied embeddings: 4.57 hangs a dense `weight` on it, 5 fails while loading.
#
# Packages:  transformers 4.57.6 and 5.24.0, torch 2.13.0, safetensors 0.8.0, accelerate 1.15.0 (4.57 imports it).
# Behaviour: a quantizer replaces lm_head by a module that has packed words and no parameter `weight`, and the
#            checkpoint's config still says tie_word_embeddings. 4.57 sets lm_head.weight to the embedding, a parameter
#            the module never had. 5 looks the parameter up and raises inside from_pretrained.
# Seen:      4.57.6: parameters of the head: words, weight | 5.24.0: AttributeError: Packed has no attribute `weight`
# Matters:   4.57's result runs, and save_pretrained or a count of bits then finds a dense weight in the packed head. A
#            quantizer that packs a tied head must set tie_word_embeddings to False in the config before loading.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
pip() { "$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check "$@"; }

cat > "$dir/show.py" <<'EOF'
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Parameter(torch.zeros(64, 8, dtype=torch.int32), requires_grad=False)


@register_quantization_config("packed_head")
class PackedConfig(QuantizationConfigMixin):
    def __init__(self, **_):
        self.quant_method = "packed_head"


@register_quantizer("packed_head")
class PackedQuantizer(HfQuantizer):
    requires_calibration = True
    requires_parameters_quantization = False  # 4.57
    is_trainable = False

    def _process_model_before_weight_loading(self, model, **_):
        model.lm_head = Packed()

    def _process_model_after_weight_loading(self, model, **_):
        return model

    def is_serializable(self, *_, **__):
        return True


sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_key_value_heads=2))
model.lm_head = Packed()
seen = {}
for tied in (False, True):
    config = {**model.config.to_dict(), "tie_word_embeddings": tied}
    config["quantization_config"] = {"quant_method": "packed_head"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        save_file(model.state_dict(), f"{folder}/model.safetensors", metadata={"format": "pt"})
        try:
            loaded = LlamaForCausalLM.from_pretrained(folder)
            seen[tied] = ", ".join(name for name, _ in loaded.lm_head.named_parameters())
        except AttributeError as error:
            seen[tied] = f"AttributeError: {error}"
    print(f"transformers {transformers.__version__}, tied {tied}: {seen[tied]}")
if seen[False] != "words" or not seen[True].startswith(sys.argv[1]):
    sys.exit(f"not as described: expected {sys.argv[1]}")
EOF

show() {
    TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_OFFLINE=1 \
        "$dir/venv/bin/python" -I "$dir/show.py" "$1"
}
pip torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 transformers==4.57.6 accelerate==1.15.0
show "words, weight"
pip transformers==5.24.0
show "AttributeError: Packed has no attribute"
