import pytest
import torch

from optimum_sab.core.hessian import InputMoments


@pytest.fixture
def correlated_inputs():
    """Gaussian tokens [tokens, width] whose covariance has a decaying spectrum, as hidden states have."""

    def make(tokens, width, seed=0):
        generator = torch.Generator().manual_seed(seed)
        spectrum = torch.arange(1, width + 1) ** -0.5
        mixing = torch.randn(width, width, generator=generator) * spectrum[:, None]
        return torch.randn(tokens, width, generator=generator) @ mixing

    return make


@pytest.fixture
def statistics_of():
    """Statistics of inputs by modality; ``dense`` are the same tokens in the dense stream."""

    def make(dense=None, **quantized):
        first = next(iter(quantized.values()))
        moments = InputMoments(first.shape[1], torch.device("cpu"), dense is not None, "the test's linear")
        for modality, inputs in quantized.items():
            moments.add(modality, inputs, None if dense is None else dense[modality])
        return moments.statistics()

    return make
