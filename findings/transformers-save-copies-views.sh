#!/usr/bin/env bash
# save_pretrained copies every tensor that shares a storage with another one, all before the first byte is written.
#
# Packages:  transformers 5.24.0, torch 2.13.0.
# Behaviour: tensors of the state that share a storage without overlapping, such as experts that are slices of one stack, or q,
#            k and v of one matrix, are told apart by being cloned: all of them, in a loop ahead of the shards. What has a
#            storage of its own is handed on as it is. max_shard_size does not help, since shards come later.
# Seen:      32 matrices of 16 MiB. Each with its own storage: memory in use rises by less than 32 MiB while they are saved;
#            slices of one tensor: by more than 500 MiB. The files are the same, byte for byte. The slices taken through
#            DLPack (from_dlpack(slice): the same memory, a storage that begins and ends with it): less than 32 MiB.
# Matters:   who stacks weights to compute them in one launch needs as much memory again to save them, on whichever device
#            they are, and reads all pages of a model that is mapped from files larger than memory. Views can be taken
#            through DLPack for the state that a quantizer hands over (get_state_dict_and_metadata).
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 \
    transformers==5.24.0

cat > "$dir/show.py" <<'EOF'
import hashlib
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, modeling_utils

COUNT, ROWS, MIB = 32, 2048, 2**20


class Config(PreTrainedConfig):
    model_type = "many"


class Many(PreTrainedModel):
    config_class = Config

    def __init__(self, config, tensors):
        super().__init__(config)
        self.experts = nn.ParameterList([nn.Parameter(each, requires_grad=False) for each in tensors])
        self.post_init()

    def _init_weights(self, module):
        pass


def in_use():
    """MiB of memory of the process's own, now."""
    line = next(each for each in open("/proc/self/status") if each.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def saved(tensors, folder):
    """By how many MiB memory is more when the first file is about to be written, and the digest of all files."""
    model = Many(Config(), tensors)
    write, seen = modeling_utils.safe_save_file, []
    modeling_utils.safe_save_file = lambda *args, **more: (seen.append(in_use()), write(*args, **more))
    before = in_use()
    try:
        model.save_pretrained(folder, max_shard_size="64MB")
    finally:
        modeling_utils.safe_save_file = write
    files = sorted(folder.glob("*.safetensors"))
    return seen[0] - before, hashlib.sha256(b"".join(each.read_bytes() for each in files)).hexdigest()


stack = torch.arange(COUNT * ROWS * ROWS, dtype=torch.float32).view(COUNT, ROWS, ROWS)
ways = {
    "slices of one tensor": lambda: list(stack),
    "the same, each a storage of its own by DLPack": lambda: [torch.from_dlpack(each) for each in stack],
    "tensors of their own": lambda: [each.clone() for each in stack],
}
rose, digests = {}, set()
for name, make in ways.items():
    with tempfile.TemporaryDirectory() as folder:
        rose[name], digest = saved(make(), Path(folder))
    digests.add(digest)
    print(f"{name}: {rose[name]:.0f} MiB more before the first file of 512 MiB is written")
print("the same files:", len(digests) == 1)
views, apart, own = rose.values()
if not (views > 500 and apart < 32 and own < 32 and len(digests) == 1):
    sys.exit("not as described")
EOF
"$dir/venv/bin/python" -I "$dir/show.py"
