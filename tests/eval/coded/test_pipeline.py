import pytest
from torch import nn

from optimum_sab.calibration.allocation.choice import selected_bits
from optimum_sab.calibration.run import Run
from optimum_sab.errors import ConfigError
from optimum_sab.eval.coded.solver import Coding
from optimum_sab.eval.methods import read_method
from optimum_sab.eval.quality import compare_quality
from optimum_sab.eval.subject import Budget, find_subject
from optimum_sab.hf.selection import select

SMALL = Budget(samples=4, length=32, held_out=1, window=32, probes=2)


@pytest.fixture(scope="module")
def subject(llama_folder):
    return find_subject(llama_folder, None, SMALL)


@pytest.mark.parametrize("name", ["coded", "coded-two-bit"])
def test_a_model_of_coded_planes_has_the_bits_of_plain_ones_at_most(subject, name):
    method = read_method(f"{name},iterations=2,block_size=64,descents=1")
    row = compare_quality(subject, [method]).rows[0]
    dense = subject.load()
    bits = selected_bits(dense, select(dense, method.config(), strict=True))
    assert 0.9 * bits < row.bits_per_weight <= bits
    assert row.family == name
    assert 0 < row.layer_error["text"] < 0.5


def test_settings_of_the_code_are_read():
    method = read_method("coded-two-bit,code=64,descents=1,damping=0.2")
    assert method.coding == Coding(code=64, descents=1)
    assert method.coding.found.states == 64
    assert (method.config().base_planes, method.config().damping) == (2, 0.2)
    assert read_method("default").coding is None
    with pytest.raises(ConfigError, match="code"):
        read_method("default,code=64")


def test_bits_of_plain_planes_count_biases(subject):
    model = subject.load()
    run = Run(model, select(model, read_method("default").config(), strict=True))
    before = selected_bits(run.model, run.selection)
    linear = model.model.layers[0].self_attn.q_proj
    linear.bias = nn.Parameter(linear.weight[:, 0].clone())
    weights = sum(model.get_submodule(name).weight.numel() for name in run.selection.settings)
    assert selected_bits(run.model, run.selection) == pytest.approx(before + 32 * 64 / weights)
