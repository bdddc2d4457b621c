"""`AutoModelForVision2Seq` under every line: Transformers 5 renamed it to `AutoModelForImageTextToText`."""

from __future__ import annotations

import transformers

AutoModelForVision2Seq = (
    getattr(transformers, "AutoModelForVision2Seq", None) or transformers.AutoModelForImageTextToText
)
