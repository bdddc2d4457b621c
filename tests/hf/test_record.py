"""What is written down of a run reads back as the run was."""

import json

import pytest
from torch import nn

from optimum_sab import SABConfig
from optimum_sab.calibration.blocks.report import BlockReport, LayerReport
from optimum_sab.calibration.predictions.agreement import Agreement
from optimum_sab.calibration.report import BinarizationReport, StageReport
from optimum_sab.calibration.stages.allocation import AllocationReport
from optimum_sab.calibration.stages.samples import SampleReport
from optimum_sab.errors import SABWarning
from optimum_sab.hf.recipe import as_recipe
from optimum_sab.hf.record import record
from optimum_sab.hf.selection import select


@pytest.fixture
def model():
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleDict({"gate": nn.Linear(64, 64), "gate_proj": nn.Linear(64, 64)}) for _ in range(2)
    )
    return model


def report(rules):
    layers = (LayerReport("layers.0.gate", 0.1, 1.5, 4096),)
    return BinarizationReport(
        (
            StageReport("samples", 0.0, SampleReport(3, {"text": 30}, 0, "builtin", 256, 0)),
            StageReport("allocation", 0.0, AllocationReport(rules, None)),
            StageReport("blocks", 0.0, (BlockReport(0, layers, None, 0.0),)),
        )
    )


def test_a_choice_for_a_linear_that_a_rule_of_the_user_names_joins_it(model):
    """The two have one key then, and both count when the model is loaded."""
    config = SABConfig(block_size=32, dynamic={"layers.1.gate_proj": {"block_size": 64}, "gate": {"damping": 0.2}})
    planes = {"base_planes": 2, "residual_planes": 0, "salient_fraction": 0.125}
    selection = select(model, config, strict=True).with_rules({"layers.1.gate_proj": planes})
    record(config, selection, report({"layers.1.gate_proj": planes}))
    assert config.dynamic["layers.1.gate_proj"] == {"block_size": 64, **planes}
    stored = SABConfig.from_dict(config.to_dict())
    assert select(model, stored, strict=False).settings == selection.settings


def recorded(model, config, *more):
    record(config, select(model, config, strict=True), BinarizationReport((*report({}).stages, *more)))
    return config


def test_the_verdict_is_recorded(model):
    agreement = {"text": Agreement(0.5, 0.7)}
    found = recorded(model, SABConfig(block_size=32), StageReport("comparison", 0.0, agreement))
    assert found.measured["verdict"] == {"level": "care", "words": "usable with care"}
    assert SABConfig.from_dict(found.to_dict()).measured == found.measured


def test_what_is_no_number_is_recorded_as_json_knows_it(model):
    agreement = {"text": Agreement(float("nan"), 0.0)}
    found = recorded(model, SABConfig(block_size=32), StageReport("comparison", 0.0, agreement))
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert stored["measured"]["agreement"] == {"text": {"kl": None, "top1": 0.0}}
    assert stored["measured"]["verdict"]["level"] == "far"
    assert SABConfig.from_dict(stored).measured == found.measured


def test_of_a_file_that_calibrated_the_last_part_is_recorded(model, tmp_path):
    (tmp_path / "own.jsonl").write_text("{}")
    found = recorded(model, SABConfig(block_size=32, calibration=str(tmp_path / "own.jsonl")))
    assert found.calibration == "own.jsonl"
    assert recorded(model, SABConfig(block_size=32, calibration="owner/name:train")).calibration == "owner/name:train"


def test_a_recipe_without_its_samples_mixes_nothing_into_the_built_in_set():
    config = SABConfig(calibration=["one", "two"], builtin_samples=3)
    again = SABConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    with pytest.warns(SABWarning, match="the built-in set is used"):
        as_recipe(again)
    assert (again.calibration, again.builtin_samples) == (None, 0)
    again.validate()
