"""A finished block as an interrupted run keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from optimum_sab.calibration.blocks.measured import BlockSignificance
from optimum_sab.calibration.blocks.report import ExpertsReport
from optimum_sab.calibration.refine.reconstruction import Reconstruction
from optimum_sab.calibration.resume.folder import ResumeFolder
from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.packed_weight import PackedWeight

_BAR = "|"  # parts the names in a block's file; module names have no such character


@dataclass(frozen=True)
class FinishedBlock:
    """What is kept of a decoder block.

    Attributes:
        packed: its linears by dotted name.
        errors: their relative output errors.
        vectors: its one-dimensional parameters by name inside the block, where the refinement changed them.
        reconstruction: what the refinement made of it; None without it.
        by_modality: its linears' errors of each modality.
        significance: of its first linears; None where it was not told.
        experts: what came to its experts.
    """

    packed: dict[str, PackedWeight]
    errors: dict[str, float]
    vectors: dict[str, Tensor]
    reconstruction: Reconstruction | None
    by_modality: dict[str, dict[str, float]]
    significance: BlockSignificance | None
    experts: tuple[ExpertsReport, ...] = ()

    def write(self, folder: ResumeFolder, index: int) -> None:
        """Keep it."""
        tensors = {f"{name}{_BAR}{k}": t for name, packed in self.packed.items() for k, t in packed.tensors.items()}
        tensors |= {f"{_BAR}{name}": vector for name, vector in self.vectors.items()}
        about = {
            "errors": self.errors,
            "reconstruction": None if self.reconstruction is None else asdict(self.reconstruction),
            "by_modality": self.by_modality,
            "significance": None if self.significance is None else asdict(self.significance),
            "experts": [asdict(each) for each in self.experts],
        }
        folder.write_tensors(_name(index), tensors, about)

    @classmethod
    def read(
        cls, folder: ResumeFolder, index: int, layers: Mapping[str, tuple[int, int, LayerSettings]]
    ) -> FinishedBlock:
        """The one that was kept.

        Args:
            folder: where.
            index: which.
            layers: out_features, in_features and settings of its linears by dotted name.

        Raises:
            CalibrationError: its file cannot be read, or is not what these layers need.
        """
        tensors, about = folder.read_tensors(_name(index))
        named: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
        vectors: dict[str, Tensor] = {}
        try:
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
            errors = {name: float(about["errors"][name]) for name in layers}
            by_modality = {n: {m: float(e) for m, e in about["by_modality"][n].items()} for n in layers}
            shown = about["significance"]
            return cls(
                packed,
                errors,
                vectors,
                None if found is None else Reconstruction(**found),
                by_modality,
                None if shown is None else BlockSignificance(**shown),
                tuple(ExpertsReport(e["name"], tuple(e["tokens"]), e["mixed"]) for e in about["experts"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise folder.refusal(_name(index), f"it is not what this block needs: {error}") from error


def is_finished(folder: ResumeFolder | None, index: int) -> bool:
    """Whether the folder keeps a block."""
    return folder is not None and folder.knows(_name(index))


def _name(index: int) -> str:
    return f"block-{index:05d}.safetensors"
