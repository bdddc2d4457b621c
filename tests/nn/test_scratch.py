"""Tensors in scratch files are what they were, take no memory when they are not used, and leave nothing behind."""

import copy
import gc
import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from optimum_sab.errors import StreamError
from optimum_sab.nn import scratch
from optimum_sab.nn.scratch import Scratch, apart, give_back, in_scratch, make_private, staying_shared

LARGE = 1 << 24  # values, so 64 MiB in float32
STATUS = Path("/proc/self/status")
tells = pytest.mark.skipif(not STATUS.exists(), reason="this system does not tell what is resident")


def resident(kind):
    gc.collect()
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{kind}:"))
    return int(line.split()[1]) * 1024


def handles():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_values_identity_and_gradients_stay(tmp_path):
    parameter, buffer = nn.Parameter(torch.arange(12.0).view(3, 4)), torch.arange(6, dtype=torch.int16).view(2, 3).t()
    before = parameter
    Scratch(tmp_path).put([parameter, buffer])
    assert parameter is before and parameter.requires_grad and in_scratch(parameter) and in_scratch(buffer)
    assert torch.equal(parameter.detach(), torch.arange(12.0).view(3, 4))
    assert buffer.stride() == (1, 3) and buffer.tolist() == [[0, 3], [1, 4], [2, 5]]
    parameter.sum().backward()
    assert parameter.grad.tolist() == [[1.0] * 4] * 3
    assert not list(tmp_path.iterdir())


def test_what_shares_memory_still_does_and_what_does_not_has_a_storage_of_its_own(tmp_path):
    whole = torch.arange(100.0)
    views = [whole.detach()[10:30], whole.detach()[20:40], whole.detach()[60:70]]
    Scratch(tmp_path).put(views)
    assert views[0].untyped_storage()._cdata == views[1].untyped_storage()._cdata
    assert views[2].untyped_storage().nbytes() < 2 * 10 * 4 + 16
    views[0][15] = -1.0
    assert views[1][5] == -1.0 and whole[25] == 25.0
    assert views[2].tolist() == list(range(60, 70))


@pytest.mark.parametrize("filed", [False, True])
def test_a_view_is_given_a_storage_of_its_own_in_the_same_memory(tmp_path, filed):
    whole = torch.arange(60, dtype=torch.int16).view(3, 4, 5)
    if filed:
        Scratch(tmp_path).put([whole])
    views = [apart(view) for view in whole]
    for place, view in enumerate(views):
        assert torch.equal(view, whole[place]) and view.dtype == torch.int16
        assert view.data_ptr() == whole[place].data_ptr()
        assert (view.storage_offset(), view.untyped_storage().nbytes()) == (0, 40)
        assert in_scratch(view) == filed
    whole.zero_()
    assert not any(view.any() for view in views)
    del whole
    gc.collect()
    views[1][2, 3] = 7
    assert apart(views[1])[2, 3] == 7 and not views[0].any()


@tells
def test_pages_of_a_view_that_was_given_a_storage_can_be_given_back(tmp_path):
    whole = torch.ones(4, LARGE // 4)
    Scratch(tmp_path).put([whole])
    view, before = apart(whole[2]), resident("RssFile")
    assert view.sum() == LARGE // 4
    assert resident("RssFile") > before + LARGE // 2
    give_back(view)
    assert resident("RssFile") < before + LARGE // 4
    assert view[5] == 1


def test_what_is_there_already_is_not_moved_again(tmp_path):
    tensor, other = torch.ones(10), torch.ones(10)
    files = Scratch(tmp_path)
    files.put([tensor])
    address = tensor.data_ptr()
    files.put([tensor, other, tensor])
    assert tensor.data_ptr() == address and in_scratch(other)
    files.put([torch.zeros(0), torch.zeros(4, device="meta")])


@tells
def test_what_is_put_into_a_file_is_no_longer_in_memory_of_the_process_s_own(warm, tmp_path):
    """In a process of its own: what others have left behind in the allocator may be used again meanwhile."""
    program = (
        "import sys, torch\nfrom tests.nn.test_scratch import LARGE, Scratch, resident\n"
        "files, tensor = Scratch(sys.argv[1]), torch.rand(LARGE)\nown = resident('RssAnon')\n"
        "files.put([tensor])\nprint(own - resident('RssAnon'))"
    )
    found = subprocess.run([warm / "python", "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(found.stdout) > 3 * LARGE


@tells
def test_pages_are_given_back_and_come_again(tmp_path):
    files, tensor = Scratch(tmp_path), torch.rand(LARGE)
    wanted = float(tensor.double().sum())
    files.put([tensor])
    for back in (files.give_back, lambda: give_back(tensor)):
        there = resident("RssFile")
        assert float(tensor.double().sum()) == wanted
        assert resident("RssFile") > there + 3 * LARGE
        tensor[0] += 1
        wanted = float(tensor.double().sum())
        back()
        assert resident("RssFile") < there + LARGE


def test_files_go_with_their_tensors(tmp_path):
    before = handles()
    tensor, files = torch.ones(1000), Scratch(tmp_path)
    files.put([tensor])
    view = tensor[10:]
    assert handles() > before and scratch._PLACES
    del tensor, files
    assert view.sum() == 990
    del view
    assert handles() == before and not scratch._PLACES


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_private_tensors_are_a_processes_own(tmp_path):
    tensor = torch.arange(1000.0)
    view = tensor[:10]
    Scratch(tmp_path).put([tensor, view])
    make_private([tensor, view])
    assert not in_scratch(tensor) and not scratch._PLACES
    child = os.fork()
    if not child:
        view[0] = 7.0
        os._exit(int(tensor[0] != 7.0))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert tensor.tolist() == list(range(1000))
    view[1] = 5.0
    give_back(tensor)  # which would lose that
    assert tensor[1] == 5.0


def test_private_tensors_can_be_copied_and_pickled(tmp_path):
    tensor = nn.Parameter(torch.arange(1000.0))
    Scratch(tmp_path).put([tensor])
    make_private([tensor])
    for again in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor)), tensor.to(torch.float64).float()):
        assert torch.equal(again, tensor)


def test_they_stay_shared_for_who_only_saves_them(tmp_path):
    tensor = torch.ones(10)
    Scratch(tmp_path).put([tensor])
    with staying_shared():
        make_private([tensor])
        assert in_scratch(tensor)
    make_private([tensor])
    assert not in_scratch(tensor)


@pytest.mark.parametrize("place", ["full", "file"])
def test_a_place_without_room_is_named_and_tensors_stay_where_they_are(tmp_path, monkeypatch, place):
    def full(handle, offset, size):
        raise OSError(28, "No space left on device")

    folder = tmp_path / "there"
    if place == "full":
        monkeypatch.setattr(os, "posix_fallocate", full)
    else:
        folder.write_text("no folder")
    tensor = torch.arange(10.0)
    address, before = tensor.data_ptr(), handles()
    with pytest.raises(StreamError, match=rf"{tmp_path}/there.*resume_folder or TMPDIR"):
        Scratch(folder).put([tensor])
    assert tensor.data_ptr() == address and tensor.tolist() == list(range(10)) and handles() == before
    assert place == "file" or not list(folder.iterdir())
