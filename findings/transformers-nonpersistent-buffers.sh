#!/usr/bin/env bash
# In Transformers 5 a non-persistent buffer of a custom module holds uninitialised memory after from_pretrained.
#
# Packages:  transformers 4.57.6 and 5.24.0, torch 2.13.0.
# Behaviour: 4.57 puts only parameters on the meta device while it builds the model, so tables made in __init__ keep
#            their values. 5 puts everything there. A buffer with persistent=False, which no checkpoint has, is then
#            allocated and not filled unless the model's _init_weights knows it; a plain tensor attribute stays on meta.
#            The same goes for modules that a quantizer puts in before loading. Nothing is reported as missing.
#            (transformers issue 48892.)
# Seen:      a table of -1.0, -0.3, 0.3, 1.0 after loading, and a plain tensor's device
#            4.57.6: [-1.0, -0.3, 0.3, 1.0], cpu | 5.24.0: e.g. [-2.66e+01, 4.57e-41, -1.27e+01, 4.57e-41], meta
# Matters:   code books, bit masks and shift tables are what quantized layers keep in such buffers. Now and then the
#            memory still holds the right numbers, so tests pass. Save them, or make them at the first forward.
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

LEVELS = [-1.0, -0.3, 0.3, 1.0]


class Quantized(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("levels", torch.tensor(LEVELS), persistent=False)
        self.plain = torch.tensor(LEVELS)


class Config(PretrainedConfig):
    model_type = "tiny"


class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.layer = Quantized()
        self.post_init()


intact, devices = [], set()
with tempfile.TemporaryDirectory() as folder:
    Model(Config()).save_pretrained(folder)
    for _ in range(4):
        used = [torch.full((4,), 123.0) for _ in range(100)]  # memory that was in use, as in any real program
        del used
        model, info = Model.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        intact.append(torch.equal(model.layer.levels, torch.tensor(LEVELS)))
        devices.add(model.layer.plain.device.type)
print(f"transformers {transformers.__version__}: {model.layer.levels.tolist()}, intact {intact}, plain on {devices}")
if (all(intact), devices) != {"kept": (True, {"cpu"}), "lost": (False, {"meta"})}[sys.argv[1]]:
    sys.exit(f"not as described: expected {sys.argv[1]}")
EOF

show() {
    TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_OFFLINE=1 \
        "$dir/venv/bin/python" -I "$dir/show.py" "$1"
}
pip torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 transformers==4.57.6
show kept
pip transformers==5.24.0
show lost
