"""Binarize block after block."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from optimum_sab.calibration.blocks.binarizer import BlockBinarizer
from optimum_sab.calibration.blocks.report import BlockReport
from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.predictions.at_head import AtHead
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.resume.fingerprint import WeightsDigest
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.stage import Stage
from optimum_sab.calibration.stages.head import Head
from optimum_sab.calibration.statistics.passes import calibration_pass
from optimum_sab.calibration.streams.coroutines import import_greenlet
from optimum_sab.calibration.streams.lockstep import Lockstep
from optimum_sab.calibration.streams.placement import refuse_spread
from optimum_sab.calibration.streams.targets import check_weights, decoder_targets


class SolveBlocks(Stage):
    """Runs the lockstep: every linear is solved, every block refined if asked for. Leaves `AtHead`.

    Every finished block is kept for a run that is resumed. Where there is a resume folder, or
    several ranks, it leaves `WeightsDigest` for whom compares it, since it looks at all weights before the work.
    """

    name: ClassVar[str] = "blocks"
    title: ClassVar[str] = "Binarizing"
    unit: ClassVar[str] = "block"

    def check(self, model: nn.Module, options: RunOptions) -> None:
        import_greenlet()
        calibration_pass(options.calibration_pass)

    def prepare(self, run: Run) -> None:
        self.check(run.model, run.options)
        refuse_spread(run.model, run.options.device)
        if run.options.resume_folder is None and run.ranks.size == 1:
            check_weights(run.model, run.selection)
        else:  # one read of the weights for both
            weights = WeightsDigest()
            check_weights(run.model, run.selection, weights.add)
            run.keep(weights)

    def apply(self, run: Run, on_step: OnStep) -> tuple[BlockReport, ...]:
        targets = decoder_targets(run.model, run.selection)
        binarizer = BlockBinarizer(run, targets)
        finisher = binarizer if run.options.refine or run.resume else None
        head = run.kept(Head)
        embedding, awaited = (None, ()) if head is None else (head.embedding, head.awaited)
        lockstep = Lockstep(
            run.model,
            targets.blocks,
            targets.linears,
            run.samples.inputs,
            run.two_streams,
            run.options.device,
            run.options.expert_tokens == "all",
            run.bound(),
            run.ranks,
            run.samples.own,
        )
        run.keep(AtHead(lockstep.run(binarizer, finisher, embedding, awaited)))
        return tuple(binarizer.reports)
