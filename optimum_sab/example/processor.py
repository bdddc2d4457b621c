"""The files that a checkpoint's processor is read from: tokenizer, chat template, what is done to pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer


def special_token(text: str) -> AddedToken:
    """A token that stands for itself wherever it is written, and is left out of decoded answers."""
    return AddedToken(text, special=True, normalized=False)


@dataclass(frozen=True)
class ProcessorClasses:
    """Names of the classes in Transformers: of the processor, and of its two parts."""

    processor: str
    tokenizer: str
    image_processor: str


def write_processor_files(
    folder: Path,
    classes: ProcessorClasses,
    tokenizer: Tokenizer,
    template: str,
    tokenizer_config: dict[str, Any],
    preprocessor_config: dict[str, Any],
) -> None:
    """Write a processor that both lines of Transformers read; it makes pixels values from -1 to 1.

    Args:
        folder: of the checkpoint; it is made if there is none.
        classes: what the files are read into.
        tokenizer: the tokenizer.
        template: the chat template.
        tokenizer_config: roles of tokens, and whatever else the tokenizer is told.
        preprocessor_config: sizes of pictures and patches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    owner = {"processor_class": classes.processor}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": classes.tokenizer, **owner, **tokenizer_config})
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": classes.image_processor,
            **owner,
            **preprocessor_config,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one of a checkpoint's configurations, readable by people."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
