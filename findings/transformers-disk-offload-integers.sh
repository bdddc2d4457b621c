#!/usr/bin/env bash
# Transformers 4.57 reads packed int32 words that it offloaded to disk back through the model's float dtype.
#
# Packages:  transformers 4.57.6 (wrong) and 5.24.0 (right), accelerate 1.15.0, torch 2.13.0.
# Behaviour: from_pretrained with dtype=float16 and a device_map that sends a module to "disk" keeps int32 parameters
#            int32, but every access fetches them as float16 and converts the result. Nothing warns, and the dtype that
#            is seen is the right one. uint8 survives, because float16 holds 0..255 exactly, and so do words below
#            2^24 in a float32 model. Buffers are not offloaded by default.
# Seen:      stored 0, 1000003, 2000006 | 4.57.6: 0, -2147483648, -2147483648 (int32) | 5.24.0: as stored
# Matters:   a packed model that is right on a GPU and on the CPU speaks noise as soon as a part of it is offloaded to
#            disk. A plugin that supports 4.57 must refuse disk offload there, or pack into uint8.
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
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

WORDS = torch.arange(8, dtype=torch.int32) * 1000003
BYTES = torch.arange(8, dtype=torch.uint8) * 31


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Parameter(WORDS.clone(), requires_grad=False)
        self.bytes = nn.Parameter(BYTES.clone(), requires_grad=False)

    def forward(self, x):
        self.seen = [self.words.clone(), self.bytes.clone()]
        return x


class Config(PretrainedConfig):
    model_type = "tiny"


class Model(PreTrainedModel):
    config_class = Config
    _no_split_modules = ["Packed"]

    def __init__(self, config):
        super().__init__(config)
        self.packed, self.head = Packed(), nn.Linear(4, 4)
        self.post_init()

    def forward(self, x):
        return self.head(self.packed(x))


intact = []
for place in ("cpu", "disk"):
    with tempfile.TemporaryDirectory() as saved, tempfile.TemporaryDirectory() as offload:
        Model(Config()).save_pretrained(saved)
        model = Model.from_pretrained(
            saved, dtype=torch.float16, device_map={"packed": place, "head": "cpu"}, offload_folder=offload
        )
        model(torch.zeros(1, 4, dtype=torch.float16))
    words, small = model.packed.seen
    assert words.dtype == torch.int32 and small.dtype == torch.uint8
    intact.append((torch.equal(words, WORDS), torch.equal(small, BYTES)))
    print(f"transformers {transformers.__version__}, {place}: {words.tolist()[:3]} intact (int32, uint8): {intact[-1]}")
if intact != [(True, True), (sys.argv[1] == "intact", True)]:
    sys.exit(f"not as described: expected {sys.argv[1]}")
EOF

show() {
    TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_OFFLINE=1 \
        "$dir/venv/bin/python" -I "$dir/show.py" "$1"
}
pip torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 transformers==4.57.6 accelerate==1.15.0
show damaged
pip transformers==5.24.0
show intact
