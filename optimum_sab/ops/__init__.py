"""Computation with packed weights."""

from optimum_sab.ops.reference import binary_linear as binary_linear
