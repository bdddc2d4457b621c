"""SABConfig: round trips, and every bad value rejected by name."""

import copy
import json

import pytest

from optimum_sab import SABConfig
from optimum_sab.core.refinement import RefineSettings
from optimum_sab.errors import ConfigError, FormatVersionError
from optimum_sab.format.layout import stored_bits_per_weight
from optimum_sab.hf.config import describe_calibration
from optimum_sab.ops.backends import BACKENDS

CHANGED = {
    "block_size": 64,
    "base_planes": 2,
    "dynamic": {r"layers\.0\.": {"sweeps": 3}},
    "modules_to_not_convert": ["down_proj"],
    "calibration": "data.jsonl",
    "seed": 7,
    "propagation": 0.25,
    "target_bits": 1.8,
    "refine": True,
    "refine_steps": 30,
}


@pytest.mark.parametrize("changes", [{}, CHANGED], ids=["defaults", "changed"])
def test_config_survives_dict_and_json(changes, tmp_path):
    config = SABConfig(**changes)
    assert SABConfig.from_dict(config.to_dict()) == config
    config.to_json_file(tmp_path / "c.json")
    assert SABConfig.from_dict(json.loads((tmp_path / "c.json").read_text())) == config
    assert SABConfig(**config.to_diff_dict()) == config


def test_diff_dict_holds_only_what_differs():
    assert set(SABConfig().to_diff_dict()) == {"quant_method", "format_version"}
    assert set(SABConfig(seed=3).to_diff_dict()) == {"quant_method", "format_version", "seed"}


def test_paper_preset_is_the_published_method():
    config = SABConfig.paper()
    assert (config.significance, config.feedback, config.refit, config.iterations) == ("modality", "block", False, 15)
    assert (config.base_planes, config.residual_planes, config.block_size) == (2, 1, 128)
    assert SABConfig.paper(seed=5).seed == 5


@pytest.mark.parametrize("name", ["2bit", "2-bit", "twobit", "two_bit"])
def test_a_preset_by_another_name_is_told_its_own(name):
    with pytest.raises(ConfigError, match=r"; did you mean 'two-bit'\?$"):
        SABConfig.preset(name)


SHAPES_7B = ((3584, 3584), (512, 3584), (18944, 3584), (3584, 18944))
SHAPES_135M = ((576, 576), (192, 576), (1536, 576), (576, 1536))


@pytest.mark.parametrize("shapes", [SHAPES_7B, SHAPES_135M], ids=["7B", "135M"])
@pytest.mark.parametrize(("preset", "limit"), [(SABConfig, 1.30), (SABConfig.two_bit, 2.25)])
def test_presets_keep_their_bits(preset, limit, shapes):
    settings = preset().layer_settings
    stored = sum(stored_bits_per_weight(*shape, settings) * shape[0] * shape[1] for shape in shapes)
    assert stored / sum(a * b for a, b in shapes) <= limit


def test_unknown_setting_is_named_with_the_nearest_known_one():
    with pytest.raises(ConfigError, match="'blok_size'; did you mean 'block_size'"):
        SABConfig(blok_size=64)
    with pytest.raises(ConfigError, match="'wibble'"):
        SABConfig.from_dict({"quant_method": "sab", "wibble": 1})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("block_size", 100),
        ("block_size", "128"),
        ("base_planes", 0),
        ("base_planes", 4),
        ("residual_planes", -1),
        ("salient_fraction", 1.0),
        ("salient_fraction", 0.0005),
        ("iterations", 0),
        ("significance", "magic"),
        ("feedback", "row"),
        ("refit", 1),
        ("row_scale", "int4"),
        ("damping", 0.0),
        ("propagation", 1.5),
        ("propagation", float("nan")),
        ("allocation", "magic"),
        ("allocation", None),
        ("target_bits", 0.9),
        ("target_bits", True),
        ("target_bits", "2"),
        ("calibration_samples", 0),
        ("sequence_length", 0),
        ("seed", -1),
        ("refine", 1),
        ("refine_epochs", -1),
        ("refine_steps", 1.5),
        ("resume_folder", 7),
        ("progress", "loud"),
        ("dequantize", "yes"),
        ("backend", "gpu"),
        ("backend", "Triton"),
        ("backend", True),
        ("backend", ["triton"]),
        ("modules_to_not_convert", "down_proj"),
        ("modules_to_not_convert", 7),
        ("modules_to_not_convert", [7]),
        ("modules_to_not_convert", [["down_proj"]]),
        ("modules_to_not_convert", {"down_proj": 1}),
        ("dynamic", ["down_proj"]),
        ("dynamic", "down_proj"),
        ("dynamic", {"down_proj": 2}),
        ("dynamic", {"down_proj": [["sweeps", 2]]}),
        ("dynamic", {7: {"sweeps": 2}}),
        ("dynamic", {"down_proj": {7: 2}}),
        ("calibration", 7),
        ("calibration", 1.5),
        ("calibration", True),
        ("calibration_pass", ["hessian"]),
        ("calibration_pass", None),
        ("calibration_device", 7),
        ("calibration_device", ["cuda"]),
        ("measured", [1]),
        ("measured", "x"),
        ("measured", {"left_dense": "layers.0"}),
        ("measured", {"left_dense": [1]}),
        ("measured", {"left_dense": None}),
        ("measured", {"weights": 7}),
        ("measured", {"dynamic_order": 7}),
        ("format_version", "1"),
        ("format_version", True),
        ("format_version", 1.0),
        ("format_version", [1]),
        ("verify", 1),
        ("verify", "some"),
        ("verify", None),
        ("verify", ["all"]),
        ("block_size", [128]),
        ("block_size", 10**40),
        ("significance", ["hessian"]),
        ("row_scale", {"fp8": 1}),
        ("damping", "0.1"),
        ("salient_fraction", [0.1]),
        ("target_bits", [2]),
        ("allocation", ["uniform"]),
        ("temperature_scaling", "yes"),
        ("quant_method", ["sab"]),
        ("progress", ["bar"]),
        ("calibration_samples", 1_000_000_001),
        ("calibration_samples", 2**63),
        ("calibration_samples", 5.0),
        ("sequence_length", 2**24 + 1),
        pytest.param("sequence_length", 10**5000, id="sequence_length-long"),
        ("seed", 2**64),
        ("seed", float("nan")),
        ("refine_epochs", 10_001),
        ("refine_steps", 1_000_001),
        pytest.param("iterations", 10**5000, id="iterations-long"),
        ("sweeps", 101),
        ("damping", 10**400),
        pytest.param("damping", 10**5000, id="damping-long"),
        ("damping", float("inf")),
        ("salient_fraction", -float("inf")),
        ("propagation", 10**400),
        ("target_bits", float("nan")),
        ("target_bits", float("inf")),
        pytest.param("target_bits", 10**5000, id="target_bits-long"),
    ],
)
def test_bad_value_is_named(setting, value):
    with pytest.raises(ConfigError, match=setting):
        SABConfig(**{setting: value})


@pytest.mark.parametrize(
    ("setting", "most"),
    [
        ("calibration_samples", 1_000_000_000),
        ("sequence_length", 2**24),
        ("seed", 2**64 - 1),
        ("refine_epochs", 10_000),
        ("refine_steps", 1_000_000),
    ],
)
def test_the_largest_value_is_taken_and_the_next_is_told_the_bounds(setting, most):
    assert getattr(SABConfig(**{setting: most}), setting) == most
    with pytest.raises(ConfigError, match=rf"^{setting}={most + 1} must be an integer from [01] to {most}"):
        SABConfig(**{setting: most + 1})


def test_a_number_of_any_length_is_told_in_a_line():
    with pytest.raises(ConfigError, match=r"^damping=10{59}… must be a finite number"):
        SABConfig(dynamic={"down_proj": {"damping": 10**400}})
    for value in (10**300, 10**5000):
        with pytest.raises(ConfigError) as error:
            SABConfig(seed=value)
        assert len(str(error.value)) < 200 and "must be an integer from 0 to" in str(error.value)


def test_sweeps_without_refit_is_refused():
    with pytest.raises(ConfigError, match="sweeps=2 needs refit=True"):
        SABConfig(refit=False, sweeps=2)


def test_a_budget_needs_an_allocation():
    with pytest.raises(ConfigError, match=r"target_bits=1\.5 needs allocation='sensitivity'"):
        SABConfig(target_bits=1.5, allocation="uniform")
    assert SABConfig().allocation == SABConfig.two_bit().allocation == "sensitivity"
    assert SABConfig.paper().allocation == "uniform"


def test_bad_dynamic_rules_are_named():
    with pytest.raises(ConfigError, match="no regular expression"):
        SABConfig(dynamic={"layers[": {"sweeps": 1}})
    with pytest.raises(ConfigError, match="'sweps'"):
        SABConfig(dynamic={"layers": {"sweps": 1}})
    with pytest.raises(ConfigError, match="block_size=7"):
        SABConfig(dynamic={"layers": {"block_size": 7}})


@pytest.mark.parametrize("stored", [None, "2", 2.0])
def test_stored_version_is_a_whole_number(stored):
    with pytest.raises(ConfigError, match="format_version"):
        SABConfig.from_dict({"quant_method": "sab", "format_version": stored})


def test_version_follows_from_codes():
    assert SABConfig().to_dict()["format_version"] == 1
    assert SABConfig(code="trellis16").to_dict()["format_version"] == 2
    assert SABConfig(dynamic={"down": {"code": "trellis16"}}).to_dict()["format_version"] == 2
    changed = SABConfig()
    changed.code = "trellis16"
    changed.validate()
    assert SABConfig.from_dict(changed.to_diff_dict()).format_version == 2


@pytest.mark.parametrize(("version", "settings"), [(1, {"code": "trellis16"}), (2, {}), (2, {"dynamic": {"x": {}}})])
def test_version_that_does_not_fit_is_refused(version, settings):
    with pytest.raises(FormatVersionError, match=f"format_version={version} does not fit"):
        SABConfig.from_dict({"quant_method": "sab", "format_version": version, **settings})


def test_later_version_is_named_before_its_settings():
    with pytest.raises(FormatVersionError, match="format_version=3"):
        SABConfig.from_dict({"quant_method": "sab", "format_version": 3, "of_later": 1})


def test_other_format_version_is_refused():
    with pytest.raises(FormatVersionError, match="format_version=99"):
        SABConfig.from_dict({"quant_method": "sab", "format_version": 99})


def test_other_quant_method_is_refused():
    with pytest.raises(ConfigError, match="'gptq'"):
        SABConfig(quant_method="gptq")


def test_deep_copy_shares_samples_and_copies_settings():
    config = SABConfig(calibration=[["not", "copied"]], processor=object(), dynamic={"a": {"sweeps": 2}})
    twin = copy.deepcopy(config)
    assert twin == config
    assert twin.calibration is config.calibration
    assert twin.processor is config.processor
    twin.dynamic["a"]["sweeps"] = 3
    assert config.dynamic["a"]["sweeps"] == 2


def test_sample_objects_are_stored_as_their_number(tmp_path):
    config = SABConfig(calibration=["a text", [{"role": "user", "content": "hi"}]], processor=object())
    assert config.to_dict()["calibration"] == {"samples": 2}
    assert "processor" not in config.to_dict()
    assert describe_calibration(tmp_path) == str(tmp_path)
    json.dumps(config.to_dict())


@pytest.mark.parametrize("backend", [None, "auto", *BACKENDS])
def test_backend_is_of_one_call_and_not_of_the_checkpoint(backend, tmp_path):
    config = SABConfig(backend=backend, seed=3)
    assert config.backend == backend
    assert copy.deepcopy(config).backend == backend
    assert config.get_loading_attributes()["backend"] == backend
    assert config == SABConfig(seed=3)
    config.to_json_file(tmp_path / "c.json")
    for stored in (config.to_dict(), config.to_diff_dict(), json.loads((tmp_path / "c.json").read_text())):
        assert "backend" not in stored
        assert SABConfig.from_dict(stored).backend is None
    assert SABConfig.from_dict({"quant_method": "sab"}, backend=backend).backend == backend


def test_bad_backend_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="backend='gpu' is no backend; use one of auto, triton, cpu, reference"):
        SABConfig(backend="gpu")


def test_resume_folder_is_of_one_call_and_not_of_the_checkpoint(tmp_path):
    config = SABConfig(resume_folder=tmp_path)
    assert config == SABConfig()
    assert "resume_folder" not in config.to_dict()
    assert copy.deepcopy(config).resume_folder == tmp_path


@pytest.mark.parametrize("name", ["refine", "temperature_scaling", "dequantize"])
def test_switches_are_true_or_false(name):
    with pytest.raises(ConfigError, match=f"{name}=1 must be true or false"):
        SABConfig(**{name: 1})


def test_paper_leaves_the_temperature_alone():
    assert SABConfig().temperature_scaling
    assert not SABConfig.paper().temperature_scaling


def test_refine_settings_are_there_only_when_asked_for():
    assert SABConfig(refine_steps=7).refine_settings is None
    assert SABConfig(refine=True, refine_epochs=3, refine_steps=7).refine_settings == RefineSettings(3, 7)
    with pytest.raises(ConfigError, match="nothing to refine"):
        SABConfig(refine_epochs=0, refine_steps=0)


def test_a_name_that_is_none_of_python_s_business_is_an_unknown_setting():
    for name in ("self", "unknown"):
        with pytest.raises(ConfigError, match=f"unknown setting '{name}'"):
            SABConfig.from_dict({"quant_method": "sab", name: 1})


def test_a_long_value_is_shown_in_part():
    with pytest.raises(ConfigError) as caught:
        SABConfig(dynamic=[{"sweeps": 2}] * 1000)
    assert len(str(caught.value)) < 200


def test_rules_keep_their_order_where_storing_sorts_them():
    """They apply in order; Transformers sorts a config.json's keys."""
    rules = {"layers": {"sweeps": 1}, "down_proj": {"sweeps": 3}}
    config = SABConfig(dynamic=rules, measured={"bits_per_weight": 1.3})
    stored = json.loads(json.dumps(config.to_dict(), sort_keys=True))
    assert list(stored["dynamic"]) == ["down_proj", "layers"]
    found = SABConfig.from_dict(stored)
    assert list(found.dynamic) == ["layers", "down_proj"]
    assert found.measured == {"bits_per_weight": 1.3}
    assert found == config
    plain = SABConfig(dynamic=rules)
    assert SABConfig.from_dict(json.loads(json.dumps(plain.to_dict(), sort_keys=True))) == plain
    assert list(SABConfig.from_dict({**stored, "dynamic": {"x": {"sweeps": 1}}}).dynamic) == ["x"]  # edited since


def test_settings_of_a_call_are_told_apart_from_those_of_a_checkpoint():
    given = SABConfig.from_dict({"quant_method": "sab", "progress": "none", "backend": "reference"})
    assert (given.progress, given.backend) == ("none", "reference")
    with pytest.raises(ConfigError, match="holds progress='none', which belongs to a call"):
        copy.deepcopy(given).refuse_call_settings()
    SABConfig.from_dict({"quant_method": "sab"}, progress="none").refuse_call_settings()
    SABConfig.from_dict(given.to_dict()).refuse_call_settings()


def test_loading_attributes_are_the_settings_of_a_load():
    assert SABConfig(verify="all", backend="reference").get_loading_attributes() == {
        "dequantize": False,
        "backend": "reference",
        "verify": "all",
    }
    assert "verify" not in SABConfig(verify=False).to_dict()
