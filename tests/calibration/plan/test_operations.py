"""The formulas against what the real functions ask PyTorch for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_sab.calibration.plan import operations
from optimum_sab.calibration.plan.workload import LinearGroup
from optimum_sab.calibration.samples.modality import TokenModalities
from optimum_sab.calibration.statistics.gathering import Gathering
from optimum_sab.calibration.statistics.hessian import HessianPass
from optimum_sab.calibration.streams.arrival import DENSE, QUANTIZED, Arrival
from optimum_sab.core.factorization import WIDE, invert_upper, upper_root
from optimum_sab.core.hessian import InputMoments, accumulate_hessian
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import solve


class Products(TorchDispatchMode):
    """Counts matrix products; factors, and what solves with them, are none."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm"):
            left, right = args[-2], args[-1]
            self.found += 2 * left.numel() * right.shape[-1]
        return function(*args, **(kwargs or {}))


def counted(run):
    with Products() as counter:
        run()
    return counter.found


def moments(out, n, tokens, two_streams, weight=None):
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(0))
    found = InputMoments(n, torch.device("cpu"), two_streams, "x", weight=weight)
    if two_streams:
        found.add("text", x, x + 0.1, torch.ones(tokens, out))
    else:
        found.add("text", x)
    return found


@pytest.mark.parametrize("two_streams", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_second_moments(two_streams, residual):
    out, n, tokens = 96, 768, 512

    def run():
        x = torch.randn(tokens, n)
        found = InputMoments(n, torch.device("cpu"), two_streams, "x")
        rest = torch.ones(tokens, out) if residual and two_streams else None
        found.add("text", x, x + 0.1 if two_streams else None, rest)

    group = LinearGroup(1, out, n, LayerSettings(), at_residual=residual)
    assert counted(run) == operations.second_moments(group, tokens, two_streams)


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("out", [256, 600])
def test_what_a_linear_of_few_outputs_gathers(out, residual, members):
    n, tokens = 1152, 32  # whole strips
    group = LinearGroup(members, out * members, n, LayerSettings(), at_residual=residual and members == 1)
    modalities = [TokenModalities(("text",), torch.zeros(tokens, dtype=torch.long))] * 2
    x, r = torch.randn(2, tokens, n), torch.randn(2, tokens, out) if group.at_residual else (None, None)
    arrivals = [
        Arrival(sample, stream, x[0] + 0.1 * x[int(stream == DENSE)], r[int(stream == DENSE)], tokens, 2)
        for sample in range(2)
        for stream in (DENSE, QUANTIZED)
    ]
    gathering = Gathering(HessianPass(), modalities)
    weights = {str(member): torch.randn(out, n) for member in range(members)}
    inputs = gathering.inputs(arrivals)
    found = counted(lambda: gathering.statistics(weights, inputs, [LayerSettings()], torch.device("cpu")))
    assert found == operations.second_moments(group, 2 * tokens, True)
    assert operations.gathers_correction(group, True) == (members == 1 and (out == 256 or residual))


def test_half_of_a_second_moment_is_computed():
    x, hessian = torch.randn(64, 1920), torch.zeros(1920, 1920)
    assert counted(lambda: accumulate_hessian(hessian, x)) == operations.hessian(64, 1920) < 0.6 * 2 * 64 * 1920**2


@pytest.mark.parametrize("n", [512, 1024])
@pytest.mark.parametrize("changes", [{}, {"sweeps": 0}, {"refit": False, "sweeps": 0}, {"propagation": 0.0}])
def test_solving(n, changes):
    out = 128
    settings = LayerSettings(iterations=1, block_size=128, **changes)
    two_streams = settings.propagation is None
    statistics = moments(out, n, n, two_streams).statistics(
        part=moments(out, n, n, two_streams) if two_streams else None, by_modality=False
    )
    weight = torch.randn(out, n, generator=torch.Generator().manual_seed(1))
    found = counted(lambda: solve(weight, statistics, settings))
    expected = operations.solving(out, n, settings, two_streams)
    products = sum(expected[name] for name in ("cross-validation", "target", "refit", "feedback", "errors", "descent"))
    square = out * n**2
    uncounted = 2.0 * n**3 / 3.0 + 4.0 * square if two_streams else 0.0  # factors of the halves, solving with them
    inside = 2.0 * out * n * 128 * (1 + settings.sweeps)  # column by column: no products
    wide = (3 if two_streams else 1) * counted(lambda: upper_root(torch.eye(n))) if n >= WIDE else 0.0
    wide += counted(lambda: invert_upper(torch.eye(n))) if n >= WIDE else 0.0
    assert found - wide == pytest.approx(products - uncounted - inside, rel=0.2)


def test_a_search_of_coded_planes_goes_with_the_entries():
    for code, times in (("none", 4.0), ("trellis16", 2.0)):
        narrow, wide = (operations.solving(64, n, LayerSettings(code=code), True) for n in (1024, 2048))
        for name in ("feedback", "descent"):
            assert wide[name] / narrow[name] == pytest.approx(times, rel=0.35), (code, name)
        assert wide["refit"] / narrow["refit"] > 3.9
    assert operations.solving(64, 1024, LayerSettings(code="trellis16", sweeps=0), True)["descent"] == 0


def test_solving_with_a_correction_that_was_gathered():
    out, n, settings = 128, 1024, LayerSettings(iterations=1, block_size=128)
    weight = torch.randn(out, n, generator=torch.Generator().manual_seed(1))
    found, told = [], []
    for given in (None, weight):
        parts = [moments(out, n, n, True, given) for _ in range(2)]
        statistics = parts[1].statistics(part=parts[0], by_modality=False)
        found.append(counted(lambda of=statistics: solve(weight, of, settings)))
        told.append(sum(operations.solving(out, n, settings, True, given is not None).values()))
    assert found[0] - found[1] == told[0] - told[1] == 6 * out * n**2  # of both halves, and of all


def test_a_factorization_is_a_factor_an_inverse_and_a_factor():
    assert operations.factorization(30) == 30**3 / 3 + 2 * 30**3 / 3 + 30**3 / 3
    assert operations.factorization(3000) == 3000**3 / 3 + 3000**3 / 3  # its inverse is a factor already


def test_a_forward(work):
    tokens = 32
    block = work.model.blocks[0]
    with torch.device("meta"):
        layers = [torch.nn.Linear(g.in_features, g.out_features, bias=False) for g in block.groups]
        inputs = [torch.empty(tokens, layer.in_features) for layer in layers]
        found = counted(lambda: [x @ layer.weight.T for layer, x in zip(layers, inputs, strict=True)])
    assert operations.products(work, tokens) == len(work.model.blocks) * found
    heads = torch.empty(16, tokens, 64, device="meta")
    once = counted(lambda: torch.bmm(torch.bmm(heads, heads.mT), heads))
    assert operations.attention(work, [tokens]) == len(work.model.blocks) * once
