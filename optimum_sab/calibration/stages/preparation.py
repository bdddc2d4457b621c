"""Give the packed layers the form in which they compute."""

from __future__ import annotations

from typing import ClassVar

from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.stage import Stage
from optimum_sab.nn.preparation import prepare_layers
from optimum_sab.ops.backends import choose_backend


class PrepareLayers(Stage):
    """Layouts and groups, as after loading."""

    name: ClassVar[str] = "preparation"

    def prepare(self, run: Run) -> None:
        choose_backend(run.home, run.options.backend)  # one that cannot be used is refused before the work

    def apply(self, run: Run, on_step: OnStep) -> None:
        prepare_layers(run.model, run.options.backend)
