"""The embedded example's tokenizer and picture preprocessing, and the texts the tokenizer is trained on."""

import pathlib
import random
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from optimum_sab.data.reference import reference_topics
from optimum_sab.example.architecture import (
    END_OF_TEXT,
    MERGE_SIZE,
    PATCH_SIZE,
    SPECIAL_TOKENS,
    TEMPORAL_PATCH_SIZE,
    VOCABULARY_SIZE,
)
from optimum_sab.example.chatml import TURN_END, chat_template
from optimum_sab.example.processor import ProcessorClasses, special_token, write_processor_files
from optimum_sab.example.tasks import IMAGE_SIZE, SUBJECTS, training_conversation

PRE_TOKENIZATION = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
IMAGE, VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"


def write_processor(folder: pathlib.Path, texts: Iterator[str]) -> None:
    """Train the tokenizer on `texts` and write every file of the processor.

    Bytes are the smallest tokens, so any Unicode text can be encoded; digits never merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZATION), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[special_token(token) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    write_processor_files(
        folder,
        ProcessorClasses("Qwen2_5_VLProcessor", "Qwen2Tokenizer", "Qwen2VLImageProcessor"),
        tokenizer,
        chat_template(IMAGE, VIDEO),
        tokenizer_config={
            "model_max_length": 2048,
            "eos_token": TURN_END,
            "pad_token": END_OF_TEXT,
            "unk_token": None,
            "bos_token": None,
            "add_prefix_space": False,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": False,
            "errors": "replace",
        },
        preprocessor_config={
            "min_pixels": (2 * PATCH_SIZE * MERGE_SIZE) ** 2,
            "max_pixels": IMAGE_SIZE**2,
            "patch_size": PATCH_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
            "merge_size": MERGE_SIZE,
        },
    )


def prose_passages(rng: random.Random, length: int = 300) -> Iterator[str]:
    """Endless passages of `length` characters from the reference documentation inside Python."""
    text = "\n\n".join(reference_topics())
    while True:
        start = rng.randrange(len(text) - length)
        yield text[start : start + length]


def tokenizer_texts(seed: int) -> Iterator[str]:
    """What the tokenizer is trained on: conversations and prose, about equal in size."""
    rng = random.Random(f"tokenizer {seed}")
    passages = prose_passages(rng)
    for _ in range(3000):
        for turn in training_conversation(rng, rng.choice(SUBJECTS)).turns:
            yield f"user\n{turn.prompt}"
            yield f"assistant\n{turn.answer}"
        yield next(passages)
