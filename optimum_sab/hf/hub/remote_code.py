"""A checkpoint that loads without `import optimum_sab`, by a file that it brings for ``trust_remote_code=True``.

Transformers reads a checkpoint's configuration before it looks for its quantizer. So the file stands in for the
configuration's class: it is run where code of the checkpoint is trusted, imports this package, and is the same class
under the same name. The model's own class stays Transformers', with everything that is registered for it, such as the
names of its tensors on disk. Where code is not trusted, the file is not looked at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from optimum_sab.errors import ConfigError

MODULE = "configuration_sab"
FILE = f"{MODULE}.py"
_CODE = """\
# Read first by from_pretrained(..., trust_remote_code=True), so that no program needs to import optimum_sab itself.
try:
    import optimum_sab  # registers the quantization method "sab"
except ModuleNotFoundError as error:
    if error.name != "optimum_sab":
        raise
    raise ImportError("this checkpoint is packed by optimum-sab, which is missing: pip install optimum-sab") from error

import transformers


class {name}(transformers.{name}):
    pass
"""


def add_remote_code(model: Any) -> None:
    """Have the model saved with the file that makes ``import optimum_sab`` unnecessary.

    ``from_pretrained(…, trust_remote_code=True)`` then registers this package by itself, or says that it has to be
    installed. Call it before ``save_pretrained`` or ``push_to_hub``.

    Args:
        model: its ``config`` is changed.

    Raises:
        ConfigError: its configuration is no class of Transformers, or names code of its own.
    """
    check_remote_code(model.config)
    model.config.auto_map = {"AutoConfig": f"{MODULE}.{_class_name(model.config)}"}


def check_remote_code(config: Any) -> None:
    """Refuse the configuration of a model that `add_remote_code` can do nothing for.

    Raises:
        ConfigError: see there.
    """
    name = _class_name(config)
    if getattr(config, "auto_map", None) and not brings_code(config):
        raise ConfigError(
            f"{name} brings code of its own (auto_map={config.auto_map!r}), in whose place ours would be run; leave it "
            "out, and import optimum_sab where the model is loaded."
        )
    if not issubclass(type(config), getattr(transformers, name, ())):
        raise ConfigError(
            f"{name} is not a class that transformers exports, so the file could not name it; leave it out, and import "
            "optimum_sab where the model is loaded."
        )


def forget_remote_code(config: Any) -> None:
    """Take our file's name out of the configuration of a model that is dense again, and is saved without it."""
    if brings_code(config):
        del config.auto_map["AutoConfig"]
        if not config.auto_map:
            del config.auto_map


def brings_code(config: Any) -> bool:
    """Whether a configuration names our file."""
    named = (getattr(config, "auto_map", None) or {}).get("AutoConfig", "")
    return isinstance(named, str) and named.split("--")[-1] == f"{MODULE}.{_class_name(config)}"


def write_remote_code(config: Any, folder: Path) -> None:
    """Write the file, where the configuration names it: also that of a checkpoint that was read without trusting it."""
    if brings_code(config):
        name = _class_name(config)
        config.auto_map["AutoConfig"] = f"{MODULE}.{name}"  # from here, and not from where it was read
        (folder / FILE).write_text(_CODE.format(name=name), encoding="utf-8")


def _class_name(config: Any) -> str:
    return type(config).__name__
