"""`optimum-sab run PROGRAM …` is the program, with the quantization method registered."""

import json
import os
import subprocess
import sys

import pytest
import transformers

from optimum_sab.cli.main import main

SCRIPT = """
import json, sys
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print(json.dumps([sys.argv, __name__, "sab" in AUTO_QUANTIZER_MAPPING, sys.modules["__main__"].__dict__ is globals()]))
sys.exit(int(sys.argv[-1]))
"""


@pytest.fixture
def run(warm, tmp_path):
    (tmp_path / "program.py").write_text(SCRIPT)

    def call(*arguments, program=("optimum-sab",), **environment):
        command = [warm / program[0], *program[1:], "run", *arguments]
        given = {**os.environ, **environment}
        return subprocess.run(command, env=given, cwd=tmp_path, capture_output=True, text=True, check=False)

    return call


@pytest.mark.parametrize("program", [("optimum-sab",), ("python", "-m", "optimum_sab")], ids=["program", "module"])
def test_a_script_has_its_own_arguments_and_exit_code(run, program):
    done = run("program.py", "--help", "-m", "3", program=program)
    assert done.stdout == '[["program.py", "--help", "-m", "3"], "__main__", true, true]\n'
    assert done.returncode == 3, done.stderr


def test_a_module_is_run_as_python_runs_it(run, tmp_path):
    done = run("-m", "program", "--json", "0")
    assert done.stdout == f'[["{tmp_path / "program.py"}", "--json", "0"], "__main__", true, true]\n'
    assert done.returncode == 0, done.stderr


def test_an_installed_program_is_found_by_its_name(run):
    name = "transformers" if transformers.__version__ >= "5" else "transformers-cli"
    done = run(name, "env", program=("optimum-sab",))
    assert done.returncode == 0 and transformers.__version__ in done.stdout, done.stderr


def test_a_python_program_on_the_path_is_found_by_its_name(run, tmp_path):
    program = tmp_path / "bin" / "tool"
    program.parent.mkdir()
    program.write_text(f"#!/usr/bin/env python3\n{SCRIPT}")
    program.chmod(0o755)
    done = run("tool", "5", PATH=f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    assert done.stdout.startswith(f'[["{program}", "5"]') and done.returncode == 5


def test_errors_of_the_program_are_its_own(run, tmp_path):
    (tmp_path / "program.py").write_text("from optimum_sab import SABConfig\nSABConfig(block_size=1)\n")
    done = run("program.py")
    assert done.returncode == 1 and "Traceback" in done.stderr and "program.py" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "'nowhere'"),
        (("-m",), "module"),
        (("ls",), "no Python program"),
        (("missing.py",), "'missing.py'"),
        (("-m", "no_such_module"), "'no_such_module'"),
        (("-m", "json.no_such_module"), "'json.no_such_module'"),
        (("-m", "json.tool.within"), "'json.tool.within'"),
    ],
)
def test_what_cannot_be_run_is_named_in_one_line(run, arguments, said):
    done = run(*arguments)
    assert done.returncode == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_what_cannot_be_run_is_told_in_json(capsys):
    assert main(["--json", "run", "nowhere"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert "'nowhere'" in found["error"] and found["exit_code"] == 1


def test_search_path_is_left_alone_where_python_is_told_so(tmp_path):
    for name, code in (("program.py", "import beside\n"), ("elsewhere/beside.py", "print('found')\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    path = os.pathsep.join([str(tmp_path / "elsewhere"), *filter(None, sys.path)])
    command = [sys.executable, "-m", "optimum_sab", "run", str(tmp_path / "program.py")]
    given = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=given, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "found\n", done.stderr


def test_nothing_to_run_shows_how(run):
    assert run().returncode == 2
    help_asked = run("--help")
    assert help_asked.returncode == 0 and "run -m MODULE" in help_asked.stdout
