"""Calibration: samples, the lockstep forward, the registered Hessian pass, and the pipeline that binarizes a model."""

from optimum_sab.calibration.passes import CalibrationPass as CalibrationPass
from optimum_sab.calibration.passes import register_pass as register_pass
from optimum_sab.calibration.pipeline import binarize as binarize
