"""Only what certainly cannot fit is refused, with the setting that would make it fit."""

from dataclasses import replace

import pytest

from optimum_sab.calibration.plan.fit import DiskUse, refuse_what_cannot_fit
from optimum_sab.calibration.plan.limits import Room
from optimum_sab.calibration.plan.memory import MACHINE, memory_of
from optimum_sab.errors import ConfigError
from optimum_sab.wording import size_in_words


def rooms(total):
    return {MACHINE: Room(total, total // 2, "memory and swap")}


def refused(work, total, disks=()):
    with pytest.raises(ConfigError) as caught:
        refuse_what_cannot_fit(work, rooms(total), disks)
    return str(caught.value)


def certain(work):
    return memory_of(work)[0].certain.certain


def expected(work):
    return memory_of(work)[0].peak.bytes


def deep(work):
    """So many blocks that they are what takes memory."""
    return replace(work, model=replace(work.model, blocks=work.model.blocks * 6))


def test_what_is_expected_to_be_too_much_is_not_refused(work):
    (memory,) = memory_of(work)
    assert certain(work) < memory.peak.bytes
    refuse_what_cannot_fit(work, rooms(certain(work)))
    assert "at least" in refused(work, certain(work) - 1)


def test_activations_that_cannot_fit_name_their_bound(work, changed):
    bounded = expected(changed(work, activation_memory=2**30))
    said = refused(work, bounded)
    assert f"at least {size_in_words(certain(work))}" in said
    assert f"there are {size_in_words(bounded)} (memory and swap, {size_in_words(bounded // 2)} of it free)" in said
    assert f"With activation_memory=1 it is {size_in_words(bounded)}." in said
    assert "ignore_plan=True" in said


def test_a_dense_model_that_is_copied_names_streaming(work, changed):
    copied = changed(deep(work), copied=1.0, activation_memory=2**30)
    streamed = expected(changed(copied, streamed=True))
    assert streamed < certain(copied)
    assert f"With stream_weights=True it is {size_in_words(streamed)}." in refused(copied, streamed)
    less = refused(copied, streamed - 1)  # streaming alone would not be certain to fail
    assert "With stream_weights=True and calibration_samples=64 it is" in less


def test_both_are_named_where_neither_is_enough(work, changed):
    copied = changed(deep(work), copied=1.0)
    both = expected(changed(copied, streamed=True, activation_memory=2**30))
    assert "With stream_weights=True and activation_memory=1 it is" in refused(copied, both)


def test_fewer_samples_are_named_where_the_bound_is_set_already(work, changed):
    bounded = changed(work, streamed=True, activation_memory=2**30)
    said = refused(bounded, certain(bounded) - 1)
    count = int(said.split("calibration_samples=")[1].split(" ")[0])
    fewer = [changed(bounded, samples=bounded.samples.first(each, 0)) for each in (count, 2 * count)]
    assert expected(fewer[0]) <= certain(bounded) - 1 < expected(fewer[1])


def test_where_only_what_is_certain_finds_room_that_is_said(work):
    one = replace(work, samples=work.samples.first(1, 0), model=replace(work.model, copied=1.0))
    least = certain(replace(one, streamed=True))
    said = refused(one, least)
    assert f"With stream_weights=True it is at least {size_in_words(least)}." in said


def test_nothing_is_named_where_nothing_helps(work):
    assert "(sequence_length; the processor's max_pixels for pictures); else it takes a machine" in refused(work, 10**6)


def test_what_is_not_known_is_not_refused(work):
    refuse_what_cannot_fit(work, {MACHINE: Room(None, None, "unknown")})
    refuse_what_cannot_fit(work, {})


def test_disk_is_counted_by_folder(work):
    blocks = DiskUse("finished blocks", "/there", 60, 100, "resume_folder", 60)
    files = DiskUse("activations", "/there", 80, 100, "activation_memory", 50)
    other = DiskUse("activations", "/elsewhere", 80, 100, "activation_memory", 50)
    room = rooms(10**15)
    refuse_what_cannot_fit(work, room, [blocks, other])
    with pytest.raises(
        ConfigError, match=r"finished blocks and activations .* '/there', .* resume_folder or activation_memory"
    ):
        refuse_what_cannot_fit(work, room, [blocks, files])
