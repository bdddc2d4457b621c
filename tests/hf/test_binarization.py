"""What a configuration is refused for before the work, and what the work leaves of it."""

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from optimum_sab import AutoModelForVision2Seq, SABConfig
from optimum_sab.calibration.run import Run
from optimum_sab.errors import CalibrationError, ConfigError, MissingDependencyError
from optimum_sab.hf.binarization import binarize_loaded, stages
from optimum_sab.hf.run_options import run_options
from optimum_sab.hf.selection import select

pytestmark = pytest.mark.filterwarnings("ignore::optimum_sab.errors.SABWarning")


@pytest.fixture
def no_weights(monkeypatch):
    """Nothing may come to the point where weights are there."""

    def fail(*args, **kwargs):
        raise AssertionError("the weights were read")

    monkeypatch.setattr("optimum_sab.hf.quantizer.SABHfQuantizer._process_model_after_weight_loading", fail)


def planes(model):
    return {n: m.settings for n, m in model.named_modules() if hasattr(m, "settings")}


# -- the caller's configuration ----------------------------------------------------------------------------------------


@dataclass
class Finished:
    """A run that chose planes and kept its blocks.

    Attributes:
        config: that was given.
        before: what it was before the run.
    """

    model: nn.Module
    config: SABConfig
    before: dict


@pytest.fixture(scope="module")
def finished(llama_folder, quick_config, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "run"
    config = quick_config(calibration=texts, block_size=64, target_bits=1.9, resume_folder=folder)
    before = config.to_dict()
    model = LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32, quantization_config=config)
    return Finished(model, config, before)


def test_the_configuration_that_was_given_stays_as_it_was(finished, texts):
    config = finished.config
    assert config.to_dict() == finished.before
    assert config.calibration is texts
    assert finished.model.config.quantization_config is not config
    assert finished.model.config.quantization_config.measured["target_bits"] == 1.9


def test_a_run_is_repeated_and_resumed_with_the_same_configuration(finished, llama_folder):
    first, config = finished.model, finished.config
    again = LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32, quantization_config=config)
    assert planes(first) == planes(again)
    assert len({(s.base_planes, s.salient_fraction) for s in planes(again).values()}) > 1
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            # a rule that pins planes to what they are changes no layer's settings, but what is left to choose
            {"dynamic": {"down_proj": {"base_planes": 1, "residual_planes": 1}}},
            r"free_linears\.model\.layers\.0\.mlp\.down_proj is True there and None now",
        ),
        ({"sequence_length": 20}, r"samples is '\d+ of \d+ tokens, \w+' there and '\d+ of \d+ tokens, \w+' now"),
        ({"iterations": 3}, r"layers\..*\.iterations is 2 there and 3 now"),
        ({"target_bits": 1.8}, "target_bits is 1.9 there and 1.8 now"),
        ({"calibration": "self", "refine": True}, "refine is None there"),
    ],
    ids=["rule", "samples", "setting", "bits", "samples that are not written yet"],
)
def test_a_resume_folder_of_another_run_is_refused_before_weights_are_read(
    finished, llama_folder, unread, changes, said
):
    config = copy.copy(finished.config)
    for name, value in changes.items():
        setattr(config, name, value)
    kept = sorted(Path(config.resume_folder).iterdir())
    with pytest.raises(CalibrationError, match=f"belongs to another run: {said}"):
        AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32, quantization_config=config)
    assert sorted(Path(config.resume_folder).iterdir()) == kept


def test_a_resume_folder_of_this_run_comes_to_its_weights(finished, llama_folder, unread):
    with pytest.raises(AssertionError, match="weights were read"):
        AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32, quantization_config=finished.config)


def test_a_resume_folder_that_holds_other_files_is_refused_before_weights_are_read(
    llama_folder, quick_config, texts, tmp_path, unread
):
    (tmp_path / "notes.txt").touch()
    config = quick_config(calibration=texts, resume_folder=tmp_path)
    with pytest.raises(CalibrationError, match=r"holds other files, such as 'notes\.txt'"):
        AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config)
    assert [each.name for each in tmp_path.iterdir()] == ["notes.txt"]


# -- refused before a weight is read -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration_pass": "hesian"}, "calibration_pass='hesian' is not registered"),
        ({"calibration_device": "cuda:99"}, r"calibration_device='cuda:99' cannot be used here \(.*leave it out"),
        ({"calibration_device": "gpu"}, r"calibration_device='gpu' cannot be used here"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_before_a_weight_is_read(
    llama_folder, quick_config, texts, no_weights, changes, message
):
    with pytest.raises(ConfigError, match=message):
        AutoModelForCausalLM.from_pretrained(
            llama_folder, quantization_config=quick_config(calibration=texts, **changes)
        )


def test_refinement_without_a_language_head_is_refused_before_a_weight_is_read(
    llama_folder, quick_config, texts, no_weights
):
    with pytest.raises(CalibrationError, match=r"no output embedding.*refine_steps=0"):
        AutoModel.from_pretrained(llama_folder, quantization_config=quick_config(calibration=texts, refine=True))


def test_a_missing_package_is_named_before_a_weight_is_read(llama_folder, quick_config, texts, no_weights, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "greenlet", None)
    with pytest.raises(MissingDependencyError, match=r"optimum-sab\[quantize\]"):
        AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=quick_config(calibration=texts))


# -- refused before a sample is read -----------------------------------------------------------------------------------


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def no_samples(monkeypatch):
    """Nothing may come to the point where samples are read."""

    def fail(*args, **kwargs):
        raise AssertionError("samples were read")

    monkeypatch.setattr("optimum_sab.calibration.stages.samples.calibration_inputs", fail)


def test_offloaded_weights_are_named_also_where_a_run_would_be_resumed(
    llama_folder, quick_config, texts, no_samples, tmp_path
):
    model, config = loaded(llama_folder), quick_config(calibration=texts, resume_folder=tmp_path / "run")
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.to("meta"))
    with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.up_proj is offloaded.*device_map='cpu'"):
        binarize_loaded(model, config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("places", "refused"), [((0, 1), True), ((0, 0), False)])
def test_a_calibration_device_beside_a_device_map_over_several_is_refused(
    llama_folder, quick_config, texts, no_samples, places, refused
):
    model, config = loaded(llama_folder), quick_config(calibration=texts, calibration_device="cpu")
    model.hf_device_map = {"model.layers.0": places[0], "model.layers.1": places[1]}
    if refused:
        with pytest.raises(ConfigError, match=r"calibration_device='cpu' .*device_map over 0, 1.*device_map='cpu'"):
            binarize_loaded(model, config)
    else:
        run = Run(model, select(model, config, strict=True), run_options(config))
        for stage in stages(config):
            stage.prepare(run)


def test_a_model_that_writes_its_samples_is_tried_before_it_writes(example, quick_config, monkeypatch):
    from optimum_sab.calibration.samples import inputs
    from optimum_sab.calibration.stages import rehearsal

    written = []
    monkeypatch.setattr(inputs, "self_samples", lambda *arguments: written.append(arguments))
    monkeypatch.setattr(rehearsal, "refusal", lambda *arguments: CalibrationError("does not bear it"))
    with pytest.raises(CalibrationError, match="does not bear it"):
        AutoModelForVision2Seq.from_pretrained(example, quantization_config=quick_config(calibration="self"))
    assert not written
