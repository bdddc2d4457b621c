"""No family that works is refused before its weights are read, and a sample only where the loaded model refuses it."""

import pytest
import torch

from optimum_sab.bench.coverage.configuration import random_model, small_config
from optimum_sab.bench.coverage.exceptions import exceptions_of
from optimum_sab.bench.coverage.families import all_families
from optimum_sab.bench.coverage.samples import build_samples
from optimum_sab.calibration.early_rehearsal import rehearse_unloaded
from optimum_sab.calibration.rehearsal import refusal
from optimum_sab.calibration.samples.calibration_samples import CalibrationSamples
from optimum_sab.calibration.stages.rehearsal import telling_sample
from optimum_sab.errors import CalibrationError, ConfigError
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.selection import select
from optimum_sab.nn.unfusing import unfuse_experts

SAMPLE = ("qwen2_5_vl", "llava", "mllama", "qwen3_vl_moe", "blip-2", "mamba2")
FAMILIES = {family.name: family for family in all_families()}


def damaged(sample):
    """Samples that are not what they were; some models take some of them."""
    for name, value in sample.items():
        yield {key: each for key, each in sample.items() if key != name}
        yield {**sample, name: value[..., :-1].contiguous()}
        yield {**sample, name: value[None]}
        if name.endswith("_ids"):
            yield {**sample, name: value + 10_000}
    yield {**sample, "wibble": torch.ones(1)}


def taken(model, selection, sample):
    try:
        return rehearse_unloaded(model, selection, sample)
    except CalibrationError:
        return None


def tried(family):
    exceptions = exceptions_of(family.name)
    try:
        model = random_model(family, exceptions)
        rows = build_samples(model, family, exceptions).rows
    except Exception as error:  # of any kind, see `trial`
        pytest.skip(f"it is not built: {error}")
    sample = rows[telling_sample(CalibrationSamples.of(rows, model.config))]
    if refusal(model, sample, ()):
        pytest.skip("its samples are not built")
    with torch.device("meta"):
        unread = family.model_class(small_config(family, exceptions))
    try:
        selection = select(unread, SABConfig(), strict=True)
    except ConfigError as error:
        pytest.skip(str(error))
    unfuse_experts(unread, selection.experts)
    assert taken(unread, selection, sample) is True
    for other in damaged(sample):
        wrong = refusal(model, {name: each.clone() for name, each in other.items()}, ())
        if taken(unread, selection, other) is None:
            assert wrong is not None, other.keys()
    assert taken(unread, selection, sample) is True  # what failed has left nothing behind


@pytest.mark.parametrize("name", SAMPLE)
def test_family_is_tried_whole_and_no_sample_is_refused_that_it_takes(name):
    tried(FAMILIES[name])


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in SAMPLE])
def test_every_family_is_tried_whole_and_no_sample_is_refused_that_it_takes(name):
    tried(FAMILIES[name])
