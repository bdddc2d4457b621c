"""See what the model does with its blocks and linears, and leave dense what a packed layer cannot stand for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

from torch import nn

from optimum_sab.calibration.blocks.idle_experts import idle_expert
from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.rehearsal import random_state_kept, refusal
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.samples.calibration_samples import CalibrationSamples
from optimum_sab.calibration.stage import Stage
from optimum_sab.calibration.streams.observation import Forward, Observation, told
from optimum_sab.calibration.streams.targets import decoder_targets, target_linear
from optimum_sab.errors import CalibrationError, ConfigError, warn
from optimum_sab.nn.streamed import keep_weights, streamed_blocks

_PASSES = ("loop_num_passes", "total_ut_steps")  # what models that use their blocks repeatedly call the number
_NOT_TWICE = "a block's weights are found by what it is given once, so such a model cannot be binarized."


class LookAtForwards(Stage):
    """One sample of every kind goes through the dense model.

    The blocks stand in the selection's order of their first call afterwards. Linears that the model does more with than
    to call them once are taken out of it, in all blocks.
    """

    name: ClassVar[str] = "forward"

    def check(self, model: nn.Module, options: RunOptions) -> None:
        """What shows in the class and the configuration already.

        Raises:
            ConfigError: the model is one of several parts and has no forward, or is said to use its blocks repeatedly.
        """
        kind = type(model).__name__
        if type(model).forward is nn.Module.forward:
            parts = ", ".join(f"{name} ({type(part).__name__})" for name, part in model.named_children())
            raise ConfigError(f"{kind} has no forward; load the part that writes text by its own class: {parts}.")
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        passes = next((found for name in _PASSES if isinstance(found := getattr(text, name, None), int)), 1)
        if passes > 1:
            raise ConfigError(f"{kind} goes through its decoder blocks {passes} times; {_NOT_TWICE}")

    def wanted(self, run: Run) -> bool:
        return run.kept(CalibrationSamples) is not None

    def apply(self, run: Run, on_step: OnStep) -> dict[str, list[str]] | None:
        seen = _observe(run)
        again = next((name for name, count in seen.entered.items() if count > 1), None)
        if again is not None:
            kind = type(run.model).__name__
            raise CalibrationError(
                f"{kind} calls its decoder block {again} more than once in one forward; {_NOT_TWICE}"
            )
        order = [name for name in seen.entered if name in run.selection.blocks]
        rest = [name for name in run.selection.blocks if name not in seen.entered]
        left = {reason: names for reason, names in _left_dense(run, seen).items() if names}
        selection = run.selection.without({name for names in left.values() for name in names})
        if not selection.settings:
            raise CalibrationError(f"nothing is left to binarize in {type(run.model).__name__}: {told(left)}")
        run.selection = selection.in_order((*order, *rest))
        for name, block in streamed_blocks(run.model).items():
            if not any(each.startswith(f"{name}.") for each in selection.settings):
                keep_weights(block)  # all of it stays dense: from here on it is read no more
        if left:
            warn(f"{_share(run, left):.1%} of the weights that were to be binarized stay dense. {told(left)}")
        return left or None


def _observe(run: Run) -> Observation:
    targets, model = decoder_targets(run.model, run.selection), run.model
    seen = Observation(coming=streamed_blocks(model))
    blocks = {name: model.get_submodule(name) for name in run.selection.blocks}
    linears = {name: each for some in targets.linears for name, each in some.items()}
    samples = [run.samples.inputs[index] for index in one_of_each_kind(run.samples)]
    looks = [Forward(partial(refusal, model, sample, ())) for sample in samples]
    # what the model does to weights only while it is trained is seen as far as it comes
    looks.append(Forward(partial(refusal, model, samples[0], ()), training=True, around=partial(_training, model)))
    with random_state_kept(), _buffers_kept(model):
        found = seen.forwards(looks, blocks, linears)
    refused = next((each for each in found[:-1] if each is not None), None)
    if refused is not None:
        raise refused
    return seen


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    model.train()
    try:
        yield
    finally:
        model.eval()


def _left_dense(run: Run, seen: Observation) -> dict[str, list[str]]:
    """Linears by the reason for which they stay dense."""
    blocks = run.selection.blocks
    names = [name for block in blocks for name in run.selection.settings if name.startswith(f"{block}.")]
    found = seen.unfit(names, blocks)
    unfit = {name for some in found.values() for name in some}
    found[_MISSED] = []
    for block in blocks:
        own = [name for name in names if name.startswith(f"{block}.")]
        reached = [name for name in own if name in seen.called]
        found[_MISSED] += [
            name for name in own if name not in unfit and name not in seen.called and idle_expert(name, reached) is None
        ]
    return found


_MISSED = "no calibration sample comes to them"


def _share(run: Run, left: Mapping[str, list[str]]) -> float:
    def weights(names: Iterable[str]) -> int:
        return sum(target_linear(run.model, name).weight.numel() for name in names)

    dense = weights(name for names in left.values() for name in names)
    return dense / (dense + weights(run.selection.settings))


def one_of_each_kind(samples: CalibrationSamples) -> list[int]:
    """Indices of the shortest sample with every set of modalities, those with most modalities first."""
    shortest: dict[tuple[str, ...], int] = {}
    for index, modalities in enumerate(samples.modalities):
        kind = tuple(name for name in modalities.names if modalities.count(name))
        best = shortest.get(kind)
        if best is None or modalities.labels.numel() < samples.modalities[best].labels.numel():
            shortest[kind] = index
    return [shortest[kind] for kind in sorted(shortest, key=lambda kind: (-len(kind), kind))]


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Training updates running statistics."""
    before = {name: each.detach().clone() for name, each in model.named_buffers() if not each.is_meta}
    try:
        yield
    finally:
        for name, each in model.named_buffers():
            if name in before:
                each.copy_(before[name])
