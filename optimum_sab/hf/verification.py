"""Compare what a checkpoint holds, or what was loaded from it, with the digests it was saved with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from torch import nn

from optimum_sab.errors import FormatError
from optimum_sab.format.digest import digest, digest_of_bytes
from optimum_sab.hf.shares import is_shared
from optimum_sab.hf.stored_files import StoredFile
from optimum_sab.nn.linear import SABLinear

VERIFY = (True, False, "all")


def verify_loaded(model: nn.Module, files: Sequence[StoredFile], keys: Mapping[str, str], rest: bool) -> None:
    """The packed layers of a model must be what was saved; files without digests are passed over.

    They are compared where they are, before they are prepared for computing. What is offloaded, what processes share,
    and a bias of which loading made another dtype, is read from its file.

    Args:
        model: loaded, packed layers in the stored layout.
        files: of the checkpoint.
        keys: stored names of the tensors, by name in the model.
        rest: whether everything else is compared too, from the files.

    Raises:
        FormatError: names the first tensor that differs, and how many there are.
    """
    digests = {name: value for file in files for name, value in file.digests.items()}
    if not digests:
        return
    wrong: list[str] = []
    unseen = set(digests)
    packed = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, SABLinear):
            continue
        for tensor_name, tensor in layer.named_parameters(recurse=False):
            stored = keys[f"{name}.{tensor_name}"]
            packed.add(stored)
            if (
                tensor.is_meta
                or is_shared(tensor)
                or (tensor_name == "bias" and _dtype_of(files, stored) != str(tensor.dtype).removeprefix("torch."))
            ):
                continue
            unseen.discard(stored)
            if digest(tensor) != digests[stored]:
                wrong.append(stored)
    wrong += differing(files, unseen if rest else unseen & packed)
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise FormatError(
            f"{min(wrong)}{more}: not what was saved (its digest differs); the file is damaged, fetch it again. "
            "`optimum-sab inspect FOLDER --verify` names all."
        )


def differing(files: Sequence[StoredFile], names: Collection[str] | None = None) -> list[str]:
    """The tensors whose content in the files is not what was saved, sorted.

    Args:
        files: with digests; those without are passed over.
        names: the tensors to look at; None for all.
    """
    wrong = []
    for file in files:
        looked_at = [n for n in file.digests if n in file.tensors and (names is None or n in names)]
        if not looked_at:
            continue
        content = np.asarray(np.memmap(file.path, np.uint8, "r"))
        for name in looked_at:
            entry = file.tensors[name]
            found = digest_of_bytes(entry.dtype_name, entry.shape, content[entry.start : entry.start + entry.bytes])
            if found != file.digests[name]:
                wrong.append(name)
    return sorted(wrong)


def _dtype_of(files: Sequence[StoredFile], name: str) -> str | None:
    return next((file.tensors[name].dtype_name for file in files if name in file.tensors), None)
