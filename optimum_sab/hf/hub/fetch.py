"""A packed checkpoint of the Hub on this machine, or as much of it as is wanted."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.utils import validate_repo_id

from optimum_sab.errors import FormatError
from optimum_sab.hf.origin import Origin

_FILES = ("config.json", "*.safetensors", "model.safetensors.index*.json")


def checkpoint_folder(origin: Origin) -> Path:
    """The folder of a checkpoint: itself, or where the Hub's cache has it, into which what is missing is downloaded.

    Args:
        origin: folder or repository, and how it is reached.

    Raises:
        FormatError: there is no such folder, and no such repository or no way to it.
    """
    within = str(origin.place.get("subfolder") or "")
    folder = Path(origin.name)
    if folder.exists():
        return folder / within
    try:
        validate_repo_id(origin.name)
        found = snapshot_download(
            origin.name,
            allow_patterns=[f"{within}/{name}" if within else name for name in _FILES],
            **origin.download,
        )
    except Exception as error:  # of every kind, according to what of the Hub or the network fails
        reason = " ".join(str(error).split())
        raise FormatError(
            f"{origin.name!r} is no folder here, and as a repository of the Hub it cannot be had ({reason}); name the "
            "folder or the repository of a packed checkpoint."
        ) from error
    return Path(found, within)
