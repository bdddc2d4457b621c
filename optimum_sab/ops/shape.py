"""`LayerShape`: what an operator must know of a packed layer, as plain numbers."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from optimum_sab.core.code import find_code
from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.layout import salient_per_block, tensor_specs

if TYPE_CHECKING:
    from sab_kernels import Geometry


class LayerShape(NamedTuple):
    """Shape and storage of a packed layer. A flat tuple of numbers and strings, because it is hashed at every call.

    Attributes:
        out_features: rows of the weight.
        in_features: columns of the weight.
        block_size, base_planes, residual_planes, salient_fraction, row_scale, code: as in `LayerSettings`.
    """

    out_features: int
    in_features: int
    block_size: int
    base_planes: int
    residual_planes: int
    salient_fraction: float
    row_scale: str
    code: str

    @classmethod
    def of(cls, out_features: int, in_features: int, settings: LayerSettings) -> LayerShape:
        """The shape of a layer with these settings."""
        return cls(
            out_features,
            in_features,
            settings.block_size,
            settings.base_planes,
            settings.residual_planes,
            float(settings.salient_fraction),
            settings.row_scale,
            settings.code,
        )

    @classmethod
    def read(cls, text: str) -> LayerShape:
        """The shape of a `text`."""
        return _read(text)

    @property
    def text(self) -> str:
        """As one string, which operators take: `torch.library` and the guards of `torch.compile` look at every
        argument at every call."""
        return " ".join(map(str, self))

    @property
    def settings(self) -> LayerSettings:
        """Settings with this storage; what only the solver reads has its default."""
        return _settings(self[2:])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layer's tensors, in the order in which operators take them."""
        return _names(self)

    @property
    def geometry(self) -> Geometry:
        """The same for the Triton kernels."""
        return _geometry(self)


@lru_cache(maxsize=1024)
def _settings(storage: tuple[int, int, int, float, str, str]) -> LayerSettings:
    block_size, base_planes, residual_planes, salient_fraction, row_scale, code = storage
    return LayerSettings(
        block_size=block_size,
        base_planes=base_planes,
        residual_planes=residual_planes,
        salient_fraction=salient_fraction,
        row_scale=row_scale,
        code=code,
    )


@lru_cache(maxsize=1024)
def _read(text: str) -> LayerShape:
    *counts, salient_fraction, row_scale, code = text.split(" ")
    out_features, in_features, block_size, base_planes, residual_planes = map(int, counts)
    sizes = out_features, in_features, block_size, base_planes, residual_planes
    return LayerShape(*sizes, float(salient_fraction), row_scale, code)


@lru_cache(maxsize=1024)
def _names(shape: LayerShape) -> tuple[str, ...]:
    return tuple(tensor_specs(shape.out_features, shape.in_features, shape.settings))


@lru_cache(maxsize=1024)
def _geometry(shape: LayerShape) -> Geometry:
    from sab_kernels import Geometry

    code = find_code(shape.code)
    counts = salient_per_block(shape.in_features, shape.settings)
    return Geometry(
        rows=shape.out_features,
        columns=shape.in_features,
        block_size=shape.block_size,
        base_planes=shape.base_planes,
        residual_planes=shape.residual_planes,
        salient=counts[0],
        salient_last=counts[-1],
        fp8=shape.row_scale == "fp8",
        code=() if code is None else code.taps,
    )
