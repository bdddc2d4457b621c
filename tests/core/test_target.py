import numpy as np
import pytest
import torch

from optimum_sab.core.hessian import factor_hessian
from optimum_sab.core.target import propagated_target


@pytest.fixture
def streams(correlated_inputs):
    """Inputs of the dense and of the quantized stream, and a weight."""
    dense = correlated_inputs(60, 12, 0)
    quantized = dense + 0.3 * correlated_inputs(60, 12, 1)
    return dense, quantized, torch.randn(5, 12, generator=torch.Generator().manual_seed(2))


def ridge(dense, quantized, weight, penalty):
    """argmin over V of ``‖X̂ Vᵀ − X Wᵀ‖² + penalty · ‖V − W‖²`` from the explicit inputs, in double precision."""
    X, X_hat, W = (t.double().numpy() for t in (dense, quantized, weight))
    above = np.vstack([X_hat, np.sqrt(penalty) * np.eye(W.shape[1])])
    below = np.vstack([X @ W.T, np.sqrt(penalty) * W.T])
    return np.linalg.lstsq(above, below, rcond=None)[0].T


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 100.0])
def test_propagated_target_at_one_is_ridge_least_squares_of_the_dense_outputs(streams, penalty):
    dense, quantized, weight = streams
    inverse = torch.linalg.inv((quantized.T @ quantized).double() + penalty * torch.eye(12)).float()
    found = propagated_target(weight, inverse, (dense - quantized).T @ quantized, 1.0)
    np.testing.assert_allclose(found.numpy(), ridge(dense, quantized, weight, penalty), rtol=1e-3, atol=1e-3)


def test_propagated_target_from_statistics_is_the_same_ridge(streams, statistics_of):
    """The balanced Hessian's scale cancels: its damping is a penalty of 0.01 of the mean diagonal of X̂ᵀX̂."""
    dense, quantized, weight = streams
    statistics = statistics_of(dense={"text": dense}, text=quantized)
    inverse = factor_hessian(statistics.hessian, 0.01).inverse
    found = propagated_target(weight, inverse, statistics.drift, 1.0)
    penalty = 0.01 * float((quantized**2).sum()) / 12
    np.testing.assert_allclose(found.numpy(), ridge(dense, quantized, weight, penalty), rtol=1e-3, atol=1e-3)


def test_propagated_target_lowers_the_error_of_the_dense_outputs(streams):
    dense, quantized, weight = streams
    inverse = torch.linalg.inv(quantized.T @ quantized)
    drift = (dense - quantized).T @ quantized
    wanted = dense @ weight.T
    errors = [
        float((quantized @ propagated_target(weight, inverse, drift, alpha).T - wanted).square().sum())
        for alpha in (0.0, 0.3, 0.7, 1.0)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_propagated_target_is_linear_in_alpha(streams):
    dense, quantized, weight = streams
    inverse = torch.linalg.inv(quantized.T @ quantized)
    drift = (dense - quantized).T @ quantized
    whole = propagated_target(weight, inverse, drift, 1.0)
    assert torch.equal(propagated_target(weight, inverse, drift, 0.0), weight)
    torch.testing.assert_close(propagated_target(weight, inverse, drift, 0.3), 0.7 * weight + 0.3 * whole)


def test_propagated_target_of_equal_streams_is_the_weight(streams):
    _, quantized, weight = streams
    drift = torch.zeros(12, 12)
    assert torch.equal(propagated_target(weight, torch.linalg.inv(quantized.T @ quantized), drift, 1.0), weight)
