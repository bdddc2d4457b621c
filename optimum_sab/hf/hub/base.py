"""What is said of the model that was binarized: its name on the Hub, and what its own card says of its licence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.utils import EntryNotFoundError

from optimum_sab.hf.hub.authorship import CARD
from optimum_sab.hf.origin import Origin

_TAKEN = ("license", "license_name", "license_link", "pipeline_tag")
_CACHED = re.compile(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})/?$")


def describe_base(origin: Origin) -> dict[str, str]:
    """The dense model, as it is recorded with the packed one.

    A folder of this machine has no name that others could use, unless it is one of the Hub's cache. Its card counts all
    the same. No card, or no way to it now, is no reason to stop.

    Args:
        origin: of the dense model.

    Returns:
        ``model`` and ``revision``, where it is on the Hub; and what its card has of ``license``, ``license_name``,
        ``license_link`` and ``pipeline_tag``.
    """
    found: dict[str, str] = {}
    folder = Path(origin.name)
    if origin.name and not folder.exists():
        found["model"] = origin.name
        if origin.place.get("revision"):
            found["revision"] = str(origin.place["revision"])
    elif cached := _CACHED.search(str(folder.resolve()) if origin.name else ""):
        found["model"], found["revision"] = f"{cached[1]}/{cached[2]}", cached[3]
    card = _card_data(origin)
    stated = {name: getattr(card, name, None) for name in _TAKEN}
    return {**found, **{name: value for name, value in stated.items() if isinstance(value, str)}}


def _card_data(origin: Origin) -> Any:
    """The data of a model's card; None where there is none, or none that can be read."""
    if not origin.name:
        return None
    try:
        if Path(origin.name).exists():
            path = Path(origin.name, CARD)
        else:
            path = Path(hf_hub_download(origin.name, CARD, **origin.download))
        return ModelCard.load(path, ignore_metadata_errors=True).data
    except (OSError, EntryNotFoundError, ValueError, yaml.YAMLError):
        return None
