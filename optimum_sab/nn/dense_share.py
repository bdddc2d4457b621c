"""What of a language model stays dense, and how much of it that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from optimum_sab.errors import warn
from optimum_sab.nn.decoder import foreign_modules
from optimum_sab.nn.selection import Selection
from optimum_sab.wording import page

WORTH_A_WARNING = 0.1
_NO_MATRICES = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class DenseShare:
    """Of the language model's matrices, embeddings of tokens aside.

    Attributes:
        share: of their weights, that is not binarized although no rule asks for that.
        parts: the same for each kind of tensor, by its name without the numbers in it, the largest first.
    """

    share: float
    parts: Mapping[str, float]

    def __str__(self) -> str:
        some = [f"{name} ({share:.0%})" for name, share in list(self.parts.items())[:3] if share >= 0.005]
        more = ", and others" if len(self.parts) > len(some) else ""
        named = f"{', '.join(some) or 'small ones'}{more}"
        return f"{self.share:.0%} of the language model's matrices stay dense without a rule that says so: {named}"


def dense_share(model: nn.Module, selection: Selection) -> DenseShare:
    """Count the matrices beside and in the decoder blocks.

    Args:
        model: dense; may be on meta.
        selection: what is binarized.
    """
    root = model.get_submodule(selection.lists.above)
    start = f"{selection.lists.above}." if selection.lists.above else ""
    foreign = foreign_modules(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    total = 0
    dense: dict[str, int] = {}
    for name, module in root.named_modules():
        if id(module) in foreign or module is head or isinstance(module, _NO_MATRICES):
            continue
        for tensor, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or not parameter.is_floating_point():
                continue
            total += parameter.numel()
            if f"{start}{name}" in selection.asked_dense:
                continue
            if f"{start}{name}" not in selection.settings or tensor != "weight":
                kind = _without_numbers(f"{name}.{tensor}")
                dense[kind] = dense.get(kind, 0) + parameter.numel()
    parts = {kind: count / total for kind, count in sorted(dense.items(), key=lambda item: -item[1])}
    return DenseShare(sum(parts.values()), parts)


def warn_of_dense(model: nn.Module, selection: Selection) -> None:
    """Say what stays dense where it is more than `WORTH_A_WARNING`."""
    found = dense_share(model, selection)
    if found.share > WORTH_A_WARNING:
        warn(
            f"{found}. They are no linears that can be packed, so the model takes more memory than its bits per weight "
            "say; 'optimum-sab plan MODEL' shows how much. Fused experts are packed with Transformers 5; the families "
            f"that are packed whole are on {page('models')}."
        )


def _without_numbers(name: str) -> str:
    return ".".join(part for part in name.removesuffix(".weight").split(".") if not part.isdigit())
