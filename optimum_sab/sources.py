"""Where a checkpoint is, as a user names it."""

from __future__ import annotations

import os

from optimum_sab.errors import ConfigError


def check_folder(source: str) -> None:
    """Refuse the name of a folder that is not there, which the Hub would be asked for otherwise.

    Raises:
        ConfigError: it looks like a path, and nothing is there.
    """
    if not os.path.exists(source) and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ConfigError(f"there is no folder {source!r}; name a checkpoint's folder, or a repository on the Hub.")
