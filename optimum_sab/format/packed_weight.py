"""`PackedWeight`: a layer's stored tensors, and the exact way there from binary planes and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optimum_sab.core.planes import BinaryPlanes
from optimum_sab.core.row_scale import row_exponent
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import FormatError
from optimum_sab.format.bits import pack_bits, unpack_bits
from optimum_sab.format.layout import salient_per_block, tensor_specs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PackedWeight:
    """The stored tensors of one layer (docs/format.md).

    Attributes:
        tensors: by name, exactly the names, shapes and dtypes of `tensor_specs`.
        out_features: rows of the weight.
        in_features: columns of the weight.
        settings: what the shapes follow from.
    """

    tensors: dict[str, Tensor]
    out_features: int
    in_features: int
    settings: LayerSettings

    @classmethod
    def pack(cls, planes: BinaryPlanes, settings: LayerSettings) -> PackedWeight:
        """Pack; `unpack` gives back exactly these planes.

        Raises:
            FormatError: a scale is not representable in its stored type (round it first, core/row_scale.py), or
                the salient columns are not the number per block that the settings say.
        """
        width = planes.in_features
        found = (planes.base_sign.shape[0], planes.residual_sign.shape[0], planes.block_size, planes.code)
        wanted = (settings.base_planes, settings.residual_planes, settings.block_size, settings.code)
        if found != wanted:
            raise FormatError(
                f"base planes, residual planes, block size and code are {found}, the settings ask for {wanted}."
            )
        tensors = {"weight": pack_bits(planes.base_sign, 4).view(torch.int32)}
        if settings.residual_planes:
            block = planes.residual_index // settings.block_size
            expected = salient_per_block(width, settings)
            counts = torch.bincount(block, minlength=len(expected)).tolist()
            if counts != expected:
                raise FormatError(f"salient columns per block are {counts}, the settings ask for {expected}.")
            offset = planes.residual_index - block * settings.block_size
            tensors["residual_sign"] = pack_bits(planes.residual_sign)
            tensors["residual_index"] = offset.to(torch.uint8 if settings.block_size <= 256 else torch.int16)
        if settings.row_scale == "fp8":
            exponent = row_exponent(planes.row_scale)
            tensors["row_scale"] = (
                (planes.row_scale / torch.exp2(exponent.float())).to(torch.float8_e4m3fn).view(torch.uint8)
            )
            tensors["row_exponent"] = exponent
        else:
            tensors["row_scale"] = planes.row_scale.half().view(torch.int16)
        tensors["col_scale"] = planes.column_scale.half().view(torch.int16)
        packed = cls({name: t.contiguous() for name, t in tensors.items()}, planes.out_features, width, settings)
        for name, stored, given in (
            ("row", packed.row_scale(), planes.row_scale),
            ("column", packed.column_scale(), planes.column_scale),
        ):
            if not torch.equal(stored, given):
                worst = float((stored - given).abs().max())
                raise FormatError(
                    f"a {name} scale is not representable in its stored type (off by {worst:g}); round the scales "
                    "before packing."
                )
        packed.validate()
        return packed

    def to(self, device: torch.device) -> PackedWeight:
        """The same weight with its tensors on ``device``."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return PackedWeight(tensors, self.out_features, self.in_features, self.settings)

    def row_scale(self) -> Tensor:
        """a, fp32 [planes, blocks, out]."""
        stored = self.tensors["row_scale"]
        if self.settings.row_scale == "fp8":
            return stored.view(torch.float8_e4m3fn).float() * torch.exp2(self.tensors["row_exponent"].float())
        return stored.view(torch.float16).float()

    def column_scale(self) -> Tensor:
        """c, fp32 [in]."""
        return self.tensors["col_scale"].view(torch.float16).float()

    def salient_columns(self) -> Tensor:
        """The salient columns, int64 [salient], ascending."""
        weight = self.tensors["weight"]
        if not self.settings.residual_planes:
            return torch.zeros(0, dtype=torch.int64, device=weight.device)
        counts = torch.tensor(salient_per_block(self.in_features, self.settings), device=weight.device)
        start = torch.arange(len(counts), device=weight.device) * self.settings.block_size
        return self.tensors["residual_index"].long() + start.repeat_interleave(counts)

    def unpack(self) -> BinaryPlanes:
        """Exactly the planes that were packed."""
        weight = self.tensors["weight"]
        columns = self.salient_columns()
        if self.settings.residual_planes:
            residual = unpack_bits(self.tensors["residual_sign"], columns.numel())
        else:
            residual = torch.zeros(0, self.out_features, 0, dtype=torch.bool, device=weight.device)
        return BinaryPlanes(
            base_sign=unpack_bits(weight.view(torch.uint8), self.in_features),
            residual_sign=residual,
            residual_index=columns,
            row_scale=self.row_scale(),
            column_scale=self.column_scale(),
            block_size=self.settings.block_size,
            code=self.settings.code,
        )

    def dequantize(self) -> Tensor:
        """The dense fp32 weight [out, in]."""
        return self.unpack().dequantize()

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """``8 · stored_bytes / (out · in)``: never a nominal count."""
        return 8.0 * self.stored_bytes / (self.out_features * self.in_features)

    def validate(self, name: str = "the layer") -> None:
        """Check names, shapes, dtypes and contents.

        Raises:
            FormatError: names the tensor, what it is and what it should be.
        """
        specs = tensor_specs(self.out_features, self.in_features, self.settings)
        for key, spec in specs.items():
            tensor = self.tensors.get(key)
            if tensor is None:
                raise FormatError(f"{name}: tensor {key!r} is missing; the checkpoint is incomplete, fetch it again.")
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise FormatError(
                    f"{name}: tensor {key!r} is {tensor.dtype} {tuple(tensor.shape)}, expected {spec.dtype} "
                    f"{spec.shape}; the checkpoint and its quantization_config do not belong together."
                )
        extra = sorted(set(self.tensors) - set(specs))
        if extra:
            raise FormatError(f"{name}: unexpected tensor {extra[0]!r}; the format has {', '.join(specs)}.")
        if not bool(torch.isfinite(self.row_scale()).all() and torch.isfinite(self.column_scale()).all()):
            raise FormatError(f"{name}: a stored scale is NaN or inf; the checkpoint is damaged, fetch it again.")
        if self.settings.residual_planes:
            columns = self.salient_columns()
            ascending = bool((columns[1:] > columns[:-1]).all() and (columns < self.in_features).all())
            inside = torch.equal(columns % self.settings.block_size, self.tensors["residual_index"].long())
        else:
            ascending = inside = True
        if not (ascending and inside):
            raise FormatError(
                f"{name}: 'residual_index' is not ascending within its blocks; the checkpoint is damaged."
            )
