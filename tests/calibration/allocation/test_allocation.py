import copy
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_sab.calibration.allocation.choice import allocate as choose
from optimum_sab.calibration.allocation.ladder import ANCHORS, LADDER, expected_error
from optimum_sab.calibration.allocation.probe import measure_errors
from optimum_sab.calibration.allocation.sensitivity import output_sensitivity
from optimum_sab.calibration.options import AllocationSettings, RunOptions
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.samples.calibration_samples import CalibrationSamples
from optimum_sab.calibration.stage import run_stages
from optimum_sab.calibration.stages import allocation as module
from optimum_sab.calibration.stages.allocation import AllocateBits, MeasureSensitivities
from optimum_sab.calibration.stages.blocks import SolveBlocks
from optimum_sab.calibration.stages.samples import GivenSamples
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError, NonFiniteError
from optimum_sab.format.layout import stored_bits_per_weight
from optimum_sab.nn.selection import select_linears

SETTINGS = LayerSettings(block_size=32)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.2, **sizes)).eval()


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (1, 32), generator=generator)} for _ in range(6)]


def bits_of(model, settings):
    shapes = {n: tuple(model.get_submodule(n).weight.shape) for n in settings}
    weights = sum(a * b for a, b in shapes.values())
    return (
        sum(stored_bits_per_weight(*shapes[n], s) * shapes[n][0] * shapes[n][1] for n, s in settings.items()) / weights
    )


def allocate(model, selection, samples, target=None, fixed=()):
    """What the stages of the allocation choose."""
    options = RunOptions(allocation=AllocationSettings(target, fixed))
    run = Run(model, selection, options)
    report = run_stages(run, (GivenSamples(samples), MeasureSensitivities(), AllocateBits()))
    found = report.section("allocation")
    assert run.selection.settings == {**selection.settings, **found.choice.settings}  # what the blocks are solved with
    return found.choice


@pytest.fixture(scope="module")
def measured(llama, samples):
    """``measured(selection, target)``: a choice from sensitivities and errors that are measured once.

    Neither hangs on how many planes the settings have.
    """
    selection = select_linears(llama, SETTINGS)
    names, shown = list(selection.settings), CalibrationSamples.of(samples, llama.config)
    sensitivity = output_sensitivity(llama, names, samples)
    probed = measure_errors(llama, selection, names, shown)
    return lambda asked, target=None: choose(llama, asked, sensitivity, probed, target)


@pytest.mark.parametrize("target", [2.6, 3.0, 3.4])
def test_allocation_uses_the_budget(llama, measured, target):
    found = measured(select_linears(llama, SETTINGS), target)
    assert found.bits_per_weight == pytest.approx(bits_of(llama, found.settings))
    assert target - 0.1 < found.bits_per_weight <= target
    assert len({(s.base_planes, s.salient_fraction) for s in found.settings.values()}) > 1


def test_the_stages_find_what_is_measured_step_by_step_and_leave_the_model_alone(llama, samples, measured):
    before = {n: p.clone() for n, p in llama.named_parameters()}
    selection = select_linears(llama, SETTINGS)
    found = allocate(llama, selection, samples, 3.0)
    assert found.settings == measured(selection, 3.0).settings
    assert all(torch.equal(p, before[n]) for n, p in llama.named_parameters())


def test_allocation_gives_more_to_linears_whose_errors_cost_more(llama, samples, monkeypatch):
    selection = select_linears(llama, SETTINGS)
    names = list(selection.settings)
    dear = "model.layers.1.mlp.up_proj"
    monkeypatch.setattr(module, "sensitivity_of", lambda *a, **k: {n: 100.0 if n == dear else 1.0 for n in names})
    found = allocate(llama, selection, samples, 2.6)
    steps = {n: (s.base_planes, s.salient_fraction if s.residual_planes else 0.0) for n, s in found.settings.items()}
    assert steps[dear] == max(steps.values())
    assert steps[dear] > steps["model.layers.0.mlp.up_proj"]


def test_allocation_counts_what_it_may_not_choose(llama, samples):
    selection = select_linears(llama, SETTINGS, dynamic={"down_proj": {"base_planes": 3, "residual_planes": 0}})
    free = [n for n in selection.settings if "down_proj" not in n]
    found = allocate(llama, selection, samples, 3.0, fixed=("down_proj",))
    assert set(found.settings) == set(free)
    assert found.bits_per_weight == pytest.approx(bits_of(llama, {**selection.settings, **found.settings}))
    assert found.bits_per_weight <= 3.0


def test_allocation_rules_select_the_same_settings_under_any_prefix(llama, measured):
    selection = select_linears(llama, SETTINGS)
    found = measured(selection, 2.8)
    rules = found.rules(selection)
    assert list(rules) == [name.removeprefix("model.") for name in found.settings]  # names, not patterns
    assert select_linears(llama, SETTINGS, dynamic=rules).settings == found.settings
    inner = select_linears(llama.model, SETTINGS, dynamic=rules).settings
    assert {f"model.{n}": s for n, s in inner.items()} == found.settings
    assert not any(re.search(rule, "model.layers.10.mlp.up_proj") for rule in rules)


def test_allocation_names_the_least_that_is_possible(llama, measured):
    selection = select_linears(llama, SETTINGS)
    with pytest.raises(ConfigError, match=r"target_bits=1.1 is less than the \d\.\d+ bits"):
        measured(selection, 1.1)


def test_error_falls_along_the_ladder():
    anchors = dict(zip(ANCHORS, (0.3, 0.2, 0.1, 0.08), strict=True))
    errors = [expected_error(anchors, step) for step in LADDER]
    assert errors == sorted(errors, reverse=True)
    assert [expected_error(anchors, step) for step in ANCHORS] == pytest.approx(list(anchors.values()))


def test_linears_of_one_shape_that_share_an_input_have_the_same_planes(llama, measured):
    selection = select_linears(llama, SETTINGS)
    found = measured(selection, 2.6).settings
    for layer in ("model.layers.0", "model.layers.1"):
        assert len({found[f"{layer}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert found[f"{layer}.mlp.gate_proj"] == found[f"{layer}.mlp.up_proj"]
    assert len(set(found.values())) > 1


def test_smaller_linears_choose_apart_from_larger_ones(samples, monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=1, **sizes)).eval()
    selection = select_linears(model, SETTINGS)
    names = list(selection.settings)
    monkeypatch.setattr(module, "sensitivity_of", lambda *a, **k: {n: 100.0 if "v_proj" in n else 1.0 for n in names})
    found = allocate(model, selection, samples, 2.8).settings
    q, k, v = (found[f"model.layers.0.self_attn.{each}_proj"] for each in "qkv")
    assert k == v != q
    assert k.base_planes > q.base_planes


def test_linears_that_share_an_input_and_not_their_settings_choose_apart(llama, samples):
    selection = select_linears(llama, SETTINGS, dynamic={"up_proj": {"block_size": 64}})
    found = allocate(llama, selection, samples, 2.6).settings
    assert all(found[n].block_size == s.block_size for n, s in selection.settings.items())


def test_without_a_target_the_settings_bits_are_spent(llama, measured):
    selection = select_linears(llama, SETTINGS)
    found = measured(selection)
    plain = bits_of(llama, selection.settings)
    assert plain - 0.1 < found.bits_per_weight <= plain
    assert len(set(found.settings.values())) > 1


@pytest.mark.parametrize("base", [1, 2, 3, 4])
def test_every_number_of_planes_is_within_reach(llama, measured, base):
    settings = SETTINGS.replace(base_planes=base, residual_planes=0)
    selection = select_linears(llama, settings)
    found = measured(selection)
    assert found.bits_per_weight == pytest.approx(bits_of(llama, selection.settings), abs=0.15)


def test_biases_are_counted(samples):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_bias=True, **sizes)).eval()
    selection = select_linears(model, SETTINGS)
    found = allocate(model, selection, samples, 2.8)
    biases = 32 * 2 * 4 * 64 / sum(model.get_submodule(n).weight.numel() for n in found.settings)
    assert found.bits_per_weight == pytest.approx(bits_of(model, found.settings) + biases)
    assert found.bits_per_weight <= 2.8


def test_a_linear_that_no_token_reaches_stays_as_it_is(llama, samples):
    llama = copy.deepcopy(llama)

    class Unused(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.expert = inner, torch.nn.Linear(64, 32, bias=False)

        def forward(self, x):
            return self.inner(x)

    llama.model.layers[1].mlp = Unused(llama.model.layers[1].mlp)
    selection = select_linears(llama, SETTINGS)
    name = "model.layers.1.mlp.expert"
    found = allocate(llama, selection, samples, 2.6)
    assert name in selection.settings and name not in found.settings
    assert found.bits_per_weight == pytest.approx(bits_of(llama, {**selection.settings, **found.settings}))


def test_allocation_names_a_damaged_weight(llama, samples):
    llama = copy.deepcopy(llama)
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    selection = select_linears(llama, SETTINGS)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj"):
        run_stages(Run(llama, selection), (GivenSamples(samples), MeasureSensitivities(), SolveBlocks()))
