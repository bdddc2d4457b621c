"""What a sample is before it is a model's input: a text, or a chat of messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimum_sab.errors import SampleError

Sample = str | list[dict[str, Any]]


def is_chat(sample: Any) -> bool:
    """Whether this is a list of messages with a role and a content each."""
    return (
        isinstance(sample, Sequence)
        and not isinstance(sample, str)
        and len(sample) > 0
        and all(isinstance(m, Mapping) and "role" in m and "content" in m for m in sample)
    )


def checked_sample(sample: Any, label: str) -> Sample:
    """A text or a chat as it is, a record with "messages" as its chat.

    Raises:
        SampleError: it is something else; ``label`` names it.
    """
    if isinstance(sample, str):
        return sample
    if isinstance(sample, Mapping) and is_chat(sample.get("messages")):
        sample = sample["messages"]
    if not is_chat(sample):
        raise SampleError(
            f"{label} is a {type(sample).__name__}; give a text, or a list of messages with 'role' and 'content'."
        )
    return list(sample)
