"""Generators as calibration data: as good the second time as the first, or a named error."""

import copy

import pytest

from optimum_sab import SABConfig
from optimum_sab.errors import SampleError
from optimum_sab.hf.replay import Replay, replayed


def test_what_was_given_is_given_again_and_no_more_is_taken_than_asked_for():
    taken = []
    data = Replay(taken.append(i) or i for i in range(10))
    first = iter(data)
    assert [next(first), next(first)] == [0, 1]
    assert taken == [0, 1]
    assert list(data) == list(data) == list(range(10))
    assert list(first) == list(range(2, 10))
    assert taken == list(range(10))


@pytest.mark.parametrize("failure", [ValueError("row 2 is broken"), KeyboardInterrupt()])
def test_a_generator_that_failed_is_not_taken_for_one_that_ended(failure):
    def rows():
        yield "a"
        raise failure

    data = Replay(rows())
    with pytest.raises(type(failure)):
        list(data)
    with pytest.raises(SampleError, match="the generator that was given as calibration has failed before"):
        list(data)


def test_what_can_be_gone_through_again_is_left_alone(tmp_path):
    for data in (None, "self", tmp_path, ["a"], ("a",), {"text": "a"}):
        assert replayed(data) is data


def test_copies_of_a_configuration_share_what_a_generator_gave():
    config = SABConfig(calibration=(text for text in ["a", "b"]))
    twin = copy.deepcopy(config)
    assert list(twin.calibration) == list(config.calibration) == ["a", "b"]
    assert config.to_dict()["calibration"] == {"samples": None}
    assert SABConfig.from_dict(config.to_dict()) == config
