"""Small checkpoints, of which it can be told whether they are whole, and processes that end in the midst of work."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from optimum_sab.hf.output.place import check_output
from optimum_sab.hf.output.saving import written_whole

FILES = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json")


def write_checkpoint(folder, version):
    folder.mkdir(exist_ok=True, parents=True)
    for name in FILES:
        (folder / name).write_text(f"{name} {version}")


def version_of(folder):
    """The version of a whole checkpoint; None where nothing of one is there.

    Raises:
        AssertionError: files are missing, or of several versions.
    """
    folder = Path(folder)
    found = {each.name: each.read_text() for each in folder.iterdir() if each.name in FILES} if folder.exists() else {}
    if not found:
        return None
    versions = {found[name].removeprefix(f"{name} ") for name in found}
    assert (set(found), len(versions)) == (set(FILES), 1), f"a mixture: {found}"
    return versions.pop()


def save(output, version, overwrite=True, sources=()):
    with written_whole(check_output(Path(output), overwrite, sources)) as folder:
        write_checkpoint(folder, version)


def hidden(folder):
    return [each for each in Path(folder).iterdir() if each.name.startswith(".optimum-sab-")]


def in_child(work):
    """Run in a forked process; its exit code, negative for the signal that ended it. 77 stands for an exception."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(77)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="session")
def disk():
    """The functions above."""
    return SimpleNamespace(write=write_checkpoint, version_of=version_of, save=save, hidden=hidden, in_child=in_child)


@pytest.fixture
def mounted(tmp_path):
    """A mount point of three megabytes."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
