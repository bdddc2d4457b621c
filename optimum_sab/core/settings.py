"""Settings of one layer's binarization, validated once and used by every stage of the solver."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from optimum_sab.core.bounds import check_integer as _integer
from optimum_sab.core.bounds import check_number as _number
from optimum_sab.core.code import NO_CODE, find_code
from optimum_sab.errors import ConfigError
from optimum_sab.wording import did_you_mean

SIGNIFICANCE = ("modality", "hessian", "uniform")
FEEDBACK = ("column", "block")
ROW_SCALE = ("fp8", "fp16")
MAX_PLANES = 4
CODED_COLUMNS = 128  # a block of a coded plane is a multiple: what the kernels go through at a time


@dataclass(frozen=True)
class LayerSettings:
    """How one linear is binarized.

    Args:
        block_size: input columns per block; a multiple of 32. Row scales are per block.
        base_planes: sign planes on every column (1 to 4).
        residual_planes: further sign planes on the salient columns only (0 to 4 with ``base_planes``).
        salient_fraction: share of a block's columns that carry the residual planes, in (0, 1).
        iterations: rounds of the alternating fit (method.md section 5; the paper uses 15).
        significance: error weight of the alternating fit: ``"modality"`` is the paper's map squared,
            ``"hessian"`` the Hessian's diagonal, ``"uniform"`` is ARB-LLM_RC.
        feedback: ``"column"`` passes every column's error on inside the block as well, ``"block"`` only
            between blocks, as the lineage does.
        refit: solve all row scales of a row jointly under the full Hessian once the signs are fixed.
        sweeps: rounds of coordinate descent over the signs under the full Hessian, each followed by a refit.
            Needs ``refit``.
        row_scale: storage of the row scales, ``"fp8"`` (e4m3 and a power of two per row) or ``"fp16"``.
        damping: fraction of the Hessian's mean diagonal that is added to its diagonal.
        propagation: α of the propagated target in [0, 1]; 0 aims every linear at its own dense weight. None lets
            cross-validation over the samples choose it for every linear.
        code: a trellis code (`optimum_sab.core.code`) that makes two planes of the first stored base plane, or "none":
            "trellis16" for a base plane alone, "trellis16x2" for one beside others. The allocation takes the one for
            the planes that it gives a linear; where all are as set, so is the code.
            Needs ``refit``, column feedback, and blocks of a multiple of 128 columns.

    Raises:
        ConfigError: a value is out of range; the message names it and the remedy.
    """

    block_size: int = 512
    base_planes: int = 1
    residual_planes: int = 1
    salient_fraction: float = 0.1875
    iterations: int = 10
    significance: str = "hessian"
    feedback: str = "column"
    refit: bool = True
    sweeps: int = 2
    row_scale: str = "fp8"
    damping: float = 0.1
    propagation: float | None = None
    code: str = NO_CODE

    def __post_init__(self) -> None:
        _integer("block_size", self.block_size, 32, 4096)
        if self.block_size % 32:
            raise ConfigError(
                f"block_size={self.block_size} must be a multiple of 32; 128 is what the kernels are tuned for."
            )
        _integer("base_planes", self.base_planes, 1, MAX_PLANES)
        _integer("residual_planes", self.residual_planes, 0, MAX_PLANES - 1)
        if self.planes > MAX_PLANES:
            raise ConfigError(
                f"base_planes={self.base_planes} + residual_planes={self.residual_planes} is more than {MAX_PLANES} "
                "planes; use fewer planes, or a 4-bit quantizer."
            )
        _number("salient_fraction", self.salient_fraction)
        if self.residual_planes and not 0.0 < self.salient_fraction < 1.0:
            raise ConfigError(
                f"salient_fraction={self.salient_fraction} must lie strictly between 0 and 1 with residual_planes="
                f"{self.residual_planes}; use residual_planes=0 for none, or one more base plane for all columns."
            )
        if self.residual_planes and round(self.salient_fraction * self.block_size) < 1:
            raise ConfigError(
                f"salient_fraction={self.salient_fraction} leaves no salient column in a block of {self.block_size}; "
                f"use at least {1 / self.block_size:g}, or residual_planes=0."
            )
        _integer("iterations", self.iterations, 1, 1000)
        _choice("significance", self.significance, SIGNIFICANCE)
        _choice("feedback", self.feedback, FEEDBACK)
        _choice("row_scale", self.row_scale, ROW_SCALE)
        if not isinstance(self.refit, bool):
            raise ConfigError(f"refit={self.refit!r} must be true or false.")
        _integer("sweeps", self.sweeps, 0, 100)
        if self.sweeps and not self.refit:
            raise ConfigError(f"sweeps={self.sweeps} needs refit=True; set sweeps=0 to keep the scales as fitted.")
        _number("damping", self.damping)
        if not 0.0 < self.damping <= 1.0:
            raise ConfigError(f"damping={self.damping} must lie in (0, 1]; 0.1 is the default, 0.01 the lineage's.")
        if self.propagation is not None:
            _number("propagation", self.propagation)
            if not 0.0 <= self.propagation <= 1.0:
                raise ConfigError(
                    f"propagation={self.propagation} must lie in [0, 1]; 0 switches the propagated target off, "
                    "None lets cross-validation choose."
                )
        self._check_code()

    def _check_code(self) -> None:
        code = find_code(self.code)
        if code is None:
            return
        if self.block_size % CODED_COLUMNS:
            raise ConfigError(
                f"block_size={self.block_size} must be a multiple of {CODED_COLUMNS} with code={self.code!r}; use 128 "
                "or 512, or code='none'."
            )
        if self.computed_planes > MAX_PLANES:
            raise ConfigError(
                f"base_planes={self.base_planes} + residual_planes={self.residual_planes} with code={self.code!r} are "
                f"{self.computed_planes} planes to compute with, more than {MAX_PLANES}; use fewer, or code='none'."
            )
        if not self.refit or self.feedback != "column":
            raise ConfigError(
                f"code={self.code!r} needs refit=True and feedback='column' (now {self.refit} and {self.feedback!r}); "
                "use code='none' for the lineage's rules."
            )

    @property
    def planes(self) -> int:
        """Stored planes: base and residual planes together."""
        return self.base_planes + self.residual_planes

    @property
    def computed_planes(self) -> int:
        """Planes that a product is made of: a coded plane counts as those that are derived of it."""
        code = find_code(self.code)
        return code.computed(self.planes) if code else self.planes

    def salient_columns(self, width: int) -> int:
        """Number of salient columns in a block that is ``width`` columns wide (the last one may be narrower)."""
        return round(self.salient_fraction * width) if self.residual_planes else 0

    def replace(self, **changes: Any) -> LayerSettings:
        """A copy with some settings changed; unknown names raise `ConfigError`."""
        names = [f.name for f in fields(self)]
        unknown = sorted(set(changes) - set(names))
        if unknown:
            hint = did_you_mean(str(unknown[0]), names, f"; the settings are {', '.join(sorted(names))}.")
            raise ConfigError(f"unknown layer setting {unknown[0]!r}{hint}")
        return LayerSettings(**{**asdict(self), **changes})


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(allowed)}{did_you_mean(str(value), allowed)}")
