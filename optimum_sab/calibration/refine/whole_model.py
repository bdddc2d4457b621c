"""Where the tuning finds what it trains in a binarized model, and how its result gets back there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.head import output_embedding
from optimum_sab.calibration.modality import TokenModalities
from optimum_sab.calibration.placement import device_of
from optimum_sab.calibration.progress import OnStep, no_step
from optimum_sab.calibration.refine.parameters import ModuleParameters, vectors_of, write_vectors
from optimum_sab.calibration.refine.student import Student, TunedModule
from optimum_sab.calibration.refine.tuning import Tuning, TuningSample, TuningStore, tune
from optimum_sab.errors import CalibrationError
from optimum_sab.nn.decoder import find_decoder_blocks
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.selection import set_module


def head_to_tune_to(model: nn.Module) -> nn.Module:
    """The output embedding, whose next-token distributions the tuning is about.

    Raises:
        CalibrationError: the model has none.
    """
    head = output_embedding(model)
    if head is None:
        raise CalibrationError(
            f"{type(model).__name__} has no output embedding, so there are no next-token distributions to tune to; "
            "load it with its language head (AutoModelForCausalLM, AutoModelForImageTextToText), or set refine_steps=0."
        )
    return head


def tune_model(
    model: nn.Module,
    samples: Sequence[Mapping[str, Any]],
    modalities: Sequence[TokenModalities],
    teacher: Mapping[int, Tensor],
    dtype: torch.dtype,
    steps: int,
    device: torch.device | None = None,
    store: TuningStore | None = None,
    on_step: OnStep = no_step,
) -> Tuning:
    """Tune a binarized model in place; it is left as it is where nothing beats that.

    Args:
        model: in eval mode, its layers packed.
        samples: forward arguments.
        modalities: of every sample's tokens.
        teacher: what the dense model gives to its output embedding, by sample.
        dtype: in which the binarized linears compute.
        steps: of Adam.
        device: where the decoder blocks and the head compute; None leaves them where they are.
        store: see `tune`.
        on_step: see `tune`.
    """
    tuned = list(_tuned_modules(model, dtype, device))
    student = Student(model, tuned, head_to_tune_to(model), device)
    judged = [TuningSample(s, teacher[i], modalities[i]) for i, s in enumerate(samples)]
    outcome = tune(student, judged, steps, store, on_step)
    if outcome.improved:
        for each in tuned:
            for name, packed in each.parameters.packed().items():
                old = each.module.get_submodule(name)
                assert isinstance(old, SABLinear)
                layer = SABLinear.from_packed(packed, old.bias).to(packed.tensors["weight"].device)
                set_module(each.module, name, layer.train(old.training))
            write_vectors(each.module, each.parameters.built_vectors())
    return outcome


def _tuned_modules(model: nn.Module, dtype: torch.dtype, device: torch.device | None) -> Iterator[TunedModule]:
    """The blocks with packed layers, and the norms that stand beside the block list."""
    decoder = find_decoder_blocks(model)
    for block in decoder.blocks:
        layers = {name: m for name, m in block.named_modules() if isinstance(m, SABLinear)}
        if layers:
            yield _tuned(block, layers, dtype, device)
    beside = model.get_submodule(decoder.prefix.rpartition(".")[0])
    for child in beside.children():
        if not list(child.children()) and vectors_of(child):
            yield _tuned(child, {}, dtype, device)


def _tuned(
    module: nn.Module, layers: Mapping[str, SABLinear], dtype: torch.dtype, device: torch.device | None
) -> TunedModule:
    vectors = vectors_of(module)
    place = device or device_of(module) or torch.device("cpu")
    packed = {name: layer.packed for name, layer in layers.items()}
    return TunedModule(module, ModuleParameters(packed, dtype, vectors, place))
