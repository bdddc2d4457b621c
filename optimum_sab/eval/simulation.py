"""Run a baseline through the same lockstep calibration as ours; the weights it gives stay dense."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.samples.calibration_samples import CalibrationSamples
from optimum_sab.calibration.samples.modality import TokenModalities
from optimum_sab.calibration.statistics.hessian import HessianPass
from optimum_sab.calibration.statistics.pairing import pair_streams
from optimum_sab.calibration.streams.arrival import Arrival
from optimum_sab.calibration.streams.experts import ExpertLinears, RoutedArrival, arrivals_by_expert
from optimum_sab.calibration.streams.lockstep import Lockstep
from optimum_sab.calibration.streams.targets import decoder_targets
from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.settings import LayerSettings
from optimum_sab.eval.baselines import Baseline
from optimum_sab.nn.selection import select_linears


@dataclass(frozen=True)
class Simulation:
    """What a simulated quantization took.

    Attributes:
        bits_per_weight: over all quantized linears, by the baseline's own accounting.
        seconds: wall time.
    """

    bits_per_weight: float
    seconds: float


@torch.no_grad()
def simulate(model: nn.Module, samples: Sequence[Mapping[str, Any]], baseline: Baseline) -> Simulation:
    """Quantize in place the linears that ours would binarize, each from its own inputs in the quantized stream.

    Args:
        model: dense.
        samples: forward keyword arguments, one dict per sample.
        baseline: what is done to each linear.
    """
    targets = decoder_targets(model, select_linears(model, LayerSettings()))
    modalities = CalibrationSamples.of(samples, getattr(model, "config", None)).modalities
    worker = _Simulator(targets.linears, modalities, baseline)
    model.eval()
    started = time.perf_counter()
    Lockstep(model, targets.blocks, targets.linears, samples, two_streams=False).run(worker)
    return Simulation(worker.bits / worker.count, time.perf_counter() - started)


@dataclass
class _Simulator:
    """The lockstep's visitor: every linear by itself, as the methods are published."""

    linears: Sequence[Mapping[str, nn.Linear]]
    modalities: Sequence[TokenModalities]
    baseline: Baseline
    bits: float = 0.0
    count: int = 0
    _done: dict[str, Tensor] = field(default_factory=dict)

    def enter(self, index: int) -> None:
        self._index = index
        self._done = {}

    def solve(self, names: tuple[str, ...], arrivals: Sequence[Arrival]) -> Mapping[str, Tensor]:
        members = {name: self.linears[self._index][name] for name in names}
        device = next(iter(members.values())).weight.device
        statistics = HessianPass().collect(names[0], pair_streams(arrivals, self.modalities), device)
        for name, linear in members.items():
            self._quantize(name, linear, statistics)
        return {name: self._done[name] for name in names}

    def solve_experts(self, linears: ExpertLinears, arrivals: Sequence[RoutedArrival]) -> Mapping[str, Tensor]:
        idle = []
        for name, here in arrivals_by_expert(linears, arrivals):
            if here:
                self.solve((name,), here)
            else:
                idle.append(name)
        self.miss(idle)
        return {name: self._done[name] for name in linears.names.values()}

    def miss(self, names: Sequence[str]) -> None:
        for name in names:
            linear = self.linears[self._index][name]
            self._quantize(name, linear, InputStatistics.without_data(linear.in_features, linear.weight.device))

    def _quantize(self, name: str, linear: nn.Linear, statistics: InputStatistics) -> None:
        result = self.baseline(linear.weight.float(), statistics)
        self.bits += result.bits_per_weight * linear.weight.numel()
        self.count += linear.weight.numel()
        self._done[name] = result.weight.to(linear.weight.dtype)

    def leave(self, index: int, drift: float | None) -> None:
        for name, linear in self.linears[index].items():
            linear.weight.copy_(self._done[name])
