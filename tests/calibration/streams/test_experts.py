"""Fused experts in the lockstep: what each is given, by token and modality, in both streams."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from optimum_sab.calibration.samples.modality import TokenModalities
from optimum_sab.calibration.statistics.pairing import pair_streams
from optimum_sab.calibration.streams.arrival import DENSE, QUANTIZED
from optimum_sab.calibration.streams.experts import arrivals_by_expert, pooled_arrivals
from optimum_sab.calibration.streams.lockstep import Lockstep
from optimum_sab.nn.experts import SABExperts
from optimum_sab.nn.fused_experts import fused_layout
from tests.nn.fused import EXPERTS, HIDDEN, fused

pytestmark = pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="experts are no one module")

TOP_K = 2


class Block(nn.Module):
    """A linear, then experts behind a router."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(HIDDEN, HIDDEN)
        self.router = nn.Linear(HIDDEN, EXPERTS)
        own = fused("plain", seed=seed)
        self.experts = SABExperts.unfused(own, fused_layout(own))

    def forward(self, x):
        x = x + self.linear(x)
        rows = x.flatten(0, -2)
        weights, chosen = self.router(rows).softmax(-1).topk(TOP_K)
        return x + self.experts(rows, chosen, weights).view_as(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(0), Block(1)])
        self.config = SimpleNamespace()

    def forward(self, x, use_cache=None):
        for layer in self.layers:
            x = layer(x)
        return x


class Recorder:
    """Answers with given weights, and keeps what it is shown of experts."""

    def __init__(self, weights):
        self.weights, self.seen, self.order, self.missed = weights, {}, [], []

    def enter(self, index):
        pass

    def solve(self, names, arrivals):
        self.order.append(names)
        return {name: self.weights[name] for name in names}

    def solve_experts(self, linears, arrivals):
        self.order.append(linears.key)
        self.seen[linears.key] = (linears, list(arrivals))
        return {name: self.weights[name] for name in linears.names.values()}

    def miss(self, names):
        self.missed += names

    def leave(self, index, drift):
        self.drift = drift


def targets(model, without=()):
    return [
        {
            f"layers.{index}.{name}": each
            for name, each in block.named_modules()
            if isinstance(each, nn.Linear) and name != "router" and f"layers.{index}.{name}" not in without
        }
        for index, block in enumerate(model.layers)
    ]


def run(two_streams=True, scale=0.2, without=(), every_token=False):
    model = Model().eval()
    samples = [{"x": torch.randn(1, n, HIDDEN, generator=torch.Generator().manual_seed(n))} for n in (9, 14)]
    linears = targets(model, without)
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: each.weight.detach() + scale * torch.randn(each.weight.shape, generator=generator)
        for block in linears
        for name, each in block.items()
    }
    recorder = Recorder(weights)
    Lockstep(model, list(model.layers), linears, samples, two_streams, every_token=every_token).run(recorder)
    return model, samples, recorder


def plain_inputs(model, samples):
    """By name, sample and expert: the rows a linear is called with in the model's own forward."""
    found = {}
    for index, sample in enumerate(samples):
        hooks = [
            each.register_forward_pre_hook(
                lambda module, args, name=name, index=index: found.__setitem__((name, index), args[0].detach())
            )
            for name, each in model.named_modules()
            if isinstance(each, nn.Linear) and ".experts." in name
        ]
        with torch.no_grad():
            model(**sample)
        for hook in hooks:
            hook.remove()
    return found


def quantized(model, weights):
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight
    return model


def test_each_expert_is_given_what_a_plain_forward_gives_it():
    model, samples, recorder = run()
    for stream, same in ((DENSE, model), (QUANTIZED, quantized(Model().eval(), recorder.weights))):
        wanted = plain_inputs(same, samples)
        found = {}
        for linears, arrivals in recorder.seen.values():
            for name, here in zip(linears.names.values(), (a for _, a in arrivals_by_expert(linears, arrivals))):
                for each in here:
                    if each.stream == stream and not (stream == DENSE and linears.first):
                        found[name, each.sample] = each.inputs
        for key, rows in found.items():
            torch.testing.assert_close(rows, wanted[key], rtol=1e-4, atol=1e-5)
        if stream == QUANTIZED:
            assert found.keys() == wanted.keys()


def test_the_linears_of_one_name_wait_together_and_in_order():
    _, _, recorder = run()
    assert recorder.order == [
        entry
        for index in (0, 1)
        for entry in (
            (f"layers.{index}.linear",),
            f"layers.{index}.experts.*.gate_up_proj",
            f"layers.{index}.experts.*.down_proj",
        )
    ]
    assert recorder.missed == [] and recorder.drift > 0


def test_both_streams_are_paired_by_token_and_never_else():
    _model, samples, recorder = run()
    modalities = [
        TokenModalities(("text", "visual"), torch.arange(sample["x"].shape[1]) % 3 // 2) for sample in samples
    ]
    for linears, arrivals in recorder.seen.values():
        dense = {a.sample: a.given for a in arrivals if a.stream == DENSE}
        for expert, (_, here) in zip(linears.names, arrivals_by_expert(linears, arrivals)):
            tokens = {a.sample: a.tokens for a in here if a.stream == QUANTIZED}
            for (sample, where), pair in zip(tokens.items(), pair_streams(here, modalities), strict=True):
                assert torch.equal(pair.modalities.labels, modalities[sample].labels[where])
                assert not pair.routed
                given = dense[sample]
                for row, token in enumerate(where.tolist()):
                    if linears.first:
                        wanted = given.inputs[token]
                    else:
                        pairs = (given.routing.token == token) & (given.routing.experts == expert)
                        wanted = given.inputs[pairs][0] if pairs.any() else pair.quantized[row]
                    assert torch.equal(pair.dense[row], wanted)


def test_one_stream_has_no_pairs():
    _, samples, recorder = run(two_streams=False)
    modalities = [TokenModalities(("text",), torch.zeros(s["x"].shape[1], dtype=torch.long)) for s in samples]
    for linears, arrivals in recorder.seen.values():
        for _, here in arrivals_by_expert(linears, arrivals):
            assert all(pair.dense is None for pair in pair_streams(here, modalities))


def test_what_is_pooled_has_every_row_once_and_those_of_one_expert_side_by_side():
    _, samples, recorder = run()
    modalities = [TokenModalities(("text",), torch.zeros(s["x"].shape[1], dtype=torch.long)) for s in samples]
    for linears, arrivals in recorder.seen.values():
        dense = {a.sample: a.given for a in arrivals if a.stream == DENSE}
        mine = {a.sample: a.given for a in arrivals if a.stream == QUANTIZED}
        pairs = pair_streams(pooled_arrivals(linears, arrivals), modalities)
        for (sample, given), pair in zip(mine.items(), pairs, strict=True):
            assert torch.equal(pair.quantized, given.inputs)
            if linears.first:
                assert torch.equal(pair.dense, dense[sample].inputs)
                continue
            theirs = dense[sample].routing
            for row in range(pair.quantized.shape[0]):
                at = (theirs.token == row // TOP_K) & (theirs.experts == given.routing.experts[row])
                wanted = dense[sample].inputs[at][0] if at.any() else pair.quantized[row]
                assert torch.equal(pair.dense[row], wanted)


def test_an_expert_that_stays_dense_is_not_asked_for():
    without = {"layers.0.experts.1.gate_up_proj", "layers.0.experts.3.down_proj"}
    _model, samples, recorder = run(without=without)
    assert not without & {name for linears, _ in recorder.seen.values() for name in linears.names.values()}
    with torch.no_grad():
        wanted = plain_inputs(quantized(Model().eval(), recorder.weights), samples)
    linears, arrivals = recorder.seen["layers.1.experts.*.gate_up_proj"]
    for name, here in arrivals_by_expert(linears, arrivals):
        for each in here:
            if each.stream == QUANTIZED:
                torch.testing.assert_close(each.inputs, wanted[name, each.sample], rtol=1e-4, atol=1e-5)


def test_all_tokens_can_be_shown_to_every_expert():
    model, samples, recorder = run(every_token=True)
    _, _, routed = run()
    with torch.no_grad():
        both = {DENSE: model, QUANTIZED: quantized(Model().eval(), recorder.weights)}
        for key, (linears, arrivals) in recorder.seen.items():
            given = {(a.sample, a.stream): a.given.inputs for a in arrivals}
            wanted = {(a.sample, a.stream): a.given.inputs for a in routed.seen[key][1]}
            assert all(torch.equal(rows, wanted[who]) for who, rows in given.items())  # the model is the same
            for expert, (_, here) in zip(linears.names, arrivals_by_expert(linears, arrivals)):
                for each in here:
                    assert torch.equal(each.tokens, torch.arange(samples[each.sample]["x"].shape[1]))
                    before = f"{linears.key.partition('.*')[0]}.*.gate_up_proj"
                    first = next(
                        a for a in recorder.seen[before][1] if (a.sample, a.stream) == (each.sample, each.stream)
                    )
                    rows = first.given.inputs
                    if not linears.first:
                        module = both[each.stream].get_submodule(linears.key.partition(".*")[0])
                        rows = module.between(module.linear(expert, "gate_up_proj")(rows))
                    torch.testing.assert_close(each.inputs, rows, rtol=1e-4, atol=1e-5)
