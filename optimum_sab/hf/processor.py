"""The processor of a checkpoint, also where torchvision is missing."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import is_torchvision_available

from optimum_sab.errors import ConfigError, MissingDependencyError, SampleError
from optimum_sab.explanation import explain_import
from optimum_sab.hf.compat import KEEPS_ARGUMENTS
from optimum_sab.hf.origin import DOWNLOAD, Origin

_MARK = re.compile(r"[\W_]*|<.*>|\[.*\]")  # no letter or digit, or a name in brackets
_MADE_UP = 1000  # tokens; one that is made up has a hundred for spans at most
# Names of files; chat templates alone are none of them.
_OF_PROCESSORS = re.compile(r"token|vocab|merges|processor|tekken|spm|spiece|sentencepiece|bpe|\.model$", re.IGNORECASE)
_OF_PICTURES = ("size", "min_pixels", "max_pixels")  # arguments of image processors
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.gguf", "*.onnx", "*.h5", "*.msgpack")


class PictureProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor for pictures and text, without the part for videos, which needs torchvision."""

    attributes = ["image_processor", "tokenizer"]

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        **kwargs: object,
    ) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save the parts, so that the folder reads as an ordinary Qwen2.5-VL checkpoint, videos included."""
        self.image_processor.save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)


def load_processor(path: str | Path, **arguments: Any) -> Any:
    """The processor of a checkpoint: `AutoProcessor`'s, or for Qwen2.5-VL without torchvision one that lacks videos.

    No supported line of Transformers can build a Qwen2.5-VL processor where torchvision is missing, because its video
    processor imports it. Pictures and text need nothing of it, and both processors prepare them alike. A checkpoint of
    a language model gives its tokenizer.

    Args:
        path: folder, or Hub repository.
        arguments: as in ``AutoProcessor.from_pretrained``: revision, subfolder, token and the like; ``max_pixels``
            of a picture, for families that count them.

    Raises:
        MissingDependencyError: a package is missing that the processor needs.
        ConfigError: a ``size`` was given that Transformers passes over.
    """
    asked = dict(arguments.get("size") or {})  # which Transformers changes in place
    found = _loaded(path, arguments)
    _check_size(getattr(found, "image_processor", None), asked)
    for name in _OF_PICTURES:  # a tokenizer keeps and saves them, and from there they come back at every call
        getattr(getattr(found, "tokenizer", None), "init_kwargs", {}).pop(name, None)
    return found


def _loaded(path: str | Path, arguments: dict[str, Any]) -> Any:
    if not KEEPS_ARGUMENTS and not Path(path).exists():
        path, arguments = _fetched(str(path), arguments)
    try:
        return AutoProcessor.from_pretrained(path, **arguments)
    except ImportError as error:
        if is_torchvision_available() or not _is_qwen2_5_vl(path, arguments):
            raise _missing(path, error) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **arguments)
        images = AutoImageProcessor.from_pretrained(path, **arguments)
    except ImportError as error:
        raise _missing(path, error) from error
    return PictureProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def _check_size(images: Any, asked: Mapping[str, Any]) -> None:
    """Refuse a ``size`` that does nothing: an image processor whose file holds ``max_pixels`` goes by that."""
    most = asked.get("longest_edge")
    kept = getattr(images, "max_pixels", None) or dict(getattr(images, "size", None) or {}).get("longest_edge")
    if most is not None and images is not None and kept != most:
        raise ConfigError(
            f"size={dict(asked)!r} does nothing to the checkpoint's {type(images).__name__}, whose file holds "
            f"max_pixels and which goes on with {kept}; give max_pixels={most} instead."
        )


def _fetched(name: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Everything of a repository but its weights, in the Hub's cache; and what of the arguments is left to be said."""
    given = {key: value for key, value in arguments.items() if key in DOWNLOAD}
    folder = snapshot_download(name, ignore_patterns=list(_WEIGHTS), **given)
    return folder, {key: value for key, value in arguments.items() if key not in DOWNLOAD}


def find_processor(given: Any, origin: Origin, visual: bool) -> Any:
    """The processor to prepare calibration samples with.

    Args:
        given: `SABConfig.processor`: an object, where to load it from, or None for the checkpoint's own.
        origin: of the checkpoint.
        visual: whether the model reads pictures.

    Raises:
        SampleError: none can be loaded.
        MissingDependencyError: see `load_processor`.
    """
    if given is not None and not isinstance(given, (str, Path)):
        return given
    source = origin if given is None else origin.at(given)
    load = load_processor if visual else AutoTokenizer.from_pretrained
    try:
        found = load(source.name, **source.arguments)
        if knows_no_token(getattr(found, "tokenizer", found)):  # which Transformers 5 makes up for many a model
            raise ValueError("there is no vocabulary of a tokenizer")
        return found
    except (OSError, ValueError, ImportError) as error:  # 4.57 asks for protobuf where there is no tokenizer at all
        bare = _is_bare(os.path.join(source.name, source.place.get("subfolder") or ""))
        if isinstance(error, MissingDependencyError) and not bare:
            raise
        within = "".join(f", {name}={value!r}" for name, value in source.place.items())
        reason = "that folder holds no file of a tokenizer or processor" if bare else str(error).strip()
        raise SampleError(
            f"no processor can be loaded from {source.name!r}{within} ({reason}); name a folder or repository that has "
            "one, such as the base model's: --processor PATH, in Python SABConfig(processor=...)."
        ) from error


def _is_bare(folder: str) -> bool:
    """Whether this is a folder here, without anything that a processor or a tokenizer is read from."""
    try:
        inside = os.listdir(folder)
    except OSError:  # a repository, or what may not be looked into
        return False
    return not any(_OF_PROCESSORS.search(each) for each in inside)


def knows_no_token(tokenizer: Any) -> bool:
    """Whether a tokenizer has special tokens, added ones and marks between words alone, so a text is nothing to it."""
    if not hasattr(tokenizer, "get_added_vocab") or len(tokenizer) > _MADE_UP:
        return False
    own = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab())
    return all(_MARK.fullmatch(token) for token in own)


def _is_qwen2_5_vl(path: str | Path, arguments: dict[str, Any]) -> bool:
    """By the checkpoint's config, or by the processor's, which may lie alone or serve another architecture."""
    try:
        config, _ = PretrainedConfig.get_config_dict(path, **arguments)
    except OSError:
        config = {}
    if config.get("model_type") == "qwen2_5_vl":
        return True
    return bool(get_tokenizer_config(path, **arguments).get("processor_class") == Qwen2_5_VLProcessor.__name__)


def _missing(path: str | Path, error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f"the processor of {str(path)!r} needs a package that is missing or broken: {explain_import(error)}."
    )
