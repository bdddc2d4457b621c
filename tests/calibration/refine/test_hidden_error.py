"""The error of hidden states by hand."""

import torch

from optimum_sab.calibration.refine.hidden_error import hidden_error


def test_hidden_error_is_relative_per_token():
    wanted = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    error = hidden_error(wanted + torch.tensor([[[1.0, 0.0], [100.0, 0.0]]]), wanted)
    torch.testing.assert_close(error, torch.tensor([1 / 25, 1 / 25]))


def test_hidden_error_of_an_empty_token_is_finite():
    wanted = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    error = hidden_error(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), wanted)
    torch.testing.assert_close(error, torch.tensor([0.5, 0.0]))  # relative to the mean size, 2
