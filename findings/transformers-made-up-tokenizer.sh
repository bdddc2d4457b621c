#!/usr/bin/env bash
# A folder without any tokenizer file: for many models Transformers 5 makes up a tokenizer that knows no token.
#
# Packages:  transformers 5.24.0 and 4.57.6, torch 2.13.0.
# Behaviour: AutoTokenizer.from_pretrained on a folder that holds config.json alone gives a tokenizer for Qwen2 and GPT-2,
#            without a warning. It has one token, and every text has no tokens. For Llama it raises.
# Seen:      5.24.0: qwen2 and gpt2: 1 token, 'a cat' is []; llama: ValueError | 4.57.6: ImportError for all three
# Matters:   a fine-tune saved without its tokenizer evaluates, trains or calibrates on nothing instead of failing. Look at
#            whether the tokenizer knows a word: those made up for some other families hold marks and added tokens too.
set -euo pipefail
dir="$(mktemp -d)"
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
pip() { "$dir/venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check "$@"; }

cat > "$dir/show.py" <<'EOF'
import sys
import tempfile

import transformers
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config

made_up = []
for config in (Qwen2Config(), GPT2Config(), LlamaConfig()):
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)  # and nothing else
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, TypeError, ValueError, ImportError) as error:
            print(f"transformers {transformers.__version__}, {config.model_type}: {type(error).__name__}")
            continue
    ids = tokenizer("a cat").input_ids
    print(f"transformers {transformers.__version__}, {config.model_type}: {len(tokenizer)} tokens, 'a cat' is {ids}")
    if ids == []:
        made_up.append(config.model_type)
if made_up != sys.argv[1:]:
    sys.exit(f"not as described: expected {sys.argv[1:]}")
EOF

show() {
    TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -I "$dir/show.py" "$@"
}
pip torch==2.13.0 numpy==2.4.6 transformers==5.24.0
show qwen2 gpt2
pip transformers==4.57.6
show
