"""Prepared samples whose names nothing in the model reads."""

import warnings
from types import SimpleNamespace
from typing import TypedDict

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig
from typing_extensions import Unpack

from optimum_sab.calibration.pipeline import binarize
from optimum_sab.calibration.samples.forward_arguments import ForwardArguments
from optimum_sab.calibration.samples.inputs import SampleSource, given_inputs
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import SABWarning, SampleError
from optimum_sab.hf.auto import AutoModelForVision2Seq
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.processor import load_processor
from optimum_sab.nn.selection import select_linears


@pytest.fixture(scope="module")
def processor(smallest_example):
    return load_processor(smallest_example)


@pytest.fixture(scope="module")
def model(smallest_example):
    with torch.device("meta"):
        return AutoModelForVision2Seq.from_config(AutoConfig.from_pretrained(smallest_example))


@pytest.fixture(scope="module")
def prepared(processor):
    picture = {"type": "image", "image": Image.new("RGB", (56, 56))}
    chat = [{"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}]
    return dict(processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt"))


def renamed(row, name, other):
    return {other if key == name else key: value for key, value in row.items()}


@pytest.mark.compat
@pytest.mark.parametrize(
    ("name", "mistyped"),
    [
        ("pixel_values", "pixel_valuess"),
        ("pixel_values", "pixels_values"),
        ("image_grid_thw", "image_grid_hwt"),
        ("attention_mask", "attention_maks"),
    ],
)
def test_a_mistyped_argument_is_named_with_the_nearest(model, processor, prepared, name, mistyped):
    with pytest.raises(SampleError) as error:
        given_inputs(model, processor, SampleSource([prepared, renamed(prepared, name, mistyped)]))
    assert str(error.value) == (
        f"calibration sample 1 has the forward argument {mistyped!r}, which {type(model).__name__} does not know; did "
        f"you mean {name!r}?"
    )


def test_an_argument_like_none_is_to_be_removed(model, processor, prepared):
    with pytest.raises(SampleError, match=r"argument 'zzz', which .* does not know; remove it"):
        given_inputs(model, processor, SampleSource([{**prepared, "zzz": torch.ones(2)}]))


@pytest.mark.compat
def test_arguments_that_the_model_knows_are_taken(model, processor, prepared):
    tokens = prepared["input_ids"].shape[1]
    more = {  # named in the forward, in one inside of it, and in what its **kwargs may be
        "position_ids": torch.zeros(3, 1, tokens, dtype=torch.long),
        "second_per_grid_ts": torch.ones(1),
        "pixel_values_videos": torch.ones(4, 1176),
        "video_grid_thw": torch.tensor([[1, 2, 2]]),
        "mm_token_type_ids": torch.zeros(1, tokens, dtype=torch.long),
        "cu_seq_lens_q": torch.tensor([0, tokens], dtype=torch.int32),
    }
    found = ForwardArguments(model, processor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.check({**prepared, **{name: more[name] for name in list(more)[:4]}}, "row")
        if "mm_token_type_ids" in found.named:  # of newer lines
            found.check(more, "row")


def test_it_is_told_before_a_weight_is_read(smallest_example, prepared, monkeypatch):
    monkeypatch.setattr("safetensors.safe_open", None)
    config = SABConfig.light(calibration=[renamed(prepared, "pixel_values", "pixel_valuess")], progress="none")
    with pytest.raises(SampleError, match="calibration sample 0 has the forward argument 'pixel_valuess'"):
        AutoModelForVision2Seq.from_pretrained(smallest_example, quantization_config=config)


def test_columns_of_trainers_are_told_and_no_arguments(model, processor, prepared):
    row = {**prepared, "completion_mask": [0, 1], "labels": [1, 2]}
    with pytest.warns(SABWarning, match="columns that are not calibrated on: 'completion_mask', 'labels'"):
        [inputs] = given_inputs(model, processor, SampleSource([row]))
    assert set(inputs) == set(prepared)


# -- models of other kinds ---------------------------------------------------------------------------------------------


class Listed(TypedDict, total=False):
    flash_lengths: torch.Tensor


class Inner(nn.Module):
    def forward(self, input_ids, image_sizes=None, **kwargs: Unpack[Listed]):
        return input_ids if kwargs.get("num_crops") is None else kwargs["num_crops"]


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace()
        self.inner = Inner()

    def forward(self, input_ids, **kwargs):
        return self.inner(input_ids, **kwargs)


class Closed(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace()
        self.inner = Inner()

    def forward(self, input_ids, pixel_values=None):
        return self.inner(input_ids)


def check(model, *names, processor=None):
    ForwardArguments(model, processor).check(dict.fromkeys(("input_ids", *names), torch.ones(1)), "row")


def test_what_an_inner_forward_takes_by_name_by_listing_or_by_asking_is_known():
    check(Outer(), "image_sizes", "flash_lengths", "num_crops")
    with pytest.raises(SampleError, match="'image_size', which Outer does not know; did you mean 'image_sizes'"):
        check(Outer(), "image_sizes"[:-1])  # what stands here as a string of its own is asked for by this very file


def test_a_forward_that_takes_only_what_it_names_takes_nothing_else():
    check(Closed(), "pixel_values")
    for name in ("image_sizes", "num_crops"):  # of a module inside, which it does not come to
        with pytest.raises(SampleError, match=f"'{name}', which Closed does not know"):
            check(Closed(), name)


def test_what_the_processor_makes_is_known():
    class Maker:
        model_input_names = ("input_ids", "pixel_attention_mask")

        def __call__(self, text, **options):
            return {"input_ids": torch.ones(1, 3, dtype=torch.long), "unheard_of": torch.ones(1)}

    check(Outer(), "pixel_attention_mask", "unheard_of", processor=Maker())
    with pytest.raises(SampleError, match=r"'pixel_attention_masks', .* did you mean 'pixel_attention_mask'"):
        check(Outer(), "pixel_attention_mask" + "s", processor=Maker())
    with pytest.raises(SampleError, match="'pixel_attention_mask', which Closed does not know"):
        check(Closed(), "pixel_attention_mask", processor=Maker())


def test_where_the_code_cannot_be_read_it_is_a_warning():
    made = {}
    exec(
        "class Made(torch.nn.Module):\n    def forward(self, input_ids, **kwargs): return input_ids",
        {"torch": torch, "__name__": "made_at_run_time"},
        made,
    )
    arguments = ForwardArguments(made["Made"]())
    row = {"input_idss": torch.ones(1)}
    with pytest.warns(SABWarning, match=r"'input_idss', and it cannot be seen whether Made does .* mean 'input_ids'"):
        arguments.check(row, "row")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments.check(row, "the next")


def test_what_is_no_tensor_is_not_looked_at():
    ForwardArguments(Closed()).check({"input_ids": torch.ones(1), "return_dict": True}, "row")


def test_samples_that_are_given_encoded_are_looked_at_too(build):
    subject = build("llama")
    samples = [{**each, "attention_masks": torch.ones_like(each["input_ids"])} for each in subject.samples]
    selection = select_linears(subject.model, LayerSettings())
    with pytest.raises(
        SampleError, match=r"calibration sample 0 .* 'attention_masks', .* did you mean 'attention_mask'"
    ):
        binarize(subject.model, selection, samples)
