"""The language model that the reader speaks with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM


@dataclass(frozen=True)
class Language:
    """What the training needs of the language model: itself in bfloat16, its tokenizer, its embeddings in float32."""

    model: Any
    tokenizer: Any
    embeddings: Tensor


def load_language(folder: Path) -> Language:
    """The frozen language model."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    embeddings = model.get_input_embeddings().weight.detach().float()
    return Language(model, AutoTokenizer.from_pretrained(folder), embeddings)
