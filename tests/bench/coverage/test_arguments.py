"""What a family's forward knows, by `ForwardArguments`: all that it is given, and no mistyped name."""

import pytest
import torch

from optimum_sab.bench.coverage.configuration import random_model
from optimum_sab.bench.coverage.exceptions import exceptions_of
from optimum_sab.bench.coverage.families import all_families
from optimum_sab.bench.coverage.samples import build_samples
from optimum_sab.calibration.samples.forward_arguments import ForwardArguments
from optimum_sab.calibration.samples.rows import read_row
from optimum_sab.errors import SampleError

SAMPLE = ("qwen2_5_vl", "mllama", "aria")


def params():
    return [
        pytest.param(family, id=family.name, marks=() if family.name in SAMPLE else pytest.mark.full)
        for family in all_families()
    ]


@pytest.mark.compat
@pytest.mark.parametrize("family", params())
def test_a_family_s_arguments_are_known_and_a_mistyped_one_is_not(family):
    exceptions = exceptions_of(family.name)
    try:
        model = random_model(family, exceptions)
        rows = build_samples(model, family, exceptions).rows
    except Exception as error:  # `bench coverage` says of which families that is, and why
        pytest.skip(f"not built: {error}")
    arguments = ForwardArguments(model)
    for row in rows:
        arguments.check(read_row(row, "row")[0], "row")
    mistyped = {**read_row(rows[0], "row")[0], "pixel_" + "valuess": torch.ones(2)}
    with pytest.raises(SampleError, match=r"^row has the forward argument 'pixel_valuess', which \w+ does not know"):
        arguments.check(mistyped, "row")
