"""Loading the processor of a Qwen2.5-VL checkpoint with or without torchvision."""

import os

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


def load_processor(path: str | os.PathLike[str]) -> ProcessorMixin:
    """The processor of a Qwen2.5-VL checkpoint: `AutoProcessor`'s, or without torchvision one that lacks videos.

    Transformers cannot build a Qwen2.5-VL processor where torchvision is missing, neither 4.57 nor 5.23, because its
    video processor imports it. Pictures and text need nothing of it, and both processors prepare them alike.

    Args:
        path: local folder or repository of the checkpoint.
    """
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    return PictureProcessor(AutoImageProcessor.from_pretrained(path), tokenizer, chat_template=tokenizer.chat_template)
