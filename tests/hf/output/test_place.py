"""Places a checkpoint can go to, and those it cannot: told before the work, and left as they were."""

import errno
import os
import resource
import subprocess
import tempfile
from pathlib import Path

import pytest

from optimum_sab.errors import OutputError, OutputExistsError
from optimum_sab.hf.output.place import check_output, check_size


def listing(folder):
    return sorted((str(p.relative_to(folder)), p.is_symlink(), p.is_dir()) for p in Path(folder).rglob("*"))


def refused(output, *words, overwrite=False, error=OutputError, **options):
    with pytest.raises(error) as caught:
        check_output(Path(output), overwrite, **options)
    message = str(caught.value)
    for word in (repr(str(output)), *words):
        assert word in message
    assert "\n" not in message


def as_nobody(disk, work):
    """Run it as a user without rights, as root may write everywhere."""

    def with_less():
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        work()

    assert disk.in_child(with_less) == 0


# -- what reads must not be what is replaced ---------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["model", "", "model/packed", "model/a/b", "link", "link/packed", "model/../model"])
def test_place_refuses_the_source_what_holds_it_and_what_lies_in_it(tmp_path, name, overwrite, disk):
    (tmp_path / "all").mkdir()
    disk.write(tmp_path / "all" / "model", "source")
    (tmp_path / "all" / "link").symlink_to(tmp_path / "all" / "model")
    before = listing(tmp_path)
    refused(
        str(tmp_path / "all" / name).rstrip("/"),
        repr(str(tmp_path / "all" / "model")),
        "name a folder outside of it",
        overwrite=overwrite,
        sources=[tmp_path / "all" / "model"],
    )
    refused(
        str(tmp_path / "all" / name).rstrip("/"),
        "outside",
        overwrite=overwrite,
        sources=[str(tmp_path / "all" / "link")],
    )
    assert listing(tmp_path) == before


def test_place_beside_the_source_is_taken(tmp_path, disk):
    disk.write(tmp_path / "model", "source")
    assert check_output(tmp_path / "model-sab", True, [tmp_path / "model"]).folder == tmp_path / "model-sab"
    disk.save(tmp_path / "model-sab", "new", sources=[str(tmp_path / "model")])
    assert (disk.version_of(tmp_path / "model"), disk.version_of(tmp_path / "model-sab")) == ("source", "new")


def test_place_refuses_what_the_links_of_the_source_lead_to(tmp_path, disk):
    disk.write(tmp_path / "blobs", "source")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "blobs" / "config.json")
    refused(tmp_path / "blobs", "links to", overwrite=True, sources=[tmp_path / "model"])


def test_place_refuses_a_single_file_that_is_read(tmp_path, disk):
    disk.write(tmp_path / "vision", "source")
    refused(tmp_path / "vision", "holds", overwrite=True, sources=[tmp_path / "vision" / "tokenizer.json"])


@pytest.mark.parametrize("below", ["", "snapshots/abc", "snapshots/abc/packed"])
def test_place_refuses_the_cache_of_a_source_on_the_hub(tmp_path, monkeypatch, below, disk):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    disk.write(tmp_path / "models--org--name" / "snapshots" / "abc", "source")
    output = str(tmp_path / "models--org--name" / below).rstrip("/")
    refused(output, "'org/name'", overwrite=True, sources=["org/name"])
    refused(tmp_path, "holds", overwrite=True, sources=["org/name"])
    assert check_output(tmp_path.parent / f"{tmp_path.name}-other", sources=["org/name"])


# -- places that would fail after the work -----------------------------------------------------------------------------


def test_place_is_left_as_it_was(tmp_path, disk):
    check_output(tmp_path / "a" / "b" / "out")
    assert listing(tmp_path) == []
    (tmp_path / "empty").mkdir(mode=0o700)
    before = (tmp_path / "empty").stat()
    check_output(tmp_path / "empty")
    disk.write(tmp_path / "old", "old")
    check_output(tmp_path / "old", overwrite=True)
    assert disk.version_of(tmp_path / "old") == "old"
    after = (tmp_path / "empty").stat()
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert disk.hidden(tmp_path) == []


def test_place_refuses_files_and_folders_with_files(tmp_path, disk):
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file", error=OutputExistsError)
    refused(tmp_path / "file" / "out", "below a file")
    refused(tmp_path / "file" / "out" / "deeper", "below a file")
    disk.write(tmp_path / "old", "old")
    refused(tmp_path / "old", "not empty", "--overwrite", error=OutputExistsError)


@pytest.mark.parametrize("parent", ["", "missing"])
def test_place_refuses_a_name_that_is_too_long(tmp_path, parent):
    refused(tmp_path / parent / ("n" * 256), "shorter")
    assert listing(tmp_path) == []


def test_place_with_the_longest_name_is_written(tmp_path, disk):
    name = "n" * 250
    disk.save(tmp_path / name, "first")
    disk.save(tmp_path / name, "second")
    assert disk.version_of(tmp_path / name) == "second"
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_place_refuses_links_that_lead_nowhere(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    refused(tmp_path / "dangling", repr(str(tmp_path / "gone")), "does not exist")
    (tmp_path / "one").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "one")
    refused(tmp_path / "one", "circle")


@pytest.mark.parametrize("old", [None, "old"])
def test_place_behind_a_link_is_written(tmp_path, old, disk):
    (tmp_path / "real").mkdir()
    if old:
        disk.write(tmp_path / "real", old)
    (tmp_path / "link").symlink_to("real")
    disk.save(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert disk.version_of(tmp_path / "real") == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


@pytest.fixture
def common():
    """A folder whose parents everyone may pass; pytest's are its user's own."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_place_refuses_what_may_not_be_written_to(disk, common):
    (common / "locked").mkdir()
    (common / "locked" / "empty").mkdir()
    os.chmod(common / "locked", 0o555)

    def work():
        refused(common / "locked" / "out", "you may not write there")
        refused(common / "locked" / "empty", "you may not write there")

    as_nobody(disk, work)


@pytest.mark.parametrize("where", ["passed", "barred", "barred/below"])
def test_place_that_may_not_be_looked_into_is_named(shut, where):
    shut.passed.chmod(0o333)
    output = str(shut.passed.parent / where)
    with shut.entered():
        refused(output, "may not", overwrite=True)


def test_place_in_a_parent_that_may_not_be_written_to_is_filled_where_it_is(common, disk):
    (common / "locked").mkdir()
    (common / "locked" / "mine").mkdir()
    os.chmod(common / "locked" / "mine", 0o777)
    os.chmod(common / "locked", 0o555)

    def work():
        disk.save(common / "locked" / "mine", "new", overwrite=False)
        refused(common / "locked" / "mine", "holds a checkpoint", overwrite=True)

    as_nobody(disk, work)
    assert disk.version_of(common / "locked" / "mine") == "new"
    assert disk.hidden(common / "locked" / "mine") == []


def test_place_that_is_the_working_folder_is_filled_where_it_is(tmp_path, monkeypatch, disk):
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    disk.save(".", "new", overwrite=False)
    assert disk.version_of(".") == "new"
    assert tmp_path.stat().st_ino == inode
    assert disk.hidden(tmp_path) == []
    refused(".", "working folder", "packed", overwrite=True)
    assert disk.version_of(".") == "new"


def test_place_that_is_a_mount_point_is_filled_where_it_is(mounted, disk):
    (mounted / "lost+found").mkdir()
    disk.save(mounted, "new", overwrite=False)
    assert disk.version_of(mounted) == "new"
    assert disk.hidden(mounted) == []
    refused(mounted, "mount point", overwrite=True)
    assert disk.version_of(mounted) == "new"
    disk.save(mounted / "packed", "inside of it")
    assert disk.version_of(mounted / "packed") == "inside of it"


def test_place_refuses_a_full_disk_and_too_little_space(mounted):
    where = check_output(mounted / "out")
    check_size(where, 2_000_000)
    with pytest.raises(OutputError, match=r"0\.00\d* GB free.*takes about 1\.5 GB.*another disk"):
        check_size(where, 1_500_000_000)
    (mounted / "filler").write_bytes(bytes(2_900_000))
    refused(mounted / "out", "no space", "another disk")
    assert [p.name for p in mounted.iterdir()] == ["filler"]


def test_place_refuses_a_read_only_disk(mounted):
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    refused(mounted / "out", "read-only")
    refused(mounted, "read-only")


def test_place_refuses_files_that_may_not_become_that_large(tmp_path, disk):
    where = check_output(tmp_path / "out")

    def with_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 25, -1))
        check_size(where, 1 << 25)
        with pytest.raises(OutputError, match=r"0\.0336 GB here, .*about 5 GB; .*ulimit -f"):
            check_size(where, 5_000_000_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, -1))
        refused(tmp_path / "out", "ulimit -f")

    assert disk.in_child(with_limit) == 0
    assert listing(tmp_path) == []


def test_place_refuses_an_adapter_that_would_be_loaded_instead(tmp_path, disk):
    disk.write(tmp_path / "old", "old")
    (tmp_path / "old" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "old", "adapter_config.json", overwrite=True)


def test_place_tells_a_folder_that_cannot_be_renamed_by_trying(tmp_path, monkeypatch, disk):
    """Docker's lower layers answer so, and are no mount points."""
    (tmp_path / "layer").mkdir()
    rename = Path.rename

    def refusing(self, target):
        if self == tmp_path / "layer" or target == tmp_path / "layer":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refusing)
    assert check_output(tmp_path / "layer").inside
    disk.save(tmp_path / "layer", "new", overwrite=False)
    assert disk.version_of(tmp_path / "layer") == "new"
