"""Which linears of a model are binarized, and with which settings."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError, warn
from optimum_sab.nn.decoder import BlockLists, DecoderBlocks, find_decoder_blocks
from optimum_sab.nn.experts import SABExperts
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.modules import set_module
from optimum_sab.nn.routers import find_routers
from optimum_sab.nn.rules import covered_by, is_expression, nearest_rule, overridden


@dataclass(frozen=True)
class Selection:
    """The outcome of the rules on one model.

    Attributes:
        lists: the module lists that hold the decoder blocks.
        blocks: dotted names of the decoder blocks, in the order in which the model calls them as far as that is known.
        settings: per selected linear, by dotted name, in the model's order.
        left_dense: linears inside the decoder blocks that a rule, a tied weight or their place keeps dense.
        experts: modules of experts that are linears (`SABExperts`), by dotted name: of blocks with a selected one, or,
            where a packed model is loaded, as they were when it was saved.
        asked_dense: modules that ``modules_to_not_convert`` names, and fused experts with one that it names.
    """

    lists: BlockLists
    blocks: tuple[str, ...]
    settings: dict[str, LayerSettings]
    left_dense: tuple[str, ...]
    experts: tuple[str, ...] = ()
    asked_dense: frozenset[str] = field(default=frozenset(), compare=False)  # why, not what

    def with_rules(self, dynamic: Mapping[str, Mapping[str, Any]]) -> Selection:
        """The same linears with the settings that more rules of ``dynamic`` give them."""
        return replace(self, settings=overridden(self.settings, dynamic, self.lists)[0])

    def without(self, names: Collection[str]) -> Selection:
        """The same, but that these linears stay dense."""
        settings = {name: own for name, own in self.settings.items() if name not in names}
        more = [name for name in self.settings if name in names]
        return replace(self, settings=settings, left_dense=(*self.left_dense, *more))

    def in_order(self, blocks: Sequence[str]) -> Selection:
        """The same linears, of blocks that the model calls in this order."""
        return replace(self, blocks=tuple(blocks))


def select_linears(
    model: nn.Module,
    defaults: LayerSettings,
    modules_to_not_convert: Sequence[str] = (),
    dynamic: Mapping[str, Mapping[str, Any]] | None = None,
    strict: bool = True,
    keep_routers: bool = True,
) -> Selection:
    """Every linear in the decoder blocks, less the rules.

    The vision tower, projector, embeddings and lm_head lie outside the decoder blocks and stay dense, and so does a
    linear whose weight is shared with another module, that decides which expert a token goes to (`find_routers`), or
    that computes more than a linear does. Experts count where they are linears, as in `SABExperts`.
    ``modules_to_not_convert`` adds to that, it replaces nothing.

    Args:
        model: dense, or a skeleton on meta.
        defaults: settings of a module without an override.
        modules_to_not_convert: rules as in `covered_by`.
        dynamic: regular expression → settings to override; searched in the module's name, all that match apply in
            order.
        strict: whether a rule that matches nothing is an error (when quantizing) or passed over (when loading).
        keep_routers: whether routers stay dense; False where the rules say of every linear whether it was left dense.

    Raises:
        ConfigError: a rule matches no module or is no rule (`check_rules`), or nothing is left to binarize.
    """
    decoder = find_decoder_blocks(model)
    shared = shared_parameters(model)
    routers = find_routers(model) if keep_routers else set()
    names = [name for name, _ in model.named_modules() if name]
    covered = covered_by(modules_to_not_convert, names)
    asked: set[str] = set().union(*covered.values())
    dense = routers | asked
    chosen: dict[str, LayerSettings] = {}
    left_dense: list[str] = []
    for name, module in model.named_modules():
        if not decoder.lists.holds(name) or not isinstance(module, (nn.Linear, SABLinear)):
            continue
        if id(module.weight) in shared or name in dense or not _is_plain(module):
            left_dense.append(name)
        else:
            chosen[name] = defaults
    settings, used = overridden(chosen, dynamic or {}, decoder.lists)
    used |= {rule for rule, found in covered.items() if found}
    unused = [r for r in [*modules_to_not_convert, *(dynamic or {})] if r not in used]
    if not settings:
        kind = type(model).__name__
        if left_dense and all(id(model.get_submodule(name).weight) in shared for name in left_dense):
            raise ConfigError(
                f"nothing can be binarized in {kind}: the weights of all its linears stand in more than one place, "
                "and what they are given in one says nothing of the other."
            )
        raise ConfigError(f"nothing is left to binarize in {kind}; loosen modules_to_not_convert.")
    if strict and unused:
        among = names if unused[0] in modules_to_not_convert else list(settings)
        close = nearest_rule(unused[0], among)
        hint = f"names look like {next(iter(settings))!r}." if close is None else f"did you mean {close!r}?"
        raise ConfigError(f"the module rule {unused[0]!r} matches no module of {type(model).__name__}; {hint}")
    unfused = [name for name, module in model.named_modules() if isinstance(module, SABExperts)]
    experts = [name for name in unfused if not strict or _beside_selected(name, decoder, unfused, settings)]
    fused = tuple(f"{name}." for name in unfused if name not in experts)  # stay as the model has them
    rest = tuple(name for name in left_dense if not name.startswith(fused))
    asked |= {name[:-1] for name in fused if any(each.startswith(name) for each in asked)}
    return Selection(decoder.lists, tuple(decoder.named), settings, rest, tuple(experts), frozenset(asked))


def warn_of_idle_rules(model: nn.Module, selection: Selection, modules_to_not_convert: Sequence[str]) -> None:
    """Say which plain rules keep nothing dense although they stand in names of linears that are binarized.

    ``"proj"`` is part of a vision tower's names and only stands in ``"q_proj"``. A rule outside of the decoder blocks
    that stands in no such name, as ``"lm_head"``, is no mistake.

    Args:
        model: as `select_linears` was given it.
        selection: what it gave.
        modules_to_not_convert: the rules it was given.
    """
    plain = [rule for rule in modules_to_not_convert if not is_expression(rule)]
    for rule, found in covered_by(plain, [name for name, _ in model.named_modules() if name]).items():
        if any(selection.lists.holds(name) for name in found):
            continue
        names = [name for name in selection.settings if rule and rule in name]
        if not found or not names:
            continue
        missed = list(dict.fromkeys(_parts_around(rule, name) for name in names))
        end = "$" if all(name.endswith(rule) for name in names) else ""
        more = " and others" if len(missed) > 3 else ""
        warn(
            f"the module rule {rule!r} keeps nothing dense that would not be dense without it: it matches modules such "
            f"as {found[0]!r}, and not {', '.join(map(repr, missed[:3]))}{more}. Rules are whole dotted names or parts "
            f"between dots; if those were meant, write 're:.*{re.escape(rule)}{end}', or name them."
        )


def _parts_around(rule: str, name: str) -> str:
    """The whole dotted parts of a name that a text stands in."""
    start = name.rindex(rule)
    end = name.find(".", start + len(rule))
    return name[name.rfind(".", 0, start) + 1 : end if end >= 0 else None]


def _beside_selected(
    name: str, decoder: DecoderBlocks, unfused: Sequence[str], settings: Mapping[str, LayerSettings]
) -> bool:
    """Whether any expert of the block is selected: Transformers may store several modules of a block as one."""
    block = next((f"{each}." for each in decoder.named if name.startswith(f"{each}.")), f"{name}.")
    beside = tuple(f"{each}." for each in unfused if each.startswith(block))
    return any(each.startswith(beside) for each in settings)


def _is_plain(module: nn.Module) -> bool:
    """Whether it computes ``x Wᵀ + b`` and nothing else, which is what a packed layer does."""
    return isinstance(module, SABLinear) or type(module).forward is nn.Linear.forward


def shared_parameters(model: nn.Module) -> set[int]:
    """ids of parameters that more than one module holds, or one module that stands in several places.

    Transformers ties weights when they are loaded and knows before which.
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    named = dict(model.named_parameters(remove_duplicate=False))
    announced = {id(named[name]) for pair in tied.items() for name in pair if name in named}
    seen: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return announced | {key for key, count in seen.items() if count > 1}


def replace_with_skeletons(model: nn.Module, selection: Selection) -> None:
    """Swap every selected `nn.Linear` for an empty `SABLinear` on the same device, for a loader to fill."""
    for name, settings in selection.settings.items():
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        set_module(
            model,
            name,
            SABLinear(
                dense.in_features,
                dense.out_features,
                settings,
                dense.bias is not None,
                device=dense.weight.device,
                dtype=dense.weight.dtype,
            ),
        )
