from dataclasses import replace

import pytest
import torch

from optimum_sab.core.hessian import InputMoments, InputStatistics
from optimum_sab.core.many import solve_many
from optimum_sab.core.parts import watched_by
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import solve
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
