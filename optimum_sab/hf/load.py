"""Load a model of whatever kind a checkpoint holds, and save a packed one without leaving half a checkpoint."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from optimum_sab.errors import ConfigError, OutputExistsError
from optimum_sab.hf.auto import AutoModelForVision2Seq


def model_config(source: str, **arguments: Any) -> Any:
    """The config of a checkpoint.

    Args:
        source: folder, or Hub repository.
        arguments: as in ``from_pretrained``: revision, token and the like.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(source, **arguments)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no model can be read from {source!r}: {error}") from error


def auto_class(config: Any) -> Any:
    """The auto class for a config: image–text to text where it is a vision-language model's, else causal LM."""
    return AutoModelForVision2Seq if reads_pictures(config) else AutoModelForCausalLM


def reads_pictures(config: Any) -> bool:
    """Whether the config is one of a vision-language model."""
    return config.model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse to write where files are.

    Raises:
        OutputExistsError: ``output`` is a file, or a folder with files in it and ``overwrite`` was not asked for.
    """
    if output.is_file():
        raise OutputExistsError(f"{str(output)!r} is a file; name a folder.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputExistsError(f"{str(output)!r} is not empty; name another folder, or overwrite it (--overwrite).")


@contextmanager
def written_whole(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes ``output`` at the end, and goes if there is an error.

    Raises:
        OutputExistsError: see `check_output`.
    """
    check_output(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def save_packed(model: Any, processor: Any, output: Path, overwrite: bool = False) -> None:
    """Save model and processor to ``output``, which appears only when all of it is written.

    Raises:
        OutputExistsError: see `check_output`.
    """
    with written_whole(output, overwrite) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
