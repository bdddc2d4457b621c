"""Compare what a checkpoint's files hold with the digests they were saved with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from safetensors import safe_open

from optimum_sab.errors import FormatError
from optimum_sab.format.digest import digest
from optimum_sab.hf.stored_files import StoredFile

VERIFY = (True, False, "all")


def differing(files: Sequence[StoredFile], names: Collection[str] | None = None) -> list[str]:
    """The tensors whose content is not what was saved, sorted.

    Every tensor is read from its file, so device, dtype and offloading of a model do not matter.

    Args:
        files: with digests; those without are passed over.
        names: the tensors to look at; None for all.
    """
    wrong: list[str] = []
    for file in files:
        looked_at = [n for n in sorted(file.digests) if n in file.tensors and (names is None or n in names)]
        if not looked_at:
            continue
        with safe_open(file.path, framework="pt") as handle, ThreadPoolExecutor() as threads:
            opened: Any = handle
            found = threads.map(lambda name, source=opened: digest(source.get_tensor(name)), looked_at)
            wrong += [name for name, value in zip(looked_at, found) if value != file.digests[name]]
    return sorted(wrong)


def verify(files: Sequence[StoredFile], names: Collection[str] | None = None) -> None:
    """Raise where `differing` finds a tensor.

    Raises:
        FormatError: names the first tensor, and how many there are.
    """
    wrong = differing(files, names)
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise FormatError(
            f"{wrong[0]}{more}: not what was saved (its digest differs); the file is damaged, fetch it again. "
            "`optimum-sab inspect FOLDER --verify` names all."
        )
