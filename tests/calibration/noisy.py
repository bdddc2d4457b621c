"""A model's hidden states before its head, and the same with noise."""

import torch

from optimum_sab.calibration.predictions.at_head import HeadInputs
from optimum_sab.calibration.predictions.head import SharedHead

ONE = {"input_ids": torch.tensor([[7]])}  # forward arguments of a single token


def head_inputs(subject, noise):
    """The dense hidden states of every sample, and the same with noise of this relative size."""
    generator = torch.Generator().manual_seed(3)
    found = []
    with torch.no_grad(), SharedHead(subject.model, subject.model.lm_head).open() as shared:
        for index, sample in enumerate(subject.samples * 20):
            given = shared.given(sample)
            loud = given + noise * given.std() * torch.randn(given.shape, generator=generator)
            found.append(HeadInputs(index, given, loud, torch.ones(given.shape[1], dtype=torch.bool)))
    return found


def sharpened(model):
    """Give the model a head of its own whose predictions are neither uniform nor certain."""
    generator = torch.Generator().manual_seed(4)
    weight = 0.4 * torch.randn(model.lm_head.weight.shape, generator=generator)
    model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
