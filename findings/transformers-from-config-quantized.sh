#!/usr/bin/env bash
# from_config with a quantized model's config makes a dense model, and saves it as a quantized one.
#
# Packages:  transformers 4.57.6 and 5.24.0, torch 2.13.0.
# Behaviour: AutoModel.from_config asks no quantizer. With a quantization_config in the config it builds dense layers of
#            random weights without a word. save_pretrained writes them beside that quantization_config, because no
#            quantizer is there that could object, and from_pretrained then takes them for quantized tensors.
#            (tests/quantization/config of transformers once expected a NotImplementedError here.)
# Seen:      class of a linear after from_config, and quant_method in the saved config.json: Linear, mine | both lines
# Matters:   accelerate's init_empty_weights() and size estimates go through from_config: they see the dense model. A
#            quantizer that wants a refusal has to wrap PreTrainedModel._from_config itself.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
pip() { "$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check "$@"; }

cat > "$dir/show.py" <<'EOF'
import json
import sys
import tempfile
import warnings
from pathlib import Path

import transformers
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

asked = []


@register_quantization_config("mine")
class MyConfig(QuantizationConfigMixin):
    def __init__(self, **settings):
        self.quant_method = "mine"


@register_quantizer("mine")
class MyQuantizer(HfQuantizer):
    is_trainable = False

    def __init__(self, *given, **named):
        asked.append("a quantizer")
        super().__init__(*given, **named)

    def is_serializable(self, safe_serialization=None):
        return True

    def _process_model_before_weight_loading(self, model, **named):
        return model

    def _process_model_after_weight_loading(self, model, **named):
        return model


config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    quantization_config={"quant_method": "mine"},
)
with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    saved = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["quant_method"]
    kind = type(model.model.layers[0].mlp.up_proj).__name__
    print(f"transformers {transformers.__version__}: {kind}, {saved}; asked: {asked}, said: {[str(w.message) for w in said]}")
    if (kind, saved, asked) != ("Linear", "mine", []):
        sys.exit("not as described")
EOF

show() {
    TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -I "$dir/show.py"
}
pip torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 transformers==4.57.6
show
pip transformers==5.24.0
show
