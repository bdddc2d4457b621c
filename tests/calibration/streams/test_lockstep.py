import copy
import sys

import pytest
import torch
from torch import nn

from optimum_sab.calibration.streams.arrival import DENSE, QUANTIZED
from optimum_sab.calibration.streams.lockstep import Lockstep
from optimum_sab.errors import LockstepError, MissingDependencyError


class Recorder:
    """Answers with given weights and keeps what it was shown."""

    def __init__(self, weights):
        self.weights = weights
        self.inputs = {}
        self.calls = []
        self.drift = []
        self.states = []

    def enter(self, index):
        self.calls.append(("enter", index))

    def solve(self, names, arrivals):
        self.calls.append(("solve", names))
        self.states.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        for arrival in arrivals:
            for name in names:
                key = (name, arrival.sample, arrival.stream)
                assert key not in self.inputs
                self.inputs[key] = arrival.inputs.clone()
        return {name: self.weights[name] for name in names}

    def miss(self, names):
        self.calls.append(("miss", tuple(names)))

    def leave(self, index, drift):
        self.calls.append(("leave", index))
        self.drift.append(drift)

    @property
    def groups(self):
        return [payload for kind, payload in self.calls if kind == "solve"]


def run_pass(subject, visitor, two_streams=True, **options):
    Lockstep(subject.model, subject.blocks, subject.linears, subject.samples, two_streams, **options).run(visitor)
    return visitor


def dense_weights(subject):
    return {name: linear.weight.detach() for block in subject.linears for name, linear in block.items()}


def perturbed_weights(subject, scale=0.1):
    generator = torch.Generator().manual_seed(7)
    return {
        name: weight + scale * torch.randn(weight.shape, generator=generator)
        for name, weight in dense_weights(subject).items()
    }


def with_weights(subject, weights):
    other = copy.deepcopy(subject)
    for name, weight in weights.items():
        other.model.get_submodule(name).weight = nn.Parameter(weight.clone())
    return other


@torch.no_grad()
def plain_inputs(subject):
    """Inputs of every decoder linear by (name, sample), recorded by hooks in ordinary forwards."""
    found = {}
    handles = []
    for name in dense_weights(subject):

        def hook(module, args, name=name):
            found[name, current[0]] = args[0].clone()

        handles.append(subject.model.get_submodule(name).register_forward_pre_hook(hook))
    for index, sample in enumerate(subject.samples):
        current = [index]
        subject.model(**sample, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def block_outputs(subject):
    """Outputs of every block by (block, sample)."""
    found = {}
    handles = []
    for position, block in enumerate(subject.blocks):

        def hook(module, args, output, position=position):
            found[position, current[0]] = (output[0] if isinstance(output, tuple) else output).clone()

        handles.append(block.register_forward_hook(hook))
    for index, sample in enumerate(subject.samples):
        current = [index]
        subject.model(**sample, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def logits(subject):
    return [subject.model(**sample, use_cache=False).logits for sample in subject.samples]


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def of_stream(recorder, stream):
    return {(name, sample): x for (name, sample, s), x in recorder.inputs.items() if s == stream}


# -- Transformers models ------------------------------------------------------------------------------------------


@pytest.mark.compat
def test_lockstep_with_dense_weights_shows_both_streams_the_plain_forward(subject):
    before, expected = logits(subject), plain_inputs(subject)
    recorder = run_pass(subject, Recorder(dense_weights(subject)))
    assert same(of_stream(recorder, DENSE), expected)
    assert same(of_stream(recorder, QUANTIZED), expected)
    assert recorder.drift == [0.0] * len(subject.blocks)
    assert all(torch.equal(a, b) for a, b in zip(before, logits(subject), strict=True))


@pytest.mark.compat
def test_lockstep_with_new_weights_shows_each_stream_its_own_model(subject):
    weights = perturbed_weights(subject)
    other = with_weights(subject, weights)
    recorder = run_pass(subject, Recorder(weights))
    assert same(of_stream(recorder, DENSE), plain_inputs(subject))
    assert same(of_stream(recorder, QUANTIZED), plain_inputs(other))


def test_lockstep_with_one_stream_runs_only_the_quantized_one(subject):
    weights = perturbed_weights(subject)
    recorder = run_pass(subject, Recorder(weights), two_streams=False)
    assert of_stream(recorder, DENSE) == {}
    assert same(of_stream(recorder, QUANTIZED), plain_inputs(with_weights(subject, weights)))
    assert recorder.drift == [None] * len(subject.blocks)


@pytest.mark.parametrize(("two_streams", "streams"), [(True, 2), (False, 1)])
def test_lockstep_runs_one_forward_per_sample_and_stream(subject, two_streams, streams):
    counts = {subject.embedding: 0, subject.tower: 0}
    for name in filter(None, counts):

        def hook(*_, name=name):
            counts[name] += 1

        subject.model.get_submodule(name).register_forward_hook(hook)
    run_pass(subject, Recorder(dense_weights(subject)), two_streams)
    assert counts[subject.embedding] == streams * len(subject.samples)
    assert counts[subject.tower] == streams * len(subject.pictured)


def test_lockstep_groups_linears_by_shared_input_in_calling_order(subject):
    recorder = run_pass(subject, Recorder(dense_weights(subject)))
    expected = []
    for index, linears in enumerate(subject.linears):
        stem = next(iter(linears)).partition(".self_attn")[0]
        expected += [
            ("enter", index),
            ("solve", tuple(f"{stem}.self_attn.{n}_proj" for n in "qkv")),
            ("solve", (f"{stem}.self_attn.o_proj",)),
            ("solve", (f"{stem}.mlp.gate_proj", f"{stem}.mlp.up_proj")),
            ("solve", (f"{stem}.mlp.down_proj",)),
            ("leave", index),
        ]
    assert recorder.calls == expected


def test_lockstep_reports_the_drift_between_the_streams(build):
    subject = build("qwen3_vl")
    weights = perturbed_weights(subject)
    recorder = run_pass(subject, Recorder(weights))
    dense, quantized = block_outputs(subject), block_outputs(with_weights(subject, weights))
    for index, drift in enumerate(recorder.drift):
        keys = [(index, sample) for sample in range(len(subject.samples))]
        above = sum((dense[k] - quantized[k]).square().sum() for k in keys)
        below = sum(dense[k].square().sum() for k in keys)
        assert drift == pytest.approx(float(above / below), rel=1e-5)
        assert drift > 0.0


def test_lockstep_works_on_the_linears_it_is_given_only(build):
    subject = build("llama")
    kept = [{n: m for n, m in block.items() if "mlp" in n} for block in subject.linears]
    weights = perturbed_weights(subject)
    chosen = {n: w for n, w in weights.items() if "mlp" in n}
    recorder = Recorder(weights)
    Lockstep(subject.model, subject.blocks, kept, subject.samples, True).run(recorder)
    expected = plain_inputs(with_weights(subject, chosen))
    assert same(of_stream(recorder, QUANTIZED), {k: x for k, x in expected.items() if "mlp" in k[0]})


def test_lockstep_runs_through_the_blocks_that_are_not_targets(build):
    subject = build("qwen3_vl")
    weights = perturbed_weights(subject)
    names = list(subject.linears[1])
    recorder = Recorder(weights)
    Lockstep(subject.model, subject.blocks[1:2], subject.linears[1:2], subject.samples, True).run(recorder)
    other = with_weights(subject, {n: weights[n] for n in names})
    assert same(of_stream(recorder, QUANTIZED), {k: x for k, x in plain_inputs(other).items() if k[0] in names})


def test_lockstep_is_not_disturbed_by_a_model_that_collects_hidden_states(build):
    subject = build("llama")
    subject.model.config.output_hidden_states = True
    expected = plain_inputs(subject)
    recorder = run_pass(subject, Recorder(dense_weights(subject)))
    assert same(of_stream(recorder, QUANTIZED), expected)
    with torch.no_grad():
        states = subject.model(**subject.samples[0]).hidden_states
    assert len(states) == len(subject.blocks) + 1


def test_lockstep_brings_each_block_to_the_device_and_back_once(build, monkeypatch):
    subject = build("llava")
    moves = []
    for index, block in enumerate(subject.blocks):
        monkeypatch.setattr(block, "to", lambda device, index=index: moves.append((index, str(device))))
    expected = plain_inputs(subject)
    # not equal to the parameters' "cpu", and yet the same place: what comes back can be compared bit for bit
    recorder = run_pass(subject, Recorder(dense_weights(subject)), device=torch.device("cpu:0"))
    assert same(of_stream(recorder, QUANTIZED), expected)
    assert moves == [(0, "cpu:0"), (0, "cpu"), (1, "cpu:0"), (1, "cpu")]


@pytest.mark.gpu
def test_lockstep_moves_one_block_at_a_time_to_the_device(build):
    subject = build("qwen3_vl")
    subject.model.double()  # so that both devices agree to a tolerance that a wrong input would miss
    for sample in subject.samples:
        if "pixel_values" in sample:
            sample["pixel_values"] = sample["pixel_values"].double()
    expected = plain_inputs(subject)
    device = torch.device("cuda", torch.cuda.current_device())
    places = []

    class Watcher(Recorder):
        def enter(self, index):
            places.append([next(b.parameters()).device.type for b in subject.blocks])

    weights = {n: w.to(device) for n, w in dense_weights(subject).items()}
    recorder = run_pass(subject, Watcher(weights), device=device)
    assert {x.device for x in recorder.inputs.values()} == {device}
    for (name, sample, _), found in recorder.inputs.items():
        torch.testing.assert_close(found.cpu(), expected[name, sample], rtol=1e-9, atol=1e-9)
    assert places == [["cpu"] * len(subject.blocks)] * len(subject.blocks)
    assert {p.device.type for p in subject.model.parameters()} == {"cpu"}


# -- toys: the paths that no Transformers model above takes ---------------------------------------------------------


class Block(nn.Module):
    """Two linears; the second reads the first's output."""

    def __init__(self, width=8):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


class Toy(nn.Module):
    """Blocks in a row; counts the forwards that were begun and those that were left."""

    def __init__(self, *blocks):
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.begun = self.left = 0

    def forward(self, x, use_cache=False, **options):
        self.begun += 1
        try:
            return self.route(x, **options)
        finally:
            self.left += 1

    def route(self, x):
        for block in self.layers:
            x = block(x)
        return x


class ToySubject:
    """A toy with its samples, in the shape of the other subjects."""

    def __init__(self, model, samples):
        self.model, self.samples = model.eval(), samples
        self.blocks = tuple(model.layers)
        self.linears = [
            {f"layers.{i}.{n}": m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
            for i, block in enumerate(model.layers)
        ]


def toy(model=None, options=({}, {}), tokens=(5, 3)):
    torch.manual_seed(0)
    model = Toy(Block(), Block()) if model is None else model
    samples = [{"x": torch.randn(1, n, 8), **more} for n, more in zip(tokens, options, strict=True)]
    return ToySubject(model, samples)


class AutocastToy(Toy):
    """Samples may ask for autocast, and for gradients, around the blocks."""

    def route(self, x, autocast=False, grad=False):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            x = super().route(x)
            self.seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return x

    seen: list


class NarrowBlock(Block):
    """No residual: under autocast its output, and so the next block's input, is bfloat16."""

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("block", [Block, NarrowBlock])
@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_autocast_of_one_sample_does_not_leak_into_another(order, block):
    torch.manual_seed(0)
    subject = toy(AutocastToy(block(), block()), [{"autocast": on} for on in order])
    subject.model.seen = []
    expected = plain_inputs(subject)
    recorder = run_pass(subject, Recorder(dense_weights(subject)))
    assert same(of_stream(recorder, DENSE), expected)
    assert same(of_stream(recorder, QUANTIZED), expected)
    assert {x.dtype for x in expected.values()} == {torch.bfloat16, torch.float32}
    assert not any(autocast for _, autocast in recorder.states)
    assert not torch.is_autocast_enabled("cpu")


def test_grad_mode_of_one_sample_does_not_leak_into_another():
    subject = toy(AutocastToy(Block(), Block()), [{"grad": True}, {"grad": False}])
    subject.model.seen = []
    modes = []
    for block in subject.blocks:
        block.second.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    recorder = run_pass(subject, Recorder(dense_weights(subject)))
    assert not any(grad for grad, _ in recorder.states)
    assert torch.is_grad_enabled()
    # per block: the probe (sample 0, in its own mode), then each coroutine: sample 0 twice, sample 1 twice
    assert modes == [True, True, True, False, False] * 2


@pytest.mark.parametrize("fails", [False, True])
def test_autocast_of_the_caller_is_what_it_was(fails):
    subject = toy(AutocastToy(Block(), Block()), [{"autocast": False}, {"autocast": True}])
    with torch.autocast("cpu", dtype=torch.float16):
        if fails:
            with pytest.raises(ZeroDivisionError):
                run_pass(subject, Failing(dense_weights(subject), at=1))
        else:
            subject.model.seen = []
            run_pass(subject, Recorder(dense_weights(subject)))
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.float16
        assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


class Failing(Recorder):
    """Fails at its n-th group."""

    def __init__(self, weights, at):
        super().__init__(weights)
        self.at = at

    def solve(self, names, arrivals):
        if len(self.groups) == self.at:
            raise ZeroDivisionError
        return super().solve(names, arrivals)


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_error_of_the_visitor_leaves_the_model_as_it_was(at):
    subject = toy()
    before = [subject.model(**s) for s in subject.samples]
    subject.model.begun = subject.model.left = 0
    with pytest.raises(ZeroDivisionError):
        run_pass(subject, Failing(perturbed_weights(subject), at))
    assert subject.model.begun == subject.model.left == 4
    assert all(torch.equal(subject.model(**s), b) for s, b in zip(subject.samples, before, strict=True))
    assert not any("forward" in module.__dict__ for module in subject.model.modules())
    assert torch.is_grad_enabled()


def test_error_of_the_model_comes_through_and_ends_every_coroutine():
    class Breaking(Toy):
        def route(self, x, fail=False):
            x = self.layers[0](x)
            if fail:
                raise ZeroDivisionError
            return self.layers[1](x)

    subject = toy(Breaking(Block(), Block()), [{}, {"fail": True}])
    with pytest.raises(ZeroDivisionError):
        run_pass(subject, Recorder(dense_weights(subject)))
    assert subject.model.left == subject.model.begun == 4
    assert not any("forward" in module.__dict__ for module in subject.model.modules())


def test_autocast_that_a_failing_model_set_by_hand_is_taken_back():
    class Breaking(Toy):
        def route(self, x):
            x = self.layers[0](x)
            torch.set_autocast_enabled("cpu", True)
            raise ZeroDivisionError

    subject = toy(Breaking(Block(), Block()))
    with pytest.raises(ZeroDivisionError):
        run_pass(subject, Recorder(dense_weights(subject)))
    assert not torch.is_autocast_enabled("cpu")


def test_pass_ends_every_coroutine_when_all_is_well():
    subject = toy()
    run_pass(subject, Recorder(dense_weights(subject)))
    assert subject.model.begun == subject.model.left == 4
    assert not any("forward" in module.__dict__ for module in subject.model.modules())


@pytest.mark.parametrize("fails", [False, True])
def test_forward_that_was_patched_before_is_put_back(fails):
    subject = toy()
    block, linear = subject.blocks[0], subject.blocks[0].first
    originals = {module: module.forward for module in (block, linear)}
    patched = {
        module: lambda *args, original=original, **kwargs: original(*args, **kwargs)
        for module, original in originals.items()
    }
    for module, forward in patched.items():
        module.forward = forward
    if fails:
        with pytest.raises(ZeroDivisionError):
            run_pass(subject, Failing(dense_weights(subject), 2))
    else:
        run_pass(subject, Recorder(dense_weights(subject)))
    assert all(module.forward is forward for module, forward in patched.items())


def test_linear_called_by_keyword_is_paused_at_as_well():
    class Keyword(Block):
        def forward(self, x):
            return x + self.second(input=torch.tanh(self.first(input=x)))

    subject = toy(Toy(Keyword(), Keyword()))
    recorder = run_pass(subject, Recorder(dense_weights(subject)))
    assert len(recorder.groups) == 4


def test_views_of_one_tensor_are_different_inputs():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.all, self.few, self.turned, self.again = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            few = self.few(x[:, :3]).sum(1, keepdim=True)
            return self.all(x) + few + self.turned(x.transpose(1, 2)) + self.again(x.view(1, 8, 8))

    subject = toy(Toy(Views()), tokens=(8, 8))
    recorder = run_pass(subject, Recorder(dense_weights(subject)))
    assert recorder.groups == [("layers.0.few",), ("layers.0.all", "layers.0.again"), ("layers.0.turned",)]
    expected = plain_inputs(subject)
    assert same(of_stream(recorder, DENSE), expected)


class Skipping(Toy):
    """A sample may take another way through the blocks."""

    def route(self, x, order=(0, 1, 2)):
        for index in order:
            x = self.layers[index](x)
        return x


@pytest.mark.parametrize(
    ("order", "place"),
    [
        ((0, 0, 1, 2), "block 0 while the others enter decoder block 1"),
        ((0, 1, 0, 2), "block 0 while the others enter decoder block 2"),
    ],
)
def test_sample_that_comes_back_to_a_block_is_named(order, place):
    torch.manual_seed(0)
    subject = toy(Skipping(Block(), Block(), Block()), [{}, {"order": order}])
    with pytest.raises(LockstepError, match=f"sample 1 is at {place}"):
        run_pass(subject, Recorder(dense_weights(subject)))
    assert subject.model.begun == subject.model.left


@pytest.mark.parametrize("two_streams", [True, False])
@pytest.mark.parametrize("order", [(1, 2), (0, 2), (0, 1), (2,), ()])
def test_sample_whose_way_leads_past_a_block_waits_behind_it(order, two_streams):
    torch.manual_seed(0)
    subject = toy(Skipping(Block(), Block(), Block()), [{}, {"order": order}])
    recorder = run_pass(subject, Recorder(dense_weights(subject)), two_streams=two_streams)
    found = of_stream(recorder, QUANTIZED)
    assert same(found, plain_inputs(subject))
    for block in range(3):
        came = {sample for name, sample in found if name == f"layers.{block}.first"}
        assert came == ({0, 1} if block in order else {0})


def test_block_that_no_sample_comes_to_is_told():
    torch.manual_seed(0)
    subject = toy(Skipping(Block(), Block(), Block()), [{"order": (0, 2)}, {"order": (0, 2)}])
    recorder = run_pass(subject, Recorder(dense_weights(subject)))
    assert ("miss", ("layers.1.first", "layers.1.second")) in recorder.calls


def test_linear_that_is_called_twice_is_named():
    class Twice(Block):
        def forward(self, x):
            return self.second(self.second(self.first(x)))

    subject = toy(Toy(Block(), Twice()))
    with pytest.raises(LockstepError, match=r"layers\.1\.second is called more than once.*modules_to_not_convert"):
        run_pass(subject, Recorder(dense_weights(subject)))


def test_linear_that_no_sample_reaches_is_told_before_its_block_ends():
    class Idle(Block):
        def forward(self, x):
            return x + self.first(x)

    subject = toy(Toy(Block(), Idle()))
    recorder = run_pass(subject, Recorder(dense_weights(subject)))
    assert recorder.calls[-3:] == [("solve", ("layers.1.first",)), ("miss", ("layers.1.second",)), ("leave", 1)]
    assert [call for call in recorder.calls if call[0] == "miss"] == recorder.calls[-2:-1]


def test_route_that_comes_back_to_a_binarized_linear_is_named():
    class Either(Block):
        """Positive sums go through the first linear, then the second; others the other way round."""

        def forward(self, x):
            first, second = (self.first, self.second) if x.sum() > 0 else (self.second, self.first)
            return x + second(torch.tanh(first(x)))

    subject = toy(Toy(Either()))
    subject.samples = [{"x": torch.ones(1, 2, 8)}, {"x": -torch.ones(1, 2, 8)}]
    with pytest.raises(LockstepError, match=r"reaches layers\.0\.first after it was binarized"):
        run_pass(subject, Recorder(dense_weights(subject)))


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.down(torch.relu(self.gate(x)) * self.up(x))


class Mixture(nn.Module):
    """Every token goes to the expert its router prefers.

    Args:
        call_all: call experts that no token chose too, with no tokens.
    """

    def __init__(self, call_all, experts=3):
        super().__init__()
        self.call_all = call_all
        self.router = nn.Linear(8, experts)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))

    def forward(self, x):
        rows = x.flatten(0, -2)
        choice = self.router(rows).argmax(-1)
        mixed = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            here = choice == index
            if self.call_all or bool(here.any()):
                mixed[here] = expert(rows[here])
        return x + mixed.view_as(x)


def mixture(call_all):
    """Sample 0 reaches one expert only, so that the probe does not know the others' groups."""
    torch.manual_seed(0)
    model = Toy(Mixture(call_all), Mixture(call_all))
    subject = ToySubject(model, [{"x": torch.randn(1, n, 8)} for n in (1, 12, 9)])
    return subject


@pytest.mark.parametrize("call_all", [False, True])
def test_experts_see_what_a_plain_forward_routes_to_them(call_all):
    subject = mixture(call_all)
    weights = perturbed_weights(subject, 0.02)
    recorder = run_pass(subject, Recorder(weights))
    plain = {DENSE: plain_inputs(subject), QUANTIZED: plain_inputs(with_weights(subject, weights))}
    for stream, expected in plain.items():
        found = {k: x for k, x in of_stream(recorder, stream).items() if x.numel()}
        assert same(found, {k: x for k, x in expected.items() if x.numel()})
    reached = {name for name, _ in of_stream(recorder, QUANTIZED)}
    assert reached == set(dense_weights(subject))


@pytest.mark.parametrize("call_all", [False, True])
def test_expert_that_no_token_chooses_is_missed_and_not_solved(call_all):
    subject = mixture(call_all)
    with torch.no_grad():
        subject.blocks[1].router.bias[2] = -1e3
    recorder = run_pass(subject, Recorder(dense_weights(subject)))
    idle = tuple(f"layers.1.experts.2.{name}" for name in ("gate", "up", "down"))
    assert [names for kind, names in recorder.calls if kind == "miss"] == [idle]
    assert not set(idle) & {name for group in recorder.groups for name in group}


@pytest.mark.parametrize("call_all", [False, True])
def test_expert_that_the_dense_stream_alone_reaches_is_missed(call_all):
    class Lift(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return x + self.linear(x)

    class HighAndLow(nn.Module):
        """The second expert takes high tokens."""

        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x):
            out = x + 0.01 * self.experts[0](x)
            here = x.mean(-1) > 5
            if call_all or bool(here.any()):
                out = out.clone()
                out[here] += self.experts[1](x[here])
            return out

    subject = toy(Toy(Lift(), HighAndLow()))
    with torch.no_grad():
        subject.blocks[0].linear.weight.zero_()
        subject.blocks[0].linear.weight[:, 0] = 100.0
        for sample in subject.samples:
            sample["x"][..., 0] = 1.0
    weights = dense_weights(subject) | {"layers.0.linear": torch.zeros(8, 8)}
    recorder = run_pass(subject, Recorder(weights))
    assert [names for kind, names in recorder.calls if kind == "miss"] == [("layers.1.experts.1",)]
    assert ("layers.1.experts.1",) not in recorder.groups


@pytest.mark.parametrize("call_all", [False, True])
def test_fewer_rows_than_entered_the_block_are_told_where_tokens_are_routed(call_all):
    routed = {}

    class Watcher(Recorder):
        def solve(self, names, arrivals):
            for arrival in arrivals:
                routed[names[0], arrival.sample, arrival.stream] = (arrival.rows < arrival.entered, arrival.rows)
            return super().solve(names, arrivals)

    subject = mixture(call_all)
    run_pass(subject, Watcher(dense_weights(subject)))
    lengths = [s["x"].shape[1] for s in subject.samples]
    for (name, sample, _), (is_routed, rows) in routed.items():
        assert is_routed == (rows != lengths[sample])
        assert not (is_routed and name.endswith("router"))
    assert {is_routed for is_routed, _ in routed.values()} == {False, True}


def test_missing_greenlet_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "greenlet", None)
    subject = toy()
    with pytest.raises(MissingDependencyError, match=r"pip install 'optimum-sab\[quantize\]'"):
        run_pass(subject, Recorder(dense_weights(subject)))


class TwiceToy(nn.Module):
    """A model that goes through all its blocks twice."""

    def __init__(self, *blocks):
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x, use_cache=False):
        for _ in range(2):
            for block in self.layers:
                x = block(x)
        return x


def test_model_that_loops_over_its_blocks_is_an_error():
    subject = toy(TwiceToy(Block(), Block()), [{}, {}])
    with pytest.raises(LockstepError, match="again after the last decoder block"):
        run_pass(subject, Recorder(dense_weights(subject)))


class Cache:
    """Adds to what it holds at every call, as Transformers' caches do."""

    def __init__(self):
        self.held = []

    def update(self, rows):
        self.held.append(rows)
        return torch.cat(self.held, dim=1)

    def get_seq_length(self):
        return sum(rows.shape[1] for rows in self.held)


class CachingBlock(Block):
    def forward(self, x, cache):
        before = cache.update(self.first(x))
        return x + self.second(torch.tanh(before.sum(1, keepdim=True) + x))


class Caching(Toy):
    """Makes caches of its own, whatever it is asked, as a decoder does whose action expert reads them."""

    def route(self, x):
        for block in self.layers:
            x = block(x, cache=Cache())
        return x


@pytest.mark.parametrize("two_streams", [True, False])
def test_block_that_adds_to_a_cache_is_tried_with_a_copy_of_it(two_streams):
    torch.manual_seed(0)
    subject = toy(Caching(CachingBlock(), CachingBlock()))
    recorder = run_pass(subject, Recorder(dense_weights(subject)), two_streams=two_streams)
    assert same(of_stream(recorder, QUANTIZED), plain_inputs(subject))
