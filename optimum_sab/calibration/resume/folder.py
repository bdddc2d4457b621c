"""A folder that keeps what a calibration has finished, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from optimum_sab.errors import CalibrationError

_FINGERPRINT = "fingerprint.json"


class ResumeFolder:
    """Files by name, each written beside its place and then renamed. What they hold is for the stages to know.

    Args:
        folder: made if it is not there.
        marks: what tells the run from others, as JSON values (`fingerprint`).

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
            self.write_json(_FINGERPRINT, marks)
            return
        difference = _difference(json.loads(path.read_text()), json.loads(json.dumps(marks)))
        if difference:
            raise CalibrationError(
                f"resume_folder={str(self.folder)!r} belongs to another run: {difference}. Repeat that run, or name "
                "another folder."
            )

    def knows(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return (self.folder / name).exists()

    def read_json(self, name: str) -> Any:
        """What `write_json` was given.

        Raises:
            CalibrationError: the file cannot be read.
        """
        path = self.folder / name
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise CalibrationError(f"{path} cannot be read ({error}); name another resume_folder.") from error

    def write_json(self, name: str, value: Any) -> None:
        """Keep JSON values."""
        self._write(name, lambda target: target.write_text(json.dumps(value, indent=1)))

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `write_tensors` was given: the tensors, on the CPU, and the JSON values about them.

        Raises:
            CalibrationError: the file cannot be read.
        """
        path = self.folder / name
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                return {each: file.get_tensor(each) for each in names}, json.loads(file.metadata()["about"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{path} cannot be read ({error}); delete it, and its work is done again."
            ) from error

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keep tensors and JSON values about them."""
        ready = {each: t.detach().cpu().contiguous() for each, t in tensors.items()}
        self._write(name, lambda target: save_file(ready, target, metadata={"about": json.dumps(dict(about))}))

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        path = self.folder / name
        partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
        try:
            write(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _difference(there: Any, now: Any, name: str = "") -> str:
    """The first place where two trees of JSON values differ, in words; empty where they do not."""
    if isinstance(there, dict) and isinstance(now, dict):
        for key in [*there, *(k for k in now if k not in there)]:
            inner = _difference(there.get(key), now.get(key), f"{name}.{key}" if name else key)
            if inner:
                return inner
        return ""
    return "" if there == now else f"{name} is {there!r} there and {now!r} now"
