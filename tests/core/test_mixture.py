import pytest
import torch

from optimum_sab.core.hessian import InputMoments, InputStatistics
from optimum_sab.core.mixture import mixed_by, mixed_statistics, own_share
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import solve
from optimum_sab.errors import CalibrationError, ConfigError

CPU = torch.device("cpu")


def gathered(tokens, seed, halves=True, streams=True, residual=False, width=16, names=("text",)):
    generator = torch.Generator().manual_seed(seed)
    first, second = (InputMoments(width, CPU, streams, "an expert") for _ in range(2))
    for name in names:
        for moments in (first, second) if halves else (second,):
            x = torch.randn(tokens, width, generator=generator)
            r = torch.randn(tokens, 4, generator=generator) if residual else None
            moments.add(name, x, 1.1 * x if streams else None, r)
    return second.statistics(part=first if halves else None)


def test_the_share_grows_with_tokens_and_is_all_from_the_stated_number_on():
    shares = [own_share(n, 1024) for n in (0, 1, 64, 256, 1023, 1024, 5000)]
    assert shares == sorted(shares)
    assert shares[0] == 0 and shares[2] == 0.2 and shares[3] == 0.5 and shares[-2:] == [1, 1]
    assert own_share(0, 0) == 1.0


def test_enough_tokens_leave_the_experts_own_and_none_the_shared():
    own, shared = gathered(20, 0), gathered(300, 1)
    assert mixed_statistics(own, shared, 40) is own
    empty = InputStatistics.without_data(16, CPU)
    for full in (0, 100):
        found = mixed_statistics(empty, shared, full)
        assert found.hessian is shared.hessian and found.drift is shared.drift and found.half is shared.half
        assert found.tokens == {}


def test_everything_is_mixed_in_one_share():
    own, shared = gathered(10, 0, residual=True), gathered(300, 1, residual=True)
    found = mixed_statistics(own, shared, 240)
    w = 20 / (20 + 60)  # not a half, which would hide one in the place of the other
    for name in ("hessian", "drift", "residual"):
        for part in (lambda s: s, lambda s: s.half):
            expected = w * getattr(part(own), name) + (1 - w) * getattr(part(shared), name)
            torch.testing.assert_close(getattr(part(found), name), expected)
    torch.testing.assert_close(
        found.by_modality["text"], w * own.by_modality["text"] + (1 - w) * shared.by_modality["text"]
    )
    assert found.tokens == own.tokens == {"text": 20}
    torch.testing.assert_close(found.hessian.diagonal().mean(), torch.tensor(1.0))


def test_a_modality_that_one_side_lacks_is_the_others():
    own, shared = gathered(10, 0), gathered(300, 1, names=("text", "visual"))
    found = mixed_by(own, shared, 0.25)
    assert torch.equal(found.by_modality["visual"], shared.by_modality["visual"])
    assert set(found.by_modality) == {"text", "visual"}


@pytest.mark.parametrize("lacks", ["own", "shared"])
def test_a_side_without_halves_is_all_in_the_second(lacks):
    own, shared = gathered(10, 0, halves=lacks != "own"), gathered(300, 1, halves=lacks != "shared")
    found = mixed_by(own, shared, 0.25)
    expected = 0.75 * shared.half.hessian if lacks == "own" else 0.25 * own.half.hessian
    torch.testing.assert_close(found.half.hessian, expected)
    weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(2))
    assert 0.5 < solve(weight, found, LayerSettings(block_size=32)).propagation <= 1.0  # the streams differ by a tenth


def test_a_residual_of_one_side_alone_counts_as_zero_on_the_other():
    own, shared = gathered(10, 0, residual=True), gathered(300, 1)
    torch.testing.assert_close(mixed_by(own, shared, 0.25).residual, 0.25 * own.residual)


def test_few_tokens_are_solved_better_on_the_mixture(correlated_inputs):
    x = correlated_inputs(1200, 64)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    own, shared = (InputMoments(64, CPU, False, "an expert") for _ in range(2))
    own.add("text", x[:8])
    shared.add("text", x[8:600])
    own, shared = own.statistics(), shared.statistics()
    errors = []
    for statistics in (own, mixed_statistics(own, shared, 128)):
        found = solve(weight, statistics, LayerSettings(block_size=32)).planes.dequantize()
        errors.append(float(((weight - found) @ x[600:].T).square().sum()))
    assert errors[1] < 0.8 * errors[0]


def test_what_does_not_go_together_is_refused():
    own, shared = gathered(10, 0), gathered(300, 1)
    with pytest.raises(CalibrationError, match="16 inputs and the shared ones of 24"):
        mixed_statistics(own, gathered(300, 1, width=24), 100)
    with pytest.raises(CalibrationError, match="drift"):
        mixed_statistics(own, gathered(300, 1, streams=False, halves=False), 100)
    with pytest.raises(ConfigError, match="full=-1"):
        mixed_statistics(own, shared, -1)
