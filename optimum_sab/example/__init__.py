"""The embedded example: a trained, tiny vision-language model, its tasks and the script that trained it."""

import importlib.resources
import pathlib

MARK = "optimum_sab_example"  # in config.json of another model that answers its tasks
EXAMPLE = "example"  # what `optimum-sab eval quality` calls it


def checkpoint_path() -> pathlib.Path:
    """Folder of the shipped checkpoint, ready for `from_pretrained`."""
    return pathlib.Path(str(importlib.resources.files(__name__) / "checkpoint"))
