"""Caches among a block's arguments, which a block changes: whoever runs it again needs them as they were.

Nothing here asks for a cache, but some models make one for themselves (a decoder whose action expert reads it).
"""

from __future__ import annotations

import copy
from typing import Any


def holds_cache(tree: Any) -> bool:
    """Whether there is one in nested dicts, lists and tuples."""
    if isinstance(tree, dict):
        return any(map(holds_cache, tree.values()))
    if isinstance(tree, (list, tuple)):
        return any(map(holds_cache, tree))
    return _is_cache(tree)


def with_own_caches(tree: Any) -> Any:
    """The same with copies of the caches; everything else as it is."""
    if not holds_cache(tree):
        return tree
    if isinstance(tree, dict):
        return {key: with_own_caches(value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(with_own_caches, tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(with_own_caches, tree))
    return copy.deepcopy(tree)


def _is_cache(value: Any) -> bool:
    """Transformers' classes, which all have these; the calibration does not import it."""
    return callable(getattr(value, "update", None)) and callable(getattr(value, "get_seq_length", None))
