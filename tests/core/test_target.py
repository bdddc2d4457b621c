import dataclasses

import numpy as np
import pytest
import torch

from optimum_sab.core import target
from optimum_sab.core.factorization import factor_hessian
from optimum_sab.core.hessian import InputMoments
from optimum_sab.core.target import cross_validated_alpha, propagated_target, sketch_rows


@pytest.fixture
def streams(correlated_inputs):
    """Inputs of the dense and of the quantized stream, and a weight."""
    dense = correlated_inputs(60, 12, 0)
    quantized = dense + 0.3 * correlated_inputs(60, 12, 1)
    return dense, quantized, torch.randn(5, 12, generator=torch.Generator().manual_seed(2))


def times(inverse):
    """The product with an inverse that is given."""
    return lambda left: left @ inverse


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
    found = propagated_target(weight, times(inverse), (dense - quantized).T @ quantized, 1.0)
    np.testing.assert_allclose(found.numpy(), ridge(dense, quantized, weight, penalty), rtol=1e-3, atol=1e-3)


def test_propagated_target_from_statistics_is_the_same_ridge(streams, statistics_of):
    """The balanced Hessian's scale cancels: its damping is a penalty of 0.01 of the mean diagonal of X̂ᵀX̂."""
    dense, quantized, weight = streams
    statistics = statistics_of(dense={"text": dense}, text=quantized)
    factored = factor_hessian(statistics.hessian, 0.01)
    found = propagated_target(weight, factored.times_inverse, statistics.drift, 1.0)
    penalty = 0.01 * float((quantized**2).sum()) / 12
    np.testing.assert_allclose(found.numpy(), ridge(dense, quantized, weight, penalty), rtol=1e-3, atol=1e-3)


def test_propagated_target_lowers_the_error_of_the_dense_outputs(streams):
    dense, quantized, weight = streams
    by_inverse = times(torch.linalg.inv(quantized.T @ quantized))
    drift = (dense - quantized).T @ quantized
    wanted = dense @ weight.T
    errors = [
        float((quantized @ propagated_target(weight, by_inverse, drift, alpha).T - wanted).square().sum())
        for alpha in (0.0, 0.3, 0.7, 1.0)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_propagated_target_is_linear_in_alpha(streams):
    dense, quantized, weight = streams
    by_inverse = times(torch.linalg.inv(quantized.T @ quantized))
    drift = (dense - quantized).T @ quantized
    whole = propagated_target(weight, by_inverse, drift, 1.0)
    assert torch.equal(propagated_target(weight, by_inverse, drift, 0.0), weight)
    torch.testing.assert_close(propagated_target(weight, by_inverse, drift, 0.3), 0.7 * weight + 0.3 * whole)


def test_propagated_target_of_equal_streams_is_the_weight(streams):
    _, quantized, weight = streams
    drift = torch.zeros(12, 12)
    assert torch.equal(propagated_target(weight, times(torch.linalg.inv(quantized.T @ quantized)), drift, 1.0), weight)


def test_propagated_target_with_a_residual_is_least_squares_of_the_dense_stream_behind_the_addition(streams):
    dense, quantized, weight = streams
    generator = torch.Generator().manual_seed(3)
    r, r_hat = torch.randn(60, 5, generator=generator), torch.randn(60, 5, generator=generator)
    penalty = 2.0
    inverse = torch.linalg.inv((quantized.T @ quantized).double() + penalty * torch.eye(12)).float()
    found = propagated_target(weight, times(inverse), (dense - quantized).T @ quantized, 1.0, (r - r_hat).T @ quantized)
    X_hat, W = quantized.double().numpy(), weight.double().numpy()
    wanted = (dense.double() @ weight.double().T + r.double() - r_hat.double()).numpy()
    above = np.vstack([X_hat, np.sqrt(penalty) * np.eye(12)])
    below = np.vstack([wanted, np.sqrt(penalty) * W.T])
    np.testing.assert_allclose(found.numpy(), np.linalg.lstsq(above, below, rcond=None)[0].T, rtol=1e-3, atol=1e-3)


def halves_of(dense, quantized, residual=None):
    """Statistics of two streams with the first half of the rows apart."""
    moments, part = (InputMoments(12, torch.device("cpu"), True, "layer") for _ in range(2))
    n = len(dense) // 2
    rows = [None if residual is None else residual[s] for s in (slice(n), slice(n, None))]
    part.add("text", quantized[:n], dense[:n], rows[0])
    moments.add("text", quantized[n:], dense[n:], rows[1])
    return moments.statistics(part=part)


def test_cross_validation_trusts_a_drift_that_both_halves_show(correlated_inputs):
    """Where the dense inputs are a linear map of the quantized ones, the correction is exact and α is near 1."""
    quantized = correlated_inputs(400, 12, 0)
    dense = quantized @ (torch.eye(12) + 0.3 * torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    assert cross_validated_alpha(weight, halves_of(dense, quantized), 1e-6) == pytest.approx(1.0, abs=0.01)


def test_cross_validation_distrusts_noise(correlated_inputs):
    """Where the streams differ by noise that has nothing to do with the inputs, half of the samples predict nothing."""
    quantized = correlated_inputs(60, 12, 0)
    dense = quantized + torch.randn(60, 12, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    assert cross_validated_alpha(weight, halves_of(dense, quantized), 1e-6) < 0.35
    assert cross_validated_alpha(weight, halves_of(quantized, quantized), 1e-6) == 0.0


def test_cross_validated_alpha_lowers_the_error_on_new_samples(correlated_inputs):
    """On average over draws it beats both no correction and the whole of it."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(5, 12, generator=generator)
    mixing = torch.eye(12) + 0.2 * torch.randn(12, 12, generator=generator)

    def streams(count, seed):
        quantized = correlated_inputs(count, 12, seed)
        return quantized @ mixing + 1.5 * torch.randn(count, 12, generator=generator), quantized

    errors = {"none": 0.0, "chosen": 0.0, "whole": 0.0}
    for seed in range(20):
        dense, quantized = streams(60, seed)
        statistics = halves_of(dense, quantized)
        factored = factor_hessian(statistics.hessian, 0.01)
        chosen = cross_validated_alpha(weight, statistics, 0.01)
        for name, alpha in (("none", 0.0), ("chosen", chosen), ("whole", 1.0)):
            target = propagated_target(weight, factored.times_inverse, statistics.drift, alpha)
            difference = target - weight @ mixing.T  # what the dense outputs are on average, from the quantized inputs
            errors[name] += float(((difference @ statistics.hessian) * difference).sum())
    assert errors["chosen"] < 0.95 * min(errors["none"], errors["whole"])


def test_cross_validation_sees_the_residual(correlated_inputs):
    quantized = correlated_inputs(400, 12, 0)
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    explained = quantized @ torch.randn(12, 5, generator=torch.Generator().manual_seed(3))
    assert cross_validated_alpha(weight, halves_of(quantized, quantized, explained), 1e-6) == pytest.approx(1, abs=0.01)


def many_rows(correlated_inputs, residual=False):
    """Statistics of two streams that differ in a way which halves partly agree on, and a weight of many rows."""
    quantized = correlated_inputs(120, 12, 0)
    generator = torch.Generator().manual_seed(1)
    mixing = torch.eye(12) + 0.2 * torch.randn(12, 12, generator=generator)
    dense = quantized @ mixing + 2.0 * torch.randn(120, 12, generator=generator)
    weight = torch.randn(600, 12, generator=generator) * torch.logspace(0, -2, 600)[:, None]
    beside = 0.1 * torch.randn(120, 600, generator=generator) if residual else None
    return weight, halves_of(dense, quantized, beside)


@pytest.mark.parametrize("residual", [False, True])
def test_alpha_from_a_sketch_of_the_rows_is_that_of_all_rows_to_a_hundredth(residual, correlated_inputs, monkeypatch):
    weight, statistics = many_rows(correlated_inputs, residual)
    exact = cross_validated_alpha(weight, statistics, 0.01)
    assert 0.1 < exact < 0.95
    monkeypatch.setattr(target, "WIDE", 1)
    assert cross_validated_alpha(weight, statistics, 0.01) == pytest.approx(exact, abs=0.02)
    assert cross_validated_alpha(weight[:200], statistics_of_rows(statistics, 200), 0.01) == pytest.approx(
        exact_of(weight[:200], statistics_of_rows(statistics, 200), monkeypatch), rel=1e-6
    )  # no more rows than a sketch has


def statistics_of_rows(statistics, count):
    """The same for the first rows alone."""

    def cut(moments):
        residual = None if moments.residual is None else moments.residual[:count]
        return dataclasses.replace(moments, residual=residual)

    return dataclasses.replace(cut(statistics), half=cut(statistics.half))


def exact_of(weight, statistics, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(target, "WIDE", 10**9)
        return cross_validated_alpha(weight, statistics, 0.01)


def test_a_sketch_leaves_sums_over_rows_as_they_are_on_average(monkeypatch):
    """Over many draws of S the trace of ``S A Sᵀ`` is that of A; here also of a matrix that is far from diagonal."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(40, 6, generator=generator), torch.randn(40, 6, generator=generator) + 0.5
    found, seeds = [], iter(range(4000))
    own = torch.Generator.manual_seed
    monkeypatch.setattr(target, "_generator", lambda: own(torch.Generator(), next(seeds)))
    for _ in range(2000):
        both = sketch_rows(torch.cat([left, right], 1), 8)
        found.append(float((both[:, :6] * both[:, 6:]).sum()))
    assert np.mean(found) == pytest.approx(float((left * right).sum()), abs=4 * np.std(found) / len(found) ** 0.5)


def test_a_sketch_is_the_same_every_time_and_holds_every_row_once():
    rows = torch.eye(300)
    first = sketch_rows(rows, 256)
    assert torch.equal(first, sketch_rows(rows, 256))
    assert torch.equal(first.abs().sum(0), torch.ones(300))
    assert sorted(first.abs().sum(1).tolist()) == [1.0] * 212 + [2.0] * 44
