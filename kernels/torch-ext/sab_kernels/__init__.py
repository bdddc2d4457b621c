"""Triton kernels for weights packed as binary planes."""

from .dequantize import dequantize as dequantize
