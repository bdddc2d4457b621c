"""Which names of a folder are a checkpoint's, so that whatever else lies there is kept."""

from __future__ import annotations

import os
import re
from pathlib import Path

from optimum_sab.report.files import REPORT_HTML, REPORT_JSON

# What Transformers writes and reads: settings, weights under each of their names, tokenizers, processors. And what this
# package says of a checkpoint, which is not to stay beside another one.
_NAMES = frozenset(
    {
        "config.json",
        "configuration_sab.py",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "image_processor_config.json",
        "video_preprocessor_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
        REPORT_JSON,
        REPORT_HTML,
    }
)
_WEIGHTS = re.compile(
    r"model(\.[\w-]+)?(-\d+-of-\d+)?(\.[\w-]+)?\.safetensors|model\.safetensors\.index(\.[\w-]+)?\.json|"
    r"pytorch_model(\.[\w-]+)?(-\d+-of-\d+)?\.bin|pytorch_model\.bin\.index(\.[\w-]+)?\.json"
)
_TEMPLATES = "additional_chat_templates"  # the one folder
CONFIG = "config.json"
ADAPTER = "adapter_config.json"


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights of a model, or says which files do."""
    return _WEIGHTS.fullmatch(name) is not None


def is_member(entry: os.DirEntry[str] | Path) -> bool:
    """Whether a folder's entry is part of a checkpoint: a file or link of a known name, or the folder of templates."""
    folder = entry.is_dir() and not entry.is_symlink()
    return entry.name == _TEMPLATES if folder else entry.name in _NAMES or _WEIGHTS.fullmatch(entry.name) is not None
