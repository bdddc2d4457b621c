"""Passages of ordinary text, written for this package, that the built-in calibration set is made of.

`passages.txt` holds them: explanations, stories, instructions, letters, news, conversations, worked problems, code,
tables, descriptions of pictures, and some in other languages, so that the statistics of a model's activations are those
of what people really send to it. A line of four hyphens separates two passages.
"""

import functools
import random
import re
from importlib import resources

from optimum_sab.errors import ConfigError

SEPARATOR = "\n----\n"
IDEOGRAPHS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")


@functools.cache
def passages() -> tuple[str, ...]:
    """Every passage, in the order of the file."""
    text = resources.files("optimum_sab.data").joinpath("passages.txt").read_text(encoding="utf-8")
    return tuple(passage.strip() for passage in text.split(SEPARATOR))


def word_count(text: str) -> int:
    """Words between blanks; Chinese and Japanese, which are written without, count as one word per two characters."""
    return len(text.split()) + len(IDEOGRAPHS.findall(text)) // 2


def text_samples(count: int, seed: int = 0, words: int = 400) -> list[str]:
    """Texts of whole passages in random order, each of at least `words` words.

    Passages are dealt from a shuffled deck that is shuffled anew when it runs out, so none comes twice before all have
    come once. The same arguments give the same texts on every machine, and a larger `count` begins with the texts of a
    smaller one.

    Args:
        count: how many texts.
        seed: of the shuffles.
        words: length at which a text is complete, in words; the last passage is not cut.

    Raises:
        ConfigError: `count` or `words` is less than one.
    """
    if count < 1:
        raise ConfigError(f"count={count} must be at least 1; it is the number of texts to make.")
    if words < 1:
        raise ConfigError(f"words={words} must be at least 1; 400 gives about 600 tokens.")
    rng = random.Random(seed)
    deck: list[str] = []
    samples = []
    for _ in range(count):
        sample: list[str] = []
        length = 0
        while length < words:
            if not deck:
                deck = list(passages())
                rng.shuffle(deck)
            sample.append(deck.pop())
            length += word_count(sample[-1])
        samples.append("\n\n".join(sample))
    return samples
