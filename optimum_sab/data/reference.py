"""Ordinary English that every installation has: the reference documentation inside Python."""

from __future__ import annotations

import pydoc_data.topics


def reference_topics() -> tuple[str, ...]:
    """The text of every topic of `pydoc_data.topics`, in the order of their names."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return tuple(topics[name] for name in sorted(topics))
