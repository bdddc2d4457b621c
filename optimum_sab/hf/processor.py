"""The processor of a checkpoint, also where torchvision is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
)
from transformers.utils import is_torchvision_available

from optimum_sab.errors import SampleError


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


def load_processor(path: str | Path) -> Any:
    """The processor of a checkpoint: `AutoProcessor`'s, or for Qwen2.5-VL without torchvision one that lacks videos.

    No supported line of Transformers can build a Qwen2.5-VL processor where torchvision is missing, because its video
    processor imports it. Pictures and text need nothing of it, and both processors prepare them alike. A checkpoint of
    a language model gives its tokenizer.
    """
    try:
        return AutoProcessor.from_pretrained(path)
    except ImportError:
        if is_torchvision_available():
            raise
        tokenizer = AutoTokenizer.from_pretrained(path)
        images = AutoImageProcessor.from_pretrained(path)
        return PictureProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def find_processor(given: Any, source: str, visual: bool) -> Any:
    """The processor to prepare calibration samples with.

    Args:
        given: `SABConfig.processor`: an object, where to load it from, or None for the checkpoint's own.
        source: the checkpoint.
        visual: whether the model reads pictures.

    Raises:
        SampleError: none can be loaded.
    """
    if given is not None and not isinstance(given, (str, Path)):
        return given
    path = str(given or source)
    try:
        return load_processor(path) if visual else AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise SampleError(
            f"no processor can be loaded from {path!r} ({error}); give one as SABConfig(processor=...)."
        ) from error
