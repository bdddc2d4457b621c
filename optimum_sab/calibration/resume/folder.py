"""A folder that keeps what a calibration has finished, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from optimum_sab.calibration.resume.difference import difference
from optimum_sab.calibration.resume.digest import content_digest
from optimum_sab.errors import CalibrationError

_FINGERPRINT = "fingerprint.json"
_OURS = re.compile(r"(fingerprint\.json|rules\.json|tuning\.safetensors|block-\d+\.safetensors)(\.partial-\d+)?")


class ResumeFolder:
    """Files by name, each written beside its place and then renamed. What they hold is for the stages to know.

    Every file carries a digest of its content, its name and the run it belongs to, so what is read back is what this
    run has written there.

    Args:
        folder: made if it is not there.
        marks: what tells the run from others, as JSON values (`fingerprint`).
        begin: whether the run begins, or goes on. If not, the marks are those that are known of it so far: only they
            are compared, and nothing is left but an empty folder.

    Raises:
        CalibrationError: the folder belongs to another run, holds something else, or cannot be read or written.
    """

    def __init__(self, folder: str | Path, marks: Mapping[str, Any], begin: bool = True) -> None:
        self.folder = Path(folder)
        marks = json.loads(json.dumps(dict(marks)))
        self._run = ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = sorted(each.name for each in self.folder.iterdir())
        except OSError as error:
            raise CalibrationError(
                f"resume_folder={str(self.folder)!r} cannot be used ({error}); name a folder that can be written."
            ) from error
        foreign = [name for name in names if not _OURS.fullmatch(name)]
        if foreign and _FINGERPRINT not in names:
            raise CalibrationError(
                f"resume_folder={str(self.folder)!r} holds other files, such as {foreign[0]!r}, and no {_FINGERPRINT}; "
                "name an empty folder, or one that an interrupted run was given."
            )
        if _FINGERPRINT in names:
            there = self.read_json(_FINGERPRINT)
            self._compare(there if begin else {key: there.get(key) for key in marks}, marks)
        elif begin:  # a new folder, or one whose run was stopped before it was there
            self.write_json(_FINGERPRINT, marks)
        self._run = content_digest("run", {}, marks)

    def _compare(self, there: Mapping[str, Any], marks: Mapping[str, Any]) -> None:
        found = difference(there, marks)
        if found:
            raise CalibrationError(
                f"resume_folder={str(self.folder)!r} belongs to another run: {found}. Repeat that run, or name "
                "another folder."
            )

    def knows(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return (self.folder / name).exists()

    def read_json(self, name: str) -> Any:
        """What `write_json` was given.

        Raises:
            CalibrationError: the file cannot be read, or is not what this run wrote there.
        """
        self._require_file(name)
        try:
            stored = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise self.refusal(name, str(error)) from error
        if not isinstance(stored, dict) or stored.keys() != {"content", "sha256"}:
            raise self.refusal(name, "it has no digest, as those of earlier releases")
        return self._checked(name, stored["sha256"], {}, stored["content"])[1]

    def write_json(self, name: str, value: Any) -> None:
        """Keep JSON values."""
        stored = {"sha256": content_digest(self._run + name, {}, value), "content": value}
        self._write(name, lambda target: target.write_text(json.dumps(stored, indent=1), encoding="utf-8"))

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `write_tensors` was given: the tensors, on the CPU, and the JSON values about them.

        Raises:
            CalibrationError: the file cannot be read, or is not what this run wrote there.
        """
        self._require_file(name)
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                tensors = {each: file.get_tensor(each) for each in list(file.keys())}
                metadata = file.metadata() or {}
                about = json.loads(metadata.get("about", "null"))
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise self.refusal(name, str(error)) from error
        return self._checked(name, metadata.get("sha256"), tensors, about)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keep tensors and JSON values about them."""
        ready = {each: t.detach().cpu().contiguous() for each, t in tensors.items()}
        about = dict(about)
        metadata = {"about": json.dumps(about), "sha256": content_digest(self._run + name, ready, about)}
        self._write(name, lambda target: save_file(ready, target, metadata=metadata))

    def refusal(self, name: str, reason: str) -> CalibrationError:
        """The error that names a file, what is wrong with it, and the remedy."""
        if name == _FINGERPRINT:
            remedy = "delete it, and blocks of this run that are in the folder are used; or name another resume_folder."
        else:
            remedy = "delete it, and its work is done again."
        return CalibrationError(f"{self.folder / name} cannot be used ({reason}); {remedy}")

    def _require_file(self, name: str) -> None:
        """Reading a pipe would wait for somebody to write into it."""
        path = self.folder / name
        if path.exists() and not path.is_file():
            raise self.refusal(name, "it is no file")

    def _checked(
        self, name: str, digest: Any, tensors: dict[str, Tensor], about: Any
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if digest != content_digest(self._run + name, tensors, about):
            raise self.refusal(name, "its content is not what this run wrote there: damaged, or of another run")
        return tensors, about

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        path = self.folder / name
        partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
        try:
            write(partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            raise CalibrationError(
                f"{path} cannot be written ({error}); make room for it, and repeat the call: what is finished is kept."
            ) from error
        finally:
            partial.unlink(missing_ok=True)
