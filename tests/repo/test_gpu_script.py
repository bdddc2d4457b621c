"""docs/measure-on-gpu.sh with a stand-in for Python: its budget, limits, what it goes on with, and its status."""

import json
import os
import shutil
import subprocess
import textwrap
import time
from pathlib import Path

import pytest

from optimum_sab.cli.main import build_parser, find_command

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "measure-on-gpu.sh"

# CALLS gets a line per step; WHEN says what a call whose words hold a key does instead of succeeding at once
STAND_IN = """\
    #!/usr/bin/env bash
    words="$*"
    case "$words" in
      *find_spec*"'$MISSING'"*) exit 1 ;;
      *find_spec*) exit 0 ;;
      *get_device_name*) [ -n "$GPU" ] || exit 1; echo "$GPU"; exit 0 ;;
      *--help*) echo "$HELP"; exit 0 ;;
    esac
    printf '%s\\n' "${SAB_KERNELS_AUTOTUNE:-} $words" >> "$CALLS"
    echo '{"whole":'
    case "$words" in
      *"$FAILS"*) echo "this is why" >&2; exit 3 ;;
      *"$SLEEPS"*) sleep 30 ;;
    esac
    echo 'true}'
"""

NOTHING = "no call has these words"


@pytest.fixture
def script(tmp_path):
    """Runs the script with a stand-in; gives status, output, seconds and the calls that were made."""
    stand_in = tmp_path / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text(textwrap.dedent(STAND_IN), encoding="utf-8")
    stand_in.chmod(0o755)
    calls = tmp_path / "calls"

    def run(**variables):
        calls.write_text("", encoding="utf-8")
        known = {
            "CALLS": str(calls),
            "FAILS": NOTHING,
            "SLEEPS": NOTHING,
            "MISSING": NOTHING,
            "HELP": "--code NAME, qwen3-30b-a3b",
            "GPU": "H0",
        }
        path = f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, **known, **variables}
        began = time.monotonic()
        done = subprocess.run(
            [shutil.which("bash"), str(SCRIPT), str(tmp_path / "results")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout, time.monotonic() - began, calls.read_text(encoding="utf-8").splitlines()

    return run


def results(tmp_path, ending=".json"):
    return {path.name.removesuffix(ending) for path in (tmp_path / "results").glob(f"*{ending}")}


def test_whole_run_leaves_a_result_for_every_step_and_the_next_one_has_nothing_to_do(script, tmp_path):
    status, output, _, calls = script()
    assert status == 0, output
    steps = results(tmp_path) | results(tmp_path, ".txt") - {"summary", "device"}
    assert len(calls) == len(steps) > 15
    assert all(json.loads(p.read_text()) == {"whole": True} for p in (tmp_path / "results").glob("*.json"))
    assert not results(tmp_path, ".part")
    assert (tmp_path / "results" / "summary.txt").read_text().count("done in") == len(steps)
    status, output, _, calls = script(BUDGET="1")  # not even time is needed
    assert (status, calls) == (0, [])
    assert output.count("there already\n") == 2 * len(steps)  # as it goes, and in the summary


def test_steps_come_in_the_order_of_their_worth(script):
    calls = script()[3]
    first = {
        word: next(i for i, call in enumerate(calls) if word in call)
        for word in (
            "env",
            "tests/kernels",
            "18944x3584",
            "--humming",
            "--gemlite",
            "--code",
            "no:cacheprovider tests/kernels/test_experts.py",
            "qwen3-30b-a3b --tokens 1 ",
            "generate",
            "quantize",
            "solve-experts",
        )
    }
    assert list(first.values()) == sorted(first.values())
    tuned = [call.startswith("1 ") for call in calls]
    assert tuned == sorted(tuned) and any(tuned)


@pytest.mark.parametrize("small", ["", "1"])
def test_commands_of_the_script_are_understood(script, capsys, small):
    parser = build_parser("optimum-sab")
    with pytest.raises(SystemExit):
        parser.parse_args(["bench", "kernels", "--help"])
    made = script(SMALL=small, HELP=capsys.readouterr().out)[3]
    calls = [call.partition("optimum_sab.cli.main ")[2].split() for call in made]
    understood = [words for words in calls if words]
    assert len(understood) > 12
    for words in understood:
        assert callable(find_command(parser.parse_args(words).run)), words
    large = {"8b", "32b", "7b", "7b-block", "29568x8192"}
    assert bool(large & {word for words in understood for word in words}) == (not small)


def test_failed_step_does_not_stop_the_others_and_is_run_again(script, tmp_path):
    status, output, _, calls = script(FAILS="--size 8b")
    assert status == 1
    assert "generate-8b.json: FAILED with status 3" in output and "this is why" in output
    assert "generate-8b" not in results(tmp_path) and "generate-32b" in results(tmp_path)
    again = script()
    assert again[0] == 0 and len(again[3]) == 1 and "--size 8b" in again[3][0] and len(calls) > 15


def test_step_beyond_its_limit_is_cut_and_leaves_nothing_that_looks_whole(script, tmp_path):
    status, output, seconds, calls = script(BUDGET="8", SLEEPS="main env")
    assert status == 2 and seconds < 13
    assert "env.json: cut after 3 s, left for another run" in output
    assert "env" not in results(tmp_path) and results(tmp_path, ".part") == {"env.json"}
    assert (
        len(calls) == 1 and "decode-7b.json: left for another run: it takes 15 s at least, and 0 s are left" in output
    )
    again = script()
    assert again[0] == 0 and "main env" in again[3][0]
    assert json.loads((tmp_path / "results" / "env.json").read_text()) == {"whole": True}


def test_step_begins_only_if_a_sensible_part_is_left(script):
    status, output, _, calls = script(BUDGET="24")
    assert status == 2
    assert "tests/kernels" not in "".join(calls) and "env --json" in calls[0]  # 20 s at least, and fewer than that
    assert "--size 8b" not in "".join(calls)
    assert "tests-kernels.txt: left for another run: it takes 20 s at least" in output
    assert any("18944x3584" in call for call in calls)  # what needs less goes on


@pytest.mark.parametrize(("budget", "limit"), [("480", 60), ("960", 120), ("40", 35)])
def test_limits_grow_with_a_larger_budget_and_never_exceed_what_is_left(script, budget, limit):
    assert f"env.json, at most {limit} s" in script(BUDGET=budget)[1]


def test_coded_planes_are_timed_where_the_command_line_knows_them(script):
    assert not any("--code" in call for call in script(HELP="usage: --tokens M")[3])


def test_machine_without_a_gpu_is_refused_unless_all_is_small(script, tmp_path):
    status, output, _, calls = script(GPU="")
    assert (status, calls) == (1, []) and "torch sees no GPU; SMALL=1" in output
    assert not (tmp_path / "results").exists()
    assert script(GPU="", SMALL="1")[0] == 0


@pytest.mark.parametrize("other", [{"GPU": "H1"}, {"SMALL": "1"}], ids=["another GPU", "small"])
def test_results_of_different_devices_do_not_mix(script, other):
    assert script()[0] == 0
    status, output, _, calls = script(**other)
    assert (status, calls) == (1, []) and "has results of 'H0', not of" in output
    assert script()[0] == 0


def test_packages_that_are_missing_are_left_out(script):
    status, output, _, calls = script(MISSING="humming")
    assert status == 0 and "humming: not installed, left out" in output
    assert not any("--humming" in call for call in calls) and any("--gemlite" in call for call in calls)
