"""Weights solved together: by threads bit for bit what `solve` finds, as a stack what it finds to rounding."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_sab.core import many
from optimum_sab.core.columns import IN_TORCH
from optimum_sab.core.fitting import fit_planes
from optimum_sab.core.hessian import InputMoments, InputStatistics
from optimum_sab.core.many import solve_many, stack_size
from optimum_sab.core.parts import watched_by
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import finish, prepare, solve
from optimum_sab.errors import CalibrationError, ConfigError, NonFiniteError
from optimum_sab.ops.columns import column_loops

CPU = torch.device("cpu")
DEFAULT = LayerSettings(block_size=32)
SETTINGS = {
    "default": DEFAULT,
    "two-bit": replace(DEFAULT, base_planes=2, sweeps=3),
    "no residual planes, uniform": replace(DEFAULT, residual_planes=0, significance="uniform"),
    "set propagation, fp16": replace(DEFAULT, propagation=0.5, row_scale="fp16"),
    "paper": replace(DEFAULT, base_planes=2, feedback="block", refit=False, sweeps=0, propagation=0.3),
    "coded": LayerSettings(block_size=128, code="trellis16"),
}
WIDTH, OUT = 160, 64
NAMES = [f"experts.{e}" for e in range(3)]
PLENTY = 2**40  # bytes


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def expert(correlated_inputs):
    """Weight and statistics of an expert, in halves."""

    def make(seed, tokens=40, dtype=torch.bfloat16):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(OUT, WIDTH, generator=generator).to(dtype)
        if not tokens:
            return weight, InputStatistics.without_data(WIDTH, CPU)
        x = correlated_inputs(tokens, WIDTH, seed)
        dense = x + 0.1 * torch.randn(x.shape, generator=generator)
        halves = [InputMoments(WIDTH, CPU, True, f"experts.{seed}") for _ in range(2)]
        for half, some in zip(halves, (slice(0, tokens // 2), slice(tokens // 2, tokens)), strict=True):
            half.add("text", x[some], dense[some])
        return weight, halves[1].statistics(part=halves[0] if tokens > 1 else None)

    return make


def same(found, expected):
    pairs = zip(vars(found.planes).values(), vars(expected.planes).values(), strict=True)
    return found.error == expected.error and all(a.equal(b) if torch.is_tensor(a) else a == b for a, b in pairs)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("workers", [1, 2])
def test_it_is_solve_bit_for_bit(expert, threads, workers, name):
    settings, loops = SETTINGS[name], column_loops(CPU)
    made = [expert(seed) for seed in range(3)]
    weights, statistics = [w for w, _ in made], [s for _, s in made]
    threads(1)
    expected = [solve(w, s, settings, loops=loops) for w, s in made]
    threads(workers)
    found = solve_many(torch.stack(weights), statistics, settings, NAMES, loops)
    assert torch.get_num_threads() == workers
    assert all(map(same, found, expected))


@pytest.mark.parametrize("tokens", [0, 1, 2, 3 * WIDTH])
def test_any_number_of_tokens_is_solved(expert, tokens):
    weight, statistics = expert(0, tokens)
    [found] = solve_many([weight], [statistics], DEFAULT, ["experts.0"])
    assert same(found, solve(weight, statistics, DEFAULT))
    assert torch.isfinite(found.planes.dequantize()).all()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_expert_that_fails_is_named(expert, threads, workers):
    made = [expert(seed) for seed in range(3)]
    weights = [w.clone() for w, _ in made]
    weights[1][0, 0] = float("nan")
    weights[2][0, 0] = float("nan")
    threads(workers)
    with pytest.raises(NonFiniteError, match=r"experts\.1 holds NaN"):
        solve_many(weights, [s for _, s in made], DEFAULT, NAMES)
    assert torch.get_num_threads() == workers


def test_what_does_not_go_together_is_refused_before_any_work(expert):
    weight, statistics = expert(0)
    with pytest.raises(ConfigError, match="1 weights, 2 statistics and 1 names"):
        solve_many([weight], [statistics, statistics], DEFAULT, ["one"])
    with pytest.raises(ConfigError, match=r"two is \[32, 160\].*one is \[64, 160\]"):
        solve_many([weight, weight[:32]], [statistics, statistics], DEFAULT, ["one", "two"])
    with pytest.raises(CalibrationError, match="one has 128 inputs and was given the statistics of 160"):
        solve_many([weight[:, :128]], [statistics], DEFAULT, ["one"])
    assert solve_many([], [], DEFAULT, []) == []


def test_statistics_are_asked_for_when_their_turn_comes_and_once(expert):
    made, asked = [expert(seed) for seed in range(3)], []

    class Lazy:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            asked.append(index)
            return made[index][1]

    solve_many([w for w, _ in made], Lazy(), DEFAULT, NAMES)
    assert sorted(asked) == [0, 1, 2]


def test_a_watch_hears_of_its_own_thread_alone(expert, threads):
    class Watch:
        depth = 0

        def enter(self, name):
            self.depth += 1

        def leave(self):
            self.depth -= 1

    made, watch = [expert(seed) for seed in range(3)], Watch()
    threads(2)
    with watched_by(watch):
        solve_many([w for w, _ in made], [s for _, s in made], DEFAULT, NAMES)
    assert watch.depth == 0


@pytest.fixture
def stacks(monkeypatch):
    """Sizes of the stacks that were fitted."""
    sizes = []

    def watched(problem, settings, loops):
        assert problem.target.ndim == 3
        sizes.append(len(problem.target))
        return fit_planes(problem, settings, loops)

    monkeypatch.setattr(many, "fit_planes", watched)
    return sizes


def assert_close(found, expected):
    """To rounding: the same α and columns, and where levels are as near another sign, which errors tell little of."""
    for one, other in zip(found, expected, strict=True):
        assert one.propagation == other.propagation
        assert torch.equal(one.planes.residual_index, other.planes.residual_index)
        assert one.error == pytest.approx(other.error, rel=1e-3, abs=1e-9)
        for name in ("base_sign", "residual_sign"):
            signs, theirs = getattr(one.planes, name), getattr(other.planes, name)
            assert signs.shape == theirs.shape
            assert not signs.numel() or float((signs != theirs).float().mean()) < 1e-3
        assert one.planes.row_scale.is_contiguous()


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "coded"])
@pytest.mark.parametrize(
    "seed", [0, pytest.param(10, marks=pytest.mark.full), pytest.param(20, marks=pytest.mark.full)]
)
def test_a_stack_is_solve_to_rounding(expert, stacks, name, seed):
    made = [expert(seed + number) for number in range(3)]
    weights, statistics = [w for w, _ in made], [s for _, s in made]
    expected = [solve(w, s, SETTINGS[name]) for w, s in made]
    assert_close(solve_many(weights, statistics, SETTINGS[name], NAMES, room=PLENTY), expected)
    assert_close(solve_many(weights, statistics, SETTINGS[name], NAMES, column_loops(CPU), PLENTY), expected)
    assert stacks == [3, 3]


def test_a_stack_of_wide_weights_is_solve_to_rounding(correlated_inputs, statistics_of, stacks):
    """From 1,024 inputs on factors and Gram matrices are found in another way."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(32, 1056, generator=generator) for _ in range(2)]
    statistics = [statistics_of(text=correlated_inputs(300, 1056, seed)) for seed in range(2)]
    settings = replace(DEFAULT, block_size=128)
    expected = [solve(w, s, settings) for w, s in zip(weights, statistics, strict=True)]
    assert_close(solve_many(weights, statistics, settings, NAMES[:2], column_loops(CPU), PLENTY), expected)
    assert stacks == [2]


def unusual(expert):
    """Experts that need decisions of their own, by what they are."""
    found = {"ordinary": expert(0), "without tokens": expert(1, 0), "of few tokens": expert(2, 2)}
    weight, statistics = expert(3)
    found["all zero"] = torch.zeros_like(weight), statistics
    weight, statistics = expert(4)
    for sums in (statistics.hessian, statistics.drift, statistics.half.hessian, statistics.half.drift):
        sums[:, 30:70] = 0.0  # a whole block of 32, and parts of two
    for sums in (statistics.hessian, statistics.half.hessian):
        sums[30:70] = 0.0
    found["with dead columns"] = weight, statistics
    weight, statistics = expert(5, 3 * WIDTH)
    least = float(torch.linalg.eigvalsh(statistics.hessian)[0])
    statistics.hessian.diagonal().sub_(least + 0.2)  # positive definite at ten times the damping, not before
    found["singular"] = weight, statistics
    weight, statistics = expert(6)
    found["huge"] = weight * 2.0**60, statistics
    weight, statistics = expert(7)
    found["tiny"] = weight * 2.0**-60, statistics
    return found


def test_every_weight_of_a_stack_has_decisions_of_its_own(expert, stacks):
    made = unusual(expert)
    expected = [solve(w, s, DEFAULT) for w, s in made.values()]
    found = solve_many([w for w, _ in made.values()], [s for _, s in made.values()], DEFAULT, list(made), room=PLENTY)
    assert_close(found, expected)
    assert stacks == [len(made)]
    by_name = dict(zip(made, found, strict=True))
    alphas = {name: each.propagation for name, each in by_name.items()}
    assert alphas["without tokens"] == 0.0 and alphas["ordinary"] > 0.0
    assert not by_name["all zero"].planes.dequantize().any()
    assert not by_name["with dead columns"].planes.dequantize()[:, 30:70].any()
    assert by_name["with dead columns"].planes.dequantize()[:, :30].any()
    damping = [prepare(w, s, DEFAULT, "it").added / float(s.hessian.diagonal().mean()) for w, s in made.values()]
    assert dict(zip(made, damping, strict=True))["singular"] == pytest.approx(1.0)  # ten times what is set
    assert damping[0] == pytest.approx(0.1)
    sizes = {name: float(each.planes.row_scale.abs().amax()) for name, each in by_name.items()}
    assert sizes["tiny"] < 2.0**-50 and sizes["huge"] > 2.0**50


def test_coded_planes_are_solved_one_after_the_other(expert, stacks):
    made = [expert(seed) for seed in range(2)]
    settings = SETTINGS["coded"]
    found = solve_many([w for w, _ in made], [s for _, s in made], settings, NAMES[:2], room=PLENTY)
    assert stacks == [] and all(same(one, solve(w, s, settings)) for one, (w, s) in zip(found, made, strict=True))


def test_as_many_are_stacked_as_have_room(expert, stacks):
    made = [expert(seed) for seed in range(5)]
    weights, names = [w for w, _ in made], [f"experts.{e}" for e in range(5)]
    expected = [solve(w, s, DEFAULT) for w, s in made]
    each = 4 * (3 * WIDTH**2 + (2 * DEFAULT.planes + 11) * OUT * WIDTH)
    for room, sizes in ((2 * 2 * each, [2, 2, 1]), (2 * 4 * each - 1, [2, 2, 1]), (2 * 2 * each - 1, [])):
        stacks.clear()
        assert_close(solve_many(weights, [s for _, s in made], DEFAULT, names, room=room), expected)
        assert stacks == sizes


def test_stack_sizes_are_powers_of_two_that_fit_in_half_of_the_room():
    assert stack_size(OUT, WIDTH, DEFAULT, 0) == stack_size(OUT, WIDTH, DEFAULT, -1) == 1
    sizes = [stack_size(1536, 2048, LayerSettings(), gigabytes << 30) for gigabytes in range(0, 141, 5)]
    assert sizes == sorted(sizes) and all(size & (size - 1) == 0 for size in sizes)
    assert sizes[-1] >= 128  # a whole block
    assert stack_size(1536, 2048, DEFAULT.replace(base_planes=2, residual_planes=2), 1 << 35) < sizes[-1]


@pytest.mark.parametrize("late", [False, True])
def test_the_first_of_a_stack_that_fails_is_named(expert, monkeypatch, late):
    """Also where it fails only once a later one has."""
    made = [expert(seed) for seed in range(3)]
    weights = [w.clone() for w, _ in made]
    weights[2 if late else 1][0, 0] = float("nan")

    def damaged(prepared, fit, settings):
        if late and prepared.name == "experts.1":
            fit.row_scale[:] = float("inf")
        return finish(prepared, fit, settings)

    monkeypatch.setattr(many, "finish", damaged)
    message = "planes found for experts.1 hold NaN" if late else "weight of experts.1 holds NaN"
    with pytest.raises(NonFiniteError, match=message):
        solve_many(weights, [s for _, s in made], DEFAULT, NAMES, room=PLENTY)


@pytest.mark.parametrize("room", [None, PLENTY], ids=["one by one", "a stack"])
def test_the_factors_of_those_that_are_done_are_let_go_while_others_wait(expert, room):
    made = [expert(seed) for seed in range(2)]
    solve_many([w for w, _ in made], [s for _, s in made], DEFAULT, NAMES[:2], room=room)
    assert not any(s._factored for _, s in made)


def test_a_stack_refuses_what_does_not_fit(expert):
    made = [expert(seed) for seed in range(2)]
    short = InputStatistics.without_data(128, CPU)
    with pytest.raises(CalibrationError, match=r"experts\.1 has 160 inputs and was given the statistics of 128"):
        solve_many([w for w, _ in made], [made[0][1], short], DEFAULT, NAMES[:2], room=PLENTY)


class Operators(TorchDispatchMode):
    """Counts operators, of which each is at most a few launches on an accelerator."""

    def __init__(self):
        super().__init__()
        self.called = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_a_stack_takes_as_many_operators_as_one_weight(expert):
    """Those of the loops over columns aside, which are one launch for all only in Triton."""
    loops = replace(IN_TORCH, feedback=lambda weight, *rest: weight, sweep=lambda block: None, stacks=True)
    first = prepare(*expert(0), DEFAULT, "it").problem
    counts = []
    for size in (2, 8):
        stack = first.empty_stack(size)
        for index in range(size):
            stack.put(index, prepare(*expert(index), DEFAULT, "it").problem)
        with Operators() as operators:
            fit_planes(stack, DEFAULT, loops)
        counts.append(operators.called)
    assert counts[0] == counts[1]
    with Operators() as operators:
        fit_planes(first, DEFAULT, loops)
    assert sum(counts[1].values()) < 1.25 * sum(operators.called.values())
