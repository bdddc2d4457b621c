"""`SABShare`: what one process computes of a packed linear that several processes share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import pad

from optimum_sab.errors import ConfigError
from optimum_sab.nn.linear import SABLinear


class SABShare(nn.Module):
    """A process's rows, or columns, of a packed linear; what makes one output of all shares is done around it.

    Args:
        whole: (in, out) of the linear that is shared.
        pieces: the share: one layer, or several of consecutive columns, whose products add up.
        bias: [out] of the linear, where columns are shared. That of rows is their layer's own.
        around: inputs of zeros that the pieces want before and behind the share's own (format/share.py).

    Attributes:
        in_features, out_features: of the linear that is shared.
    """

    bias: nn.Parameter | None
    _hf_quantized_needs_local_tp = True  # Transformers: give and take plain tensors, not DTensors

    def __init__(
        self,
        whole: tuple[int, int],
        pieces: Sequence[SABLinear],
        bias: nn.Parameter | None = None,
        around: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = whole
        for index, piece in enumerate(pieces):
            self.add_module(str(index), piece)
        self._widths = [piece.in_features for piece in pieces]
        self.around = around
        self.register_parameter("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """``x`` [..., in of the share] → [..., out of the share] in x's dtype; plus the bias, if it is here."""
        if self.around != (0, 0):
            inputs = pad(inputs, self.around)
        only = self.only
        if only is not None:
            output: Tensor = only(inputs)  # the tensor itself, by which layers find that they share it
        else:
            products = [piece(part) for piece, part in zip(self.pieces, inputs.split(self._widths, -1))]
            output = sum(products[1:], products[0])
        return output if self.bias is None else output + self.bias

    @property
    def pieces(self) -> list[SABLinear]:
        """The layers, in the order of their columns."""
        return [piece for piece in self.children() if isinstance(piece, SABLinear)]

    @property
    def only(self) -> SABLinear | None:
        """The layer, where it is one; None where there are several."""
        pieces = self.pieces
        return pieces[0] if len(pieces) == 1 else None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def refuse_shares(model: nn.Module, what: str) -> None:
    """A model is to be treated as a whole, of which this process has a share.

    Args:
        model: with or without shares.
        what: is to be done with it, as a participle.

    Raises:
        ConfigError: it has a share of a layer, or of experts.
    """
    for name, module in model.named_modules():
        if isinstance(module, SABShare) or (
            isinstance(module, SABLinear) and module.counted != module.in_features * module.out_features
        ):
            raise ConfigError(
                f"{name} is a share of a packed layer, as each process of tensor parallelism has one, and cannot be "
                f"{what}. Load the checkpoint in one process, without distributed_config, and have that one {what}; "
                "the checkpoint itself is as it was."
            )
