"""A folder that keeps what a calibration has finished, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from optimum_sab.calibration.refine.reconstruction import Reconstruction
from optimum_sab.core.refinement import RefineSettings
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import CalibrationError
from optimum_sab.format.layout import FORMAT_VERSION
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.version import __version__

PROBES = 4096  # values of every parameter that go into the fingerprint
_FINGERPRINT, _TUNING, _RULES = "fingerprint.json", "tuning.safetensors", "rules.json"
_BAR = "|"  # parts the names in a block's file; module names have no such character


@dataclass(frozen=True)
class FinishedBlock:
    """What is kept of a decoder block.

    Attributes:
        packed: its linears by dotted name.
        errors: their relative output errors.
        vectors: its one-dimensional parameters by name inside the block, where the refinement changed them.
        reconstruction: what the refinement made of it; None without it.
    """

    packed: dict[str, PackedWeight]
    errors: dict[str, float]
    vectors: dict[str, Tensor]
    reconstruction: Reconstruction | None


def fingerprint(
    model: nn.Module,
    samples: Sequence[Mapping[str, Any]],
    layers: Mapping[str, LayerSettings],
    pass_name: str,
    refine: RefineSettings | None,
) -> dict[str, Any]:
    """What decides the result, as JSON values: two runs may share a folder only if theirs are equal.

    The model is told by the names, shapes and dtypes of its parameters and by `PROBES` values of each, the samples by
    all they hold.
    """
    weights, data = hashlib.sha256(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        _update(weights, name, parameter, flat[:: max(1, flat.numel() // PROBES)])
    for sample in samples:
        for name, value in sample.items():
            if isinstance(value, Tensor):
                _update(data, name, value, value.flatten())
            else:
                data.update(repr((name, value)).encode())
    return {
        "release": __version__,
        "torch": torch.__version__,
        "format_version": FORMAT_VERSION,
        "model": weights.hexdigest(),
        "samples": data.hexdigest(),
        "calibration_pass": pass_name,
        "refine": None if refine is None else asdict(refine),
        "layers": {name: asdict(settings) for name, settings in layers.items()},
    }


class ResumeFolder:
    """The allocation, finished blocks and the state of the tuning, each file written beside its place and then renamed.

    Args:
        folder: made if it is not there.
        marks: the run's `fingerprint`.

    Raises:
        CalibrationError: the folder belongs to another run, or holds something else.
    """

    def __init__(self, folder: str | Path, marks: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        path = self.folder / _FINGERPRINT
        if not path.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise CalibrationError(
                    f"resume_folder={str(self.folder)!r} holds files but no {_FINGERPRINT}; name an empty folder, "
                    "or one that an interrupted run was given."
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(path, lambda target: target.write_text(json.dumps(marks, indent=1)))
            return
        difference = _difference(json.loads(path.read_text()), json.loads(json.dumps(marks)))
        if difference:
            raise CalibrationError(
                f"resume_folder={str(self.folder)!r} belongs to another run: {difference}. Repeat that run, or name "
                "another folder."
            )

    # -- allocation --------------------------------------------------------------------------------------------------

    def rules(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The rules of the allocation: as found at first, so that rounding cannot make them others on the way."""
        path = self.folder / _RULES
        if not path.exists():
            self._write(path, lambda target: target.write_text(json.dumps(make(), indent=1)))
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise CalibrationError(f"{path} cannot be read ({error}); name another resume_folder.") from error
        return found

    # -- blocks ------------------------------------------------------------------------------------------------------

    def knows_block(self, index: int) -> bool:
        """Whether the block was finished."""
        return self._block(index).exists()

    def read_block(self, index: int, layers: Mapping[str, tuple[int, int, LayerSettings]]) -> FinishedBlock:
        """A finished block.

        Args:
            index: which.
            layers: out_features, in_features and settings of its linears by dotted name.

        Raises:
            CalibrationError: its file cannot be read.
            FormatError: it holds other tensors than these layers need.
        """
        tensors, about = _read(self._block(index))
        named: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
        vectors: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            owner, _, name = key.partition(_BAR)
            if owner:
                named[owner][name] = tensor
            else:
                vectors[name] = tensor
        packed = {name: PackedWeight(named[name], *shape) for name, shape in layers.items()}
        for name, weight in packed.items():
            weight.validate(name)
        found = about["reconstruction"]
        return FinishedBlock(packed, about["errors"], vectors, None if found is None else Reconstruction(**found))

    def write_block(self, index: int, block: FinishedBlock) -> None:
        """Keep a finished block."""
        tensors = {f"{name}{_BAR}{k}": t for name, packed in block.packed.items() for k, t in packed.tensors.items()}
        tensors |= {f"{_BAR}{name}": vector for name, vector in block.vectors.items()}
        found = None if block.reconstruction is None else asdict(block.reconstruction)
        self._write_tensors(self._block(index), tensors, {"errors": block.errors, "reconstruction": found})

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    # -- tuning ------------------------------------------------------------------------------------------------------

    def load(self) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        """The state of the tuning; None before its first."""
        path = self.folder / _TUNING
        return _read(path) if path.exists() else None

    def save(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        """Keep the state of the tuning in the place of the one before."""
        self._write_tensors(self.folder / _TUNING, tensors, dict(numbers))

    # -- files -------------------------------------------------------------------------------------------------------

    def _write_tensors(self, path: Path, tensors: Mapping[str, Tensor], about: dict[str, Any]) -> None:
        ready = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        self._write(path, lambda target: save_file(ready, target, metadata={"about": json.dumps(about)}))

    def _write(self, path: Path, write: Any) -> None:
        partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
        try:
            write(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()["about"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CalibrationError(f"{path} cannot be read ({error}); delete it, and its work is done again.") from error


def _update(digest: Any, name: str, tensor: Tensor, values: Tensor) -> None:
    digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
    digest.update(values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _difference(there: Any, now: Any, name: str = "") -> str:
    """The first place where two trees of JSON values differ, in words; empty where they do not."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in [*there, *(k for k in now if k not in there)]:
            inner = _difference(there.get(key), now.get(key), f"{name}.{key}" if name else key)
            if inner:
                return inner
        return ""
    return "" if there == now else f"{name} is {there!r} there and {now!r} now"
