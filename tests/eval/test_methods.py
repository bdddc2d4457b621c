import pytest

from optimum_sab.errors import ConfigError
from optimum_sab.eval.baselines import BASELINES
from optimum_sab.eval.methods import read_method
from optimum_sab.presets import PRESETS


@pytest.mark.parametrize("name", [*PRESETS, *BASELINES])
def test_every_name_is_a_method(name):
    method = read_method(name)
    assert method.name == name
    assert (method.baseline is None) == (name in PRESETS)


def test_settings_change_a_preset():
    config = read_method("two-bit,feedback=block,sweeps=0,propagation=0.25").config(seed=3)
    assert (config.base_planes, config.feedback, config.sweeps, config.propagation) == (2, "block", 0, 0.25)
    assert config.seed == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("magic", "method 'magic' is unknown"),
        ("default,sweps=1", "did you mean 'sweeps'"),
        ("default,sweeps", "must be SETTING=VALUE"),
        ("default,sweeps=-1", "sweeps=-1"),
        ("gptq-2,sweeps=1", "takes no settings"),
    ],
)
def test_bad_method_is_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        read_method(spec)
