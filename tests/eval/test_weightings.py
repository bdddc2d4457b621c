import pytest
import torch

from optimum_sab.calibration.statistics.passes import calibration_pass
from optimum_sab.core.hessian import InputMoments, InputStatistics
from optimum_sab.eval import weightings  # noqa: F401  # registers what is tested

CPU = torch.device("cpu")
FULL = 40


def gathered(tokens, seed):
    moments = InputMoments(8, CPU, False, "an expert")
    moments.add("text", torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed)))
    return moments.statistics()


@pytest.mark.parametrize("name", ["hessian", "hessian-own", "hessian-shared"])
@pytest.mark.parametrize("tokens", [10, 100])
def test_an_expert_is_solved_with_what_the_pass_says(name, tokens):
    own, shared, asked = gathered(tokens, 0), gathered(500, 1), []
    found = calibration_pass(name)().of_expert(own, lambda: asked.append(1) or shared, FULL)
    share = {"hessian": 1.0 if tokens > FULL else tokens / (tokens + FULL / 4), "hessian-own": 1, "hessian-shared": 0}
    wanted = share[name] * own.hessian + (1 - share[name]) * shared.hessian
    torch.testing.assert_close(found.hessian, wanted)
    assert found.tokens == own.tokens
    assert bool(asked) == (share[name] < 1)  # no statistics are gathered that count for nothing


def test_an_expert_without_tokens_is_solved_with_what_comes_to_the_others():
    nothing, shared = InputStatistics.without_data(8, CPU), gathered(500, 1)
    for name in ("hessian", "hessian-own", "hessian-shared"):
        assert calibration_pass(name)().of_expert(nothing, lambda: shared, FULL).hessian is shared.hessian
