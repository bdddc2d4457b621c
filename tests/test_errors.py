"""Warnings point at the line of whoever called."""

import inspect
import types
import warnings

import pytest
import torch
from torch import nn

from optimum_sab.errors import SABWarning, warn
from optimum_sab.hf.config import SABConfig
from optimum_sab.nn.dense_share import warn_of_dense
from optimum_sab.nn.selection import select_linears


def calling(name):
    """The function ``call(function, *arguments)`` of a module of this name."""
    module = types.ModuleType(name)
    exec("def call(function, *arguments):\n    return function(*arguments)", module.__dict__)
    return module.call


@pytest.mark.parametrize(
    "inside",
    [
        [],
        ["optimum_sab.hf.quantizer"],
        ["transformers.modeling_utils", "optimum_sab.hf.quantizer", "optimum_sab.nn.selection"],
        ["torch.nn.modules.module", "optimum_sab.nn.linear", "torch.nn.modules.module", "optimum_sab.ops.backends"],
        ["accelerate.hooks", "sab_kernels.linear", "contextlib", "optimum_sab.ops.operator"],
    ],
)
def test_warning_points_at_the_line_outside_of_the_packages(inside):
    first, *more = [*(calling(name) for name in inside), warn]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first(*more, "a message")
        line = inspect.currentframe().f_lineno - 1
    assert [(str(w.message), w.category, w.filename, w.lineno) for w in caught] == [
        ("a message", SABWarning, __file__, line)
    ]


def test_warning_of_the_package_points_at_the_users_line():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 64, 64))
            self.down = nn.Linear(64, 64)

    model = nn.Module()
    model.layers = nn.ModuleList([Experts(), Experts()])
    selection = select_linears(model, SABConfig().layer_settings, [], {}, True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_dense(model, selection)
        line = inspect.currentframe().f_lineno - 1
    assert [(w.category, w.filename, w.lineno) for w in caught] == [(SABWarning, __file__, line)]


def test_warning_is_shown_once_for_a_line(recwarn):
    warnings.simplefilter("default")
    for _ in range(3):
        warn("the same")
    assert [str(w.message) for w in recwarn] == ["the same"]
