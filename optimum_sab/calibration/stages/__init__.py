"""The stages of a run, a file each. `optimum_sab.calibration.pipeline` has them in order."""
