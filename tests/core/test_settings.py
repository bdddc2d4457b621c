import dataclasses
import math

import pytest

from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError

BAD = [
    ("block_size", 0),
    ("block_size", 31),
    ("block_size", 48),
    ("block_size", 8192),
    ("block_size", -128),
    ("block_size", 128.0),
    ("block_size", True),
    ("block_size", "128"),
    ("block_size", None),
    ("base_planes", 0),
    ("base_planes", 5),
    ("base_planes", 1.0),
    ("base_planes", True),
    ("residual_planes", -1),
    ("residual_planes", 4),
    ("residual_planes", "1"),
    ("salient_fraction", 0.0),
    ("salient_fraction", 1.0),
    ("salient_fraction", -0.1),
    ("salient_fraction", 0.0005),  # no column of a block of 512
    ("salient_fraction", math.nan),
    ("salient_fraction", "0.1"),
    ("salient_fraction", None),
    ("iterations", 0),
    ("iterations", 1001),
    ("iterations", 2.5),
    ("significance", "modal"),
    ("significance", None),
    ("significance", ["hessian"]),
    ("feedback", "row"),
    ("feedback", False),
    ("refit", 1),
    ("refit", "yes"),
    ("sweeps", -1),
    ("sweeps", 101),
    ("sweeps", 1.0),
    ("row_scale", "fp32"),
    ("row_scale", 8),
    ("damping", 0.0),
    ("damping", 1.5),
    ("damping", math.inf),
    ("damping", True),
    ("propagation", -0.1),
    ("propagation", 1.1),
    ("propagation", math.nan),
    ("propagation", "0.3"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_settings_refuse_a_bad_value_by_name(name, value):
    with pytest.raises(ConfigError) as caught:
        LayerSettings(**{name: value})
    assert f"{name}={value!r}" in str(caught.value)


@pytest.mark.parametrize(("name", "value"), BAD)
def test_replace_refuses_a_bad_value_like_the_constructor(name, value):
    with pytest.raises(ConfigError, match=name):
        LayerSettings().replace(**{name: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"block_size": 32, "salient_fraction": 1 / 32},
        {"block_size": 4096},
        {"base_planes": 4, "residual_planes": 0},
        {"base_planes": 1, "residual_planes": 3},
        {"salient_fraction": 0.99},
        {"iterations": 1},
        {"iterations": 1000},
        {"refit": False, "sweeps": 0},
        {"sweeps": 100},
        {"damping": 1},
        {"propagation": 0},
        {"propagation": 1.0},
        {"significance": "modality", "feedback": "block", "row_scale": "fp16"},
    ],
)
def test_settings_accept_the_ends_of_every_range(changes):
    settings = LayerSettings(**changes)
    assert {name: getattr(settings, name) for name in changes} == changes


def test_settings_refuse_more_planes_than_four_in_all():
    with pytest.raises(ConfigError, match=r"base_planes=3 \+ residual_planes=2"):
        LayerSettings(base_planes=3, residual_planes=2)


def test_settings_refuse_sweeps_without_a_refit():
    with pytest.raises(ConfigError, match=r"sweeps=2 needs refit=True"):
        LayerSettings(refit=False)


def test_settings_ignore_the_salient_fraction_without_residual_planes():
    settings = LayerSettings(residual_planes=0, salient_fraction=0.0)
    assert settings.salient_columns(128) == 0


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LayerSettings().block_size = 64


def test_planes_counts_base_and_residual_ones():
    assert LayerSettings(base_planes=2, residual_planes=1).planes == 3


@pytest.mark.parametrize(("width", "count"), [(128, 16), (64, 8), (32, 4), (16, 2), (5, 1), (4, 0), (1, 0)])
def test_salient_columns_are_the_rounded_share_of_the_width(width, count):
    assert LayerSettings(salient_fraction=0.125).salient_columns(width) == count


def test_replace_changes_what_it_is_given_and_nothing_else():
    before = LayerSettings(block_size=64, damping=0.1)
    after = before.replace(base_planes=2, damping=0.2)
    assert after == LayerSettings(block_size=64, base_planes=2, damping=0.2)
    assert before == LayerSettings(block_size=64, damping=0.1)


def test_replace_refuses_an_unknown_name():
    with pytest.raises(ConfigError, match="'blocksize'"):
        LayerSettings().replace(blocksize=64)
