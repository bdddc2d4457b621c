"""What is gathered from the inputs of linears: registered passes, and the rows of both streams brought together."""

from optimum_sab.calibration.statistics.hessian import HessianPass as HessianPass  # registers itself
