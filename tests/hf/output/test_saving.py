"""What is under a name: the old checkpoint or the new one, whole; and what lies beside it stays."""

import errno
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from optimum_sab.errors import OutputError
from optimum_sab.hf.output import filesystem, placing
from optimum_sab.hf.output.place import check_output
from optimum_sab.hf.output.saving import save_packed, written_whole


@pytest.fixture(params=["swap", "two renames"])
def way(request, monkeypatch):
    """How a folder is exchanged: as Linux can, and as file systems do that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(placing, "swap", lambda one, other: False)
    return request.param


def test_swap_exchanges_two_folders(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    if not filesystem.swap(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this system or file system cannot")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.glob("*/*"))] == ["one/other", "other/one"]
    with pytest.raises(FileNotFoundError):
        filesystem.swap(tmp_path / "one", tmp_path / "none")


def test_saving_replaces_a_checkpoint_and_keeps_everything_else(tmp_path, disk, way):
    out = tmp_path / "out"
    disk.write(out, "old")
    stale = [
        "model.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00009.bin",
        "generation_config.json",
        "added_tokens.json",
        "preprocessor_config.json",
        "chat_template.jinja",
    ]
    others = [
        "README.md",
        "notes.txt",
        "run.log",
        ".git/config",
        "data/config.json",
        "model_final.ckpt",
        "my.safetensors",
    ]
    for name in (*stale, *others, "additional_chat_templates/tool.jinja"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(f"my {name}")
    (out / "link").symlink_to("run.log")
    inodes = {name: (out / name).stat().st_ino for name in others}
    disk.save(out, "new")
    assert disk.version_of(out) == "new"
    assert not any((out / name).exists() for name in (*stale, "additional_chat_templates"))
    assert {name: (out / name).read_text() for name in others} == {name: f"my {name}" for name in others}
    assert {name: (out / name).stat().st_ino for name in others} == inodes  # moved, not copied
    assert os.readlink(out / "link") == "run.log"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_saving_replaces_a_file_of_the_same_name_as_a_written_one(tmp_path, disk, way):
    disk.write(tmp_path / "out", "old")
    (tmp_path / "out" / "card.md").write_text("old")
    with written_whole(check_output(tmp_path / "out", overwrite=True)) as folder:
        disk.write(folder, "new")
        (folder / "card.md").write_text("new")
    assert (tmp_path / "out" / "card.md").read_text() == "new"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_saving_gives_a_new_folder_the_mode_that_the_mask_says(tmp_path, disk, mask):
    before = os.umask(mask)
    try:
        disk.save(tmp_path / "out", "new")
        (tmp_path / "plain").mkdir()
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("old", [None, "old"])
def test_saving_leaves_the_mode_of_a_folder_that_is_there(tmp_path, disk, old, way):
    (tmp_path / "out").mkdir()
    if old:
        disk.write(tmp_path / "out", old)
    (tmp_path / "out").chmod(0o2750)
    disk.save(tmp_path / "out", "new")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o2750


def test_saving_leaves_nothing_when_the_work_fails(tmp_path, disk):
    def half_written(folder, error):
        disk.write(folder, "half")
        raise error

    disk.write(tmp_path / "out", "old")
    for error in (ValueError("of the work"), KeyboardInterrupt()):
        with pytest.raises(type(error)), written_whole(check_output(tmp_path / "out", overwrite=True)) as folder:
            half_written(folder, error)
    assert disk.version_of(tmp_path / "out") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def where_it_is(error):
    """The folder that an error says the checkpoint is in."""
    quoted = str(error).split("'")
    return Path(quoted[quoted.index(next(q for q in quoted if q.endswith((" lies in ", " saved to ")))) + 1])


def gone_dark(self, target):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("kind", ["filled", "file", "gone dark"])
def test_saving_keeps_what_is_finished_when_the_last_step_fails(tmp_path, disk, monkeypatch, kind):
    out = tmp_path / "out"
    meanwhile = {
        "filled": lambda: disk.write(out, "another's"),
        "file": lambda: out.write_text("another's"),
        "gone dark": lambda: monkeypatch.setattr(Path, "rename", gone_dark),
    }

    def finish(folder):
        disk.write(folder, "finished")
        meanwhile[kind]()

    with pytest.raises(OutputError) as caught, written_whole(check_output(out)) as folder:
        finish(folder)
    monkeypatch.undo()
    finished = where_it_is(caught.value)
    assert disk.version_of(finished) == "finished"
    if kind != "gone dark":
        out.rename(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="could not bring there"):
        check_output(out)  # the next run names it, and does not delete it
    assert disk.version_of(finished) == "finished"


def test_saving_puts_the_old_one_back_when_the_second_rename_fails(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(placing, "swap", lambda one, other: False)
    disk.write(tmp_path / "out", "old")
    rename = Path.rename

    def failing(self, target):
        if self.name == "new" and Path(target).name == "out":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    place = check_output(tmp_path / "out", overwrite=True)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError) as caught:
        with written_whole(place) as folder:
            disk.write(folder, "new")
    assert disk.version_of(tmp_path / "out") == "old"
    assert disk.version_of(where_it_is(caught.value)) == "new"


def test_saving_into_a_filled_folder_takes_back_what_had_come_in(tmp_path, disk, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = check_output(Path("."))
    assert place.inside
    rename = Path.rename

    def failing(self, target):
        if self.name == "config.json" and Path(target).parent == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError) as caught:
        with written_whole(place) as folder:
            disk.write(folder, "new")
    assert disk.version_of(tmp_path) is None
    assert disk.version_of(where_it_is(caught.value)) == "new"


def test_saving_names_what_it_could_not_bring_along(tmp_path, disk, monkeypatch):
    disk.write(tmp_path / "out", "old")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    rename = Path.rename

    def failing(self, target):
        if self.name == "notes.txt":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.warns(UserWarning, match=r"is written; left of what it replaces: .*notes\.txt"):
        disk.save(tmp_path / "out", "new")
    assert disk.version_of(tmp_path / "out") == "new"
    assert [p.read_text() for p in tmp_path.rglob("notes.txt")] == ["mine"]


def test_saving_brings_files_to_the_disk_before_they_get_their_name(tmp_path, disk, monkeypatch):
    disk.write(tmp_path / "out", "old")
    done = []
    fsync, swap = os.fsync, placing.swap

    def noted(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        return fsync(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell which file a handle is of")
    place = check_output(tmp_path / "out", overwrite=True)
    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(placing, "swap", lambda *names: done.append("SWAP") or swap(*names))
    with written_whole(place) as folder:
        disk.write(folder, "new")
        names = {p.name for p in folder.iterdir()}
    at = done.index("SWAP")
    assert names | {"new", "state.json.partial"} <= set(done[:at])
    assert tmp_path.name in done[at:]  # and the names' folder afterwards


# -- a model and its processor -----------------------------------------------------------------------------------------


def saver(write):
    return SimpleNamespace(save_pretrained=write)


NOTHING = saver(lambda folder: None)


def test_save_packed_saves_elsewhere_when_the_place_is_full(mounted, tmp_path, disk, monkeypatch):
    """Hours of work are in memory only by then."""
    from safetensors.torch import save_file

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = check_output(mounted / "out")
    (mounted / "another's").write_bytes(bytes(2_000_000))
    tensors = {"weight": torch.arange(500_000, dtype=torch.int32)}
    with pytest.raises(OutputError, match=r"no space is left there.*instead") as caught:
        save_packed(saver(lambda folder: save_file(tensors, folder / "model.safetensors")), NOTHING, place)
    assert str(mounted / "out") in str(caught.value)
    saved = where_it_is(caught.value)
    assert saved.parent == tmp_path
    assert (saved / "model.safetensors").stat().st_size > 2_000_000
    assert [p.name for p in mounted.iterdir()] == ["another's"]


def test_save_packed_says_so_when_nothing_can_be_written_anywhere(tmp_path, monkeypatch):
    def failing(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OutputError, match=f"no space is left there.*saved in '{tmp_path}' either"):
        save_packed(saver(failing), NOTHING, check_output(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_save_packed_lets_other_errors_through(tmp_path):
    def failing(folder):
        raise ValueError("of the model")

    with pytest.raises(ValueError, match="of the model"):
        save_packed(saver(failing), NOTHING, check_output(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
