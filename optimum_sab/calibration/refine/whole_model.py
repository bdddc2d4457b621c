"""Where the tuning finds what it trains in a binarized model, and how its result gets back there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from optimum_sab.calibration.predictions.head import output_embedding
from optimum_sab.calibration.ranks import Ranks
from optimum_sab.calibration.refine.parameters import ModuleParameters, vectors_of, write_vectors
from optimum_sab.calibration.refine.student import Student, TunedModule
from optimum_sab.calibration.streams.placement import device_of
from optimum_sab.errors import CalibrationError
from optimum_sab.nn.decoder import find_decoder_blocks
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.modules import set_module


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


def make_student(model: nn.Module, dtype: torch.dtype, device: torch.device | None = None) -> Student:
    """A binarized model as what is trained.

    Args:
        model: in eval mode, its layers packed.
        dtype: in which the binarized linears compute.
        device: where the decoder blocks and the head compute; None leaves them where they are.

    Raises:
        CalibrationError: see `head_to_tune_to`.
    """
    return Student(model, list(_tuned_modules(model, dtype, device)), head_to_tune_to(model), device)


def adopt(student: Student, ranks: Ranks | None = None) -> None:
    """Put into the model what its student has learned, the first rank's: packed layers, norms and biases."""
    ranks = ranks or Ranks()
    for each in student.tuned:
        weights, vectors = ranks.give("what was tuned", 0, each.parameters.stored)
        for name, packed in weights.items():
            old = each.module.get_submodule(name)
            assert isinstance(old, SABLinear)
            layer = SABLinear.from_packed(packed, old.bias).to(old.packed.tensors["weight"].device)
            set_module(each.module, name, layer.train(old.training))
        write_vectors(each.module, vectors)


def _tuned_modules(model: nn.Module, dtype: torch.dtype, device: torch.device | None) -> Iterator[TunedModule]:
    """The blocks with packed layers, and the norms that stand beside the block list."""
    decoder = find_decoder_blocks(model)
    for block in decoder.blocks:
        layers = {name: m for name, m in block.named_modules() if isinstance(m, SABLinear)}
        if layers:
            yield _tuned(block, layers, dtype, device)
    beside = model.get_submodule(decoder.lists.names[-1].rpartition(".")[0])
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
