"""Whose a model card is: ours may be written again, Transformers' stands for none, and the user's is kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import ModelCard

CARD = "README.md"
_SIGNATURE = re.compile(r"\n*<!-- optimum-sab wrote this card, [^\n]* ([0-9a-f]{16}) -->\s*\Z")
_UNFILLED = "This model card has been automatically generated."  # Transformers' own, as it is pushed with a model


def sign(card: ModelCard) -> ModelCard:
    """Note in the card that it is ours as it is now; tags are not looked at, since the Hub's tools add some."""
    text = _SIGNATURE.sub("", card.text).rstrip("\n")
    mark = _digest(card, text)
    card.text = f"{text}\n\n<!-- optimum-sab wrote this card, and writes it anew while it is unchanged: {mark} -->\n"
    return card


def is_users(card: ModelCard) -> bool:
    """Whether somebody has written the card, or changed what was written."""
    signature = _SIGNATURE.search(card.text)
    if signature is not None:
        return signature[1] != _digest(card, _SIGNATURE.sub("", card.text).rstrip("\n"))
    return not (_UNFILLED in card.text and card.text.count("[More Information Needed]") > 10)


def keeps(path: Path) -> bool:
    """Whether a file is a card that must not be written over."""
    if not path.is_file():
        return False
    try:
        text = path.read_text(encoding="utf-8")
        if not _SIGNATURE.search(text) and _UNFILLED not in text:
            return True  # without reading its head, of which huggingface_hub would complain where there is none
        return is_users(ModelCard.load(path, ignore_metadata_errors=True))
    except Exception:  # whatever cannot be read as a card was not written by us
        return True


def with_tags(card: ModelCard, tags: Iterable[str]) -> ModelCard:
    """The card with these tags behind its own."""
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
    return card


def _digest(card: ModelCard, text: str) -> str:
    data = {name: value for name, value in card.data.to_dict().items() if name != "tags"}
    said = json.dumps(data, sort_keys=True, default=str) + "\n".join(text.splitlines()).strip()
    return hashlib.sha256(said.encode()).hexdigest()[:16]
