"""A model that several processes share: what is refused by name, and what works."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed

from optimum_sab import SABConfig, SABLinear
from optimum_sab.errors import ConfigError
from optimum_sab.hf.compat import SHARES_LAYERS
from tests.hf.contract.together import found_by_two

FIVE = int(transformers.__version__.split(".")[0]) >= 5


@pytest.fixture(scope="module")
def found(warm, pair, tmp_path_factory):
    """What each of two processes found that talk over gloo."""
    folder = tmp_path_factory.mktemp("processes")
    return found_by_two(warm / "python", "tests.hf.contract.two_processes", [pair.dense, pair.packed], folder)


def test_splitting_is_refused_by_name_before_weights_are_read(found):
    for results in found:
        refused = {case: message for case, message in results.items() if case != "fsdp"}
        assert len(refused) == (6 if SHARES_LAYERS else 8 if FIVE else 2)
        for case, message in refused.items():
            argument = "tp_plan" if "tp_plan" in case else "distributed_config"
            assert message.startswith(f"ConfigError: {argument} splits the model over processes (DeviceMesh"), message


def test_a_loaded_model_that_fsdp_shards_computes_as_the_whole_one(found, pair):
    model = AutoModelForCausalLM.from_pretrained(pair.packed)
    whole = model.model.layers[0].mlp.up_proj.weight.numel()
    held = []
    for results in found:
        assert results["fsdp"]["loss"] <= 1e-6
        assert results["fsdp"]["grad"] <= 1e-5 * results["fsdp"]["scale"]
        held.append(results["fsdp"]["held"])
    assert sum(held) == whole and max(held) < whole


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_a_mesh_of_the_call_is_refused(pair, packed):
    settings = {} if packed else {"quantization_config": SABConfig(progress="none")}
    with pytest.raises(ConfigError, match=r"device_mesh splits the model over processes \(a mesh\)"):
        AutoModelForCausalLM.from_pretrained(pair.packed if packed else pair.dense, device_mesh="a mesh", **settings)


@pytest.mark.skipif(not FIVE, reason="Transformers 4.57 makes a process group in any case")
def test_a_plan_for_one_process_splits_nothing(pair, model, logits):
    again = AutoModelForCausalLM.from_pretrained(pair.packed, distributed_config={"tp_size": 1}, dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_zero_3_is_refused(pair, packed, monkeypatch):
    config = SimpleNamespace(is_zero3=lambda: True)
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: config)
    settings = {} if packed else {"quantization_config": SABConfig(progress="none")}
    with pytest.raises(ConfigError, match="ZeRO-3"):
        AutoModelForCausalLM.from_pretrained(pair.packed if packed else pair.dense, **settings)
    config.is_zero3 = lambda: False
    loaded = AutoModelForCausalLM.from_pretrained(pair.packed)
    assert any(isinstance(module, SABLinear) for module in loaded.modules())
