"""`bench generate --compile`: compiled steps give the tokens of eager ones, and what Python costs at a layer."""

import json
import time

import pytest
import torch
from torch import nn

from optimum_sab.bench import generate, linear_overhead, room
from optimum_sab.bench.compiled_generation import compare_compiled
from optimum_sab.bench.conditions import Conditions
from optimum_sab.bench.generate import CompilationError, GreedyDecoder
from optimum_sab.bench.linear_overhead import kernel_time, python_seconds
from optimum_sab.bench.qwen import empty_model, random_model
from optimum_sab.bench.random_layers import random_linear
from optimum_sab.cli.main import main
from optimum_sab.core.settings import LayerSettings
from optimum_sab.ops.cpu.compiler import usable_library

CPU = torch.device("cpu")
QUICK = ["bench", "generate", "--device", "cpu", "--prompt-tokens", "12", "--new-tokens", "3", "--repeats", "2"]
needs_kernel = pytest.mark.skipif(usable_library() is None, reason="needs a C compiler")


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch, request):
    """Traced and captured as ever, and then run as it stands: what inductor takes long for is not looked at here."""
    if not request.node.get_closest_marker("full"):
        monkeypatch.setattr(generate, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced_alone(monkeypatch):
    """Traced, and not captured either: for what is said of compiled steps, and not what they compute."""
    monkeypatch.setattr(generate, "COMPILER", "eager")


def generated(settings, compiled, size="tiny"):
    model = random_model(size, settings, CPU, torch.float32)
    prompt = torch.randint(0, 1000, (2, 9), generator=torch.Generator().manual_seed(1))
    decoder = GreedyDecoder(model, prompt, 6, cuda_graphs=False, compiled=compiled)
    decoder.warm_up()
    decoder.prefill()
    decoder.decode()
    return decoder.generated


@pytest.mark.parametrize("settings", [None, LayerSettings()], ids=["dense", "packed"])
def test_compiled_steps_give_the_tokens_of_eager_ones(settings):
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    expected, found = generated(settings, False), generated(settings, True)
    assert torch.equal(found, expected)
    assert len(set(found.flatten().tolist())) > 4  # not one token over and over in each of the two sequences
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1  # for all steps


@pytest.mark.full
@pytest.mark.parametrize("size", ["tiny", "tiny-qwen3"])
def test_steps_that_inductor_compiles_give_the_tokens_of_eager_ones(size):
    assert torch.equal(generated(LayerSettings(), True, size), generated(LayerSettings(), False, size))


@needs_kernel
def test_bench_generate_reports_both_ways(small_machine, traced_alone, capsys):
    assert main([*QUICK, "--compile", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {(row["model"], row["compiled"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == 4
    for name, compiled in (("eager", False), ("compiled", True)):
        packed, dense = (rows[model, compiled]["decode_tokens_per_second"] for model in ("packed", "dense"))
        assert found["ratios"][name] == pytest.approx(packed / dense)
        assert rows["dense", compiled]["python_seconds_per_linear"] is None
        assert rows["dense", compiled]["nothing_seconds_per_linear"] is None
        assert 0 < rows["packed", compiled]["python_seconds_per_linear"] < 0.1
        assert 0 < rows["packed", compiled]["nothing_seconds_per_linear"] < 0.1
    assert found["backend"] == "cpu" and found["size"] == "tiny"


def test_bench_generate_prints_both_ways(small_machine, traced_alone, capsys):
    assert main([*QUICK, "--compile", "--backend", "reference"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.strip().splitlines()]
    ways = [("dense", "eager"), ("packed", "eager"), ("dense", "compiled"), ("packed", "compiled")]
    assert [tuple(line[:2]) for line in lines[1:5]] == ways
    assert {word for line in lines[1:5] for word in line[4:6]} == {"-"}  # what the reference takes is Python throughout
    assert [line[:2] for line in lines[5:7]] == [["ratio", "eager"], ["ratio", "compiled"]]


def test_two_models_need_room_for_two(small_machine, monkeypatch):
    weights = sum(p.numel() for p in empty_model("tiny").parameters()) * 2
    cache = 4 * 2 * 64 * 2 * 2 * 64 * 2  # of four decoders
    monkeypatch.setattr(room, "free_memory", lambda device: 2 * weights + cache - 1)
    monkeypatch.setattr("optimum_sab.bench.compiled_generation.random_model", lambda *_: pytest.fail("made"))
    with pytest.raises(Exception, match="--size tiny takes"):
        compare_compiled("tiny", Conditions(LayerSettings(), CPU), prompt_tokens=4, new_tokens=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--cuda-graphs"], "give one of them"), (["--new-tokens", "0"], "--new-tokens 0"), (["--size", "3b"], "'3b'")],
)
def test_bad_values_are_named(small_machine, capsys, arguments, message):
    assert main([*QUICK, "--compile", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_other_devices_are_refused(small_machine):
    with pytest.raises(Exception, match="--device cpu"):
        compare_compiled("tiny", Conditions(LayerSettings(), torch.device("meta")))


def test_a_step_that_cannot_be_compiled_says_what_to_do(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no g++")

    monkeypatch.setattr(generate, "COMPILER", broken)
    with pytest.raises(CompilationError, match=r"no g\+\+.*--compile"):
        generated(None, True)


def layers():
    return nn.ModuleList(random_linear(64, 128, LayerSettings(), seed, CPU) for seed in range(3))


@needs_kernel
def test_time_of_the_kernel_is_not_python_s(monkeypatch):
    """A kernel that takes 20 ms longer, and layers that take 20 ms longer around it."""
    library, model = usable_library(), layers()
    real = library.sab_linear

    def slow(*arguments):
        time.sleep(0.02)
        return real(*arguments)

    monkeypatch.setattr(linear_overhead, "ROUNDS", 3)
    monkeypatch.setattr(linear_overhead, "WARM_ROUNDS", 1)
    monkeypatch.setattr(library, "sab_linear", slow)
    [inside] = python_seconds(model, 1, torch.float32, (None,))
    assert library.sab_linear is slow  # as it was
    for layer in model:
        layer.register_forward_hook(lambda *_: time.sleep(0.02))
    [around] = python_seconds(model, 1, torch.float32, (None,))
    assert 0 < 2 * inside.layer < 0.02 < around.layer
    assert 0 < around.nothing < 0.02  # hooks and kernel are the layer's


@needs_kernel
def test_every_product_is_timed():
    layer, x = layers()[0], torch.randn(1, 128)
    with kernel_time(usable_library()) as found:
        layer(x)
        first = found.seconds
        layer(x.requires_grad_())  # by way of the operator
    assert 0 < first < found.seconds
