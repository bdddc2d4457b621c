import importlib
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import optimum_sab.ops.cpu
from optimum_sab.errors import MissingDependencyError, SABWarning
from optimum_sab.ops.cpu import cache, columns, compiler, kernel

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
    for each in (compiler, columns):
        each._build.cache_clear()
    yield tmp_path / "cache"
    for each in (compiler, columns):
        each._build.cache_clear()


@pytest.fixture
def wrapper(tmp_path, monkeypatch):
    """``wrapper(flag)``: $CC is a compiler that refuses a flag, and takes less trouble over the rest."""

    def install(flag):
        script = tmp_path / "refusing cc"
        script.write_text(
            f'#!/bin/sh\nfor a in "$@"; do if [ "$a" = "{flag}" ]; then echo "note: hm" >&2; '
            f'echo "error: unknown option \'{flag}\'" >&2; exit 1; fi; done\nexec {COMPILER} "$@" -O1\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CC", f"'{script}'")

    return install


@pytest.fixture(scope="module")
def remembering(tmp_path_factory):
    """A compiler that gives the same file again for the same flags, and that with little optimization: compiling takes
    seconds, and only what comes before and after it is looked at where this is used."""
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
set -- "$@" -O1
kept="{folder}/$(echo "$flags" | tr -c 'a-zA-Z0-9=\n' _)"
[ -e "$kept" ] || {COMPILER} "$@" || exit
[ -e "$kept" ] || {{ cp "$out" "$kept.$$" && mv "$kept.$$" "$kept"; }}
cp "$kept" "$out"
"""
    )
    script.chmod(0o755)
    return script


@pytest.fixture(params=["linears", "columns"])
def builder(request, remembering, monkeypatch):
    """What makes each of the two libraries, of which the solver's loops over columns are one."""
    return remembered(remembering, monkeypatch, request.param)


def remembered(remembering, monkeypatch, kind):
    monkeypatch.setenv("CC", f"{remembering} -DOF_{kind}")  # what is remembered is told apart by its flags
    return {"linears": compiler, "columns": columns}[kind]


@pytest.fixture
def linears(remembering, monkeypatch):
    """The compiler of the linears, for what is the same whether their file was compiled or remembered."""
    return remembered(remembering, monkeypatch, "linears")


def start(code, cache, python=sys.executable):
    environment = os.environ | {"OPTIMUM_SAB_CACHE": str(cache)}
    return subprocess.Popen(
        [python, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def openmp_runtimes():
    return set(re.findall(r"/\S*/lib(?:gomp|iomp|omp)\S*", Path("/proc/self/maps").read_text()))


@needs_compiler
def test_load_library_is_compiled_once_and_kept(fresh, linears, remembering):
    library = compiler.load_library()
    assert compiler.load_library() is library
    assert compiler.availability().usable and str(remembering) in compiler.availability().reason
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
def test_load_library_does_without_flags_for_this_processor(wrapper):
    wrapper(*compiler.NATIVE)
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


@pytest.mark.parametrize(("path", "vnni", "words"), [(2, 1, "AVX-512 with VNNI"), (2, 0, "AVX-512"), (1, 0, "AVX2")])
def test_build_says_what_it_computes_with(path, vnni, words):
    library = SimpleNamespace(sab_path=lambda: path, sab_vnni=lambda: vnni)
    assert compiler._instructions(library) == words
    assert compiler._instructions(SimpleNamespace(sab_path=lambda: path)) == words.removesuffix(" with VNNI")


def test_build_says_that_it_computes_with_dot_products():
    library = SimpleNamespace(sab_path=lambda: 0, sab_vnni=lambda: 0, sab_dots=lambda: 1)
    assert compiler._instructions(library) == "portable code with dot products"


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc/self/maps")
def test_load_library_brings_no_second_openmp_runtime(linears):
    before = openmp_runtimes()
    assert compiler.openmp_runtime() in before
    assert compiler.load_library().sab_openmp() == 1
    assert openmp_runtimes() == before


def libraries(folder):
    return sorted(folder.glob("*.so"))


@needs_compiler
@pytest.mark.parametrize("damage", [lambda content: content[:1000], lambda content: content[:-1] + b"?", lambda _: b""])
def test_load_library_compiles_again_what_is_damaged(builder, monkeypatch, fresh, tmp_path, damage):
    assert builder._build().library is not None
    intact = libraries(fresh)
    (tmp_path / "other").mkdir(mode=0o700)
    for each in intact:
        (tmp_path / "other" / each.name).write_bytes(damage(each.read_bytes()))
    monkeypatch.setenv("OPTIMUM_SAB_CACHE", str(tmp_path / "other"))
    builder._build.cache_clear()
    assert builder._build().library.sab_path() in (0, 1, 2)
    again = [path.read_bytes() for path in libraries(tmp_path / "other")]
    assert all(each.read_bytes() in again for each in intact)


@needs_compiler
def test_cache_and_library_are_written_for_this_user_alone(builder, fresh):
    before = os.umask(0)
    try:
        assert builder._build().library is not None
    finally:
        os.umask(before)
    assert {stat.S_IMODE(each.stat().st_mode) for each in (fresh, *fresh.iterdir())} == {0o700}
    assert libraries(fresh)


def compiled_again(builder, fresh, monkeypatch, spoil):
    """What is loaded after ``spoil(folder, path)`` of every library, and whether the compiler ran for all of it."""
    assert builder._build().library is not None
    made = libraries(fresh)
    for path in made:
        spoil(fresh, path)
    loaded, runs = [], []
    load, run = compiler._load, compiler._run
    monkeypatch.setattr(compiler, "_load", lambda place: loaded.append(place) or load(place))
    monkeypatch.setattr(compiler, "_run", lambda command: runs.append(command) or run(command))
    builder._build.cache_clear()
    assert builder._build().library.sab_path() in (0, 1, 2)
    return loaded, sum("-shared" in command for command in runs) == len(made) == len(loaded)


@needs_compiler
def test_a_library_that_is_as_it_was_is_loaded_without_compiling(builder, fresh, monkeypatch):
    loaded, compiled = compiled_again(builder, fresh, monkeypatch, lambda folder, path: None)
    assert sorted(loaded) == libraries(fresh) and not compiled


@needs_compiler
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_library_that_others_may_write_is_compiled_again(builder, fresh, monkeypatch, mode):
    loaded, compiled = compiled_again(builder, fresh, monkeypatch, lambda folder, path: path.chmod(mode))
    assert compiled and sorted(loaded) == libraries(fresh)
    assert {stat.S_IMODE(path.stat().st_mode) for path in loaded} == {0o700}


@needs_compiler
@pytest.mark.parametrize("mode", [0o720, 0o777, 0o1777])
def test_nothing_is_loaded_from_a_folder_that_others_may_write(builder, fresh, monkeypatch, mode):
    with pytest.warns(SABWarning, match=rf"{fresh}, may be written by other users \(mode {mode:o}\).*chmod 700"):
        loaded, compiled = compiled_again(builder, fresh, monkeypatch, lambda folder, path: folder.chmod(mode))
    assert compiled and not any(fresh in path.parents for path in loaded)
    assert not any(path.exists() for path in loaded)  # the private folder is gone, the library is mapped


@needs_compiler
@pytest.mark.parametrize("whose", ["folder", "library"])
@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can give files away")
def test_what_another_user_owns_is_not_loaded(builder, fresh, monkeypatch, whose):
    def give_away(folder, path):
        os.chown(folder if whose == "folder" else path, 12345, -1)

    if whose == "folder":
        with pytest.warns(SABWarning, match=r"belongs to another user \(uid 12345\)"):
            loaded, compiled = compiled_again(builder, fresh, monkeypatch, give_away)
        assert not any(fresh in path.parents for path in loaded)
    else:
        loaded, compiled = compiled_again(builder, fresh, monkeypatch, give_away)
        assert {path.stat().st_uid for path in loaded} == {os.geteuid()}
    assert compiled


def test_a_library_of_an_owner_who_is_not_trusted_is_not_found(tmp_path, monkeypatch):
    linked = tmp_path / "linked.so"
    linked.write_bytes(b"library")
    path = cache.keep_library(tmp_path, "name", linked)
    assert cache.find_library(tmp_path, "name") == path
    monkeypatch.setattr(cache, "trusted_owners", lambda: {path.stat().st_uid + 1})
    assert cache.find_library(tmp_path, "name") is None


@needs_compiler
def test_load_library_by_two_processes_at_once_works_in_both(linears, warm, tmp_path):
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
