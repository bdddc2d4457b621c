"""What a packed checkpoint holds, read from its files' headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from optimum_sab.errors import FormatError
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.one_save import check_one_save
from optimum_sab.hf.stored_files import StoredFile, StoredTensor, local_files, read_headers, read_json
from optimum_sab.hf.verification import differing
from optimum_sab.version import QUANT_METHOD


@dataclass(frozen=True)
class PackedModule:
    """One packed linear on disk.

    Attributes:
        name: in the file.
        rule: the part of the name that a module rule takes: from the list of blocks on, before which the names in a
            file and in a model may differ.
        out_features, in_features: of the weight.
        bytes: of every stored tensor of it, bias included.
    """

    name: str
    rule: str
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
        files: its safetensors files.
    """

    config: SABConfig
    modules: tuple[PackedModule, ...]
    dense_bytes: int
    files: tuple[StoredFile, ...]

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
        ConfigError: a setting in it cannot be used.
        FormatError: the folder holds no packed SAB checkpoint, or a damaged one.
        FormatVersionError: it is of another format version.
    """
    config = _settings(folder)
    files = read_headers(local_files(folder))
    check_one_save(files, config.saved_as)
    stored = {name: tensor for file in files for name, tensor in file.tensors.items()}
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
    rules = rule_names(sizes)
    modules = tuple(PackedModule(stem, rules[stem], *_shape(stem, stored), size) for stem, size in sizes.items())
    return Inventory(config, modules, dense, tuple(files))


def _settings(folder: Path) -> SABConfig:
    if not folder.is_dir():
        raise FormatError(f"{str(folder)!r} is no folder; name the folder of a packed checkpoint.")
    config = read_json(folder / "config.json")
    parts = (config, config.get("text_config")) if isinstance(config, dict) else ()
    settings = next(
        (p["quantization_config"] for p in parts if isinstance(p, dict) and p.get("quantization_config")), None
    )
    if not isinstance(settings, dict) or settings.get("quant_method") != QUANT_METHOD:
        raise FormatError(
            f"{str(folder)!r} is not a packed SAB checkpoint: its config.json has no such settings; "
            f"'optimum-sab quantize {folder} --output PACKED' makes one of a dense checkpoint, or name another folder."
        )
    found: SABConfig = SABConfig.from_dict(settings)
    found.refuse_call_settings()
    return found


def rule_names(stems: Iterable[str]) -> dict[str, str]:
    """What of each name a rule takes: from the list of blocks on, or from further left where two would be the same."""
    parts = {stem: stem.split(".") for stem in stems}
    starts = {stem: _list_part(own) for stem, own in parts.items()}
    while True:
        rules = {stem: ".".join(own[starts[stem] :]) for stem, own in parts.items()}
        times = Counter(rules.values())
        longer = [stem for stem, rule in rules.items() if times[rule] > 1 and starts[stem]]
        if not longer:
            return rules
        for stem in longer:
            starts[stem] -= 1


def _list_part(parts: Sequence[str]) -> int:
    """Where a dotted name has its outermost list of modules; 0 where it has none."""
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return max(0, number - 1)


def _shape(stem: str, stored: Mapping[str, StoredTensor]) -> tuple[int, int]:
    """Rows and columns of a packed linear."""
    for tensor, dimensions in (("weight", 3), ("row_scale", 3), ("col_scale", 1)):
        entry = stored.get(f"{stem}.{tensor}")
        if entry is None:
            raise FormatError(f"{stem}: tensor {tensor!r} is missing; the checkpoint is incomplete, fetch it again.")
        if len(entry.shape) != dimensions or 0 in entry.shape:
            raise FormatError(
                f"{stem}: tensor {tensor!r} is {entry.shape}, expected {dimensions} dimensions, none of them 0; the "
                "checkpoint is damaged, fetch it again."
            )
    return stored[f"{stem}.row_scale"].shape[-1], stored[f"{stem}.col_scale"].shape[0]


@dataclass(frozen=True)
class Verification:
    """What a checkpoint's digests say.

    Attributes:
        tensors: how many were compared.
        differ: names of those that are not what was saved.
    """

    tensors: int
    differ: tuple[str, ...]


def verify_inventory(inventory: Inventory) -> Verification:
    """Compare every tensor, packed or dense, with its digest.

    Raises:
        FormatError: the checkpoint carries no digests.
    """
    files = inventory.files
    if not all(file.save for file in files):
        raise FormatError(
            f"{files[0].path} carries no digests: it was saved before there were any, or written again by another "
            "program. Load the model and save it to have digests from then on."
        )
    return Verification(sum(len(file.digests) for file in files), tuple(differing(files)))
