"""The processor that goes along when a packed model is saved, beside whatever the user has saved there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_sab.errors import MissingDependencyError, SampleError, warn
from optimum_sab.hf.origin import Origin
from optimum_sab.nn.modalities import AUDIO, VISUAL, model_modalities

# Files that are of one tokenizer, so that none of them may come from another.
_TOKENIZER = ("token", "vocab", "merges", "special_tokens", "chat_", "spiece", "sentencepiece", "additional_chat_")


@dataclass
class ProcessorSource:
    """Where the processor of a model is to be had.

    A copy of the model shares it. A pickled model leaves it behind: the processor may be no data, and the way to it
    holds a token.

    Args:
        given: `SABConfig.processor`: an object, where to load it from, or None for the checkpoint's own.
        origin: of the model.
    """

    given: Any = None
    origin: Origin | None = None

    def find(self, config: Any) -> Any:
        """The processor, the tokenizer where there is no more, or None where the model has neither.

        Args:
            config: of the model.
        """
        origin = self.origin or Origin("")
        if self.given is None and not origin.name:
            return None
        from optimum_sab.hf.processor import find_processor  # not while Transformers is being imported

        modalities = model_modalities(config)
        for more_than_text in dict.fromkeys((VISUAL in modalities or AUDIO in modalities, False)):
            try:
                return find_processor(self.given, origin, more_than_text)
            except (SampleError, MissingDependencyError) as error:
                problem = error
        if not Path(origin.name).is_dir():  # a folder is there to be looked at; what the Hub has is not seen
            warn(f"the model is saved without a processor: {problem}")
        return None

    def __deepcopy__(self, memo: Any) -> ProcessorSource:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"given": None, "origin": None}


def write_processor(processor: Any, folder: Path, taken: Collection[str] = ()) -> None:
    """Save a processor into a folder, without a file of what is there already.

    Args:
        processor: or tokenizer.
        folder: with what the user has saved there.
        taken: further files that are the user's, where the folder is uploaded to.
    """
    theirs = {*taken, *(each.name for each in folder.iterdir())}
    with tempfile.TemporaryDirectory() as made:
        processor.save_pretrained(made)
        written = list(Path(made).iterdir())
        for of_tokenizer in (True, False):
            part = [each for each in written if is_tokenizers(each.name) == of_tokenizer]
            if theirs.isdisjoint(each.name for each in part):
                for each in part:
                    shutil.move(each, folder / each.name)


def is_tokenizers(name: str) -> bool:
    """Whether a file belongs to the tokenizer rather than to what prepares pictures and sound."""
    return name.startswith(_TOKENIZER)
