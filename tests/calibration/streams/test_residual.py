import pytest
import torch
from torch import nn

from optimum_sab.calibration.samples.modality import token_modalities
from optimum_sab.calibration.statistics.hessian import HessianPass
from optimum_sab.calibration.statistics.pairing import pair_streams
from optimum_sab.calibration.streams.arrival import DENSE
from optimum_sab.calibration.streams.lockstep import Lockstep
from optimum_sab.calibration.streams.residual import ResidualWatch, read_arguments


class Block(nn.Module):
    """A pre-norm block with one linear on each of two branches."""

    def __init__(self, scaled=False):
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.o_proj, self.down_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.scaled = scaled

    def forward(self, hidden):
        branch = self.o_proj(self.first_norm(hidden))
        hidden = hidden + (2.0 * branch if self.scaled else branch)
        return self.down_proj(self.second_norm(hidden)).add_(hidden)


def watch(block, hidden):
    found = ResidualWatch(block)
    handles = [
        getattr(block, n).register_forward_hook(lambda m, a, out, n=n: found.output(n, out))
        for n in ("o_proj", "down_proj")
    ]
    with torch.no_grad(), found.watching():
        block(hidden)
    for handle in handles:
        handle.remove()
    return found.sources()


def test_residual_is_found_as_the_input_of_the_norm_before():
    block = Block()
    sources = watch(block, torch.randn(1, 3, 8))
    assert {name: (source.module, source.key) for name, source in sources.items()} == {
        "o_proj": (block.first_norm, 0),
        "down_proj": (block.second_norm, 0),
    }
    assert not any(m._forward_pre_hooks for m in block.modules())


def test_residual_of_a_changed_output_is_unknown():
    assert set(watch(Block(scaled=True), torch.randn(1, 3, 8))) == {"down_proj"}


def test_arguments_are_read_at_every_call_and_no_longer():
    block = Block()
    sources = watch(block, torch.randn(1, 3, 8))
    kept = {}
    hidden = torch.randn(1, 3, 8)
    with torch.no_grad(), read_arguments(sources, lambda source, value: kept.__setitem__(source, value.clone())):
        block(hidden)
    with torch.no_grad():
        block(torch.zeros(1, 3, 8))
        assert torch.equal(kept[sources["o_proj"]], hidden)
        torch.testing.assert_close(kept[sources["down_proj"]], hidden + block.o_proj(block.first_norm(hidden)))


class Recorder:
    """Goes on through other weights, and keeps what the pass gathers."""

    def __init__(self, linears, modalities):
        self.linears, self.modalities = linears, modalities
        self.index = 0
        self.statistics = {}
        self.arrivals = {}

    def enter(self, index):
        self.index = index

    def solve(self, names, arrivals):
        pairs = pair_streams(arrivals, self.modalities)
        self.statistics[names] = HessianPass().collect(names[0], pairs, torch.device("cpu"))
        self.arrivals[names] = arrivals
        return {n: 0.9 * self.linears[self.index][n].weight for n in names}

    def miss(self, names):
        raise AssertionError(f"no token reached {names}")

    def leave(self, index, drift):
        pass


@pytest.fixture
def llama(request):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.2, **sizes)).eval()


def test_lockstep_hands_over_what_each_stream_adds_the_output_to(llama):
    samples = [{"input_ids": torch.arange(1 + i, 13 + i)[None]} for i in range(3)]
    linears = [
        {f"model.layers.{i}.{n}": m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        for i, layer in enumerate(llama.model.layers)
    ]
    recorder = Recorder(linears, [token_modalities(s, llama.config) for s in samples])
    Lockstep(llama, list(llama.model.layers), linears, samples, two_streams=True).run(recorder)
    with torch.no_grad():
        wanted = llama(**samples[1], output_hidden_states=True).hidden_states
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.o_proj"
        given = {a.stream: a.residual for a in recorder.arrivals[(name,)] if a.sample == 1}
        torch.testing.assert_close(given[DENSE], wanted[layer])
    stacked = tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv")
    assert recorder.statistics[stacked].residual is None
    # what the second layer's o_proj learns is the sum over tokens of the difference times its input
    name = ("model.layers.1.self_attn.o_proj",)
    pairs = pair_streams(recorder.arrivals[name], recorder.modalities)
    found = recorder.statistics[name]
    naive = sum(p.residual.T @ p.quantized for p in pairs)
    scale = float(found.hessian.diagonal().mean()) / float(sum((p.quantized**2).sum() for p in pairs) / 32)
    torch.testing.assert_close(found.residual, naive * scale, rtol=1e-4, atol=1e-5)
    assert float(found.residual.abs().max()) > 0
    # nothing has come apart yet where the first layer adds
    assert float(recorder.statistics[("model.layers.0.self_attn.o_proj",)].residual.abs().max()) == 0.0


def test_one_stream_has_no_residuals(llama):
    samples = [{"input_ids": torch.arange(1, 13)[None]}]
    linears = [
        {f"model.layers.{i}.{n}": m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        for i, layer in enumerate(llama.model.layers)
    ]
    recorder = Recorder(linears, [token_modalities(s, llama.config) for s in samples])
    Lockstep(llama, list(llama.model.layers), linears, samples, two_streams=False).run(recorder)
    assert all(a.residual is None for arrivals in recorder.arrivals.values() for a in arrivals)
