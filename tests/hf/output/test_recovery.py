"""Whenever a process is killed, its name stands for the old checkpoint or the new one, and the next run tidies up."""

import json
import os
import random
import signal
import sys
import time
import warnings

import pytest

from optimum_sab.hf.output import placing
from optimum_sab.hf.output.place import check_output, content_of
from optimum_sab.hf.output.recovery import recover
from optimum_sab.hf.output.work_folder import make_work_folder

HERE = f"{os.sep}hf{os.sep}output{os.sep}"


def killed_at_line(disk, line, work):
    """Run it in a process that is killed when it comes to its nth line in the package; whether it got that far."""

    def child():
        left = line

        def trace(frame, event, argument):
            nonlocal left
            if HERE not in frame.f_code.co_filename or "conftest" in frame.f_code.co_filename:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        work()

    code = disk.in_child(child)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def come_by(output, disk):
    """What the next run does; then nothing is left but what was finished and never came to its name, and is named."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        recover(output)
    named = [str(each.message) for each in warned]
    left = [*disk.hidden(output.parent), *(disk.hidden(output) if output.exists() else ())]
    assert len(left) == len(named)
    for folder in left:
        assert any(repr(str(folder)) in each and "could not bring there" in each for each in named)
        assert disk.version_of(folder / "new") == "new"


STEPS = [7, pytest.param(2, marks=pytest.mark.full)]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("way", ["swap", "two renames"])
def test_killed_at_any_line_of_a_replacement(tmp_path, disk, monkeypatch, way, step):
    """Every line of the code is a moment between two calls of the system."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a killed process needs none, and they take time
    if way == "two renames":
        monkeypatch.setattr(placing, "swap", lambda one, other: False)
    seen, line, killed = set(), 0, True
    while killed:
        line += step
        output = tmp_path / str(line) / "out"
        disk.write(output, "old")
        (output / "notes.txt").write_text("mine")
        killed = killed_at_line(disk, line, lambda output=output: disk.save(output, "new"))
        found = disk.version_of(output)
        seen.add(found)
        come_by(output, disk)
        assert disk.version_of(output) == (found or "new")
        assert (output / "notes.txt").read_text() == "mine"
    assert found == "new"
    assert seen - {None} == {"old", "new"}
    assert way == "two renames" or None not in seen  # nothing under the name for a moment, where there is no swap


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_line_of_filling_a_folder(tmp_path, disk, monkeypatch, step):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    seen, line, killed = set(), 0, True
    while killed:
        line += step
        output = tmp_path / str(line)
        output.mkdir()
        monkeypatch.chdir(output)
        killed = killed_at_line(disk, line, lambda: disk.save(".", "new"))
        loadable = (output / "config.json").exists()
        seen.add(loadable)
        if loadable:
            assert disk.version_of(output) == "new"
        some = content_of(output) != []
        come_by(output, disk)
        assert disk.version_of(output) == ("new" if some else None)  # what had begun is carried through
    assert seen == {True, False}


def kill_replacements(disk, folder, count, seed):
    """Kill -9 at random moments a process that does nothing but replace; which versions were found."""
    moments = random.Random(seed)
    output = folder / "out"
    started = time.perf_counter()
    disk.save(output, "first")
    (output / "notes.txt").write_text("mine")
    disk.save(output, "second")
    each = (time.perf_counter() - started) / 2
    versions = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            for number in range(1_000_000):
                disk.save(output, f"{os.getpid()} {number}")
            os._exit(77)
        time.sleep(3 * each * moments.random())
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        versions.append(disk.version_of(output))
        assert [p.read_text() for p in folder.rglob("notes.txt")] == ["mine"]  # there, or on its way over
    return versions


@pytest.mark.parametrize("count", [40, pytest.param(300, marks=pytest.mark.full)])
@pytest.mark.filterwarnings("ignore:an earlier run")
def test_killed_at_random_moments(tmp_path, disk, count):
    versions = []
    for turn in range(6):  # on a disk that is slow for a while few of them get to replace
        (tmp_path / str(turn)).mkdir()
        versions += kill_replacements(disk, tmp_path / str(turn), count, seed=14 + turn)
        if len(set(versions)) > count / 8:
            break
    assert None not in versions
    assert len(set(versions)) > count / 8  # they got to replace


# -- what the next run finds -------------------------------------------------------------------------------------------


def partial(disk, output):
    """What a process that is killed in the midst of writing leaves."""
    work = make_work_folder(output, inside=False)
    disk.write(work.new, "partial")
    return work


def test_recovery_leaves_what_a_living_process_writes(tmp_path, disk):
    work = partial(disk, tmp_path / "out")
    check_output(tmp_path / "out")
    assert disk.version_of(work.new) == "partial"
    work.release()  # as the end of the process does
    check_output(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_recovery_names_what_other_outputs_and_other_machines_have_left(tmp_path, disk):
    other = partial(disk, tmp_path / "other")
    other.release()
    with pytest.warns(UserWarning, match="other outputs") as warned:
        check_output(tmp_path / "out")
    assert repr(str(other.folder)) in str(warned[0].message)
    check_output(tmp_path / "other")
    assert list(tmp_path.iterdir()) == []
    far = partial(disk, tmp_path / "out")
    far.release()
    state = json.loads((far.folder / "state.json").read_text())
    (far.folder / "state.json").write_text(json.dumps({**state, "host": "elsewhere"}))
    with pytest.warns(UserWarning, match="may still go on elsewhere"):
        check_output(tmp_path / "out")
    assert disk.version_of(far.new) == "partial"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs to give files away")
def test_recovery_touches_nothing_of_another_user(tmp_path, disk):
    """In a folder for everyone (/tmp), somebody could leave one that has us delete what is ours."""
    work = partial(disk, tmp_path / "out")
    work.release()
    os.chown(work.folder, 65534, 65534)
    with pytest.warns(UserWarning, match="may still go on"):
        check_output(tmp_path / "out")
    assert disk.version_of(work.new) == "partial"


@pytest.mark.parametrize("said", ["", "[]", "{", '{"output": 1}', '{"output": "../x", "inside": false, "names": []}'])
def test_recovery_deletes_nothing_on_the_word_of_a_damaged_state(tmp_path, disk, said):
    work = partial(disk, tmp_path / "out")
    work.release()
    (work.folder / "state.json").write_text(said)
    with pytest.warns(UserWarning, match="another run"):
        check_output(tmp_path / "out")
    assert disk.version_of(work.new) == "partial"


def test_recovery_lets_no_two_processes_write_to_one_folder(tmp_path):
    one, other = make_work_folder(tmp_path / "out", False), make_work_folder(tmp_path / "out", False)
    assert one.folder != other.folder
    check_output(tmp_path / "out")
    assert one.new.is_dir() and other.new.is_dir()
