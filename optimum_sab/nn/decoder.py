"""Where a model's decoder blocks are: asked of the model, not looked up in a list of architectures."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from optimum_sab.errors import ConfigError


@dataclass(frozen=True)
class DecoderBlocks:
    """The language model's blocks.

    Attributes:
        prefix: dotted name of the block list in the model, e.g. ``model.language_model.layers``.
        blocks: the blocks in order.
    """

    prefix: str
    blocks: tuple[nn.Module, ...]


def find_decoder_blocks(model: nn.Module) -> DecoderBlocks:
    """The block list of the model's text decoder.

    The decoder is what ``model.get_decoder()`` returns (Transformers' own accessor; vision-language models answer
    with their language model), else the model itself. Its block list is the `nn.ModuleList` that holds the most
    linear weights.

    Raises:
        ConfigError: there is no list of blocks with linears in it; where that is because the model computes with
            Conv1D, the message says so.
    """
    accessor = getattr(model, "get_decoder", None)
    decoder = accessor() if callable(accessor) else model
    if not isinstance(decoder, nn.Module):
        decoder = model
    candidates = [
        module
        for _, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and _linear_weights(module)
    ]
    if not candidates:
        transposed = next((name for name, each in model.named_modules() if type(each).__name__ == "Conv1D"), None)
        if transposed is not None:  # Transformers' own, in GPT-2 and its descendants
            raise ConfigError(
                f"{type(model).__name__} computes with Conv1D, such as {transposed}: its weight is [in, out], and SAB "
                "binarizes nn.Linear. Put an nn.Linear with the transposed weight in the place of each, and save that "
                "model, or choose one that has linears."
            )
        raise ConfigError(
            f"{type(model).__name__} has no list of decoder blocks with linear layers; SAB binarizes decoder models."
        )
    chosen = max(candidates, key=_linear_weights)
    prefix = next(name for name, module in model.named_modules() if module is chosen)
    return DecoderBlocks(prefix, tuple(chosen))


def name_from_blocks(name: str, prefix: str) -> str:
    """A module's name from the block list's last part on, ``layers.0.mlp.up_proj``: alike whatever stands before it.

    Args:
        name: of a module or a tensor, under whatever prefix a model is stored or loaded.
        prefix: `DecoderBlocks.prefix`.
    """
    last = prefix.rpartition(".")[2]
    parts = name.split(".")
    return ".".join(parts[parts.index(last) :]) if last in parts else name


def _linear_weights(module: nn.Module) -> int:
    # in_features rather than weight.numel(): packed layers count like dense ones, so a reloaded model is read alike
    total = 0
    for m in module.modules():
        width, height = getattr(m, "in_features", None), getattr(m, "out_features", None)
        if isinstance(width, int) and isinstance(height, int):
            total += width * height
    return total
