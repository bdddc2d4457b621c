"""What is expected and not free is said, with the setting that would make it fit."""

from dataclasses import replace

import pytest
import torch

from optimum_sab.calibration.plan.expectation import Fit, fit_of, shortages
from optimum_sab.calibration.plan.fit import DiskUse
from optimum_sab.calibration.plan.limits import Room
from optimum_sab.calibration.plan.memory import ACCELERATOR, MACHINE, memory_of
from optimum_sab.wording import size_in_words

PLENTY = 2**45


def said(work, free, device=MACHINE, disks=(), total=PLENTY):
    return list(shortages(work, {device: Room(total, free, "memory")}, disks))


def peak(work):
    return memory_of(work)[0].peak


def own(work):
    return max(phase.own for phase in memory_of(work)[0].phases)


def test_what_is_free_to_the_byte_is_enough(work):
    assert said(work, peak(work).bytes) == []
    assert len(said(work, peak(work).bytes - 1)) == 1
    assert said(work, None) == []


def test_weights_that_are_mapped_make_it_tight(work):
    model = work.model
    weights = (model.outside * model.item) + model.block_bytes
    assert peak(work).mapped == weights  # nothing is copied
    (message,) = said(work, own(work))
    all_of_it, without, mapped = map(size_in_words, (peak(work).bytes, own(work), weights))
    assert f"expected to take {all_of_it} of the machine's memory in the stage 'blocks'" in message
    assert f"and {without} are free. {mapped} of it are weights that are mapped" in message
    assert "at the speed of the disk. With activation_memory=1 it is" in message


def test_beyond_that_it_does_not_fit_and_says_what_would(work, changed):
    (message,) = said(work, own(work) - 1)
    assert "of it that the system can let go of and read again it is" in message
    bounded = changed(work, activation_memory=2**30)
    whole = peak(bounded).bytes
    assert whole <= own(work) - 1  # so all of it fits, with what is mapped
    assert message.endswith(f"With activation_memory=1 it is {size_in_words(whole)}.")
    streamed = peak(changed(bounded, streamed=True)).bytes
    assert streamed < whole
    (message,) = said(work, streamed)
    assert message.endswith(f"With stream_weights=True and activation_memory=1 it is {size_in_words(streamed)}.")
    assert said(work, 10**6)[0].endswith("max_pixels for pictures); else it takes a machine with more memory.")


def test_where_nothing_makes_all_of_it_fit_mapped_weights_are_left_out(work, changed):
    samples = replace(work.samples, tokens=(4096,) * 31)  # of which half would be too few
    stuck = changed(work, streamable=False, allocation=None, samples=samples)
    (message,) = said(stuck, own(changed(stuck, activation_memory=2**30)))
    assert "stream_weights" not in message
    assert message.endswith("mapped weights not counted.")


def test_long_samples_whose_gradients_are_too_much_name_the_allocation(work, changed):
    samples = replace(work.samples, tokens=(20_000,) * 20)
    long = changed(work, streamed=True, samples=samples, activation_memory=2**30)
    (memory,) = memory_of(long)
    assert memory.peak.name == "sensitivities"
    free = peak(changed(long, allocation=None)).bytes
    (message,) = said(long, free)
    assert message.endswith(f"With allocation='uniform' it is {size_in_words(free)}.")


def test_no_fewer_samples_are_named_than_calibrate_a_model_nor_than_are_mixed_in(work, changed):
    few = changed(work, streamed=True, activation_memory=0, allocation=None)
    assert "calibration_samples=" not in said(changed(few, samples=replace(work.samples, tokens=(256,) * 31)), 10**6)[0]
    source = replace(work.options.source, builtin=300)
    many = changed(work, main=torch.device("cuda"), allocation=None)
    free = peak(changed(many, samples=many.samples.first(256, 0))).bytes
    assert "With calibration_samples=256" in said(many, free, ACCELERATOR)[0]
    assert "calibration_samples=" not in said(changed(many, source=source), free, ACCELERATOR)[0]


def test_a_target_of_bits_keeps_its_allocation(work, changed):
    allocation = replace(work.options.allocation, target_bits=1.6)
    samples = replace(work.samples, tokens=(20_000,) * 20)
    long = changed(work, streamed=True, samples=samples, activation_memory=2**30, allocation=allocation)
    (message,) = said(long, peak(changed(long, allocation=None)).bytes)
    assert "uniform" not in message and "max_pixels" in message


def test_fewer_samples_are_the_first_and_those_that_are_mixed_in(work):
    samples = replace(work.samples, tokens=(9, 8, 7, 6, 5, 4), patches=60)
    assert samples.first(3).tokens == (9, 8, 7)
    assert samples.first(4, 2).tokens == (9, 8, 5, 4)
    assert samples.first(3).patches == 30
    assert samples.first(4, 9).tokens == samples.tokens


def test_the_process_that_has_most_has_its_part_of_the_longest(work):
    samples = replace(work.samples, tokens=(2000, *(10,) * 60, 2000), patches=8)
    assert sum(samples.largest_share(4).tokens) == 2000 and samples.largest_share(4).patches == 2
    assert samples.largest_share(1).total == samples.total
    even = replace(work.samples, tokens=(100,) * 8)
    assert even.largest_share(4).tokens == (100, 100)


def test_processes_are_told_the_number_of_all_samples(work, changed):
    rank = replace(changed(work, main=torch.device("cuda"), allocation=None), ranks=4)
    free = peak(replace(rank, samples=rank.samples.first(256))).bytes
    assert "With calibration_samples=1024 it is" in said(rank, free, ACCELERATOR)[0]


def test_copied_weights_are_not_let_go_of(work, changed):
    copied = changed(work, copied=1.0)
    assert peak(copied).mapped == 0 and own(copied) == peak(copied).bytes
    (message,) = said(copied, peak(copied).bytes - 1)
    assert "mapped" not in message and "let go" not in message


def test_nothing_on_an_accelerator_is_mapped(work, changed):
    there = changed(work, main=torch.device("cuda"))
    (memory,) = memory_of(there)
    assert memory.peak.mapped == 0
    (message,) = said(there, memory.peak.bytes - 1, ACCELERATOR)
    assert "of the accelerator's memory" in message and "calibration_samples=" in message


def test_a_bound_is_said_to_be_one(work, changed):
    assert "expected to take at most" in said(changed(work, samples=replace(work.samples, exact=False)), 10**6)[0]


def test_what_is_refused_is_left_to_the_refusal(work):
    certain = memory_of(work)[0].certain.certain
    assert said(work, certain // 2, total=certain - 1) == []
    ignored = shortages(work, {MACHINE: Room(certain - 1, certain // 2, "memory")}, refusing=False)
    assert len(list(ignored)) == 1
    assert len(said(work, certain // 2, total=certain)) == 1


def test_a_disk_that_is_expected_to_be_full_is_told(work):
    uses = [
        DiskUse("finished blocks", "/a", 600, 1000, "resume_folder", 600),
        DiskUse("scratch files", "/a", 600, 1000, "stream_weights"),
        DiskUse("activations", "/b", 1000, 1000, "activation_memory"),
    ]
    (message,) = said(work, PLENTY, disks=uses)
    assert message.startswith("finished blocks and scratch files are expected to take 1.2 kB in '/a'")
    surely = DiskUse("finished blocks", "/a", 1001, 1000, "resume_folder", 1001)
    assert said(work, PLENTY, disks=[surely]) == []  # refused
    assert len(list(shortages(work, {}, [surely], refusing=False))) == 1


@pytest.mark.parametrize(
    ("spare", "fit"), [(0, Fit.FITS), (-1, Fit.TIGHT)], ids=["all of the peak is free", "a byte less"]
)
def test_fit_is_of_the_peak(work, spare, fit):
    (memory,) = memory_of(work)
    assert fit_of(memory, Room(PLENTY, memory.peak.bytes + spare, "memory")) is fit
    assert fit_of(memory, Room(PLENTY, own(work) - 1, "memory")) is Fit.NOT
    assert fit_of(memory, Room(PLENTY, None, "memory")) is fit_of(memory, None) is Fit.UNKNOWN
