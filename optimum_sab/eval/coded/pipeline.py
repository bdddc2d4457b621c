"""A whole model in coded planes: the product's own run, with other planes and their bits."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from optimum_sab.calibration.allocation.choice import Allocation, allocate, selected_bits
from optimum_sab.calibration.allocation.probe import Probe
from optimum_sab.calibration.blocks.binarizer import BlockBinarizer
from optimum_sab.calibration.blocks.report import LayerReport
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.report import BinarizationReport
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.stage import run_stages
from optimum_sab.calibration.stages.allocation import AllocateBits, Sensitivities, few_samples
from optimum_sab.calibration.stages.blocks import SolveBlocks
from optimum_sab.calibration.statistics.gathering import Gathering
from optimum_sab.calibration.statistics.hessian import HessianPass
from optimum_sab.calibration.streams.lockstep import Lockstep
from optimum_sab.calibration.streams.targets import DecoderTargets, decoder_targets
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import Solution
from optimum_sab.eval.coded.solver import Coding, solve_coded
from optimum_sab.format.layout import stored_bits_per_weight
from optimum_sab.hf.binarization import stages
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.progress import shown_progress
from optimum_sab.hf.run_options import run_options
from optimum_sab.hf.selection import select
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.selection import set_module


def binarize_coded(model: nn.Module, config: SABConfig, coding: Coding) -> BinarizationReport:
    """Binarize a dense model in place with coded planes, and give it dense weights of the same values.

    Args:
        model: loaded.
        config: as for plain planes; the bits that they would take are the budget, scales of derived planes included.
        coding: how planes are coded.

    Returns:
        The report; its bits are those that coded planes store.
    """
    own = {AllocateBits: AllocateCodedBits(coding), SolveBlocks: SolveCodedBlocks(coding)}
    with shown_progress(config.progress) as progress:
        run = Run(model, select(model, config, strict=True), run_options(config), progress)
        report = run_stages(run, [own.get(type(stage), stage) for stage in stages(config)])
    for name in run.selection.settings:
        layer = model.get_submodule(name)
        assert isinstance(layer, SABLinear)
        set_module(model, name, layer.dequantize(run.dtype))
    return report


class CodedBlockBinarizer(BlockBinarizer):
    """Solves with coded planes, and counts what they store."""

    coding: Coding

    def _approximate(
        self, weight: Tensor, statistics: InputStatistics, settings: LayerSettings, name: str
    ) -> tuple[Solution, LayerSettings]:
        stored = self.coding.expanded(settings) or settings
        return solve_coded(weight, statistics, settings, self.coding, name), stored

    def _swap(self, name: str, dense: nn.Linear) -> LayerReport:
        report = super()._swap(name, dense)
        shape = dense.out_features, dense.in_features
        settings = self._settings[name]
        written = stored_bits_per_weight(*shape, self.coding.expanded(settings) or settings)
        less = written - self.coding.bits_per_weight(*shape, settings)
        return replace(report, bits_per_weight=report.bits_per_weight - less)


class SolveCodedBlocks(SolveBlocks):
    """Binarizes block after block with coded planes."""

    def __init__(self, coding: Coding) -> None:
        self._coding = coding

    def binarizer(self, run: Run, targets: DecoderTargets) -> BlockBinarizer:
        found = CodedBlockBinarizer(run, targets)
        found.coding = self._coding
        return found


class AllocateCodedBits(AllocateBits):
    """Chooses by the errors and the bits of coded planes, under the budget of plain ones."""

    def __init__(self, coding: Coding) -> None:
        self._coding = coding

    def allocation(self, run: Run, sensitivities: Sensitivities, on_step: OnStep) -> Allocation:
        asked, samples = run.options.allocation, few_samples(run)
        assert asked is not None
        targets = decoder_targets(run.model, run.selection)
        gathering = Gathering(HessianPass(), samples.modalities)
        free = frozenset(asked.free(run.selection))
        probe = CodedProbe(run.selection.settings, targets.linears, gathering, free, run.options.device, on_step)
        probe.coding = replace(self._coding, rounds=1, descents=0)
        Lockstep(run.model, targets.blocks, targets.linears, samples.inputs, False, run.options.device).run(probe)
        bits = selected_bits(run.model, run.selection) if asked.target_bits is None else asked.target_bits
        stored = self._coding.bits_per_weight
        return allocate(run.model, run.selection, sensitivities.of, probe.found, bits, stored)


class CodedProbe(Probe):
    """Measures errors of coded planes."""

    coding: Coding

    def approximate(self, weight: Tensor, statistics: InputStatistics, settings: LayerSettings, name: str) -> Tensor:
        return solve_coded(weight, statistics, settings, self.coding, name).planes.dequantize()
