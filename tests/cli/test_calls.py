"""How commands are called: help, wrong calls, what every command takes, and how soon it is answered."""

import json
import os
import runpy
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

import optimum_sab
from optimum_sab.cli.arguments.parser import build_parser, command_names
from optimum_sab.cli.arguments.settings import SETTINGS
from optimum_sab.cli.main import main
from optimum_sab.hf.config import _PARAMETERS, SABConfig
from optimum_sab.presets import PRESETS, preset_settings
from optimum_sab.version import __version__

# Settings that are no option of `quantize` like the others, which docs/cli.md says too: the processor and the rules
# have options of their own, progress is --quiet, the rest belongs to loading or is written by the quantizer.
ELSEWHERE = {"processor", "modules_to_not_convert", "dynamic", "progress"}
OF_LOADING = {"dequantize", "verify", "format_version", "measured", "quant_method"}


def fresh(*arguments):
    """Call in a process that has imported nothing, and say what it has imported in the end."""
    script = (
        "import sys, json\n"
        "from optimum_sab.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\n"
        "except SystemExit as stopped:\n    code = stopped.code or 0\n"
        "print(json.dumps([code, sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    *printed, last = done.stdout.splitlines()
    code, modules = json.loads(last)
    return code, "\n".join(printed), done.stderr, set(modules)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "quantize"),
        (["--version"], 0, __version__),
        (["quantize", "--help"], 0, "--base-planes"),
        (["bench", "kernels", "--help"], 0, "--shapes"),
        (["eval", "quality", "--help"], 0, "--methods"),
        (["quantize"], 2, "model"),
        (["quantize", "model"], 2, "--output"),
        (["quantize", "model", "--output", "out", "--private"], 2, "--push-to-hub"),
        (["quantise"], 2, "quantise"),
        (["inspect", "folder", "--verbose"], 2, "--verbose"),
        (["quantize", "model", "--output", "out", "--sweeps", "many"], 2, "many"),
    ],
)
def test_help_and_wrong_calls_load_nothing(arguments, code, words):
    found, out, err, modules = fresh(*arguments)
    assert found == code
    assert words in out + err
    assert not modules & {"torch", "transformers", "numpy", "huggingface_hub", "tqdm"}


def test_wrong_call_is_two_and_says_what_is_missing(capsys):
    assert main(["quantize"]) == 2
    assert capsys.readouterr().err == (
        "error: the following arguments are required: model. See: optimum-sab quantize --help\n"
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["quantize", "m", "--output", "o", "--calibration-sample", "3"],
            "unrecognized arguments: --calibration-sample 3. Did you mean '--calibration-samples'? "
            "See: optimum-sab quantize --help",
        ),
        (
            ["plan", "m", "--samples", "3"],
            "unrecognized arguments: --samples 3. Did you mean '--calibration-samples' or '--builtin-samples'? See:",
        ),
        (
            ["quantize", "m", "--output", "o", "--num_samples=3"],
            "Did you mean '--calibration-samples' or '--builtin-samples'? See:",
        ),
        (
            ["quantize", "m", "--output", "o", "--device", "cuda"],
            "Did you mean '--device-map' or '--calibration-device'?",
        ),
        (["quantize", "m", "--output", "o", "--no-refin"], "Did you mean '--no-refine'?"),
        (["quantize", "m", "--output", "o", "--model", "m"], "unrecognized arguments: --model m. See:"),
        (["quantize", "m", "--output", "o", "--two-bit"], "Did you mean '--preset two-bit'? See:"),
        (["plan", "m", "--two_bit"], "Did you mean '--preset two-bit'? See:"),
        (["inspect", "m", "--best"], "unrecognized arguments: --best. See:"),
        (["quantise", "m"], "Did you mean 'quantize'? See: optimum-sab --help"),
        (["quantize", "m", "--output", "o", "--preset", "two_bit"], "Did you mean 'two-bit'?"),
        (["quantize", "m", "--output", "o", "--preset", "2bit"], "Did you mean 'two-bit'? See:"),
        (["quantize", "m", "--output", "o", "--preset", "2-bit"], "Did you mean 'two-bit'? See:"),
        (["quantize", "m", "--output", "o", "--2bit"], "Did you mean '--preset two-bit'? See:"),
        (["quantize", "m", "--output", "o", "--dtype", "fp16"], "Did you mean 'float16'? See:"),
        (["quantize", "m", "--output", "o", "--dtype", "half"], "Did you mean 'float16'? See:"),
        (["quantize", "m", "--output", "o", "--dtype", "BF16"], "Did you mean 'bfloat16'? See:"),
        (["eval", "quality", "m", "--dtype", "fp32"], "Did you mean 'float32'? See:"),
        (["quantize", "m", "--output", "o", "--dtype", "light"], "). See:"),  # of another option
        (["quantize", "m", "--output", "o", "--row-scale", "float16"], "Did you mean 'fp16'? See:"),
        (["eval", "qualiti", "m"], "Did you mean 'quality'? See: optimum-sab eval --help"),
        (["inspect", "m", "--nothing-like-it"], "unrecognized arguments: --nothing-like-it. See:"),
    ],
)
def test_misspelt_words_are_answered_with_the_right_one(capsys, arguments, line):
    assert main(arguments) == 2
    assert line in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_told_before_anything_is_imported():
    code, _, err, modules = fresh("quantize", "./nowhere", "--output", "out")
    assert code == 1 and "there is no folder './nowhere'" in err
    assert "torch" not in modules


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--block-size", "100"], "--block-size 100 must be a multiple of 32"),
        (["--target-bits", "0.5"], "--target-bits 0.5 must be a number above 1"),
        (["--target-bits", "1.5", "--preset", "paper"], "needs --allocation sensitivity"),
        (["--damping", "nan"], "--damping nan must be a finite number"),
        (["--calibration-samples", "0"], "--calibration-samples 0 must be an integer from 1 to 1000000000"),
        (["--calibration-samples", str(2**63)], "must be an integer from 1 to 1000000000"),
        (["--sequence-length", str(10**30)], "--sequence-length 1000"),
        (["--seed", str(2**64)], f"--seed {2**64} must be an integer from 0 to {2**64 - 1}"),
        (
            ["--refine-epochs", "10001"],
            "--refine-epochs 10001 must be an integer from 0 to 10000; 0 leaves that part out",
        ),
        (["--target-bits", "nan"], "--target-bits nan must be a number above 1 and at most 8"),
        (["--propagation", "inf"], "--propagation inf must be a finite number"),
        (["--refine-steps", "-1"], "--refine-steps -1 must be"),
        (["--backend", "cuda"], "--backend cuda is no backend"),
        (["--dynamic", "{"], "is not JSON"),
        (["--dynamic", '{"down_proj": {"planes": 2}}'], "unknown layer setting 'planes'"),
        (["--dynamic", '{"down_proj": {"base_plane": 2}}'], "layer setting 'base_plane'; did you mean 'base_planes'?"),
        (["--dynamic", '{"down_proj": {"sweeps": -1}}'], "--sweeps -1 must be"),
        (["--calibration", "./nothing.jsonl"], "'./nothing.jsonl' does not exist"),
    ],
)
@pytest.mark.parametrize("command", [("quantize", "owner/vlm", "--output", "out"), ("demo",)])
def test_a_setting_that_cannot_be_used_is_told_before_torch_is_imported(monkeypatch, capsys, command, arguments, said):
    monkeypatch.setattr("optimum_sab.cli.main.find_command", None)
    assert main([*command, *arguments]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "owner/vlm", "--output", "out", "--target-bits", "0.5"], "--target-bits 0.5"),
        (["demo", "--questions", "0"], "--questions 0 must be at least 1"),
        (["eval", "quality", "example", "--held-out", "0"], "--held-out 0 must be at least 1"),
        (["demo", "--questions", str(2**63)], "must be at most 1000000000"),
        (["demo", "--question-seed", "-1"], "--question-seed -1 must be from 0 to"),
        (["eval", "quality", "example", "--seeds", "0", str(2**64)], f"--seeds {2**64} must be from 0 to {2**64 - 1}"),
        (["bench", "kernels", "--tokens", "1", "0"], "--tokens 0 must be at least 1"),
        (["bench", "kernels", "--seed", str(2**64)], f"--seed {2**64} must be from 0"),
        (["bench", "quantize", "--size", "tiny", "--samples", "0"], "--samples 0 must be at least 1"),
        (["bench", "generate", "--new-tokens", "-3"], "--new-tokens -3 must be at least 1"),
        (["bench", "coverage", "llama", "--timeout", "nan"], "--timeout nan must be a number above 0"),
        (["bench", "coverage", "llama", "--memory", "-1"], "--memory -1.0 must be a number above 0"),
        (["bench", "coverage", "llama", "--jobs", "0"], "--jobs 0 must be at least 1"),
        (["eval", "quality", "./nowhere"], "there is no folder './nowhere'"),
        (["eval", "quality", "example", "--calibration", "nothing.jsonl"], "'nothing.jsonl' does not exist"),
        (["inspect", "./nowhere"], "there is no folder './nowhere'"),
    ],
)
def test_what_needs_no_model_to_be_seen_is_told_without_torch(arguments, said):
    code, _, err, modules = fresh(*arguments)
    assert code == 1 and said in err
    assert not modules & {"torch", "transformers", "numpy", "huggingface_hub", "tqdm"}


def test_options_are_not_abbreviated(capsys):
    assert main(["quantize", "model", "--output", "out", "--calibration-sam", "8"]) == 2
    assert "--calibration-sam" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--json", "inspect", "nowhere"], ["inspect", "nowhere", "--json"]])
def test_json_carries_errors_wherever_it_stands(capsys, arguments):
    assert main(arguments) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["exit_code"] == 1
    assert "nowhere" in found["error"]
    assert captured.err.splitlines()[-1] == f"error: {found['error']}"


def test_json_carries_wrong_calls(capsys):
    assert main(["quantize", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == 2 and "model" in found["error"]


def test_json_and_markdown_are_not_asked_for_together(capsys):
    assert main(["--json", "bench", "coverage", "llava", "--markdown"]) == 1
    assert "--markdown" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("preset", PRESETS)
def test_help_shows_the_defaults_of_the_preset(capsys, preset):
    for arguments in (["--preset", preset, "--help"], ["--help", f"--preset={preset}"]):
        with pytest.raises(SystemExit) as stopped:
            main(["quantize", *arguments])
        assert stopped.value.code == 0
        text = "".join(capsys.readouterr().out.split())  # lines break anywhere
        config = SABConfig.preset(preset)
        for name in ("block_size", "sweeps", "damping", "calibration_samples"):
            words = f"{SETTINGS[name].help} ({preset}: {getattr(config, name)})"
            assert words.replace(" ", "") in text


def test_every_setting_has_an_option_of_its_name():
    assert set(SETTINGS) | ELSEWHERE | OF_LOADING == set(_PARAMETERS)
    for name in [*SETTINGS, *ELSEWHERE - {"progress"}]:
        flag = "--" + name.replace("_", "-")
        known = {
            option for action in _actions(build_parser("optimum-sab"), "quantize") for option in action.option_strings
        }
        assert flag in known


def test_defaults_that_are_shown_are_those_of_the_configuration():
    for preset in PRESETS:
        config = SABConfig.preset(preset)
        assert {name: getattr(config, name) for name in preset_settings(preset)} == preset_settings(preset)


def test_every_option_says_what_to_give_and_what_it_does():
    for name in command_names(build_parser("optimum-sab")):
        for action in _actions(build_parser("optimum-sab"), name):
            if isinstance(action.choices, dict) and not action.option_strings:
                continue  # commands of a command
            assert action.help, action
            assert action.metavar != "X"


def _actions(parser, name):
    found = next(action for action in parser._actions if action.dest == "==SUPPRESS==" and action.choices)
    return found.choices[name]._actions


def test_every_command_takes_json(capsys):
    for name, command in _commands(build_parser("optimum-sab")):
        if name == " run":
            continue  # whose options are the program's
        options = {option for action in command._actions for option in action.option_strings}
        assert "--json" in options, name


def _commands(parser, before=""):
    for action in parser._actions:
        if action.choices and not action.option_strings and isinstance(action.choices, dict):
            for name, command in action.choices.items():
                inner = list(_commands(command, f"{before} {name}"))
                yield from inner or [(f"{before} {name}", command)]


def test_python_runs_the_package_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "optimum_sab", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"optimum-sab {__version__}\n"


def test_optimum_cli_lists_all_commands():
    pytest.importorskip("optimum.commands.base")
    path = Path(optimum_sab.__file__).parent / "cli" / "register" / "register_sab.py"
    command = runpy.run_path(str(path))["SABCommand"]
    parser = ArgumentParser("optimum-cli sab", formatter_class=command.COMMAND.formatter_class)
    command.parse_args(parser)
    text = parser.format_help()
    commands = command_names(build_parser("optimum-cli sab"))
    assert {"quantize", "inspect", "eval", "bench", "example"} <= set(commands)
    assert all(f"  {name} " in text and purpose in text for name, purpose in commands.items())


def test_help_is_printed_where_the_terminal_knows_no_unicode():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "optimum_sab", "quantize", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "from_pretrained(\\u2026" in done.stdout
