import pytest

from optimum_sab.errors import ConfigError
from optimum_sab.eval.coded.solver import Coding
from optimum_sab.eval.methods import read_method
from optimum_sab.eval.quality import compare_quality
from optimum_sab.eval.subject import Budget, find_subject

SMALL = Budget(samples=4, length=64, held_out=1, window=64, probes=2)
QUICK = "iterations=2,block_size=64"


def test_a_model_of_coded_planes_has_the_bits_of_plain_ones_at_most(llama_folder):
    methods = [read_method(f"{name},{QUICK}") for name in ("default", "coded", "coded,allocation=uniform")]
    quality = compare_quality(find_subject(llama_folder, None, SMALL), methods)
    plain, coded, uniform = quality.rows
    assert coded.bits_per_weight <= plain.bits_per_weight
    assert uniform.bits_per_weight > plain.bits_per_weight  # the same planes, and row scales of the derived ones
    assert uniform.layer_error["text"] < plain.layer_error["text"]
    assert coded.family != plain.family


def test_settings_of_the_code_are_read():
    method = read_method("coded-two-bit,code=64,descents=1,damping=0.2")
    assert method.coding == Coding(code=64, descents=1)
    assert method.coding.found.states == 64
    assert (method.config().base_planes, method.config().damping) == (2, 0.2)
    assert read_method("default").coding is None
    with pytest.raises(ConfigError, match="code"):
        read_method("default,code=64")
