"""`SABExperts`: a mixture's experts as linears, dense or packed, in the place of the module that fuses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.nn.experts_stack import ExpertStacks
from optimum_sab.nn.fused_experts import FusedLayout, fuse
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.routing import Routing

EAGER = "eager"


class SABExpert(nn.Module):
    """The linears of one expert; its `SABExperts` computes with them."""

    def __init__(self, stacks: ExpertStacks) -> None:
        super().__init__()
        self._stacks = stacks

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            self._stacks.forget()
        super().__setattr__(name, value)


def _gone(name: str) -> property:
    """A parameter that is here no more, on meta: some models initialise it when they are built, though it is loaded."""

    def stand_in(experts: SABExperts) -> Tensor:
        if name not in experts.layout.parameters:
            raise AttributeError(f"{type(experts.own).__name__} has no {name}")
        linear = experts.linear(0, name.removesuffix("_bias"))
        shape: tuple[int, ...] = (linear.out_features, linear.in_features)
        if name.endswith("_bias"):
            shape = shape[:1]
        elif experts.layout.transposed:
            shape = shape[::-1]
        return torch.empty(experts.count, *shape, device="meta")

    return property(stand_in)


class SABExperts(nn.Module):
    """Every expert of a block: expert ``e``'s linears are ``experts.e.gate_up_proj`` and ``experts.e.down_proj``.

    What is between the two, what follows them and in which order gate and up stand is asked of the module this one
    replaces: activations, biases, limits and interleaving are the model's own. Where all linears are packed, one launch
    computes each of the two for all experts that have tokens; ``experts_implementation="eager"`` has them computed one
    expert after the other, each by its own module, and so are dense ones.

    Args:
        own: the module that is replaced. It keeps everything but its experts' parameters.
        layout: of its parameters.
        linears: every expert's linears by name, in the order in which they are applied.
    """

    def __init__(self, own: nn.Module, layout: FusedLayout, linears: list[dict[str, nn.Module]]) -> None:
        super().__init__()
        self._own = (own,)  # in a tuple it is no submodule: what it has left is registered here, under its old name
        self.layout = layout
        self._stacks = ExpertStacks()
        for index, named in enumerate(linears):
            expert = SABExpert(self._stacks)
            for name, linear in named.items():
                setattr(expert, name, linear)
            self.add_module(str(index), expert)
        self.count = len(linears)
        for name, child in own.named_children():
            self.add_module(name, child)
        self.train(own.training)

    @classmethod
    def unfused(cls, own: nn.Module, layout: FusedLayout) -> SABExperts:
        """The experts of a fused module as `nn.Linear`s, whose weights are views of the parameters that it gives up."""
        linears = []
        for expert in range(getattr(own, layout.matrices[0]).shape[0]):
            named: dict[str, nn.Module] = {}
            for name in layout.matrices:
                matrix, bias = layout.matrix(own, name, expert), layout.bias(own, name, expert)
                linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias is not None, device="meta")
                linear.weight = nn.Parameter(matrix, requires_grad=False)
                if bias is not None:
                    linear.bias = nn.Parameter(bias, requires_grad=False)
                named[name] = linear
            linears.append(named)
        found = cls(own, layout, linears)
        for name in layout.parameters:
            del own._parameters[name]
        return found

    gate_up_proj, gate_up_proj_bias = _gone("gate_up_proj"), _gone("gate_up_proj_bias")
    up_proj, up_proj_bias = _gone("up_proj"), _gone("up_proj_bias")
    down_proj, down_proj_bias = _gone("down_proj"), _gone("down_proj_bias")

    def parts(self, name: str, fused: Tensor) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """What every expert has of a fused parameter: its linear, the linear's parameter, and a view.

        Args:
            name: of the parameter, one of ``layout.parameters``.
            fused: [experts, …], as the module that was replaced has it.
        """
        matrix, kind = name.removesuffix("_bias"), "weight" if name in self.layout.matrices else "bias"
        for expert in range(self.count):
            turned = self.layout.transposed and kind == "weight"
            yield self.linear(expert, matrix), kind, fused[expert].T if turned else fused[expert]

    def __len__(self) -> int:
        return self.count

    def experts(self) -> Iterator[SABExpert]:
        """Every expert, in order."""
        return (self[index] for index in range(self.count))

    def __getitem__(self, index: int) -> SABExpert:
        expert = self._modules[str(index)]
        assert isinstance(expert, SABExpert)
        return expert

    @property
    def own(self) -> nn.Module:
        """The module this one stands for, without its experts' parameters."""
        return self._own[0]

    @property
    def bits_per_weight(self) -> float:
        """From the bytes of every stored tensor of the packed linears, biases included."""
        packed = [m for m in self.modules() if isinstance(m, SABLinear)]
        weights = sum(m.in_features * m.out_features for m in packed)
        return 8.0 * sum(sum(m.stored_bytes.values()) for m in packed) / weights if weights else 0.0

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The module that was replaced, with the weights that its experts have now, dense, in ``dtype``."""
        dense: dict[str, list[Tensor]] = {name: [] for name in self.layout.parameters}
        for expert in self.experts():
            for name in self.layout.matrices:
                linear = expert.get_submodule(name)
                found = linear.dequantize(dtype) if isinstance(linear, SABLinear) else linear
                assert isinstance(found, nn.Linear)
                dense[name].append(found.weight.detach().to(dtype or found.weight.dtype))
                if self.layout.biased:
                    dense[f"{name}_bias"].append(found.bias.detach().to(dtype or found.bias.dtype))
        return fuse(self.own, self.layout, dense).train(self.training)

    # -- computation -----------------------------------------------------------------------------------------------

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """As the module that is replaced: hidden states [tokens, in] (and which experts, with which weights)."""
        hidden, *routing = (*args, *(kwargs[name] for name in self.layout.arguments[len(args) :]))
        if not routing:
            return self._of_sorted(hidden)
        chosen, weights = routing
        found = self._expert_outputs(hidden, Routing(chosen.reshape(-1), chosen.shape[-1], hidden.shape[0]))
        weighted = found * weights.reshape(-1, 1)
        return weighted.view(*chosen.shape, found.shape[-1]).sum(-2).to(hidden.dtype)

    def _of_sorted(self, hidden: Tensor) -> Tensor:
        """Every expert is given as many rows, and those of tokens that did not choose it are zero."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        tokens = rows.shape[0] // self.count
        each = torch.arange(self.count, device=rows.device).repeat_interleave(tokens)
        chosen = torch.where((rows != 0).any(-1), each, self.count)  # no expert's: zero comes of zero
        return self._expert_outputs(rows, Routing(chosen, 0, tokens)).view_as(hidden)

    def _expert_outputs(self, hidden: Tensor, routing: Routing) -> Tensor:
        """What every expert makes of the tokens it is given, [pairs, out]."""
        first, second = self.layout.matrices
        inner = self.between(self.product(first, hidden, routing))
        found = self.product(second, inner, routing)
        own: Any = self.own
        return own.post_expert_norm(found) if getattr(own, "has_post_expert_norm", False) else found

    def between(self, inner: Tensor) -> Tensor:
        """What the second linear is given: the first one's outputs [pairs, out], activated and gated."""
        own: Any = self.own
        if not getattr(own, "has_gate", True):
            return own.act_fn(inner)
        if hasattr(own, "_apply_gate"):
            return own._apply_gate(inner)
        gate, up = inner.chunk(2, dim=-1)
        return own.act_fn(gate) * up

    def product(self, name: str, inputs: Tensor, routing: Routing) -> Tensor:
        """``y_s = W_e x + b_e`` with the linears of one name.

        Args:
            name: of the linears.
            inputs: x, [tokens, in] or [pairs, in].
            routing: the pairs s, and the expert e of each.

        Returns:
            [pairs, out]; zeros for pairs of experts that there are none of.
        """
        stack = None if self._one_by_one() else self._stacks.of(name, self._members)
        if stack is not None:
            return stack.product(inputs, routing.experts, routing.repeats(inputs))
        return self.each(name, inputs, routing, lambda expert, rows: self.linear(expert, name)(rows))

    def each(self, name: str, inputs: Tensor, routing: Routing, call: Callable[[int, Tensor], Tensor]) -> Tensor:
        """`product` one expert after the other, each by ``call(e, x [its pairs, in])``, [its pairs, out]."""
        order, outputs = [], []
        repeats = routing.repeats(inputs)
        for expert in routing.experts.unique().tolist():
            if 0 <= expert < self.count:
                [here] = torch.where(routing.experts == expert)
                order.append(here)
                outputs.append(call(expert, inputs[here // repeats]))
        like = outputs[0] if outputs else inputs
        found = like.new_zeros(routing.experts.shape[0], self.linear(0, name).out_features)
        return found.index_put((torch.cat(order),), torch.cat(outputs)) if outputs else found

    def linear(self, expert: int, name: str) -> Any:
        """One expert's linear: an `nn.Linear`, a `SABLinear`, or what stands around one."""
        return self[expert].get_submodule(name)

    def _members(self) -> dict[str, list[nn.Module]]:
        """Linears of all experts by their name."""
        return {name: [each.get_submodule(name) for each in self.experts()] for name in self.layout.matrices}

    def _one_by_one(self) -> bool:
        config: Any = getattr(self.own, "config", None)
        return getattr(config, "_experts_implementation", None) == EAGER

    def stacked_tensors(self) -> Iterator[Tensor]:
        """What the packed linears' tensors are views of, where they are stacked."""
        yield from self._stacks.tensors()

    def prepare(self, backend: str | None = None) -> None:
        """Stack the packed linears, which then are views, for the launches that compute all experts."""
        self._stacks.build(self._members(), backend)
