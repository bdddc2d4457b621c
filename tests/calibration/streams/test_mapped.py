"""Activations of waiting samples lie in memory-mapped files beyond a budget, with the values they had."""

import gc
import os

import pytest
import torch

from optimum_sab.calibration.streams import mapped as mapped_module
from optimum_sab.calibration.streams.mapped import SMALL, MappedActivations
from optimum_sab.errors import CalibrationError

WIDTH = SMALL // 4  # of a float32 row that is worth a file


def files(folder):
    """Of a folder, as far as this process has them mapped."""
    with open("/proc/self/maps") as lines:
        return sum(str(folder) in line for line in lines)


def in_file(tensor):
    return tensor.untyped_storage().filename is not None


def nothing():
    return ()


@torch.no_grad()
def test_what_a_worker_holds_beyond_the_room_lies_in_files_that_have_no_name(tmp_path):
    mapped = MappedActivations(0, tmp_path)
    with mapped.going_on("a", nothing):
        made = torch.arange(2.0 * WIDTH)
        temporary = made + 1
        del temporary
    assert in_file(made) and mapped.mapped == 2 * SMALL
    assert not list(tmp_path.iterdir())
    torch.testing.assert_close(made, torch.arange(2.0 * WIDTH), rtol=0, atol=0)
    here = files(tmp_path)
    del made
    gc.collect()
    assert here == 1 and files(tmp_path) == 0


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files have a name first")
@torch.no_grad()
def test_a_file_has_no_name_at_any_moment_that_a_kill_could_leave(tmp_path, monkeypatch):
    seen, own = [], mapped_module.reserve
    monkeypatch.setattr(mapped_module, "reserve", lambda *args: own(*args) or seen.append(list(tmp_path.iterdir())))
    with MappedActivations(0, tmp_path).going_on("a", nothing):
        made = torch.ones(WIDTH)
    assert in_file(made) and seen == [[]]


@torch.no_grad()
def test_views_stay_views_of_one_storage(tmp_path):
    with MappedActivations(0, tmp_path).going_on("a", nothing):
        whole = torch.zeros(2, WIDTH)
        turned, part = whole.t(), whole[1, ::2]
    assert turned.stride() == (1, WIDTH) and part.stride() == (2,)
    turned.add_(3)
    assert all(in_file(each) and bool((each == 3).all()) for each in (whole, turned, part))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_graph_that_has_saved_a_tensor_goes_back_through_it(tmp_path, mode):
    given = torch.arange(1.0, WIDTH + 1).requires_grad_()
    with mode():
        with MappedActivations(0, tmp_path).going_on("a", nothing):
            twice = given * 2
            part = twice[1:]
            total = twice.square().sum() + part.square().sum()
        assert in_file(twice) and in_file(part)
        torch.testing.assert_close(part, 2 * torch.arange(2.0, WIDTH + 1), rtol=0, atol=0)
    if mode is torch.enable_grad:
        total.backward()
        wanted = 16 * torch.arange(1.0, WIDTH + 1)
        wanted[0] = 8
        torch.testing.assert_close(given.grad, wanted)


@torch.no_grad()
def test_numbers_whose_sign_is_a_flag_stay_what_they_are(tmp_path):
    angles = torch.linspace(0.0, 3.0, WIDTH)
    with MappedActivations(0, tmp_path).going_on("a", nothing):
        turned = torch.polar(torch.ones(WIDTH), angles).conj()
        sines = turned.imag
    torch.testing.assert_close(sines, -angles.sin())
    torch.testing.assert_close(turned, torch.polar(torch.ones(WIDTH), -angles))


@torch.no_grad()
def test_room_is_for_all_workers_together(tmp_path):
    mapped, held = MappedActivations(3 * SMALL, tmp_path), {}
    for worker in "abc":
        with mapped.going_on(worker, nothing):
            held[worker] = torch.ones(2 * WIDTH)
    assert [in_file(each) for each in held.values()] == [False, True, True]
    with mapped.going_on("a", nothing):
        held.pop("a")
    with mapped.going_on("d", nothing):
        held["d"] = torch.ones(2 * WIDTH)
    assert not in_file(held["d"])


@torch.no_grad()
def test_what_others_hold_too_is_left_where_it_is(tmp_path):
    older = torch.ones(WIDTH)
    with MappedActivations(0, tmp_path).going_on("a", nothing):
        view = older.view(2, -1)
    assert not in_file(older) and view.data_ptr() == older.data_ptr()


@torch.no_grad()
def test_what_a_worker_is_given_counts_as_its_own(tmp_path):
    given = torch.ones(WIDTH)
    with MappedActivations(0, tmp_path).going_on("a", lambda: {"hidden": (given,)}):
        pass
    assert in_file(given)


@torch.no_grad()
def test_a_disk_that_is_full_is_named(tmp_path, monkeypatch):
    def full(handle, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CalibrationError, match=r"No space left on device.*TMPDIR"):
        with MappedActivations(0, tmp_path).going_on("a", nothing):
            made = torch.ones(WIDTH)
    assert not in_file(made) and not list(tmp_path.iterdir())
