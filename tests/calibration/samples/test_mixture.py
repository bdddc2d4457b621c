"""Data of one's own with some of the built-in set behind it."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_sab import SABConfig
from optimum_sab.calibration.samples.inputs import SampleSource, given_inputs
from optimum_sab.errors import ConfigError, SampleError
from optimum_sab.example import checkpoint_path
from optimum_sab.hf.processor import load_processor
from optimum_sab.hf.run_options import run_options

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
OWN = ["one of mine", "two of mine", "three of mine"]


def texts(inputs, tokenizer):
    return [tokenizer.decode(each["input_ids"][0], skip_special_tokens=True) for each in inputs]


@pytest.fixture
def read():
    tokenizer = load_processor(checkpoint_path()).tokenizer
    model = LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=len(tokenizer)))

    def read(**changes):
        return texts(given_inputs(model, tokenizer, SampleSource(sequence_length=48, **changes)), tokenizer)

    return read


def test_the_built_in_samples_come_behind_and_are_the_built_in_set_s_own(read):
    mixed = read(data=OWN, count=5, builtin=2)
    assert mixed == read(data=OWN, count=3) + read(count=2)
    assert len(set(mixed)) == 5  # none took another's place


def test_both_are_counted_so_rows_of_one_s_own_are_left_out_first(read):
    assert read(data=OWN, count=3, builtin=2) == read(data=OWN, count=1) + read(count=2)


def test_without_any_nothing_is_mixed_in(read):
    assert read(data=OWN, count=9, builtin=0) == read(data=OWN, count=3)


def test_own_data_that_is_empty_is_an_error_all_the_same(read):
    with pytest.raises(SampleError, match="there are no calibration samples"):
        read(data=[], count=5, builtin=2)


def test_a_configuration_asks_for_them():
    source = run_options(SABConfig(calibration=OWN, calibration_samples=9, builtin_samples=4)).source
    assert (source.count, source.builtin) == (9, 4)
    assert source.described == "given as objects, and 4 of the built-in set"
    assert SampleSource("somebody/dataset", builtin=1200).described == "somebody/dataset, and 1,200 of the built-in set"


def test_it_is_stored_where_it_is_used_and_only_there():
    plain, mixed = SABConfig(calibration="a.jsonl"), SABConfig(calibration="a.jsonl", builtin_samples=4)
    assert "builtin_samples" not in plain.to_dict()  # which earlier releases do not know
    assert mixed.to_dict()["builtin_samples"] == 4
    assert SABConfig.from_dict(mixed.to_dict()) == mixed and mixed.to_diff_dict()["builtin_samples"] == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"builtin_samples": 4},
            "builtin_samples=4 are mixed into data of your own, and calibration is 'builtin'; give",
        ),
        ({"builtin_samples": 4, "calibration": "self"}, "and calibration is 'self'"),
        ({"builtin_samples": -1, "calibration": OWN}, "builtin_samples=-1 must be"),
        (
            {"builtin_samples": 50_001, "calibration": OWN, "calibration_samples": 10**6},
            "builtin_samples=50001 must be",
        ),
        ({"builtin_samples": 1.5, "calibration": OWN}, "builtin_samples=1.5 must be"),
        (
            {"builtin_samples": 512, "calibration": OWN},
            "builtin_samples=512 leave none of calibration_samples=512 to your own; calibration_samples counts both",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        SABConfig(**changes)
