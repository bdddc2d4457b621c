"""Small pictures with one to three drawn words, one a line."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from optimum_sab.data.held_out import draw
from optimum_sab.data.typeface import typeface

SIDE = 64
MARGIN = 2
CONTRAST = 90.0
SIZES = (13, 18)  # of the letters, in pixels

# All are one token in SmolLM2's vocabulary.
_LISTED = """
    arm baby bag ball bank bed bell bird blue boat body book box boy bread bus camp car card cat chair city clock cloud
    coat coin corn cup dark day dish dog door ear earth egg eye face farm fire fish flag floor fly foot fruit game gate
    girl glass gold green hair hand hat heart hill horse house ice ink iron jam key king lake leaf leg light line lion
    map milk moon mouse music neck night nose oil open paper park pen plate rain red ring river road room salt ship
    shop sky snow star stone sugar sun table time train tree wall water wheel white wind wood
"""
WORDS: tuple[str, ...] = tuple(_LISTED.split())


@dataclass(frozen=True)
class Sign:
    """A drawn sign.

    Attributes:
        words: from the first line to the last.
        image: RGB, 64x64.
        letters: for every word the left edges of its letters and the right edge of its last, in pixels.
        lines: top and bottom of every word, in pixels.
    """

    words: tuple[str, ...]
    image: Image.Image
    letters: tuple[tuple[float, ...], ...]
    lines: tuple[tuple[float, float], ...]

    @property
    def text(self) -> str:
        """The words with spaces between them."""
        return " ".join(self.words)


def random_words(rng: random.Random, reserved: bool) -> tuple[str, ...]:
    """One to three words of `WORDS` from the wanted side of the split, each number equally likely.

    Their key (see `optimum_sab.data.held_out`) is the words in their order with spaces between them.
    """
    count = rng.randint(1, 3)
    return draw(rng, lambda rng: tuple(rng.sample(WORDS, count)), " ".join, reserved)


def draw_sign(words: tuple[str, ...], rng: random.Random) -> Sign:
    """Draw words in a random size and two random colours at a random place."""
    widest = max(words, key=lambda word: typeface(SIZES[1]).getlength(word))
    size = rng.randint(*SIZES)
    while size > SIZES[0] and typeface(size).getlength(widest) > SIDE - 2 * MARGIN:
        size -= 1
    font, pitch = typeface(size), rng.uniform(1.0, 1.2) * size
    widths = [font.getlength(word) for word in words]
    paper, ink = _colours(rng)
    image = Image.new("RGB", (SIDE, SIDE), paper)
    canvas = ImageDraw.Draw(image)
    room = SIDE - 2 * MARGIN
    top = MARGIN + rng.random() * max(0.0, room - pitch * len(words))
    left, centred = MARGIN + rng.random() * max(0.0, room - max(widths)), rng.random() < 0.5
    letters, lines = [], []
    for line, (word, width) in enumerate(zip(words, widths, strict=True)):
        x = left + (max(widths) - width) / 2 * centred
        y = top + line * pitch
        canvas.text((x, y), word, fill=ink, font=font)
        letters.append(tuple(x + font.getlength(word[:end]) for end in range(len(word) + 1)))
        lines.append((y, y + size))
    return Sign(words, image, tuple(letters), tuple(lines))


def _colours(rng: random.Random) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Two colours whose lightness differs enough to read by."""
    while True:
        paper, ink = ((rng.randrange(256), rng.randrange(256), rng.randrange(256)) for _ in range(2))
        if abs(_lightness(paper) - _lightness(ink)) > CONTRAST:
            return paper, ink


def _lightness(colour: tuple[int, int, int]) -> float:
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue
