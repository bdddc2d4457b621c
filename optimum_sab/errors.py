"""Every error the package raises on purpose: each names the value that was wrong and what to do about it."""

from __future__ import annotations


class SABError(Exception):
    """Root of the package's errors."""


class ConfigError(SABError, ValueError):
    """A setting, a module rule or a command-line value cannot be used."""


class CalibrationError(SABError, RuntimeError):
    """The calibration pass cannot go on."""


class SampleError(CalibrationError, ValueError):
    """A calibration sample is missing, unreadable, or does not hold what its text refers to."""


class NonFiniteError(CalibrationError):
    """A weight or an activation holds NaN or inf; the message names the module."""


class SingularHessianError(CalibrationError):
    """A Hessian has no Cholesky factor even after the damping was raised."""


class LockstepError(CalibrationError):
    """Samples do not go through the model's linears in one common order."""


class FormatError(SABError, ValueError):
    """A packed checkpoint or a packed tensor does not follow the format."""


class FormatVersionError(FormatError):
    """The checkpoint was written in a format version that this release cannot read."""


class OutputExistsError(SABError, FileExistsError):
    """The output directory holds files and the caller did not ask to overwrite them."""


class MissingDependencyError(SABError, ImportError):
    """An optional package is needed for what was asked; the message names the extra to install."""


class SABWarning(UserWarning):
    """Something the user should know although the work goes on."""
