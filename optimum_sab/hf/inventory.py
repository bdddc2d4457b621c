"""What a packed checkpoint holds, read from its files' headers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_sab.errors import FormatError
from optimum_sab.hf.checkpoint import local_files, stored_tensors
from optimum_sab.hf.config import SABConfig


@dataclass(frozen=True)
class PackedModule:
    """One packed linear on disk; ``bytes`` and bits count every stored tensor of it, bias included."""

    name: str
    out_features: int
    in_features: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.bytes / (self.out_features * self.in_features)


@dataclass(frozen=True)
class Inventory:
    """A packed checkpoint.

    Attributes:
        config: its `SABConfig`.
        modules: the packed linears.
        dense_bytes: bytes of every other tensor.
    """

    config: SABConfig
    modules: tuple[PackedModule, ...]
    dense_bytes: int

    @property
    def packed_bytes(self) -> int:
        return sum(m.bytes for m in self.modules)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights, all packed linears together."""
        return 8.0 * self.packed_bytes / sum(m.out_features * m.in_features for m in self.modules)


def read_inventory(folder: Path) -> Inventory:
    """Read config.json and the safetensors headers of a packed checkpoint.

    Raises:
        FormatError: the folder holds no packed SAB checkpoint, or a damaged one.
        FormatVersionError: it is of another format version.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise FormatError(f"{str(folder)!r} has no readable config.json: {error}") from error
    settings = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if not settings or settings.get("quant_method") != "sab":
        raise FormatError(f"{str(folder)!r} is not a packed SAB checkpoint: its config.json has no such settings.")
    sab = SABConfig.from_dict(settings)
    stored = stored_tensors(local_files(str(folder)))
    stems = {key.rpartition(".")[0] for key in stored if key.endswith(".row_scale")}
    if not stems:
        raise FormatError(f"{str(folder)!r} has no packed tensors in its safetensors files; fetch it again.")
    sizes: dict[str, int] = dict.fromkeys(sorted(stems), 0)
    dense = 0
    for key, entry in stored.items():
        stem = key.rpartition(".")[0]
        if stem in sizes:
            sizes[stem] += entry.bytes
        else:
            dense += entry.bytes
    modules = []
    for stem, size in sizes.items():
        if f"{stem}.col_scale" not in stored:
            raise FormatError(f"{stem}: tensor 'col_scale' is missing; the checkpoint is incomplete, fetch it again.")
        rows, columns = stored[f"{stem}.row_scale"].shape[-1], stored[f"{stem}.col_scale"].shape[0]
        modules.append(PackedModule(stem, rows, columns, size))
    return Inventory(sab, tuple(modules), dense)
