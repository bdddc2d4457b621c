"""What cannot work is refused by `from_pretrained` before it reads a weight."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama as llama

from optimum_sab import AutoModelForVision2Seq
from optimum_sab.errors import CalibrationError
from optimum_sab.hf.compat import RENAMES
from optimum_sab.hf.devices import accelerators, computes_elsewhere, main_device

pytestmark = pytest.mark.filterwarnings("ignore::optimum_sab.errors.SABWarning")


@pytest.fixture
def refused(unread, llama_folder, quick_config):
    def load(texts, **settings):
        config = quick_config(calibration=texts, **settings)
        with pytest.raises(CalibrationError) as caught:
            AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config)
        return str(caught.value)

    return load


def check_linears(self, x, own=llama.LlamaMLP.forward):
    if not isinstance(self.up_proj, nn.Linear):
        raise TypeError("up_proj must be an nn.Linear")
    return own(self, x)


def test_a_model_that_works_comes_to_its_weights(unread, llama_folder, quick_config, texts):
    with pytest.raises(AssertionError, match="weights were read"):
        AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=quick_config(calibration=texts))


@pytest.mark.parametrize("source", ["texts", "self"])
def test_a_model_that_does_not_compute_with_packed_layers(monkeypatch, refused, texts, source):
    monkeypatch.setattr(llama.LlamaMLP, "forward", check_linears)
    told = refused(texts if source == "texts" else "self")
    assert "does not compute with packed layers: model.layers.0.mlp raises TypeError: up_proj must be" in told


def test_a_model_all_of_whose_linears_read_their_weights(monkeypatch, refused, texts):
    def forward(self, x):
        x = nn.functional.linear(x, self.up_proj.weight) + nn.functional.linear(x, self.gate_proj.weight)
        return nn.functional.linear(x, self.down_proj.weight)

    monkeypatch.setattr(llama.LlamaMLP, "forward", forward)
    told = refused(texts, modules_to_not_convert=["self_attn"])
    assert "nothing is left to binarize in LlamaForCausalLM: 6 linears, such as model.layers.0.mlp.gate_proj" in told


def test_a_forward_that_does_not_take_what_the_tokenizer_makes(monkeypatch, refused, texts):
    def forward(self, input_ids, use_cache=False):
        return self.model(input_ids)

    monkeypatch.setattr(llama.LlamaForCausalLM, "forward", forward)
    told = refused(texts)
    assert "its forward raises TypeError" in told and "unexpected keyword argument 'attention_mask'" in told


def test_a_forward_that_lacks_a_package(monkeypatch, refused, texts):
    def forward(self, x):
        import a_package_that_nobody_has  # noqa: F401

    monkeypatch.setattr(llama.LlamaMLP, "forward", forward)
    assert "raises ModuleNotFoundError: No module named 'a_package_that_nobody_has'" in refused(texts)


def test_a_sample_that_does_not_fit(refused):
    told = refused([{"input_ids": torch.arange(9)[None], "position_ids": torch.arange(4)[None]}])
    assert "LlamaForCausalLM does not read a calibration sample: " in told
    assert "raises RuntimeError" in told or "raises IndexError" in told  # 4.57 masks by positions


def test_a_picture_that_is_not_what_its_tokens_say(unread, small_example, quick_config):
    model = AutoModelForVision2Seq
    ids = torch.full((1, 12), 5)
    ids[0, 2] = 2  # see `small_example`: no placeholder
    sample = {
        "input_ids": ids,
        "pixel_values": torch.randn(16, 1176),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    if RENAMES:  # Transformers 5, which wants them
        sample["mm_token_type_ids"] = torch.zeros(1, 12, dtype=torch.long)
    with pytest.raises(CalibrationError, match=r"does not read a calibration sample: .*(features|tokens)"):
        model.from_pretrained(small_example, quantization_config=quick_config(calibration=[sample]))


@pytest.mark.parametrize(
    ("device_map", "found"),
    [
        (None, False),
        ("cpu", False),
        (torch.device("cpu"), False),
        ({"": "cpu"}, False),
        ({"a": "cpu", "b": "disk"}, False),
        ("cuda", True),
        ("cuda:1", True),
        (0, True),
        ({"a": "cpu", "b": 0}, True),
    ],
)
def test_computes_elsewhere_is_told_by_any_device_that_is_no_cpu(device_map, found):
    assert computes_elsewhere(device_map) is found


@pytest.mark.parametrize(
    ("device_map", "found"),
    [
        ("cuda:1", ["cuda:1"]),
        (1, ["cuda:1"]),
        ({"": torch.device("cuda:1")}, ["cuda:1"]),
        ({"a": 0, "b": "cpu", "c": "cuda:0", "d": 1, "e": "disk"}, ["cuda:0", "cuda:1"]),
        ({"a": "cpu"}, []),
        (None, []),
    ],
)
def test_accelerators_have_their_numbers_and_are_named_once(device_map, found):
    assert [str(each) for each in accelerators(device_map)] == found
    assert str(main_device(device_map)) == next(iter(found), "cpu")


@pytest.mark.parametrize("there", [True, False])
def test_a_map_that_is_yet_to_be_made_may_lead_to_any_accelerator(monkeypatch, there):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    assert computes_elsewhere("auto") is there
