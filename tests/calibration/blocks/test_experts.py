"""What experts are solved from: their own tokens, and the others' where these are few."""

import pytest
import torch
import transformers
from packaging.version import Version

from optimum_sab.calibration.blocks import experts
from optimum_sab.calibration.blocks.experts import ENOUGH, ExpertsToSolve, solve_experts
from optimum_sab.calibration.samples.modality import TokenModalities
from optimum_sab.calibration.statistics.gathering import Gathering
from optimum_sab.calibration.statistics.hessian import HessianPass
from optimum_sab.calibration.streams.arrival import DENSE, QUANTIZED
from optimum_sab.calibration.streams.experts import ExpertLinears, RoutedArrival, RoutedInputs
from optimum_sab.core import many
from optimum_sab.core.fitting import fit_planes
from optimum_sab.core.hessian import InputMoments
from optimum_sab.core.mixture import mixed_statistics
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import solve
from optimum_sab.errors import CalibrationError
from optimum_sab.nn.experts import SABExperts
from optimum_sab.nn.fused_experts import fused_layout
from optimum_sab.nn.routing import Routing
from tests.nn.fused import EXPERTS, HIDDEN, fused

pytestmark = pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="experts are no one module")

CPU = torch.device("cpu")
SETTINGS = LayerSettings(iterations=2, sweeps=0, residual_planes=0)


def block():
    own = fused("plain")
    module = SABExperts.unfused(own, fused_layout(own))
    names = {index: f"experts.{index}.gate_up_proj" for index in range(EXPERTS)}
    linears = ExpertLinears("experts.*.gate_up_proj", module, "gate_up_proj", names)
    return linears, {name: module.linear(index, "gate_up_proj") for index, name in names.items()}


def tokens(count, seed):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def arrivals(chosen, streams=(QUANTIZED,)):
    """Of one sample, whose tokens choose these experts."""
    routing = Routing(torch.tensor(chosen).flatten(), len(chosen[0]), len(chosen))
    return [
        RoutedArrival(0, stream, RoutedInputs(tokens(len(chosen), seed), routing), len(chosen), 1)
        for seed, stream in enumerate(streams)
    ]


def solved(here, labels, names=("text",)):
    linears, members = block()
    gathering = Gathering(HessianPass(), [TokenModalities(names, labels)])
    settings = dict.fromkeys(members, SETTINGS)
    return solve_experts(linears, here, ExpertsToSolve(members, settings, gathering, CPU)), members


def moments(rows):
    found = InputMoments(HIDDEN, CPU, False, "experts")
    found.add("text", rows)
    return found.statistics()


def test_many_tokens_are_enough_and_few_are_mixed_with_the_others():
    enough = ENOUGH * HIDDEN
    chosen = [[0]] * enough + [[1]] * (enough - 1)
    found, members = solved(arrivals(chosen), torch.zeros(len(chosen), dtype=torch.long))
    rows = tokens(len(chosen), 0)
    alone = solve(members["experts.0.gate_up_proj"].weight, moments(rows[:enough]), SETTINGS)
    mixed = mixed_statistics(moments(rows[enough:]), moments(rows), enough)
    both = solve(members["experts.1.gate_up_proj"].weight, mixed, SETTINGS)
    for name, wanted in (("experts.0.gate_up_proj", alone), ("experts.1.gate_up_proj", both)):
        mine = found.solved[name]
        assert mine.error == pytest.approx(wanted.error, rel=1e-4)
        torch.testing.assert_close(mine.packed.dequantize(), wanted.planes.dequantize(), rtol=1e-3, atol=1e-4)
    assert found.report.mixed == 4


def test_an_expert_without_tokens_is_solved_with_the_others():
    chosen = [[0, 1]] * (ENOUGH * HIDDEN)
    found, members = solved(arrivals(chosen), torch.zeros(len(chosen), dtype=torch.long))
    wanted = solve(members["experts.4.gate_up_proj"].weight, moments(tokens(len(chosen), 0)), SETTINGS)
    torch.testing.assert_close(
        found.solved["experts.4.gate_up_proj"].packed.dequantize(), wanted.planes.dequantize(), rtol=1e-3, atol=1e-4
    )
    assert [sum(own.values()) for own in found.report.tokens] == [len(chosen), len(chosen), 0, 0, 0]


def test_modalities_are_counted_for_each():
    chosen = [[0], [0], [1], [0], [2]]
    found, _ = solved(arrivals(chosen), torch.tensor([0, 1, 1, 1, 0]), ("text", "visual"))
    assert [dict(own) for own in found.report.tokens] == [{"text": 1, "visual": 2}, {"visual": 1}, {"text": 1}, {}, {}]


@pytest.mark.parametrize("chosen", [[[3]] * 40, [[0]], [[EXPERTS]] * 4 + [[2]]])
def test_all_at_one_expert_one_token_and_pairs_that_go_nowhere(chosen):
    found, _ = solved(arrivals(chosen, (QUANTIZED, DENSE)), torch.zeros(len(chosen), dtype=torch.long))
    assert len(found.solved) == EXPERTS
    assert all(each.packed.dequantize().isfinite().all() for each in found.solved.values())


def test_the_dense_stream_may_have_routed_everything_elsewhere():
    mine = arrivals([[0], [1]] * 80)[0]
    theirs = RoutedArrival(0, DENSE, RoutedInputs(tokens(160, 5), Routing(torch.full((160,), 4), 1, 160)), 160, 1)
    found, _ = solved([mine, theirs], torch.zeros(160, dtype=torch.long))
    assert len(found.solved) == EXPERTS


def test_with_room_on_an_accelerator_experts_are_fitted_as_a_stack(monkeypatch):
    chosen = [[0, 1]] * 40 + [[2, 3]] * 30
    labels = torch.zeros(len(chosen), dtype=torch.long)
    alone, _ = solved(arrivals(chosen), labels)
    stacks = []

    def watched(problem, *rest):
        stacks.append(len(problem.target))
        return fit_planes(problem, *rest)

    monkeypatch.setattr(many, "fit_planes", watched)
    monkeypatch.setattr(experts, "solving_room", lambda device: 2**40)
    together, _ = solved(arrivals(chosen), labels)
    assert stacks == [EXPERTS]
    for name, mine in together.solved.items():
        assert mine.error == pytest.approx(alone.solved[name].error, rel=1e-3)
        torch.testing.assert_close(mine.packed.dequantize(), alone.solved[name].packed.dequantize())


@pytest.mark.parametrize(("free", "stacks"), [(None, 5), (40 * 4 * HIDDEN**2, 1)])
def test_more_statistics_wait_where_an_accelerator_has_room(monkeypatch, free, stacks):
    """Each is one matrix here; without an accelerator they are solved as soon as any waits."""
    monkeypatch.setattr(experts, "ROOM", 1)
    monkeypatch.setattr(experts, "solving_room", lambda device: free)
    solve_many, calls = experts.solve_many, []

    def watched(weights, *rest):
        calls.append(len(weights))
        return solve_many(weights, *rest)

    monkeypatch.setattr(experts, "solve_many", watched)
    chosen = [[expert] for expert in range(EXPERTS)] * 8
    solved(arrivals(chosen), torch.zeros(len(chosen), dtype=torch.long))
    assert calls == [EXPERTS // stacks] * stacks


def test_no_token_at_any_expert():
    with pytest.raises(CalibrationError, match=r"no calibration token.*experts"):
        solved(
            arrivals([[EXPERTS]] * 0 or [[0]])[:0]
            or [
                RoutedArrival(
                    0,
                    QUANTIZED,
                    RoutedInputs(torch.zeros(0, HIDDEN), Routing(torch.zeros(0, dtype=torch.long), 1, 0)),
                    0,
                    1,
                )
            ],
            torch.zeros(0, dtype=torch.long),
        )
