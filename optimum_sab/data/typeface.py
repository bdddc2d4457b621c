"""The typeface of every drawn text: the one inside Pillow, so that pictures are the same on every machine."""

from __future__ import annotations

import functools
from typing import cast

from PIL import ImageFont


@functools.lru_cache(maxsize=256)
def typeface(size: int) -> ImageFont.FreeTypeFont:
    """The typeface at a size in pixels."""
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))  # the other kind of font has no sizes
