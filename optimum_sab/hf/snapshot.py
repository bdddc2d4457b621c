"""Which files a model is loaded from, where Transformers does not say (4.57)."""

from __future__ import annotations

import warnings
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from torch import nn

from optimum_sab.errors import SABWarning
from optimum_sab.hf.selection import source_of
from optimum_sab.hf.stored_files import local_files


def checkpoint_files(model: nn.Module) -> list[str] | None:
    """The safetensors files of the folder, or of the Hub snapshot in the cache, that ``model`` is loaded from.

    Args:
        model: a skeleton; by now Transformers has downloaded what it will read.

    Returns:
        None where they are not known: no source, or a cache elsewhere (``cache_dir``).

    Raises:
        FormatError: see `local_files`.
    """
    source = source_of(model)
    if not source:
        return None
    folder = Path(source)
    if not folder.is_dir():
        revision = vars(model.config).get(
            "_commit_hash"
        )  # by attribute, Qwen2.5-VL's gives its text part's, which is None
        config = try_to_load_from_cache(source, "config.json", revision=revision) if revision else None
        if not isinstance(config, str):
            warnings.warn(
                f"the files of {source!r} are not where this version of Transformers keeps them (a cache_dir?), so the "
                "checkpoint is loaded unverified. Load it from its folder, or use Transformers 5.",
                SABWarning,
                stacklevel=2,
            )
            return None
        folder = Path(config).parent
    return local_files(folder)
