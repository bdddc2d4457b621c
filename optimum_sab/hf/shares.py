"""What a process of tensor parallelism has of packed layers, made of the tensors that it has read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.core.code import NO_CODE
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.format.share import Columns, columns_of
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.modules import set_module
from optimum_sab.nn.shared import SABShare


def is_shared(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this process has a part."""
    return hasattr(tensor, "full_tensor")


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of it, a plain tensor; all of one that is not shared."""
    shared: Any = tensor
    return shared.to_local() if is_shared(tensor) else tensor


def place_shares(model: nn.Module, mesh: Any, styles: Mapping[str, str], inside: Mapping[str, str]) -> None:
    """Put this process's share in the place of every layer that is shared.

    Args:
        model: weights read.
        mesh: of the processes.
        styles: of linears, by dotted name.
        inside: of linears in experts, which no style stands around by themselves.

    Raises:
        FormatError: a share's scales are not finite, or its salient columns not in order.
    """
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    shares = _Shares(model, mesh, {**inside, **styles})
    for name in inside:
        share = shares.of(name)
        plain = len(share.pieces) == 1 and share.around == (0, 0)
        set_module(model, name, share.pieces[0] if plain else share)  # linears can be stacked
    for name, style in styles.items():
        share = shares.of(name)
        ALL_PARALLEL_STYLES[style].install_forward(share, mesh)
        set_module(model, name, share)


class _Shares:
    """This process's shares of layers, by dotted name."""

    def __init__(self, model: nn.Module, mesh: Any, styles: Mapping[str, str]) -> None:
        self._model, self._mesh, self._styles = model, mesh, styles
        self._size, self._rank = int(mesh.size()), int(mesh.get_local_rank())
        self._before = self._words_before()

    @torch.no_grad()
    def of(self, name: str) -> SABShare:
        """The share of one layer, whose tensors it takes."""
        layer = self._layer(name)
        whole = (layer.in_features, layer.out_features)
        tensors = {each: own_part(layer.get_parameter(each)).detach() for each in layer.shape.names}
        bias, own = layer.bias, None
        if self._cuts_columns(name):
            columns = layer.in_features // self._size
            start = columns * self._rank
            packed = PackedWeight(tensors, layer.out_features, layer.in_features, layer.settings)
            cut = columns_of(packed, tensors, start, start + columns, self._before.get(name))
        else:
            cut = Columns((PackedWeight(tensors, layer.out_features // self._size, layer.in_features, layer.settings),))
            own, bias = None if bias is None else own_part(bias), None
        for part in cut.layers:
            part.validate(name)
        pieces = [SABLinear.from_packed(part, own) for part in cut.layers]
        elsewhere = layer.out_features - own.numel() if own is not None else 0
        for piece in pieces:
            piece.counted = 0
        pieces[0].counted = layer.counted + elsewhere
        layer._parameters.clear()  # the forward that was installed around it holds it, until garbage is collected
        return SABShare(whole, pieces, bias, (cut.front, cut.back)).train(layer.training)

    @torch.no_grad()
    def _words_before(self) -> dict[str, Tensor]:
        """Of every coded layer whose columns are shared, each row's word before this process's own, int32 [out].

        It is in the process before. All are brought in one go, while nothing can have failed in one process alone.
        """
        names = [name for name in self._styles if self._cuts_columns(name)]
        layers = {name: layer for name in names if (layer := self._layer(name)).settings.code != NO_CODE}
        if not layers:
            return {}
        last = torch.cat([own_part(layer.weight)[0, :, -1] for layer in layers.values()]).contiguous()
        gathered = [torch.empty_like(last) for _ in range(self._size)]
        torch.distributed.all_gather(gathered, last, group=self._mesh.get_group())
        if self._rank == 0:
            return {}
        words = gathered[self._rank - 1].split([layer.out_features for layer in layers.values()])
        return dict(zip(layers, words, strict=True))

    def _cuts_columns(self, name: str) -> bool:
        from optimum_sab.hf.sharing_styles import COLUMNS

        return self._styles[name] in COLUMNS

    def _layer(self, name: str) -> SABLinear:
        layer = self._model.get_submodule(name)
        assert isinstance(layer, SABLinear)
        return layer
