"""Calibration: a run is a list of stages (`pipeline`), from samples and statistics to a packed model."""

from optimum_sab.calibration.pipeline import binarize as binarize
from optimum_sab.calibration.statistics.passes import CalibrationPass as CalibrationPass
from optimum_sab.calibration.statistics.passes import register_pass as register_pass
