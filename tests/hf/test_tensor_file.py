"""Files that are written tensor by tensor are those that safetensors writes."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_sab.hf.tensor_file import write_tensors
from optimum_sab.nn.scratch import Scratch, in_scratch

DTYPES = (
    torch.float32,
    torch.uint8,
    torch.bfloat16,
    torch.int64,
    torch.bool,
    torch.float16,
    torch.int16,
    torch.float8_e4m3fn,
    torch.int32,
    torch.int8,
    torch.float64,
)


def content():
    torch.manual_seed(0)
    found = {
        f"{stem}{index}": torch.randint(0, 2, (3 + index, 5)).to(dtype)
        for stem in ("b.", "a.é", 'c"\\')
        for index, dtype in enumerate(DTYPES)
    }
    return {**found, "empty": torch.zeros(0, 4), "scalar": torch.tensor(3.0)}


def test_bytes_are_those_of_safetensors(tmp_path):
    write_tensors(content(), tmp_path / "mine", {"format": "pt"})
    save_file(content(), tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "mine").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="permissions are POSIX's")
def test_a_file_has_the_permissions_of_any_new_one(tmp_path):
    """safetensors 0.8 makes it its owner's alone."""
    (tmp_path / "other").touch()
    write_tensors({"a": torch.ones(3)}, tmp_path / "file", {})
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "other"]


def test_metadata_are_sorted(tmp_path):
    metadata = {name: name for name in ("d", "a", "c", "é", "b")}
    write_tensors({"x": torch.ones(2)}, tmp_path / "file", metadata)
    raw = (tmp_path / "file").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert list(header["__metadata__"]) == sorted(metadata) and header["__metadata__"] == metadata


def test_what_lies_in_scratch_files_is_written_as_it_is(tmp_path):
    given = content()
    Scratch(tmp_path).put(given.values())
    assert in_scratch(given["b.0"])
    write_tensors({**given, "turned": given["b.0"].t()}, tmp_path / "file", {})
    found = load_file(tmp_path / "file")
    torch.testing.assert_close(found.pop("turned"), content()["b.0"].t())
    assert all(torch.equal(found.pop(name), value) for name, value in content().items()) and not found


def test_a_file_may_be_replaced_by_what_is_mapped_from_it(tmp_path):
    write_tensors(content(), tmp_path / "file", {})
    write_tensors(load_file(tmp_path / "file"), tmp_path / "file", {})
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[name], value) for name, value in content().items())


@pytest.mark.parametrize("place", ["missing/file", "folder"])
def test_a_place_that_cannot_be_written_is_an_os_error_and_nothing_is_left(tmp_path, place):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_tensors({"x": torch.ones(2)}, tmp_path / place, {})
    assert [each.name for each in tmp_path.rglob("*")] == ["folder"]
