"""Tensor parallelism: a packed checkpoint of which every process loads its share.

Transformers' plan says how each linear is shared, what happens to its inputs and outputs, and reads of every tensor the
part that its style names (sharing_styles.py). What is planned here is checked before a tensor is read: a model that
cannot be shared so is refused. After reading, a share takes the place of each layer, under the same style.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from optimum_sab.errors import ConfigError
from optimum_sab.format.share import WORD
from optimum_sab.hf.shares import place_shares
from optimum_sab.nn.experts import SABExperts
from optimum_sab.nn.linear import SABLinear
from optimum_sab.wording import page

_HARMLESS = (None, "local_params", "replicate", "mla_kv_a_proj")  # of a module that packed layers are, or are in
_EXPERTS = "moe_tp_experts"
_PER_HEAD = ("q_proj", "k_proj", "v_proj")
_ELSE = "or leave distributed_config out and spread the blocks over devices with device_map='auto'"


class Sharing:
    """Which packed layers of a model are shared by the processes of a mesh, and how.

    Args:
        model: the skeleton, `SABLinear` in place; its plan gets the styles of their tensors.
        manager: Transformers' mesh manager.
        given: the user's rules, or None; an empty dictionary is a plan without rules.

    Raises:
        ConfigError: the model has no plan, or a layer, experts or attention heads cannot be shared by so many.
    """

    def __init__(self, model: Any, manager: Any, given: Any) -> None:
        self._mesh = manager.get_mesh("tp")
        self._size = int(self._mesh.size())
        rules = given if isinstance(given, dict) else None
        plan = {} if rules == {} else {**model.tp_plan, **(rules or {})}
        if not plan:
            raise ConfigError(
                f"{type(model).__name__} has no plan for tensor parallelism; give one in "
                f"DistributedConfig(tp_plan=…), {_ELSE}."
            )
        self._styles = dict(self._shared_linears(model, plan))
        self._inside = dict(self._shared_experts(model, plan))  # of experts, which no style stands around by themselves
        if not (self._styles or self._inside):
            raise ConfigError(
                f"the plan for tensor parallelism of {type(model).__name__} shares none of its packed layers, so every "
                "process would have all of them; name them in DistributedConfig(tp_plan=…), as "
                f"{page('large-models')} does, {_ELSE}."
            )
        self._refuse_tensors(model, rules or {})
        self._ask(model, rules or {})

    def holds(self, name: str) -> bool:
        """Whether the packed layer of this name is shared."""
        return name in self._styles or name in self._inside

    @classmethod
    def planned(cls, model: nn.Module, call: Mapping[str, Any]) -> Sharing | None:
        """Of the running `from_pretrained`, whose variables are given; None where each process has the whole model."""
        manager = call.get("mesh_manager")
        return None if manager is None else cls(model, manager, call["distributed_config"].tp_plan)

    # -- before weights are read -----------------------------------------------------------------------------------

    def _shared_linears(self, model: nn.Module, plan: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        from optimum_sab.hf.sharing_styles import COLUMNS, ROWS

        for name, module in model.named_modules():
            style = _style_of(name, plan)
            if isinstance(module, (nn.Linear, SABLinear)) and style == "colwise":
                self._check_heads(model, name, module.out_features)
            packed = isinstance(module, SABLinear)
            if packed and style in (*ROWS, *COLUMNS):
                self._check_layer(name, module, style)
                yield name, style
            elif style not in _HARMLESS and (packed or (style != _EXPERTS and _has_packed(module))):
                raise ConfigError(
                    f"{name} has the style {style!r} in the plan of tensor parallelism, which packed layers cannot "
                    f"follow; give it another in DistributedConfig(tp_plan=…), {_ELSE}."
                )

    def _shared_experts(self, model: nn.Module, plan: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        from optimum_sab.hf.sharing_styles import COLUMNS, FUSED, ROWS

        for name, module in model.named_modules():
            style = _style_of(name, plan)
            if style == _EXPERTS and not isinstance(module, SABExperts) and _has_packed(module):
                raise ConfigError(f"{name}: packed experts that are no fused module cannot be shared; {_ELSE[3:]}.")
            if not isinstance(module, SABExperts):
                continue
            first, second = module.layout.matrices
            of_first, of_second = (plan.get(f"{_wildcard(name)}.{each}") for each in (first, second))
            gated = bool(getattr(module.own, "has_gate", True))
            if (style, of_first, of_second) == (None, None, None):
                continue
            fits = style == _EXPERTS and of_first == (FUSED if gated else ROWS[0]) and of_second == COLUMNS[0]
            plain = not (module.layout.biased or getattr(module.own, "has_post_expert_norm", False))
            packed = all(
                isinstance(module.linear(expert, each), SABLinear)
                for expert in range(module.count)
                for each in (first, second)
            )
            if not (fits and plain and packed):
                raise ConfigError(
                    f"{name}: these experts cannot be shared by {self._size} processes; only those can that are all "
                    "packed and have no biases, and no norm, and whose gate stands above up in one matrix. Load the "
                    "model whole, or spread its blocks over devices with device_map='auto'."
                )
            for expert in range(module.count):
                for each, chosen in ((first, of_first), (second, of_second)):
                    linear = f"{name}.{expert}.{each}"
                    self._check_layer(linear, module.linear(expert, each), str(chosen))
                    yield linear, str(chosen)

    def _check_layer(self, name: str, layer: SABLinear, style: str) -> None:
        from optimum_sab.hf.sharing_styles import FUSED, ROWS

        if style in ROWS:
            unit, size, what = (2 if style == FUSED else 1), layer.out_features, "rows"
        else:
            unit, size, what = WORD, layer.in_features, "input columns"
        if size % (unit * self._size):
            fits = [count for count in range(2, self._size) if size % (unit * count) == 0]
            fewer = (
                f"tp_size={fits[-1]} divides them; use that"
                if fits
                else "no smaller tp_size divides them; use one process"
            )
            each = f"multiples of {unit}" if unit > 1 else "equal parts"
            raise ConfigError(
                f"{name}: its {size} {what} cannot be shared in {each} by {self._size} processes; {fewer}, {_ELSE}."
            )

    def _check_heads(self, model: nn.Module, name: str, rows: int) -> None:
        parent, _, own = name.rpartition(".")
        width = getattr(model.get_submodule(parent), "head_dim", None)
        if own in _PER_HEAD and isinstance(width, int) and rows % (width * self._size):
            raise ConfigError(
                f"{name}: its {rows // width} attention heads cannot be shared by {self._size} processes; use a "
                f"tp_size that divides them, {_ELSE}."
            )

    def _refuse_tensors(self, model: nn.Module, rules: Mapping[str, str]) -> None:
        """Rules for single tensors come before those for their layer."""
        for name, module in model.named_modules():
            for tensor in module._parameters if isinstance(module, SABLinear) else ():
                rule = _wildcard(f"{name}.{tensor}")
                if rule in rules:
                    raise ConfigError(
                        f"DistributedConfig(tp_plan=…) has a rule for {rule!r}, which is a tensor of a packed layer; "
                        "give one for the layer."
                    )

    def _ask(self, model: Any, rules: Mapping[str, str]) -> None:
        """Write into the model's plan how the tensors of shared layers are read."""
        from optimum_sab.hf.sharing_styles import COLUMNS, style_of_tensors

        for name, style in {**self._styles, **self._inside}.items():
            layer = model.get_submodule(name)
            bias = () if style in COLUMNS or layer.bias is None else ("bias",)  # of columns it is as in a dense linear
            for tensor in (*layer.shape.names, *bias):
                model.tp_plan[_wildcard(f"{name}.{tensor}")] = style_of_tensors(style)
        for name in self._inside:  # the plan's rules for fused parameters, which are here no more
            expert, _, matrix = name.rpartition(".")
            fused = f"{_wildcard(expert.rpartition('.')[0])}.{matrix}"
            if fused not in rules:  # those of a call are looked for in the plan
                model.tp_plan.pop(fused, None)

    def place(self, model: nn.Module) -> None:
        """Put this process's share in the place of every layer that is shared, after weights were read.

        Raises:
            FormatError: a share's scales are not finite, or its salient columns not in order.
        """
        place_shares(model, self._mesh, self._styles, self._inside)


def _wildcard(name: str) -> str:
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    return str(replace_layer_number_by_wildcard(name))


def _style_of(name: str, plan: Mapping[str, str]) -> str | None:
    return plan.get(_wildcard(name))


def _has_packed(module: nn.Module) -> bool:
    return any(isinstance(each, SABLinear) for each in module.modules())
