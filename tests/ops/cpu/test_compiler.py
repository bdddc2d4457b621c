import importlib
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import optimum_sab.ops.cpu
from optimum_sab.errors import MissingDependencyError, SABWarning
from optimum_sab.ops.cpu import cache, compiler, kernel

COMPILER = next(filter(None, map(shutil.which, compiler.COMPILERS)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")

COMPUTE = """
import torch
from optimum_sab.core.settings import LayerSettings
from optimum_sab.format.layout import tensor_specs
from optimum_sab.format.packed_weight import PackedWeight
from optimum_sab.ops.cpu.kernel import linear
settings = LayerSettings(residual_planes=0)
specs = tensor_specs(600, 512, settings)
packed = PackedWeight({n: torch.ones(s.shape, dtype=s.dtype) for n, s in specs.items()}, 600, 512, settings)
inputs = torch.ones(2, 512)
torch.testing.assert_close(linear(inputs, packed), inputs @ packed.dequantize().T)
print("computed")
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A cache of its own for each test, and no memory of an earlier attempt before and after it."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("OPTIMUM_SAB_CACHE", str(tmp_path / "cache"))
    compiler._build.cache_clear()
    yield tmp_path / "cache"
    compiler._build.cache_clear()


@pytest.fixture
def wrapper(tmp_path, monkeypatch):
    """``wrapper(flag)``: $CC is a compiler that refuses a flag."""

    def install(flag):
        script = tmp_path / "refusing cc"
        script.write_text(
            f'#!/bin/sh\nfor a in "$@"; do if [ "$a" = "{flag}" ]; then echo "note: hm" >&2; '
            f'echo "error: unknown option \'{flag}\'" >&2; exit 1; fi; done\nexec {COMPILER} "$@"\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CC", f"'{script}'")

    return install


@pytest.fixture(scope="module")
def remembering(tmp_path_factory):
    """A compiler that gives the same file again for the same flags: compiling takes seconds, and only what comes before
    and after it is looked at where this is used."""
    if COMPILER is None:
        return None
    folder = tmp_path_factory.mktemp("remembered")
    script = folder / "cc"
    script.write_text(
        f"""#!/bin/sh
out= flags= previous=
for a in "$@"; do
  if [ "$previous" = -o ]; then out=$a; fi
  case "$a" in /*) ;; *) flags="$flags$a" ;; esac
  previous=$a
done
if [ -z "$out" ]; then exec {COMPILER} "$@"; fi
kept="{folder}/$(echo "$flags" | tr -c 'a-zA-Z0-9=\n' _)"
[ -e "$kept" ] || {COMPILER} "$@" || exit
[ -e "$kept" ] || cp "$out" "$kept"
cp "$kept" "$out"
"""
    )
    script.chmod(0o755)
    return script


@pytest.fixture
def quick_compiler(remembering, monkeypatch):
    monkeypatch.setenv("CC", str(remembering))


def start(code, cache, python=sys.executable):
    environment = os.environ | {"OPTIMUM_SAB_CACHE": str(cache)}
    return subprocess.Popen(
        [python, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def openmp_runtimes():
    return set(re.findall(r"/\S*/lib(?:gomp|iomp|omp)\S*", Path("/proc/self/maps").read_text()))


@needs_compiler
def test_load_library_is_compiled_once_and_kept(fresh):
    library = compiler.load_library()
    assert compiler.load_library() is library
    assert compiler.availability().usable and COMPILER in compiler.availability().reason
    [path] = fresh.iterdir()
    written = path.stat().st_mtime_ns
    assert compiler.compile_library().library is not None
    assert [p.stat().st_mtime_ns for p in fresh.iterdir()] == [written]


@pytest.mark.parametrize("command", ["/nowhere/cc", "no-such-compiler -m64"])
def test_availability_says_which_compiler_is_missing(monkeypatch, command):
    monkeypatch.setenv("CC", command)
    found = compiler.availability()
    assert not found.usable and command in found.reason
    with pytest.raises(MissingDependencyError, match=rf"{command}.*Install gcc or clang"):
        compiler.load_library()


def test_availability_without_any_compiler_names_those_it_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = compiler.availability()
    assert not found.usable and "cc, gcc, clang" in found.reason


def test_availability_with_a_broken_variable_has_a_reason(monkeypatch):
    monkeypatch.setenv("CC", "'cc")
    assert not compiler.availability().usable
    assert "quot" in compiler.availability().reason


@needs_compiler
def test_availability_with_a_cache_that_cannot_be_written_has_a_reason(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("OPTIMUM_SAB_CACHE", str(tmp_path / "file"))
    found = compiler.availability()
    assert not found.usable and str(tmp_path / "file") in found.reason


@needs_compiler
def test_availability_gives_the_compiler_s_error(wrapper, fresh):
    wrapper("-O3")
    found = compiler.availability()
    assert not found.usable and "unknown option '-O3'" in found.reason
    assert list(fresh.iterdir()) == []


@needs_compiler
def test_load_library_does_without_march(wrapper):
    wrapper("-march=native")
    assert compiler.load_library().sab_path() in (0, 1, 2)


@needs_compiler
def test_availability_says_that_openmp_is_missing(wrapper):
    wrapper("-fopenmp")
    found = compiler.availability()
    assert found.usable and "without OpenMP" in found.reason
    assert compiler.load_library().sab_openmp() == 0


@needs_compiler
def test_load_library_forced_to_the_portable_path_is_portable():
    assert compiler.compile_library(("-DSAB_PATH=0",)).library.sab_path() == 0


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc/self/maps")
def test_load_library_brings_no_second_openmp_runtime():
    before = openmp_runtimes()
    assert compiler.openmp_runtime() in before
    assert compiler.load_library().sab_openmp() == 1
    assert openmp_runtimes() == before


@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("damage", [lambda content: content[:1000], lambda content: content[:-1] + b"?", lambda _: b""])
def test_load_library_compiles_again_what_is_damaged(monkeypatch, fresh, tmp_path, damage):
    assert compiler.compile_library().library is not None
    [intact] = fresh.iterdir()
    (tmp_path / "other").mkdir(mode=0o700)
    broken = tmp_path / "other" / intact.name
    broken.write_bytes(damage(intact.read_bytes()))
    monkeypatch.setenv("OPTIMUM_SAB_CACHE", str(broken.parent))
    assert compiler.load_library().sab_path() in (0, 1, 2)
    assert intact.read_bytes() in [path.read_bytes() for path in broken.parent.iterdir()]


@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
def test_cache_and_library_are_written_for_this_user_alone(fresh):
    before = os.umask(0)
    try:
        compiler.load_library()
    finally:
        os.umask(before)
    [path] = fresh.iterdir()
    assert [stat.S_IMODE(each.stat().st_mode) for each in (fresh, path)] == [0o700, 0o700]


def compiled_again(fresh, monkeypatch, spoil):
    """What is loaded after ``spoil(folder, path)``: paths, and how often the compiler ran."""
    assert compiler.compile_library().library is not None
    [path] = fresh.iterdir()
    spoil(fresh, path)
    loaded, runs = [], []
    load, run = compiler._load, compiler._run
    monkeypatch.setattr(compiler, "_load", lambda place: loaded.append(place) or load(place))
    monkeypatch.setattr(compiler, "_run", lambda command: runs.append(command) or run(command))
    assert compiler.load_library().sab_path() in (0, 1, 2)
    return loaded, sum("-shared" in command for command in runs)


@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_library_that_others_may_write_is_compiled_again(fresh, monkeypatch, mode):
    loaded, linked = compiled_again(fresh, monkeypatch, lambda folder, path: path.chmod(mode))
    assert linked == 1
    [path] = fresh.iterdir()
    assert loaded == [path] and stat.S_IMODE(path.stat().st_mode) == 0o700


@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("mode", [0o720, 0o777, 0o1777])
def test_nothing_is_loaded_from_a_folder_that_others_may_write(fresh, monkeypatch, mode):
    with pytest.warns(SABWarning, match=rf"{fresh}, may be written by other users \(mode {mode:o}\).*chmod 700"):
        loaded, linked = compiled_again(fresh, monkeypatch, lambda folder, path: folder.chmod(mode))
    assert linked == 1 and fresh not in loaded[0].parents
    assert not loaded[0].exists()  # the private folder is gone, the library is mapped


@needs_compiler
@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("whose", ["folder", "library"])
@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can give files away")
def test_what_another_user_owns_is_not_loaded(fresh, monkeypatch, whose):
    def give_away(folder, path):
        os.chown(folder if whose == "folder" else path, 12345, -1)

    if whose == "folder":
        with pytest.warns(SABWarning, match=r"belongs to another user \(uid 12345\)"):
            loaded, linked = compiled_again(fresh, monkeypatch, give_away)
        assert fresh not in loaded[0].parents
    else:
        loaded, linked = compiled_again(fresh, monkeypatch, give_away)
        assert loaded[0].stat().st_uid == os.geteuid()
    assert linked == 1


def test_a_library_of_an_owner_who_is_not_trusted_is_not_found(tmp_path, monkeypatch):
    linked = tmp_path / "linked.so"
    linked.write_bytes(b"library")
    path = cache.keep_library(tmp_path, "name", linked)
    assert cache.find_library(tmp_path, "name") == path
    monkeypatch.setattr(cache, "trusted_owners", lambda: {path.stat().st_uid + 1})
    assert cache.find_library(tmp_path, "name") is None


@needs_compiler
def test_load_library_by_two_processes_at_once_works_in_both(warm, tmp_path):
    processes = [start(COMPUTE, tmp_path / "shared", warm / "python") for _ in range(2)]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "computed" in output, output
    assert {path.suffix for path in (tmp_path / "shared").iterdir()} == {".so"}


def test_import_compiles_nothing(fresh, monkeypatch):
    modules = {"cache": cache, "compiler": compiler, "kernel": kernel}
    for name, module in modules.items():
        monkeypatch.delitem(sys.modules, module.__name__)
        monkeypatch.setattr(optimum_sab.ops.cpu, name, module)  # as it shall be again afterwards
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **named: ran.append(arguments))
    again = {name: importlib.import_module(module.__name__) for name, module in modules.items()}
    assert all(again[name] is not module for name, module in modules.items())
    assert ran == [] and not fresh.exists()
