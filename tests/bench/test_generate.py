"""`bench generate` on a tiny model: the decoding loop against plain forwards, and the report's fields."""

import json
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_sab.bench import generate, room
from optimum_sab.bench.conditions import Conditions
from optimum_sab.bench.generate import GreedyDecoder, compare_generation
from optimum_sab.bench.qwen import empty_model, model_config, random_model, weight_bytes
from optimum_sab.bench.verification import WrongResultError
from optimum_sab.cli.main import main
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError
from optimum_sab.format.layout import stored_bits_per_weight
from optimum_sab.nn.linear import SABLinear

CPU = torch.device("cpu")
QUICK = ["bench", "generate", "--device", "cpu", "--prompt-tokens", "12", "--new-tokens", "3", "--repeats", "1"]


def greedy(model, prompt, count):
    """The next ``count`` tokens by whole forwards without a cache, in the library's own way."""
    ids = prompt
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, prompt.shape[1] :]


def prompt_for(model, batch, length, device=CPU):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.get_text_config().vocab_size, (batch, length), generator=generator).to(device)


@pytest.mark.parametrize(("settings", "steps"), [(None, 6), (LayerSettings(), 2)], ids=["dense", "packed"])
@pytest.mark.parametrize("size", ["tiny", "tiny-qwen3"])
def test_decoder_gives_the_tokens_of_plain_forwards(size, settings, steps):
    model = random_model(size, settings, CPU, torch.float32)
    prompt = prompt_for(model, 2, 9)
    decoder = GreedyDecoder(model, prompt, steps, cuda_graphs=False)
    decoder.warm_up()
    expected = greedy(model, prompt, 1 + steps)
    for _ in range(2):  # a run leaves nothing behind for the next one
        decoder.prefill()
        decoder.decode()
        assert torch.equal(decoder.generated, expected)
    assert len(set(expected.flatten().tolist())) > steps  # not one token over and over, which any loop would give


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU, and so cannot be captured in a CUDA graph."""

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        assert operator.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "masked_select")
        return operator(*arguments, **(named or {}))


@pytest.mark.parametrize("size", ["tiny", "tiny-qwen3"])
def test_step_of_the_dense_model_does_not_wait_for_the_device(size):
    model = random_model(size, None, CPU, torch.float32)
    decoder = GreedyDecoder(model, prompt_for(model, 1, 5), 2, cuda_graphs=False)
    decoder.warm_up()
    decoder.prefill()
    with NoWaiting():
        decoder.decode()
    with NoWaiting(), pytest.raises(AssertionError):
        bool(torch.ones(1).any())


@pytest.mark.parametrize("size", ["tiny", "tiny-qwen3"])
def test_random_model_packs_the_decoder_and_nothing_else(size):
    settings = LayerSettings()
    dense = random_model(size, None, CPU, torch.bfloat16)
    packed = random_model(size, settings, CPU, torch.bfloat16)
    assert not any(p.is_meta for p in [*packed.parameters(), *packed.buffers(), *dense.parameters(), *dense.buffers()])
    linears = {n: m for n, m in packed.named_modules() if isinstance(m, SABLinear)}
    assert len(linears) == 7 * model_config(size).get_text_config().num_hidden_layers
    saved = 0.0
    for name, layer in linears.items():
        layer.packed.validate(name)
        replaced = dense.get_submodule(name)
        assert isinstance(replaced, nn.Linear) and replaced.weight.dtype == torch.bfloat16
        assert (replaced.bias is None) == (layer.bias is None)
        bits = stored_bits_per_weight(layer.out_features, layer.in_features, settings)
        saved += replaced.weight.numel() * (16 - bits) / 8
    assert weight_bytes(dense) - weight_bytes(packed) == pytest.approx(saved)


def test_seven_billion_has_the_shapes_of_the_model():
    text = model_config("7b").get_text_config()
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size) == (
        3584,
        18944,
        28,
        152064,
    )
    assert text.hidden_size // text.num_attention_heads == 128
    vision = model_config("7b").vision_config
    assert (vision.depth, vision.hidden_size, vision.out_hidden_size) == (32, 1280, 3584)


@pytest.mark.parametrize(
    ("size", "layers", "hidden", "intermediate", "heads", "keys"),
    [("8b", 36, 4096, 12288, 32, 8), ("32b", 64, 5120, 25600, 64, 8)],
)
def test_large_sizes_have_the_parameters_of_qwen3(size, layers, hidden, intermediate, heads, keys):
    decoder = empty_model(size).get_decoder()
    assert all(p.is_meta for p in decoder.parameters())
    attention = 2 * heads * 128 * hidden + 2 * keys * 128 * hidden  # queries and output, keys and values
    norms = 2 * hidden + 2 * 128
    block = attention + 3 * hidden * intermediate + norms
    assert sum(p.numel() for p in decoder.parameters()) == layers * block + 151936 * hidden + hidden
    # the two models that the figures to beat were taken on: 8.2 and 32.8 billion with the output embedding
    assert layers * block + 2 * 151936 * hidden == pytest.approx({"8b": 8.19e9, "32b": 32.76e9}[size], rel=1e-3)


def test_dense_model_is_gone_before_the_packed_one_is_made(small_machine, monkeypatch):
    made = []

    def watched(*arguments):
        assert all(reference() is None for reference in made)
        model = random_model(*arguments)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(generate, "random_model", watched)
    compare_generation("tiny", Conditions(LayerSettings(), CPU, repeats=1), prompt_tokens=4, new_tokens=1)
    assert len(made) == 2


def test_size_without_room_is_refused_before_anything_is_made(monkeypatch, capsys):
    weights = sum(p.numel() for p in empty_model("tiny").parameters()) * 2
    cache = 2 * 64 * 2 * 2 * 64 * 2  # keys and values of 64 tokens in 2 layers of 2 heads of 64, bfloat16
    monkeypatch.setattr(generate, "random_model", lambda *arguments: pytest.fail("made"))
    monkeypatch.setattr(room, "free_memory", lambda device: weights + cache - 1)
    assert main(QUICK) == 1
    assert "--size tiny takes 0.0 GB dense with its cache, and cpu has 0.0 GB free" in capsys.readouterr().err
    check = (Conditions(LayerSettings(), CPU), 64)
    monkeypatch.setattr(room, "free_memory", lambda device: weights + cache)
    room.check_room("tiny", *check)
    monkeypatch.setattr(room, "free_memory", lambda device: 80 * 10**9)
    room.check_room("32b", *check)
    monkeypatch.setattr(room, "free_memory", lambda device: 64 * 10**9)
    with pytest.raises(ConfigError, match=r"32b takes 66\.7 GB"):
        room.check_room("32b", *check)
    monkeypatch.setattr(room, "free_memory", lambda device: None)  # cannot be asked
    room.check_room("32b", *check)


def test_bench_generate_reports_both_models(small_machine, capsys):
    assert main([*QUICK, "--batch", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    dense, packed = found["rows"]
    assert (dense["model"], packed["model"]) == ("dense", "packed")
    assert (found["size"], found["batch"], found["cuda_graphs"]) == ("tiny", 2, False)
    for name in ("prefill_tokens_per_second", "decode_tokens_per_second", "weight_bytes"):
        assert dense[name] > 0
        assert found["ratios"][name] == pytest.approx(packed[name] / dense[name])
    assert packed["weight_bytes"] < 0.6 * dense["weight_bytes"]
    assert dense["peak_memory_bytes"] is packed["peak_memory_bytes"] is found["ratios"]["peak_memory_bytes"] is None
    assert found["environment"]["bandwidth_bytes_per_second"] > 0


def test_bench_generate_prints_a_table(small_machine, capsys):
    assert main([*QUICK, "--preset", "paper", "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["model", "dense", "packed", "ratio"]
    assert "12+3 tokens, eager steps" in lines[4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "3b"], "'3b'"),
        (["--cuda-graphs"], "--no-cuda-graphs"),
        (["--new-tokens", "0"], "--new-tokens 0"),
        (["--prompt-tokens", "0"], "--prompt-tokens 0"),
        (["--batch", "0"], "--batch 0"),
        (["--dtype", "int4"], "'int4'"),
        (["--backend", "abacus"], "'abacus'"),
    ],
)
def test_bench_generate_names_bad_values(small_machine, capsys, arguments, message):
    assert main([*QUICK, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_bench_generate_refuses_a_model_that_computes_nan(small_machine, monkeypatch):
    monkeypatch.setattr(SABLinear, "forward", lambda self, x: x.new_full((*x.shape[:-1], self.out_features), torch.nan))
    with pytest.raises(WrongResultError, match="1x4 prompt are not finite"):
        compare_generation("tiny", Conditions(LayerSettings(), CPU, repeats=1), prompt_tokens=4, new_tokens=1)


def test_compare_generation_refuses_an_unknown_size(small_machine):
    with pytest.raises(ConfigError, match="size='huge'"):
        compare_generation("huge", Conditions(LayerSettings(), CPU))


@pytest.mark.gpu
@pytest.mark.parametrize("size", ["tiny", "tiny-qwen3"])
@pytest.mark.parametrize("settings", [None, LayerSettings()], ids=["dense", "packed"])
def test_replayed_steps_give_the_tokens_of_eager_ones(size, settings):
    device = torch.device("cuda")
    model = random_model(size, settings, device, torch.float32)  # rounds so little that no logits tie
    prompt = prompt_for(model, 1, 40, device)
    found = []
    for graphs in (False, True):
        decoder = GreedyDecoder(model, prompt, new_tokens=8, cuda_graphs=graphs)
        decoder.warm_up()
        for _ in range(2):
            decoder.prefill()
            decoder.decode()
            found.append(decoder.generated.clone())
    assert all(torch.equal(tokens, found[0]) for tokens in found)


@pytest.mark.gpu
def test_bench_generate_on_cuda_counts_memory(capsys):
    command = ["bench", "generate", "--device", "cuda", "--size", "tiny", "--prompt-tokens", "32", "--new-tokens", "4"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cuda_graphs"] is True
    for row in found["rows"]:
        assert row["peak_memory_bytes"] > row["weight_bytes"]
