"""Count where the bits and bytes of the finished model are."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from optimum_sab.calibration.progress import OnStep
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.sizes import BIAS, LinearSizes, Sizes
from optimum_sab.calibration.stage import Stage
from optimum_sab.core.code import NO_CODE
from optimum_sab.nn.linear import SABLinear


class MeasureSizes(Stage):
    """Leaves `Sizes`."""

    name: ClassVar[str] = "sizes"

    def apply(self, run: Run, on_step: OnStep) -> Sizes:
        kinds: dict[str, LinearSizes] = {}
        planes: dict[str, LinearSizes] = {}
        tensors: dict[str, int] = {}
        packed: set[int] = set()
        for name in run.selection.settings:
            layer = run.model.get_submodule(name)
            assert isinstance(layer, SABLinear)
            own = layer.stored_bytes
            packed.update(id(parameter) for parameter in layer.parameters())
            weights, stored = layer.in_features * layer.out_features, sum(own.values())
            for table, key in ((kinds, name.rpartition(".")[2]), (planes, _planes_of(layer))):
                table[key] = table.get(key, LinearSizes()).plus(weights, stored)
            for tensor, size in own.items():
                tensors[tensor] = tensors.get(tensor, 0) + size
        before = sum(each.weights for each in kinds.values()) * run.dtype.itemsize + tensors.get(BIAS, 0)
        sizes = Sizes(kinds, planes, tensors, _dense(run, packed), before)
        run.keep(sizes)
        return sizes


def _planes_of(layer: SABLinear) -> str:
    own = layer.settings
    base = f"{own.base_planes}" if own.code == NO_CODE else f"{own.base_planes} ({own.code})"
    if not own.residual_planes:
        return base
    return f"{base} + {own.residual_planes} on {100 * own.salient_fraction:.4g} %"


def _dense(run: Run, packed: set[int]) -> dict[str, int]:
    """Bytes of every other parameter, a shared one once, by where it is; the largest place first."""
    model: Any = run.model
    blocks = tuple(f"{name}." for name in run.selection.blocks)
    inputs, outputs = (
        _weight_of(getattr(model, name, None)) for name in ("get_input_embeddings", "get_output_embeddings")
    )
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in packed:
            continue
        if parameter is inputs:
            place = "token embedding, also the output's" if parameter is outputs else "token embedding"
        elif parameter is outputs:
            place = "output embedding"
        elif name.startswith(blocks):
            place = "decoder blocks: norms and what stays dense"
        else:
            place = ".".join(name.split(".")[:-1][:2]) or name
        sizes[place] = sizes.get(place, 0) + parameter.numel() * parameter.element_size()
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _weight_of(accessor: Any) -> nn.Parameter | None:
    """The weight of an embedding that a model may have."""
    try:
        module = accessor() if callable(accessor) else None
    except (AttributeError, NotImplementedError):  # Transformers' own way to say that there is none
        return None
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None
