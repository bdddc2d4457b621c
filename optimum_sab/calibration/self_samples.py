"""`self_samples` under its public name."""

from optimum_sab.calibration.samples.self_written import self_samples as self_samples
