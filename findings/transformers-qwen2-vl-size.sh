#!/usr/bin/env bash
# `size` at loading does nothing to a Qwen2-VL image processor whose file holds `max_pixels`, as the released ones do.
#
# Packages:  transformers 5.24.0 and 4.57.6, torch 2.13.0, pillow 12.1.0.
# Behaviour: preprocessor_config.json of Qwen2-VL and Qwen2.5-VL holds min_pixels and max_pixels. A smaller `size` given to
#            from_pretrained, which the FutureWarning of 5.24 tells to use instead of max_pixels, is passed over without a
#            word, and in 5.24 the dict that was given holds the stored limit afterwards; max_pixels, which that warning
#            calls removed, works. In 4.57 the processor shows the new `size` and cuts by the old one. Given to a call,
#            either works.
# Seen:      tokens of a picture of 1120x1120, stored limit 12845056 pixels (1600), asked for 200704 (256):
#            5.24.0: size at loading 1600, max_pixels at loading 256, size at a call 256 | 4.57.6: the same, and
#            `processor.size` is 200704 at 1600 tokens
# Matters:   who bounds a vision-language model's memory the way it is recommended has six times as many tokens a picture,
#            in calibration, training or serving. Count the tokens of one picture; do not trust `size`.
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
from PIL import Image
from transformers import AutoImageProcessor

warnings.simplefilter("ignore")
STORED = {
    "image_processor_type": "Qwen2VLImageProcessor",
    **{"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2},
    **{"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]},
}
SIZE = {"shortest_edge": 3136, "longest_edge": 200704}
PICTURE = Image.new("RGB", (1120, 1120))


def tokens(processor, **given):
    return int(processor(images=[PICTURE], return_tensors="pt", **given)["image_grid_thw"][0].prod()) // 4


with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(STORED))
    stored = AutoImageProcessor.from_pretrained(folder)
    given = dict(SIZE)
    sized = AutoImageProcessor.from_pretrained(folder, size=given)
    pixels = AutoImageProcessor.from_pretrained(folder, max_pixels=200704)
    seen = [tokens(stored), tokens(sized), tokens(pixels), tokens(stored, size=dict(SIZE))]
shown = dict(sized.size)["longest_edge"]
print(f"transformers {transformers.__version__}, {type(stored).__name__}")
print(f"tokens as stored {seen[0]}, size at loading {seen[1]}, max_pixels at loading {seen[2]}, size at a call {seen[3]}")
print(f"loaded with size, the processor says longest_edge={shown}, the dict that was given {given['longest_edge']}")
if seen != [1600, 1600, 256, 256] or [shown, given["longest_edge"]] != [int(each) for each in sys.argv[1:]]:
    sys.exit("not as described")
EOF

show() {
    TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -I "$dir/show.py" "$@"
}
pip torch==2.13.0 numpy==2.4.6 pillow==12.1.0 transformers==5.24.0
show 12845056 12845056
pip transformers==4.57.6
show 200704 200704
