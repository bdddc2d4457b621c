"""Where a model's decoder blocks are: asked of the model, not looked up in a list of architectures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from optimum_sab.errors import ConfigError

_OTHER_SENSES = ("vision", "visual", "image", "video", "audio", "speech", "sound", "qformer", "perceiver")


@dataclass(frozen=True)
class BlockLists:
    """The module lists that hold the blocks, by dotted name, such as ``model.language_model.layers``.

    Most models have one. An encoder and a decoder have two, and so has a decoder whose cross-attention blocks stand in
    a list of their own.
    """

    names: tuple[str, ...]

    @property
    def above(self) -> str:
        """Dotted name of the innermost module that holds them all; empty for the model itself."""
        split = [name.split(".")[:-1] for name in self.names]
        common: list[str] = []
        for parts in zip(*split, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        return ".".join(common)

    @property
    def start(self) -> int:
        """Where the part of a name begins that `short` keeps, in names of linears that are inside of the lists."""
        return len(self.above) + 1 if self.above else 0

    @property
    def bare(self) -> bool:
        """Whether the model is the list, so that names begin with a number."""
        return "" in self.names

    def short(self, name: str) -> str:
        """A name from the list on, ``layers.0.mlp.up_proj``: alike whatever stands before it.

        Args:
            name: of a module or a tensor, under whatever prefix a model is stored or loaded.
        """
        parts = name.split(".")
        for own in (each[self.start :].split(".") for each in self.names):
            for begin in range(len(parts) - len(own) + 1):
                if parts[begin : begin + len(own)] == own:
                    return ".".join(parts[begin:])
        return name

    def holds(self, name: str) -> bool:
        """Whether the module of this name is inside of one of the lists."""
        return self.bare or any(name.startswith(f"{each}.") for each in self.names)


@dataclass(frozen=True)
class DecoderBlocks:
    """The language model's blocks.

    Attributes:
        lists: the lists they stand in.
        named: the blocks by dotted name, list after list.
    """

    lists: BlockLists
    named: dict[str, nn.Module]

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The blocks in order."""
        return tuple(self.named.values())


def find_decoder_blocks(model: nn.Module) -> DecoderBlocks:
    """The block lists of the model's language model.

    The decoder is what ``model.get_decoder()`` returns (Transformers' own accessor; vision-language models answer
    with their language model), else the model itself. Its block list is the `nn.ModuleList` that holds the most linear
    weights and is no part of what reads pictures or sound. Lists that stand beside it and hold blocks with linears are
    its own too, and so is the text encoder of an encoder–decoder model.

    Raises:
        ConfigError: there is no list of blocks with linears in it; where that is because the model computes with
            Conv1D, the message says so.
    """
    names = {id(module): name for name, module in model.named_modules()}
    main = _largest_list(model, _decoder(model))
    if main is None:
        raise ConfigError(_without_blocks(model))
    lists = [main] if main is model else _beside(model, main)
    encoder = _text_encoder(model)
    first = None if encoder is None else _largest_list(model, encoder)
    if first is not None and not any(first is each for each in lists):
        lists.insert(0, first)
    found = [(names[id(each)], each) for each in lists]
    named = {f"{name}.{i}" if name else f"{i}": block for name, each in found for i, block in enumerate(each)}
    return DecoderBlocks(BlockLists(tuple(name for name, _ in found)), named)


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The model's embedding of token ids; None where it does not say."""
    accessor = getattr(model, "get_input_embeddings", None)
    try:
        found = accessor() if callable(accessor) else None
    except NotImplementedError:  # Transformers' own answer for a model that has none
        return None
    return found if isinstance(found, nn.Module) else None


def behind_number(name: str, blocks: Sequence[str]) -> str:
    """A linear's name with its list and without its block's number: alike in all blocks.

    Args:
        name: dotted name of a linear.
        blocks: dotted names of the blocks.
    """
    for block in blocks:
        if name.startswith(f"{block}."):
            return f"{block.rpartition('.')[0]}.*{name[len(block) :]}"
    return name


def _decoder(model: nn.Module) -> nn.Module:
    accessor = getattr(model, "get_decoder", None)
    decoder = accessor() if callable(accessor) else model
    return decoder if isinstance(decoder, nn.Module) else model


def _text_encoder(model: nn.Module) -> nn.Module | None:
    """What reads text in a model whose decoder only attends to it."""
    inner = _decoder(model)
    accessors = [m for m in model.modules() if inner in list(m.children()) or m is model]
    for module in accessors:
        config = getattr(module, "config", None)
        accessor = getattr(module, "get_encoder", None)
        if getattr(config, "is_encoder_decoder", False) and callable(accessor):
            encoder = accessor()
            if isinstance(encoder, nn.Module) and encoder is not module and id(encoder) not in foreign_modules(model):
                return encoder
    return None


def _largest_list(model: nn.Module, within: nn.Module) -> nn.ModuleList | None:
    """The list with the most linear weights; of those for other senses only where there are no others."""
    foreign = foreign_modules(model)
    lists = [m for m in within.modules() if isinstance(m, nn.ModuleList) and len(m) and _linear_weights(m)]
    candidates = [each for each in lists if id(each) not in foreign] or lists
    return max(candidates, key=_linear_weights, default=None)


def _beside(model: nn.Module, main: nn.ModuleList) -> list[nn.ModuleList]:
    """Lists of the same parent with linears in them, in the order in which they are defined."""
    foreign = foreign_modules(model)
    parent = next((m for m in model.modules() if any(child is main for child in m.children())), None)
    children = [] if parent is None else list(parent.children())
    return [
        each
        for each in children
        if each is main
        or (isinstance(each, nn.ModuleList) and id(each) not in foreign and all(map(_is_block, each)) and len(each))
    ]


def _is_block(module: nn.Module) -> bool:
    """Whether it may be a decoder block: it has linears, and is none itself."""
    return not isinstance(module, nn.Linear) and bool(list(module.children())) and _linear_weights(module) > 0


def foreign_modules(model: nn.Module) -> set[int]:
    """ids of all modules inside of what reads pictures or sound: parts that take no token ids, or are named so."""
    embeddings = input_embedding(model)
    found: set[int] = set()
    for name, part in model.named_modules():
        if name and (getattr(part, "main_input_name", "input_ids") != "input_ids" or _named_so(name)):
            inside = list(part.modules())
            if not any(each is embeddings for each in inside):
                found.update(map(id, inside))
    return found


def _named_so(name: str) -> bool:
    last = name.rpartition(".")[2]
    return any(sense in last for sense in _OTHER_SENSES)


def _without_blocks(model: nn.Module) -> str:
    transposed = next((name for name, each in model.named_modules() if type(each).__name__ == "Conv1D"), None)
    if transposed is not None:  # Transformers' own, in GPT-2 and its descendants
        return (
            f"{type(model).__name__} computes with Conv1D, such as {transposed}: its weight is [in, out], and SAB "
            "binarizes nn.Linear. Put an nn.Linear with the transposed weight in the place of each, and save that "
            "model, or choose one that has linears."
        )
    return f"{type(model).__name__} has no list of decoder blocks with linear layers; SAB binarizes decoder models."


def _linear_weights(module: nn.Module) -> int:
    # in_features rather than weight.numel(): packed layers count like dense ones, so a reloaded model is read alike
    return sum(width * height for width, height in _widths(module))


def _widths(module: nn.Module) -> Iterator[tuple[int, int]]:
    for m in module.modules():
        width, height = getattr(m, "in_features", None), getattr(m, "out_features", None)
        if isinstance(width, int) and isinstance(height, int):
            yield width, height
