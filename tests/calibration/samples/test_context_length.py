"""Samples longer than the model's positions are cut or named."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlavaConfig

from optimum_sab.calibration.samples.context_length import context_length, limited_length, warn_of_long_samples
from optimum_sab.calibration.samples.inputs import SampleSource, given_inputs
from optimum_sab.errors import SABWarning, SampleError


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=77), 77),
        (GPT2Config(n_positions=55), 55),
        (LlavaConfig(text_config=LlamaConfig(max_position_embeddings=33)), 33),
        (SimpleNamespace(), None),
    ],
)
def test_positions_are_the_text_models(config, expected):
    assert context_length(config) == expected


def test_sequence_length_is_limited_with_a_warning():
    config = LlamaConfig(max_position_embeddings=77)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert limited_length(77, config) == 77
        assert limited_length(10**6, SimpleNamespace()) == 10**6
        warn_of_long_samples({"a": 77}, config)
    with pytest.warns(SABWarning, match="sequence_length=78 is more than the 77 positions of the model: .*cut to that"):
        assert limited_length(78, config) == 77


class Reader(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, input_ids, pixel_values=None):
        raise AssertionError("nothing is computed")


@pytest.mark.filterwarnings("ignore:sequence_length")
def test_texts_are_cut_and_pictures_are_named_once():
    config = LlamaConfig(max_position_embeddings=4, vocab_size=10)
    rows = [{"input_ids": [1] * 9}] + [{"input_ids": [1] * n, "pixel_values": [[1.0]]} for n in (4, 6, 5)]
    with pytest.warns(
        SABWarning,
        match=r"2 calibration samples with pictures are longer than the 4 .*calibration sample 2 has 6 tokens",
    ):
        found = given_inputs(Reader(config), None, SampleSource(rows))
    assert [inputs["input_ids"].shape[1] for inputs in found] == [4, 4, 6, 5]


@pytest.mark.parametrize(("token", "known"), [(9, True), (10, False), (-1, False), (99, True)])
def test_tokens_of_another_vocabulary_are_named(token, known):
    config = SimpleNamespace(vocab_size=10, image_token_id=99)
    source = SampleSource([{"input_ids": torch.tensor([[1, token]])}])
    if known:
        assert given_inputs(Reader(config), None, source)[0]["input_ids"].tolist() == [[1, token]]
        return
    with pytest.raises(
        SampleError, match=rf"calibration sample 0 has the token {token}, and the model's vocabulary 10"
    ):
        given_inputs(Reader(config), None, source)
