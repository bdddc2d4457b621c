"""What from_pretrained takes for a packed checkpoint, and in which order it says what is wrong with one."""

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from optimum_sab import SABConfig, SABLinear
from optimum_sab.errors import ConfigError, FormatError, SABWarning
from optimum_sab.hf import from_config

FIVE = int(transformers.__version__.split(".")[0]) >= 5
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def changed(pair, tmp_path):
    """The packed checkpoint with other tensors in its file, which says nothing of digests."""

    def make(change):
        folder = shutil.copytree(pair.packed, tmp_path / "changed")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def shorten(tensors, name):
    tensors[name] = tensors[name][..., :-1].contiguous()


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_loading_reports_no_missing_unexpected_or_mismatched_keys(pair):
    _, info = AutoModelForCausalLM.from_pretrained(pair.packed, output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("arguments", [{"low_cpu_mem_usage": True}, {"use_safetensors": True}, {"device_map": "cpu"}])
def test_arguments_that_change_nothing(pair, model, logits, arguments):
    again = AutoModelForCausalLM.from_pretrained(pair.packed, dtype=torch.float32, **arguments)
    assert torch.equal(logits(again), logits(model))


def test_a_config_from_the_call_loads_as_loaded(pair, model, logits):
    config = AutoConfig.from_pretrained(pair.packed)
    again = AutoModelForCausalLM.from_pretrained(pair.packed, config=config, dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


def test_only_load_time_options_of_a_given_configuration_count(pair, model, logits):
    given = SABConfig(block_size=64, seed=7, backend="reference", verify="all")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = AutoModelForCausalLM.from_pretrained(pair.packed, quantization_config=given, dtype=torch.float32)
    kept = again.config.quantization_config
    assert (kept.block_size, kept.seed) == (SABConfig().block_size, 0)
    assert (kept.backend, kept.verify) == ("reference", "all")
    assert {m.backend for m in again.modules() if isinstance(m, SABLinear)} == {"reference"}
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


def test_dequantize_at_load_time(pair, model, logits):
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        dense = AutoModelForCausalLM.from_pretrained(
            pair.packed, quantization_config=SABConfig(dequantize=True), dtype=torch.float32
        )
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not hasattr(dense.config, "quantization_config")
    assert dense.is_quantized is False
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-4)


def test_another_method_s_configuration_is_refused(pair):
    with pytest.raises(ValueError, match="quantized with SABConfig but you are passing"):
        AutoModelForCausalLM.from_pretrained(pair.packed, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


# -- a state dict in the place of files --------------------------------------------------------------------------------


def from_state_dict(pair, tensors):
    config = AutoConfig.from_pretrained(pair.packed)
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)


def test_a_state_dict_loads(pair, model, logits, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    again = from_state_dict(pair, load_file(pair.packed / "model.safetensors"))
    assert torch.equal(logits(again), logits(model))
    again = from_state_dict(pair, model.state_dict())
    assert torch.equal(logits(again), logits(model))


def test_a_state_dict_that_lacks_or_cuts_a_packed_tensor_is_refused(pair):
    tensors = load_file(pair.packed / "model.safetensors")
    cut = tensors | {f"{UP}.col_scale": tensors[f"{UP}.col_scale"][:-1]}
    with pytest.raises(FormatError, match=rf"{UP}: tensor 'col_scale' is I16 \(63,\), expected"):
        from_state_dict(pair, cut)
    del tensors[f"{UP}.col_scale"]
    with pytest.raises(FormatError, match=f"{UP}: tensor 'col_scale' is missing"):
        from_state_dict(pair, tensors)


def test_weights_that_are_no_safetensors_are_named(pair, tmp_path):
    folder = shutil.copytree(pair.packed, tmp_path / "bin")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"pytorch_model\.bin is no safetensors file"):
        AutoModelForCausalLM.from_pretrained(folder)


# -- the order of errors -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::optimum_sab.errors.SABWarning")
def test_missing_tensors_are_named_before_misshapen_ones(changed):
    def change(tensors):
        shorten(tensors, "model.layers.0.self_attn.q_proj.weight")  # comes first
        del tensors[f"{UP}.row_scale"], tensors[f"{UP}.col_scale"]

    with pytest.raises(FormatError, match=f"{UP}: tensor 'row_scale' is missing, and 1 more of packed layers"):
        AutoModelForCausalLM.from_pretrained(changed(change))


@pytest.mark.filterwarnings("ignore::optimum_sab.errors.SABWarning")
@pytest.mark.parametrize("left", [False, True])
def test_a_missing_bias_is_named_as_missing_and_a_foreign_one_as_foreign(changed, left):
    def change(tensors):
        shorten(tensors, f"{UP}.weight")
        if left:
            tensors[f"{UP}.bias"] = torch.zeros(96)
        else:
            del tensors["model.layers.0.self_attn.q_proj.bias"]

    message = "'weight' is I32" if left else "'bias' is missing; the checkpoint is incomplete"
    with pytest.raises(FormatError, match=message):
        AutoModelForCausalLM.from_pretrained(changed(change))


def test_a_dense_tensor_that_is_missing_is_reported_by_transformers(changed):
    with pytest.warns(SABWarning, match="no digests"):
        _, info = AutoModelForCausalLM.from_pretrained(
            changed(lambda tensors: tensors.pop("model.norm.weight")), output_loading_info=True
        )
    assert set(info["missing_keys"]) == {"model.norm.weight"}


def test_an_unexpected_tensor_is_reported_by_transformers(changed):
    with pytest.warns(SABWarning, match="no digests"):
        _, info = AutoModelForCausalLM.from_pretrained(
            changed(lambda tensors: tensors.update(other=torch.zeros(1))), output_loading_info=True
        )
    assert set(info["unexpected_keys"]) == {"other"}


class WithScale(LlamaForCausalLM):
    """Makes NaN of what its checkpoint lacks."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(2))
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            torch.nn.init.constant_(self.scale, float("nan"))


def test_what_was_made_up_is_not_called_damaged(pair):
    with pytest.raises(FormatError, match="scale is missing, and what was made up in its place holds NaN"):
        WithScale.from_pretrained(pair.packed)


# -- from_config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "of a model"])
@pytest.mark.parametrize("factory", [AutoModelForCausalLM, AutoModel])
def test_from_config_refuses_a_packed_model(pair, model, factory, stored):
    config = AutoConfig.from_pretrained(pair.packed) if stored else model.config
    with pytest.raises(ConfigError, match=r"from_config makes random dense weights. Load .* with from_pretrained"):
        factory.from_config(config)


def test_from_config_makes_a_dense_model_without_the_record(pair):
    config = AutoConfig.from_pretrained(pair.packed)
    del config.quantization_config
    assert not any(isinstance(m, SABLinear) for m in AutoModelForCausalLM.from_config(config).modules())
    around = PreTrainedModel._from_config.__func__.without_refusal
    from_config.install()
    assert PreTrainedModel._from_config.__func__.without_refusal is around  # once, however often
