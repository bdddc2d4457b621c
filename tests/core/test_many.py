from dataclasses import replace

import pytest
import torch

from optimum_sab.core.hessian import InputStatistics
from optimum_sab.core.many import solve_many
from optimum_sab.core.parts import watched_by
from optimum_sab.core.rows import InputRows
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import output_error, solve
from optimum_sab.core.target import target_of
from optimum_sab.errors import CalibrationError, ConfigError, NonFiniteError
from optimum_sab.ops.cpu.columns import column_loops

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
    """Weight and rows of an expert, in halves."""

    def make(seed, tokens=40, dtype=torch.bfloat16, residual=False):
        generator = torch.Generator().manual_seed(seed)
        x = correlated_inputs(tokens, WIDTH, seed) if tokens else torch.zeros(0, WIDTH)
        dense = x + 0.1 * torch.randn(x.shape, generator=generator)
        r = torch.randn(tokens, OUT, generator=generator) if residual else None
        rows = InputRows(WIDTH, CPU, True, f"experts.{seed}")
        for half in (True, False):
            some = slice(0, tokens // 2) if half else slice(tokens // 2, tokens)
            rows.add("text", x[some], dense[some], None if r is None else r[some], half=half)
        return torch.randn(OUT, WIDTH, generator=generator).to(dtype), rows

    return make


def same(found, expected):
    pairs = zip(vars(found.planes).values(), vars(expected.planes).values(), strict=True)
    return found.error == expected.error and all(a.equal(b) if torch.is_tensor(a) else a == b for a, b in pairs)


@pytest.mark.parametrize("workers", [1, 2])
def test_of_second_moments_it_is_solve_bit_for_bit(expert, threads, workers):
    made = [expert(seed) for seed in range(3)]
    weights, statistics = [w for w, _ in made], [rows.statistics() for _, rows in made]
    threads(1)
    expected = [solve(w, s, DEFAULT) for w, s in zip(weights, statistics, strict=True)]
    threads(workers)
    found = solve_many(torch.stack(weights), statistics, DEFAULT, NAMES)
    assert torch.get_num_threads() == workers
    assert all(map(same, found, expected))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_of_rows_it_is_solve_of_their_moments_to_rounding(expert, name, residual):
    settings, loops = SETTINGS[name], column_loops(CPU)
    made = [expert(seed, residual=residual) for seed in range(3)]
    found = solve_many([w for w, _ in made], [rows for _, rows in made], settings, NAMES, loops)
    for (weight, rows), each in zip(made, found, strict=True):
        expected = solve(weight, rows.statistics(), settings, loops=loops)
        assert each.propagation == pytest.approx(expected.propagation, abs=1e-4)
        assert each.error == pytest.approx(expected.error, rel=0.02)
        equal = (each.planes.base_sign == expected.planes.base_sign).float().mean()
        assert equal > 0.9
        statistics, W = rows.statistics(), weight.float()
        target = target_of(W, statistics, statistics.factored(settings.damping), each.propagation)
        actual = output_error(target, each.planes.dequantize(), statistics.hessian)
        assert each.error == pytest.approx(actual, rel=1e-3)


def test_rows_do_not_depend_on_the_number_of_threads(expert, threads):
    made = [expert(seed) for seed in range(3)]
    found = []
    for workers in (1, 2, 3):
        threads(workers)
        found.append(solve_many([w for w, _ in made], [rows for _, rows in made], DEFAULT, NAMES, column_loops(CPU)))
    assert all(same(a, b) and same(a, c) for a, b, c in zip(*found, strict=True))


@pytest.mark.parametrize("tokens", [0, 1, 2, WIDTH, 3 * WIDTH])
def test_any_number_of_tokens_is_solved(expert, tokens):
    (weight, rows), settings = expert(0, tokens), DEFAULT
    [found] = solve_many([weight], [rows], settings, ["experts.0"])
    expected = solve(weight, rows.statistics(), settings)
    assert found.error == pytest.approx(expected.error, rel=0.05, abs=1e-5)
    assert torch.isfinite(found.planes.dequantize()).all()
    if tokens == 0:
        bare = solve(weight, InputStatistics.without_data(WIDTH, CPU), settings)
        assert same(found, bare)


@pytest.mark.parametrize("scale", [0.0, 2.0**-60, 2.0**50])
def test_weights_of_any_magnitude_and_dtype_are_solved_together(expert, scale):
    made = [expert(0, dtype=torch.float32), expert(1), expert(2, dtype=torch.float16)]
    weights = [made[0][0] * scale, made[1][0], made[2][0]]
    found = solve_many(weights, [rows for _, rows in made], replace(DEFAULT, propagation=0.2), NAMES)
    first = solve_many([made[0][0]], [made[0][1]], replace(DEFAULT, propagation=0.2), ["one"])[0]
    torch.testing.assert_close(found[0].planes.dequantize(), first.planes.dequantize() * scale)
    assert all(0 < each.error < 0.2 for each in found[1:])


def test_hessians_of_modalities_are_made_where_they_are_read(expert):
    weight, rows = expert(0)
    settings = replace(DEFAULT, significance="modality")
    [found] = solve_many([weight], [rows], settings, ["experts.0"])
    assert same(found, solve(weight, rows.statistics(), settings))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_expert_that_fails_is_named(expert, threads, workers):
    made = [expert(seed) for seed in range(3)]
    weights = [w.clone() for w, _ in made]
    weights[1][0, 0] = float("nan")
    weights[2][0, 0] = float("nan")
    threads(workers)
    with pytest.raises(NonFiniteError, match=r"experts\.1 holds NaN"):
        solve_many(weights, [rows for _, rows in made], DEFAULT, NAMES)
    assert torch.get_num_threads() == workers


def test_what_does_not_go_together_is_refused_before_any_work(expert):
    weight, rows = expert(0)
    with pytest.raises(ConfigError, match="1 weights, 2 statistics and 1 names"):
        solve_many([weight], [rows, rows], DEFAULT, ["one"])
    with pytest.raises(ConfigError, match=r"two is \[32, 160\].*one is \[64, 160\]"):
        solve_many([weight, weight[:32]], [rows, rows], DEFAULT, ["one", "two"])
    with pytest.raises(CalibrationError, match="one has 128 inputs and was given the statistics of 160"):
        solve_many([weight[:, :128]], [rows], DEFAULT, ["one"])
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
        solve_many([w for w, _ in made], [rows for _, rows in made], DEFAULT, NAMES)
    assert watch.depth == 0


def test_rows_in_one_scale_are_solved_like_those_that_were_gathered(expert):
    weight, rows = expert(0)
    found = solve_many([weight] * 2, [rows, rows.weighted()], DEFAULT, NAMES[:2])
    assert same(*found)
    wide = expert(0, tokens=2 * WIDTH)[1].weighted()
    [moments] = solve_many([weight], [wide], DEFAULT, ["one"])
    assert same(moments, solve(weight, wide.statistics(), DEFAULT))
