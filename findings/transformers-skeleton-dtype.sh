#!/usr/bin/env bash
# Which dtype a loaded tensor gets has turned round between Transformers 4.57 and 5: the file decides, then the module.
#
# Packages:  transformers 4.57.6 and 5.24.0, torch 2.13.0, safetensors 0.8.0.
# Behaviour: a custom module has an empty parameter that the checkpoint fills. In 4.57 integer and float8 tensors keep
#            the file's dtype whatever the module declared, and only floats are cast. In 5 every tensor is cast to what
#            the module declared, without a warning: where that is a plain torch.zeros(n), to the model's dtype.
# Seen:      (module declares, file holds -> parameter after from_pretrained(dtype=bfloat16))
#            float, int32 16777217   -> 4.57.6: int32 16777217    5.24.0: bfloat16 16777216
#            float, float8_e4m3fn    -> 4.57.6: float8_e4m3fn     5.24.0: bfloat16 (twice the memory)
#            uint8, int32 16777217   -> 4.57.6: int32 16777217    5.24.0: uint8 1
#            int32, int32            -> both: int32               (the only safe one)
# Matters:   a placeholder of any dtype was fine for packed words in 4.57, and is silent damage in 5. Declare each
#            packed tensor with the exact dtype that the file has.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
pip() { "$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check "$@"; }

cat > "$dir/show.py" <<'EOF'
import sys
import tempfile

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

WORD = 2**24 + 1


class Config(PretrainedConfig):
    model_type = "tiny"


def load(declared: torch.dtype | None, stored: torch.Tensor) -> str:
    class Model(PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.words = nn.Parameter(torch.zeros(1, dtype=declared), requires_grad=False)
            self.post_init()

    with tempfile.TemporaryDirectory() as folder:
        Config().save_pretrained(folder)
        save_file({"words": stored}, f"{folder}/model.safetensors", metadata={"format": "pt"})
        words = Model.from_pretrained(folder, dtype=torch.bfloat16).words
    return f"{str(words.dtype).removeprefix('torch.')} {words.item():.0f}"


word = torch.tensor([WORD], dtype=torch.int32)
seen = [
    load(None, word),
    load(None, torch.ones(1).to(torch.float8_e4m3fn)),
    load(torch.uint8, word),
    load(torch.int32, word),
]
print("transformers", transformers.__version__, "|", " | ".join(seen))
expected = {
    "file": [f"int32 {WORD}", "float8_e4m3fn 1", f"int32 {WORD}", f"int32 {WORD}"],
    "module": ["bfloat16 16777216", "bfloat16 1", "uint8 1", f"int32 {WORD}"],
}
if seen != expected[sys.argv[1]]:
    sys.exit(f"not as described: the {sys.argv[1]} was to decide")
EOF

show() {
    TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_OFFLINE=1 \
        "$dir/venv/bin/python" -I "$dir/show.py" "$1"
}
pip torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 transformers==4.57.6
show file
pip transformers==5.24.0
show module
