import ast
import copy
import warnings
import weakref

import pytest
import torch
from torch import nn

from optimum_sab.calibration.blocks.measured import block_significance
from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.pipeline import binarize
from optimum_sab.calibration.run import Silent
from optimum_sab.calibration.statistics import passes
from optimum_sab.calibration.statistics.hessian import HessianPass
from optimum_sab.calibration.statistics.passes import register_pass
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.solver import solve
from optimum_sab.errors import CalibrationError, ConfigError, NonFiniteError, SABWarning, SampleError
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.selection import select_linears

QUICK = LayerSettings(block_size=32, iterations=2)
QKV = tuple(f"self_attn.{n}_proj" for n in "qkv")
GROUPS = (QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))

pytestmark = pytest.mark.filterwarnings("ignore::optimum_sab.errors.SABWarning")


@pytest.fixture
def llama(build):
    return build("llama")


@pytest.fixture
def watched(monkeypatch):
    """A registered pass "watched" that is the Hessian pass and keeps what it was given and what it made of it."""
    monkeypatch.setattr(passes, "PASSES", dict(passes.PASSES))
    seen = {}

    @register_pass("watched")
    class Watched(HessianPass):
        def collect(self, name, inputs, device):
            seen[name] = (list(inputs), statistics := super().collect(name, inputs, device))
            return statistics

    return seen


class Told(Silent):
    """Hands every block on."""

    def __init__(self, on_block):
        self.on_block = on_block


def quantize(subject, settings=QUICK, dense=(), dynamic=None, progress=None, **options):
    selection = select_linears(subject.model, settings, dense, dynamic)
    options = RunOptions(**{"temperature_scaling": False, **options})
    return binarize(subject.model, selection, subject.samples, options, progress)


def packed_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SABLinear)}


@torch.no_grad()
def plain_inputs(subject, names):
    """Input rows of these modules, all samples in a row, in an ordinary forward."""
    found = {name: [] for name in names}
    handles = [
        subject.model.get_submodule(name).register_forward_pre_hook(lambda m, args, n=name: found[n].append(args[0][0]))
        for name in names
    ]
    for sample in subject.samples:
        subject.model(**sample, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


@torch.no_grad()
def last_hidden(subject):
    """Outputs of the last block, all samples in a row."""
    rows = []
    handle = subject.blocks[-1].register_forward_hook(
        lambda m, args, out: rows.append((out[0] if isinstance(out, tuple) else out)[0])
    )
    for sample in subject.samples:
        subject.model(**sample, use_cache=False)
    handle.remove()
    return torch.cat(rows)


# -- what is replaced ---------------------------------------------------------------------------------------------


@pytest.mark.compat
def test_binarize_replaces_the_selected_linears_and_nothing_else(subject):
    names = [name for block in subject.linears for name in block]
    state = {k: v.clone() for k, v in subject.model.state_dict().items()}
    kinds = {name: type(module) for name, module in subject.model.named_modules()}
    quantize(subject)
    assert list(packed_layers(subject.model)) == names
    left = {name: type(module) for name, module in subject.model.named_modules() if name not in names}
    assert left == {name: kind for name, kind in kinds.items() if name not in names}
    for key, tensor in subject.model.state_dict().items():
        if key.rpartition(".")[0] not in names:
            assert torch.equal(tensor, state[key])
    for name, layer in packed_layers(subject.model).items():
        layer.packed.validate(name)
        assert (layer.out_features, layer.in_features) == tuple(state[f"{name}.weight"].shape)
        assert layer.settings == QUICK


def test_binarize_keeps_what_a_rule_leaves_dense(llama):
    before = {n: m.weight.clone() for n, m in llama.model.named_modules() if n.endswith("down_proj")}
    quantize(llama, dense=["down_proj"])
    assert len(packed_layers(llama.model)) == 12
    for name, weight in before.items():
        assert torch.equal(llama.model.get_submodule(name).weight, weight)


def test_binarize_keeps_every_bias(llama):
    biases = {k: v.clone() for k, v in llama.model.state_dict().items() if k.endswith("bias")}
    quantize(llama)
    assert len(biases) == 8
    assert all(torch.equal(llama.model.get_parameter(name), bias) for name, bias in biases.items())
    assert llama.model.model.layers[0].mlp.up_proj.bias is None


@pytest.mark.parametrize("training", [True, False])
def test_binarize_gives_the_training_flag_back(llama, training):
    llama.model.train(training)
    quantize(llama)
    assert {module.training for module in llama.model.modules()} == {training}


@pytest.mark.parametrize("training", [True, False])
def test_binarize_gives_the_training_flag_back_after_an_error(llama, training):
    llama.model.train(training)

    def stop(report, blocks):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quantize(llama, progress=Told(stop))
    assert {module.training for module in llama.model.modules()} == {training}


def test_binarize_switches_dropout_off(build):
    tensors = []
    for training in (False, True):
        subject = build("llama")
        for block in subject.blocks:
            block.self_attn.attention_dropout = 0.5
        subject.model.train(training)
        quantize(subject)
        tensors.append(packed_tensors(subject.model))
    assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())


def test_dense_weights_of_a_block_are_freed_when_it_is_done(llama):
    weights = [[weakref.ref(m.weight) for m in block.values()] for block in llama.linears]
    alive = []
    quantize(llama, progress=Told(lambda *_: alive.append([sum(w() is not None for w in block) for block in weights])))
    assert alive == [[0, 7], [0, 0]]


def test_binarize_twice_refuses_packed_layers(llama):
    quantize(llama)
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn\.q_proj is a SABLinear"):
        quantize(llama)


# -- what the layers hold -----------------------------------------------------------------------------------------


def packed_tensors(model):
    return {f"{n}/{k}": t for n, layer in packed_layers(model).items() for k, t in layer.packed.tensors.items()}


def test_linears_with_one_input_are_solved_as_one_stack_in_calling_order(llama, watched):
    dense = copy.deepcopy(llama.model)
    quantize(llama, calibration_pass="watched")
    for block in range(2):
        for group in GROUPS:
            names = [f"model.layers.{block}.{n}" for n in group]
            members = [dense.get_submodule(n) for n in names]
            _, statistics = watched[names[0]]
            solution = solve(torch.cat([m.weight for m in members]), statistics, QUICK)
            for name, planes in zip(names, solution.planes.split([m.out_features for m in members]), strict=True):
                found = llama.model.get_submodule(name).packed
                expected = PackedWeight.pack(planes, QUICK)
                assert all(torch.equal(found.tensors[k], t) for k, t in expected.tensors.items())
    assert len(watched) == 8


def test_linears_with_one_input_share_their_columns(llama):
    quantize(llama)
    for group in GROUPS:
        layers = [llama.model.get_submodule(f"model.layers.1.{n}") for n in group]
        for other in layers[1:]:
            assert torch.equal(layers[0].col_scale, other.col_scale)
            assert torch.equal(layers[0].residual_index, other.residual_index)
    q, gate = (llama.model.get_submodule(f"model.layers.1.{n}") for n in ("self_attn.q_proj", "mlp.gate_proj"))
    assert not torch.equal(q.col_scale, gate.col_scale)


def test_layer_of_a_stack_approximates_its_own_weight(llama):
    dense = {n: m.weight.clone() for block in llama.linears for n, m in block.items()}
    quantize(llama, LayerSettings(block_size=32, base_planes=2, residual_planes=0, propagation=0.0))
    for name, layer in packed_layers(llama.model).items():
        error = (layer.packed.dequantize() - dense[name]).square().sum() / dense[name].square().sum()
        assert error < 0.35  # 1 for zeros, about 2 for another layer's weight


def test_different_settings_inside_one_group_are_both_honoured(llama, watched):
    dense = copy.deepcopy(llama.model)
    quantize(llama, dynamic={"v_proj": {"base_planes": 2}}, calibration_pass="watched")
    two = QUICK.replace(base_planes=2)
    stem = "model.layers.0.self_attn"
    q, k, v = (llama.model.get_submodule(f"{stem}.{n}_proj") for n in "qkv")
    assert (q.settings, k.settings, v.settings) == (QUICK, QUICK, two)
    assert torch.equal(q.col_scale, k.col_scale)
    _, statistics = watched[f"{stem}.q_proj"]
    alone = solve(dense.get_submodule(f"{stem}.v_proj").weight, statistics, two).planes
    expected = PackedWeight.pack(alone, two).tensors
    assert all(torch.equal(v.packed.tensors[key], tensor) for key, tensor in expected.items())


def test_binarize_is_deterministic(build):
    runs = []
    for _ in range(2):
        subject = build("qwen2_5_vl")
        report = quantize(subject)
        runs.append((packed_tensors(subject.model), [la.error for b in report.blocks for la in b.layers]))
    assert runs[0][1] == runs[1][1]
    assert runs[0][0].keys() == runs[1][0].keys()
    assert all(torch.equal(tensor, runs[1][0][key]) for key, tensor in runs[0][0].items())


@pytest.mark.compat
def test_packed_model_is_the_quantized_stream(subject, watched):
    """Every packed layer's input in an ordinary forward is what the layer was calibrated on."""
    before = last_hidden(subject)
    report = quantize(subject, calibration_pass="watched")
    found = plain_inputs(subject, watched)
    for name, (inputs, _) in watched.items():
        torch.testing.assert_close(torch.cat([p.quantized for p in inputs]), found[name], rtol=1e-4, atol=1e-4)
    after = last_hidden(subject)
    drift = (before - after).square().sum() / before.square().sum()
    assert report.blocks[-1].drift == pytest.approx(float(drift), rel=1e-3)


@pytest.mark.compat
@torch.no_grad()
def test_temperature_is_fitted_to_the_streams_and_stands_in_the_last_norm(build):
    plain, scaled = build("qwen2_5_vl"), build("qwen2_5_vl")
    norm = "model.language_model.norm.weight"
    for subject in (plain, scaled):
        subject.model.lm_head.weight.data.mul_(2.0)
    before = {n: p.clone() for n, p in scaled.model.named_parameters()}
    dense = [scaled.model(**s, use_cache=False).logits.log_softmax(-1) for s in scaled.samples]
    assert quantize(plain).temperature is None
    report = quantize(scaled, temperature_scaling=True)
    after = dict(scaled.model.named_parameters())
    changed = {n for n, p in before.items() if n in after and not torch.equal(p, after[n])}
    assert {n for n in changed if not n.endswith("proj.weight")} == {norm}
    factor = after[norm] / before[norm]
    torch.testing.assert_close(factor, torch.full_like(factor, 1 / report.temperature.value))
    found = []
    for subject in (plain, scaled):
        kl = [
            ((p.exp() * (p - subject.model(**s, use_cache=False).logits.log_softmax(-1))).sum(-1)[0])[text]
            for p, s in zip(dense, subject.samples, strict=True)
            for text in [(s["input_ids"][0] != subject.model.config.image_token_id)]
        ]
        found.append(float(torch.cat(kl).mean()))
    assert report.temperature.before == pytest.approx(found[0], rel=1e-3)
    assert report.temperature.after == pytest.approx(found[1], rel=1e-3)
    assert found[1] < found[0]


def test_one_stream_and_no_head_have_no_temperature(build):
    assert quantize(build("llama"), QUICK.replace(propagation=0.0), temperature_scaling=True).temperature is None
    headless = build("llama")
    headless.model = headless.model.model
    assert quantize(headless, temperature_scaling=True).temperature is None


def test_dense_stream_is_the_model_as_it_was(llama, watched):
    expected = plain_inputs(llama, [f"model.layers.{b}.{group[0]}" for b in range(2) for group in GROUPS])
    quantize(llama, calibration_pass="watched")
    for name, rows in expected.items():
        assert torch.equal(torch.cat([p.dense for p in watched[name][0]]), rows)


@pytest.mark.parametrize(("propagation", "streams"), [(0.0, 1), (0.3, 2)])
def test_dense_stream_runs_only_for_propagation(llama, watched, propagation, streams):
    calls = []
    llama.model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    report = quantize(llama, QUICK.replace(propagation=propagation), calibration_pass="watched")
    assert len(calls) == streams * len(llama.samples)
    assert all((p.dense is not None) == (streams == 2) for inputs, _ in watched.values() for p in inputs)
    assert all((block.drift is not None) == (streams == 2) for block in report.blocks)


def test_modalities_reach_the_statistics(build, watched):
    subject = build("qwen2_5_vl")
    report = quantize(subject, QUICK.replace(significance="modality"), calibration_pass="watched")
    images = sum(int((s["input_ids"] == 60).sum()) for s in subject.samples)
    total = sum(s["input_ids"].numel() for s in subject.samples)
    assert report.tokens == {"text": total - images, "visual": images}
    assert all(statistics.tokens == report.tokens for _, statistics in watched.values())
    (inputs, statistics), ids = (
        watched["model.language_model.layers.0.self_attn.q_proj"],
        [s["input_ids"][0] for s in subject.samples],
    )
    visual = torch.cat([p.quantized[i == 60] for p, i in zip(inputs, ids, strict=True)])
    torch.testing.assert_close(statistics.by_modality["visual"], 2 / images * visual.T @ visual, rtol=1e-4, atol=1e-5)


def test_hessians_of_each_modality_are_kept_where_a_block_begins_and_for_the_significance_map_alone(build, watched):
    report = quantize(build("qwen2_5_vl"), calibration_pass="watched")
    kept = [name for name, (_, statistics) in watched.items() if statistics.by_modality]
    assert kept == [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert len(watched) > len(kept)
    for name, block in zip(kept, report.blocks, strict=True):
        statistics = watched[name][1]
        stack = torch.cat(dense_weights(build("qwen2_5_vl"), name))
        assert block.significance == block_significance(stack, statistics, QUICK.damping)
        assert 0 < block.significance.ratio < 1


def dense_weights(subject, query):
    """Of q, k and v of the block that a query projection is in."""
    stem = query.removesuffix("q_proj")
    return [subject.model.get_submodule(f"{stem}{letter}_proj").weight.detach() for letter in "qkv"]


def test_errors_are_told_by_modality(build):
    report = quantize(build("qwen2_5_vl"))
    for block in report.blocks:
        assert set(block.by_modality) == {"text", "visual"}
        assert all(set(layer.by_modality) == {"text", "visual"} for layer in block.layers)
        assert 0 < block.by_modality["text"] != block.by_modality["visual"] > 0
    assert set(quantize(build("llama")).blocks[0].by_modality) == {"text"}


def test_experts_as_separate_linears_are_binarized_on_their_own_tokens(watched):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

        def forward(self, x):
            choice = x[0, :, 0].gt(0).long() + x[0, :, 1].gt(0).long()
            mixed = x.clone()
            for index, expert in enumerate(self.experts):
                here = choice == index
                if bool(here.any()):
                    mixed[0, here] += expert(x[0, here])
            return mixed

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(500, 32)
            self.layers = nn.ModuleList([Experts(), Experts()])

        def forward(self, input_ids, use_cache):
            x = self.embed(input_ids)
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    model = Model().eval()
    samples = [{"input_ids": torch.randint(0, 500, (1, n))} for n in (40, 60, 50)]
    report = binarize(model, select_linears(model, QUICK), samples, RunOptions(calibration_pass="watched"))
    assert len(packed_layers(model)) == 6
    for index in range(2):
        seen = [sum(watched[f"layers.{index}.experts.{e}"][1].tokens.values()) for e in range(3)]
        assert sum(seen) == 150
        assert min(seen) > 0
    assert report.tokens == {"text": 150}


# -- report -------------------------------------------------------------------------------------------------------


def test_report_describes_every_block_and_layer(llama):
    told = []
    report = quantize(llama, progress=Told(lambda block, blocks: told.append((block, blocks))))
    assert told == [(block, 2) for block in report.blocks]
    assert [block.index for block in report.blocks] == [0, 1]
    names = [[f"model.layers.{b}.{n}" for group in GROUPS for n in group] for b in range(2)]
    assert [[layer.name for layer in block.layers] for block in report.blocks] == names
    assert report.tokens == {"text": 15}
    layers = [layer for block in report.blocks for layer in block.layers]
    for layer in layers:
        module = llama.model.get_submodule(layer.name)
        assert layer.weights == module.in_features * module.out_features
        assert layer.bits_per_weight == module.bits_per_weight
        assert 0.0 < layer.error < 1.0
    bits = sum(m.bits_per_weight * m.in_features * m.out_features for m in packed_layers(llama.model).values())
    assert report.bits_per_weight == pytest.approx(bits / sum(layer.weights for layer in layers))
    assert report.blocks[0].error == pytest.approx(sum(la.error for la in report.blocks[0].layers) / 7)
    assert all(block.drift > 0 and block.seconds > 0 for block in report.blocks)
    assert report.seconds >= sum(block.seconds for block in report.blocks)


def test_report_counts_blocks_by_their_place_in_the_decoder(build):
    subject = build("qwen3_vl")
    report = quantize(subject, dense=["layers.1"])
    assert [block.index for block in report.blocks] == [0, 2]
    assert report.blocks[1].layers[0].name.startswith("model.language_model.layers.2.")


def test_error_of_a_layer_is_that_of_its_output(llama, watched):
    """Without propagation the target is the weight itself, so that the report can be checked by hand."""
    dense = copy.deepcopy(llama.model).requires_grad_(False)
    report = quantize(llama, QUICK.replace(propagation=0.0), calibration_pass="watched")
    for block in report.blocks:
        for layer in block.layers:
            group = next(g for g in GROUPS if layer.name.endswith(g))
            stem = layer.name.split(".self_attn")[0].split(".mlp")[0]
            names = [f"{stem}.{n}" for n in group]
            hessian = watched[names[0]][1].hessian
            weight = torch.cat([dense.get_submodule(n).weight for n in names])
            difference = weight - torch.cat([llama.model.get_submodule(n).packed.dequantize() for n in names])
            expected = (difference @ hessian * difference).sum() / (weight @ hessian * weight).sum()
            assert layer.error == pytest.approx(float(expected), rel=1e-4)


# -- passes by name -----------------------------------------------------------------------------------------------


def test_binarize_uses_the_registered_pass(llama, watched):
    quantize(llama, calibration_pass="watched")
    assert list(watched) == [f"model.layers.{b}.{group[0]}" for b in range(2) for group in GROUPS]


def test_binarize_refuses_an_unknown_pass_before_any_work(llama):
    with pytest.raises(ConfigError, match="calibration_pass='unknown'"):
        quantize(llama, calibration_pass="unknown")
    assert packed_layers(llama.model) == {}


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_named_before_any_work(llama, value):
    with torch.no_grad():
        llama.model.model.layers[1].mlp.down_proj.weight[3, 4] = value
    with pytest.raises(NonFiniteError, match=r"the weight of model\.layers\.1\.mlp\.down_proj holds NaN or inf"):
        quantize(llama)
    assert packed_layers(llama.model) == {}


@pytest.mark.parametrize("name", ["layers.0.self_attn.q_proj.bias", "layers.1.input_layernorm.weight", "norm.weight"])
def test_other_parameter_that_is_not_finite_is_named_before_any_work(llama, name):
    projection = llama.model.model.layers[0].self_attn.q_proj
    projection.bias = torch.nn.Parameter(torch.zeros(projection.out_features))
    with torch.no_grad():
        llama.model.model.get_parameter(name)[1] = float("nan")
    module, _, tensor = name.rpartition(".")
    with pytest.raises(NonFiniteError, match=rf"the {tensor} of model\.{module} holds NaN or inf.*fetch it again"):
        quantize(llama)
    assert packed_layers(llama.model) == {}


@pytest.mark.parametrize(("value", "storage"), [(1e-42, "fp8"), (1e-10, "fp16"), (1e6, "fp16")])
def test_weight_of_a_magnitude_that_is_not_stored_is_named_before_any_work(llama, value, storage):
    with torch.no_grad():
        llama.model.model.layers[1].mlp.down_proj.weight.fill_(value)
    with pytest.raises(ConfigError, match=r"the weight of model\.layers\.1\.mlp\.down_proj has a magnitude of"):
        quantize(llama, QUICK.replace(row_scale=storage))
    assert packed_layers(llama.model) == {}


def test_activation_that_is_not_finite_names_the_linear(llama):
    with torch.no_grad():
        llama.model.model.layers[1].post_attention_layernorm.weight[2] = 3e38
    with pytest.raises(NonFiniteError, match=r"the input of model\.layers\.1\.mlp\.gate_proj holds NaN or inf"):
        quantize(llama)


def test_offloaded_weight_is_named_with_the_remedy(llama):
    llama.model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.up_proj is offloaded.*calibration_device"):
        quantize(llama)


def test_no_samples_is_an_error(llama):
    llama.samples = []
    with pytest.raises(SampleError, match=r"no calibration samples.*calibration='builtin'"):
        quantize(llama)


class Experts(nn.Module):
    """Linears by a router that never asks for the last ``idle`` of them."""

    def __init__(self, used, idle):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(used + idle))
        self.used = used

    def forward(self, x):
        for expert in self.experts[: self.used]:
            x = x + expert(x)
        return x


class Unread(nn.Module):
    """A linear whose weight is read without a call, as state space models do."""

    def __init__(self):
        super().__init__()
        self.inner, self.step = nn.ModuleList(nn.Linear(32, 32) for _ in range(5)), nn.Linear(32, 32)

    def forward(self, x):
        for linear in self.inner:
            x = x + linear(x)
        return x + x @ self.step.weight


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x, use_cache):
        for layer in self.layers:
            x = layer(x)
        return x


def test_linear_that_is_never_called_is_an_error_and_not_a_wrong_model():
    model = Stack(Unread(), Unread())
    remedy = r"modules_to_not_convert=\['layers\.0\.step'\]"
    with pytest.raises(CalibrationError, match=rf"goes through layers\.0\.step, and it is no expert.*{remedy}"):
        binarize(model, select_linears(model, QUICK), [{"x": torch.randn(1, 40, 32)}])


def test_many_idle_experts_are_an_error_whose_remedy_works():
    torch.manual_seed(0)
    model = Stack(Experts(2, 0), Experts(4, 2))
    with pytest.raises(CalibrationError, match=r"2 linears of experts, such as layers\.1\.experts\.4, 33%") as caught:
        binarize(model, select_linears(model, QUICK), [{"x": torch.randn(1, 40, 32)}])
    rules = ast.literal_eval(str(caught.value).partition("modules_to_not_convert=")[2].removesuffix("."))
    model = Stack(Experts(2, 0), Experts(4, 2))
    binarize(model, select_linears(model, QUICK, rules), [{"x": torch.randn(1, 40, 32)}])
    assert len(packed_layers(model)) == 6


def test_few_idle_experts_are_binarized_by_their_weights_with_a_warning():
    torch.manual_seed(0)
    model = Stack(Experts(5, 0), Experts(5, 1))
    dense = model.layers[1].experts[5].weight.detach().clone()
    wanted = r"1 linear of experts, such as layers\.1\.experts\.5.*without data.*\['layers\.1\.experts\.5'\]"
    with pytest.warns(SABWarning, match=wanted):
        report = binarize(model, select_linears(model, QUICK), [{"x": torch.randn(1, 40, 32)}])
    packed = model.layers[1].experts[5].dequantize().weight
    error = float((dense - packed).square().sum() / dense.square().sum())
    assert 0.1 < error < 0.4  # a sign and a scale alone leave 1 − 3/4 of a uniform distribution
    assert report.blocks[1].layers[-1].error == pytest.approx(error, rel=1e-4)


def warned(subject):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize(subject)
    return [str(w.message) for w in caught if issubclass(w.category, SABWarning)]


def test_fewer_tokens_than_inputs_is_warned_of(llama):
    messages = warned(llama)
    assert len(messages) == 1
    assert messages[0].startswith("15 calibration tokens are fewer than the 96 input features of")
    assert "down_proj" in messages[0]


def test_enough_tokens_are_not_warned_of(llama):
    llama.samples = [{"input_ids": torch.randint(2, 60, (1, 96), generator=torch.Generator().manual_seed(0))}]
    assert warned(llama) == []


def test_missing_modality_is_warned_of_by_name(build):
    subject = build("qwen2_5_vl")
    subject.samples = [{"input_ids": torch.randint(2, 60, (1, 96), generator=torch.Generator().manual_seed(0))}]
    messages = warned(subject)
    assert len(messages) == 1
    assert messages[0].startswith("no calibration sample has visual tokens")


def test_samples_with_pictures_are_not_warned_of(build):
    assert not any("visual tokens" in message for message in warned(build("qwen2_5_vl")))
