"""Computation with packed weights: the operators, what computes them where, and the reference they are held to."""

from optimum_sab.ops.backends import backend_name as backend_name
from optimum_sab.ops.backends import force_backend as force_backend
from optimum_sab.ops.operator import binary_linear as binary_linear
