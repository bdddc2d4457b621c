#!/usr/bin/env bash
# Qwen2.5-VL without `mm_token_type_ids` silently takes an image for text; its sister models raise.
#
# Packages:  transformers 5.24.0 (the same was seen with 5.23.0), torch 2.13.0.
# Behaviour: since Transformers 5 the three-dimensional positions of image tokens are computed from mm_token_type_ids,
#            which the processor makes. Input without it raises a ValueError in Qwen2-VL and Qwen3-VL. Qwen2.5-VL gives
#            every token, image or not, its running number on all three axes and goes on. (4.57.6 needs no such input.)
# Seen:      positions of a picture of 2x2 tokens on (time, height, width) and the logits, Qwen2.5-VL
#            with:    2 2 2 2 | 2 2 3 3 | 2 3 2 3
#            without: 2 3 4 5 | 2 3 4 5 | 2 3 4 5, logits differ by 5.6
# Matters:   calibration samples and evaluation inputs are often kept as a dict of the tensors that 4.57's processor
#            made. They run on 5 without a word, and the Hessians and scores are those of a model that is not used that
#            way.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 transformers==5.24.0

cat > "$dir/show.py" <<'EOF'
import sys

import torch
import transformers

ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}
TEXT = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2}
TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
VISION = {"patch_size": 4, "depth": 1, "num_heads": 2, "hidden_size": 16, "intermediate_size": 16}
VISION |= {"out_hidden_size": 64}
FAMILIES = {
    "Qwen2VL": {**VISION, "embed_dim": 16, "hidden_size": 64, "mlp_ratio": 1},
    "Qwen2_5_VL": {**VISION, "window_size": 16, "fullatt_block_indexes": [0]},
    "Qwen3VL": {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
}
ids = torch.tensor([[5, 62, 60, 60, 60, 60, 63, 7, 8, 9]])
torch.manual_seed(0)
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(16, 96)}
inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])


def run(model, **more):
    seen = []

    def look(module, args, kwargs):
        position_ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        seen.append(position_ids[:, 0, 2:6].tolist())

    hook = model.model.language_model.rotary_emb.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            logits = model(**inputs, **more).logits
        return seen[0], logits
    except ValueError as error:
        return "ValueError" if "mm_token_type_ids" in str(error) else str(error), None
    finally:
        hook.remove()


seen = {}
for name, vision in FAMILIES.items():
    text = {**TEXT, "rope_scaling": ROPE}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **TOKENS)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    told, right = run(model, mm_token_type_ids=(ids == 60).long())
    untold, wrong = run(model)
    print(f"{name}: with {told}, without {untold}")
    seen[name] = (told, untold)
    if wrong is not None:
        print(f"  logits differ by {(right - wrong).abs().max().item():.1f}")
grid, text = [[2, 2, 2, 2], [2, 2, 3, 3], [2, 3, 2, 3]], [[2, 3, 4, 5]] * 3
if seen != {"Qwen2VL": (grid, "ValueError"), "Qwen2_5_VL": (grid, text), "Qwen3VL": (grid, "ValueError")}:
    sys.exit("not as described")
EOF
TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -I "$dir/show.py"
