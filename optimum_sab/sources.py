"""Where a checkpoint is, as a user names it."""

from __future__ import annotations

import os
import re

from optimum_sab.errors import ConfigError

CONFIG, ADAPTER = "config.json", "adapter_config.json"
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_folder(source: str, subfolder: str = "") -> None:
    """Refuse what is named as a folder and is no checkpoint's, before anything reads it or asks the Hub for it.

    Args:
        source: folder, or Hub repository, of which nothing is known here.
        subfolder: of it, where the checkpoint is.

    Raises:
        ConfigError: nothing is there, and the name looks like a path or is no repository's; it is a file; there is
            no config.json in it; or it may not be looked at. Where an adapter lies there, or checkpoints one folder
            below, that is said.
    """
    for place in (source, os.path.join(source, subfolder, CONFIG)):
        if is_barred(place):
            raise ConfigError(f"{source!r} may not be looked into; have its permissions changed, or name another.")
    if not os.path.exists(source):
        if source.startswith((".", "/", "~")) or not _REPOSITORY.fullmatch(source):
            raise ConfigError(f"there is no folder {source!r}; name a checkpoint's folder, or a repository on the Hub.")
        return
    if os.path.isfile(source):
        raise ConfigError(f"{source!r} is a file; name the folder of a checkpoint.")
    folder = os.path.join(source, subfolder) if subfolder else source
    if os.path.isfile(os.path.join(folder, CONFIG)):
        return
    if os.path.isfile(os.path.join(folder, ADAPTER)):
        raise ConfigError(
            f"no model can be read from {folder!r}: it holds an adapter alone. Put it on its base with PEFT, "
            "merge_and_unload(), save_pretrained() the result and the processor, and name that folder."
        )
    raise ConfigError(f"no model can be read from {folder!r}: there is no {CONFIG} in it{_below(folder)}")


def is_barred(path: str) -> bool:
    """Whether permissions keep from telling what is at a path; `os.path` answers that nothing is."""
    try:
        os.stat(path)
    except PermissionError:
        return True
    except (OSError, ValueError):  # nothing is there, or nothing can have that name
        return False
    return False


def _below(folder: str) -> str:
    """The end of the sentence: the checkpoint to name instead, the newest of those one folder below, if any."""
    try:
        found = [each.path for each in os.scandir(folder) if os.path.isfile(os.path.join(each.path, CONFIG))]
    except OSError:
        found = []
    return f"; did you mean {max(found, key=os.path.getmtime)!r}?" if found else "."
