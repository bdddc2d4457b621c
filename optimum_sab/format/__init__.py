"""The on-disk contract of a packed layer: layout and version, bit packing, `PackedWeight` (docs/format.md)."""

from optimum_sab.format.layout import FORMAT_VERSIONS as FORMAT_VERSIONS
from optimum_sab.format.packed_weight import PackedWeight as PackedWeight
