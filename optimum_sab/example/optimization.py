"""The optimizers of both stages of the example's training."""

from collections.abc import Iterable

import torch
from torch import nn


def make_optimizers(module: nn.Module, learning_rate: float, weight_decay: float) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside the layers, AdamW for embeddings, convolutions, norms and biases.

    Muon's updates are scaled to the size of AdamW's, so one learning rate serves both. It reaches the same loss in a
    fraction of AdamW's steps here.

    Args:
        module: what to train; parameters without gradient are left out.
        learning_rate: of both optimizers.
        weight_decay: of the matrices; nothing else decays.
    """
    embeddings = {id(each.weight) for each in module.modules() if isinstance(each, nn.Embedding)}
    trained = [each for each in module.parameters() if each.requires_grad]
    matrices = [each for each in trained if each.ndim == 2 and id(each) not in embeddings]
    others = [each for each in trained if each.ndim != 2 or id(each) in embeddings]
    return (
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    )


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], learning_rate: float) -> None:
    """Use `learning_rate` from the next step on."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
