"""What calibrates does not judge."""

import warnings

import pytest
import torch

from optimum_sab.calibration.samples.held_out import held_out
from optimum_sab.errors import SABWarning, SampleError


def sample(*ids, **more):
    return {"input_ids": torch.tensor([ids]), **more}


def test_samples_that_calibrate_are_left_out_with_a_warning():
    calibration = [sample(1, 2, 3), sample(4, 5)]
    with pytest.warns(SABWarning, match="of the 3 evaluation samples 1 calibrate too and are left out"):
        left = held_out([sample(4, 5), sample(4, 5, 6), sample(9)], calibration)
    assert [each["input_ids"].tolist() for each in left] == [[[4, 5, 6]], [[9]]]


def test_the_same_question_about_another_picture_is_another_sample():
    calibration = [sample(1, 2, pixel_values=torch.zeros(4, 3))]
    others = [sample(1, 2, pixel_values=torch.ones(4, 3)), sample(1, 2, pixel_values=torch.zeros(8, 3)), sample(1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert held_out(others, calibration) == others
    with pytest.raises(SampleError, match="all 1 evaluation samples calibrate too"):
        held_out([sample(1, 2, pixel_values=torch.zeros(4, 3))], calibration)


def test_samples_without_tokens_are_told_apart():
    one, other = {"inputs_embeds": torch.zeros(1, 2, 4)}, {"inputs_embeds": torch.ones(1, 2, 4)}
    assert held_out([other], [one]) == [other]


def test_nothing_is_left_of_nothing():
    assert held_out([], [sample(1)]) == []
