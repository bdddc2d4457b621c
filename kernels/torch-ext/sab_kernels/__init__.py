"""Triton kernels for weights packed as binary planes."""

from .dequantize import dequantize as dequantize
from .experts import experts_linear as experts_linear
from .geometry import Geometry as Geometry
from .layout import from_kernel_layout as from_kernel_layout
from .layout import kernel_bytes as kernel_bytes
from .layout import to_kernel_layout as to_kernel_layout
from .linear import binary_linear as binary_linear
from .linear import stacked_linear as stacked_linear
from .tuning import Launch as Launch
