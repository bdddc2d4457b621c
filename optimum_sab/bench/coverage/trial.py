"""What is asked of a family: quantize it as anybody would, save it, and go on with it in another process."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers import auto as quantizers

from optimum_sab.bench.coverage.configuration import random_model
from optimum_sab.bench.coverage.exceptions import exceptions_of
from optimum_sab.bench.coverage.families import Family
from optimum_sab.bench.coverage.outcome import FAILED, NOT_BUILT, REFUSED, WORKS, first_line
from optimum_sab.bench.coverage.samples import build_samples, run
from optimum_sab.bench.coverage.share import binarized_share, language_matrices
from optimum_sab.bench.coverage.tokenizer import LetterTokenizer
from optimum_sab.errors import SABError, SABWarning
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.quantizer import SABHfQuantizer

NEW_TOKENS = 3
QUICK: dict[str, Any] = {"iterations": 2, "sweeps": 1}  # everything else is as by default
COMPARED = (0, -1)  # samples whose logits are compared: one with a picture, one without where there is one
FOUND = "found.json"
_EXPECTED = "expected.pt"
_ON_ITS_WAY = SABHfQuantizer._process_model_after_weight_loading.__code__
_TOLERANCE = 1e-3  # a dequantized weight is multiplied in another order


class DifferenceError(SABError):
    """A model that was saved and loaded does not compute what it did."""


class Notes:
    """What is known of a family so far, kept in a file: whatever becomes of the process, it says how far it came."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FOUND
        self.known: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def note(self, **found: Any) -> None:
        """Add to what is known."""
        self.known |= found
        self._file.write_text(json.dumps(self.known))


def quantize(family: Family, folder: Path) -> None:
    """The first half: a random dense model, saved, loaded with a quantization configuration, and saved packed."""
    with _noted(folder) as notes:
        notes.note(stage="build")
        exceptions = exceptions_of(family.name)
        model = random_model(family, exceptions)
        samples = build_samples(model, family, exceptions)
        notes.note(stage="dense", pictures=samples.pictures, sound=samples.sound)
        for row in samples.rows:
            if not run(model, row).isfinite().all():
                raise DifferenceError("the dense model's logits are not finite.")
        able = {"train": _able(lambda: _trained(model, samples.rows[0]))}
        able["generate"] = _able(lambda: _generated(model, samples.rows[0]))
        notes.note(left_out=[name for name, can in able.items() if not can])
        matrices = language_matrices(model, exceptions.language)
        model.save_pretrained(folder / "dense")
        del model

        notes.note(stage="quantize")
        config = SABConfig(
            calibration=samples.rows, processor=LetterTokenizer(), progress="none", examples=False, **QUICK
        )
        packed = _load(family, folder / "dense", quantization_config=config)
        notes.note(stage="forward", share=binarized_share(packed, matrices))
        logits = [run(packed, samples.rows[index]) for index in COMPARED]
        notes.note(stage="save")
        packed.save_pretrained(folder / "packed")
        torch.save({"rows": samples.rows, "logits": logits}, folder / _EXPECTED)


def use(family: Family, folder: Path) -> None:
    """The second half, in a process that has not seen the model: load it, compute, and go on with it."""
    with _noted(folder) as notes:
        notes.note(stage="reload")
        kept = torch.load(folder / _EXPECTED, weights_only=True)
        rows, logits = kept["rows"], kept["logits"]
        model = _load(family, folder / "packed")
        notes.note(stage="logits")
        _compare(model, rows, logits, "reloaded")
        left_out = notes.known["left_out"]
        if "generate" not in left_out:
            notes.note(stage="generate")
            _generated(model, rows[0])
        notes.note(stage="second save")
        model.save_pretrained(folder / "again")
        model = _load(family, folder / "again")
        _compare(model, rows, logits, "reloaded after a second save")
        if "train" not in left_out:
            notes.note(stage="train")
            _trained(model, rows[0])
        del model
        notes.note(stage="dequantize")
        _compare_dense(_dequantized(family, folder / "packed"), rows, logits)
        notes.note(stage="", outcome=WORKS)


@contextmanager
def _noted(folder: Path) -> Iterator[Notes]:
    """Errors, warnings and seconds of what is done are written down."""
    notes = Notes(folder)
    began = time.process_time()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            yield notes
        except Exception as error:  # of any kind: that is what is to be found out
            notes.note(outcome=_outcome(error, notes.known["stage"]), reason=first_line(error))
    texts = [str(each.message) for each in said if issubclass(each.category, SABWarning)]
    seconds = notes.known.get("seconds", 0.0) + time.process_time() - began
    notes.note(seconds=seconds, warnings=notes.known.get("warnings", []) + list(dict.fromkeys(texts)))


def _outcome(error: Exception, stage: str) -> str:
    if stage in ("build", "dense"):
        return NOT_BUILT
    early = stage == "quantize" and isinstance(error, SABError) and not _passed(error.__traceback__)
    return REFUSED if early else FAILED


def _passed(traceback: TracebackType | None) -> bool:
    """Whether an error came when the weights had been read."""
    while traceback is not None:
        if traceback.tb_frame.f_code is _ON_ITS_WAY:
            return True
        traceback = traceback.tb_next
    return False


def _load(family: Family, folder: Path, **arguments: Any) -> Any:
    """A model whose tensors lie where PyTorch would put them.

    Those that are read lie where they are in the file, at any multiple of their type, and a product of the same numbers
    may differ in its last bit with the place: Transformers' dense models do so too when they are read from other files.
    """
    model = family.model_class.from_pretrained(folder, dtype=torch.float32, **arguments).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def _dequantized(family: Family, folder: Path) -> Any:
    """The dense model of a packed checkpoint, by the way that this line of Transformers has."""
    if hasattr(quantizers, "LOADING_ATTRIBUTES_CONFIG_TYPES"):
        return _load(family, folder, quantization_config=SABConfig(dequantize=True))
    return _load(family, folder).dequantize()


def _able(work: Callable[[], object]) -> bool:
    """Whether the dense model can do it."""
    try:
        work()
    except Exception:  # whatever it raises: the packed one need not do what the dense one cannot
        return False
    return True


def _trained(model: Any, row: Mapping[str, Any]) -> None:
    """A forward in training mode, with gradients."""
    torch.manual_seed(0)
    try:
        model.train()
        model(**row)
    finally:
        model.eval()


def _generated(model: Any, row: Mapping[str, Any]) -> None:
    with torch.no_grad():
        model.generate(**row, max_new_tokens=NEW_TOKENS, do_sample=False)


def _compare(model: Any, rows: list[dict[str, Any]], expected: list[Tensor], which: str) -> None:
    for index, wanted in zip(COMPARED, expected, strict=True):
        found = run(model, rows[index])
        if not torch.equal(found, wanted):
            distance = float((found - wanted).abs().max()) if found.shape == wanted.shape else float("inf")
            raise DifferenceError(f"the model {which} gives other logits, by up to {distance:.2g}.")


def _compare_dense(model: Any, rows: list[dict[str, Any]], expected: list[Tensor]) -> None:
    for index, wanted in zip(COMPARED, expected, strict=True):
        distance = float((run(model, rows[index]) - wanted).norm() / wanted.norm())
        if not distance < _TOLERANCE:
            raise DifferenceError(f"the dequantized model gives other logits, {distance:.2g} away.")
