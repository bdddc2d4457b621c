"""`optimum-sab plan`: what it prints, and what it refuses as `quantize` does."""

import json
import shutil

import pytest
from transformers import ResNetConfig

from optimum_sab.calibration.plan.limits import Room
from optimum_sab.cli.commands import plan as plan_command
from optimum_sab.cli.main import main
from optimum_sab.hf import workload
from optimum_sab.report.words import seconds_in_words

QUICK = ["--calibration-samples", "4", "--sequence-length", "48", "--iterations", "1", "--sweeps", "0"]


def plan(capsys, *arguments):
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_is_what_quantize_then_makes(small_example, tmp_path, capsys):
    found = plan(capsys, small_example, "--no-timing", *QUICK, "--allocation", "uniform")
    arguments = [*QUICK, "--allocation", "uniform", "--no-examples", "--json", "--quiet"]
    assert main(["quantize", str(small_example), "--output", str(tmp_path / "out"), *arguments]) == 0
    made = json.loads(capsys.readouterr().out)
    assert found["output_bytes"] == pytest.approx(made["bytes"], rel=0.02)
    assert found["binarized"]["bits_per_weight"] == pytest.approx(made["bits_per_weight"], rel=1e-6)
    assert found["calibration"]["tokens"] == sum(made["calibration_tokens"].values())


def test_json_has_every_figure(weightless, tmp_path, capsys):
    found = plan(capsys, weightless, *QUICK, "--resume-folder", tmp_path / "unfinished", "--activation-memory", "0")
    assert set(found) == {
        "model",
        "binarized",
        "output_bytes",
        "calibration",
        "memory",
        "disk",
        "reads",
        "measured",
        "stages",
        "seconds",
        "refused",
        "warnings",
    }
    assert found["model"] == str(weightless)
    assert found["calibration"]["exact"] is True
    (memory,) = found["memory"]
    assert set(memory) == {
        "device",
        "peak_bytes",
        "peak_in",
        "certain_bytes",
        "total_bytes",
        "held_bytes",
        "free_bytes",
        "mapped_bytes",
        "fit",
        "phases",
    }
    peak = next(phase for phase in memory["phases"] if phase["name"] == memory["peak_in"])
    assert memory["peak_bytes"] == peak["bytes"] == sum(part["bytes"] for part in peak["parts"])
    assert 0 < memory["certain_bytes"] < memory["peak_bytes"] < memory["total_bytes"]
    blocks, activations = found["disk"]
    assert (blocks["setting"], activations["setting"]) == ("resume_folder", "activation_memory")
    assert blocks["folder"] == activations["folder"] == str(tmp_path / "unfinished")
    assert blocks["bytes"] < found["output_bytes"] and activations["bytes"] > 0
    assert found["reads"] == {"passes": [], "bytes": 0}
    assert found["seconds"] == pytest.approx(sum(each["seconds"] for each in found["stages"]))
    assert all(each["seconds"] > 0 for each in found["stages"])
    assert found["measured"]["device"] == "cpu" and found["measured"]["forward"] > 1e6
    assert found["refused"] is None
    assert memory["fit"] == "fits" and 0 <= memory["mapped_bytes"] < memory["peak_bytes"]
    assert not (tmp_path / "unfinished").exists()  # planning makes nothing


def test_streaming_is_told_with_its_reads(weightless, capsys):
    dense = plan(capsys, weightless, "--no-timing", *QUICK)
    streamed = plan(capsys, weightless, "--no-timing", "--stream-weights", *QUICK)
    assert streamed["reads"]["bytes"] > 0 and streamed["measured"] is None and streamed["stages"] == []

    def part(found, name):
        phase = next(each for each in found["memory"][0]["phases"] if each["name"] == "blocks")
        return next(each["bytes"] for each in phase["parts"] if each["name"] == name)

    assert part(dense, "dense blocks") == 2 * part(streamed, "one dense block")
    times = sum(each["times"] for each in streamed["reads"]["passes"])
    assert streamed["reads"]["bytes"] == times * part(dense, "dense blocks")


def test_a_person_sees_what_is_arithmetic_and_what_is_measured(weightless, capsys):
    assert main(["plan", str(weightless), *QUICK]) == 0
    out = capsys.readouterr().out
    for title in ("Binarized (arithmetic)", "Disk (arithmetic)", "Memory: the machine's memory (arithmetic;"):
        assert title in out
    assert "Time (operation counts, over what was measured here" in out
    assert "14 linears" in out and "counted, of 'builtin'" in out
    assert main(["plan", str(weightless), "--no-timing", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "\nTime: not measured\n" in out and "GFLOP" not in out
    assert main(["plan", str(weightless), "--no-timing", "--quiet", *QUICK]) == 0
    assert capsys.readouterr().out == ""


def test_a_long_time_is_told_in_minutes_too(weightless, capsys, monkeypatch):
    monkeypatch.setattr(plan_command, "A_WHILE", 0)
    assert main(["plan", str(weightless), *QUICK]) == 0
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "in all, " in each]
    seconds = float(line.split()[0])
    assert line.endswith(f" s   in all, {seconds_in_words(seconds)}")


def test_what_quantize_would_refuse_is_told(weightless, capsys, monkeypatch):
    monkeypatch.setattr(workload, "machine_room", lambda: Room(10**6, 10**6, "memory"))
    found = plan(capsys, weightless, "--no-timing", *QUICK)
    assert found["memory"][0]["total_bytes"] == 10**6
    assert found["refused"].startswith("quantizing needs at least")
    assert main(["plan", str(weightless), "--no-timing", *QUICK]) == 0
    assert "Refused by quantize: quantizing needs at least" in capsys.readouterr().out


def test_whether_it_fits_is_told_with_a_warning_where_it_does_not(weightless, capsys, monkeypatch):
    monkeypatch.setattr(workload, "machine_room", lambda: Room(10**12, 10**6, "memory"))
    found = plan(capsys, weightless, "--no-timing", *QUICK)
    assert found["memory"][0]["fit"] == "does not fit"
    assert found["refused"] is None and "expected to take" in found["warnings"][-1]
    assert main(["plan", str(weightless), "--no-timing", *QUICK]) == 0
    printed = capsys.readouterr()
    assert "  does not fit in what is free\n" in printed.out
    assert "warning: quantizing is expected to take" in printed.err


def test_quantize_refuses_by_the_plan_unless_told_otherwise(small_example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workload, "machine_room", lambda: Room(10**6, 10**6, "memory"))
    command = ["quantize", str(small_example), "--output", str(tmp_path / "out"), "--no-examples", *QUICK]
    assert main(command) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: quantizing needs at least") and "--ignore-plan" in said
    assert list(tmp_path.iterdir()) == []
    assert main([*command, "--allocation", "uniform", "--ignore-plan"]) == 0


@pytest.fixture
def doubtful(tmp_path):
    """Arguments with samples and a rule that `quantize` warns of."""
    row = {"messages": [{"role": "usr", "content": "Who has the key?"}], "id": 1}
    path = tmp_path / "samples.jsonl"
    path.write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    return ["--calibration", str(path), "--keep-dense", "proj", *QUICK]


def warned(capsys, *arguments):
    """The warnings of a command, without those of what it measured."""
    assert main([*map(str, arguments), "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    said = [line.removeprefix("warning: ") for line in printed.err.splitlines() if line.startswith("warning: ")]
    return [each for each in said if not each.startswith("the binarized model is")]


def test_what_quantize_will_warn_of_is_told_by_the_plan_once(small_example, doubtful, tmp_path, capsys):
    said = warned(capsys, "plan", small_example, "--no-timing", *doubtful)
    begins = (
        "the module rule 'proj' keeps nothing dense",
        "calibration samples have messages with the role 'usr'",
        "samples.jsonl line 1 has columns that are not calibrated on: 'id'",
        "no calibration sample has visual tokens",
        "24 calibration tokens are fewer than the 256 input features of",
    )
    assert len(said) == len(begins)
    assert all(each.startswith(begin) for each, begin in zip(said, begins, strict=True))
    output = ("--output", tmp_path / "out", "--allocation", "uniform", "--no-examples")
    assert said == warned(capsys, "quantize", small_example, *output, *doubtful)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["warnings"][: len(said)] == said
    assert main(["plan", str(small_example), "--no-timing", "--json", *doubtful]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["warnings"] == said
    assert "warning: " not in printed.err


def test_a_plan_without_doubts_warns_of_nothing(weightless, capsys):
    assert warned(capsys, "plan", weightless, "--no-timing", *QUICK, "--keep-dense", "lm_head") == []
    assert plan(capsys, weightless, "--no-timing", *QUICK)["warnings"] == []


def both(capsys, folder, tmp_path, *arguments):
    """What plan and quantize end with."""
    said = []
    for command in (["plan", str(folder)], ["quantize", str(folder), "--output", str(tmp_path / "out")]):
        code = main([*command, *arguments])
        said.append((code, capsys.readouterr().err.splitlines()[-1].replace(f"optimum-sab {command[0]}", "")))
    return said


def test_bad_input_is_refused_as_quantize_refuses_it(small_example, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    packed = tmp_path / "packed"
    shutil.copytree(small_example, packed)
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "sab"}}))
    sharded = tmp_path / "sharded"
    shutil.copytree(small_example, sharded)
    (sharded / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    truncated = tmp_path / "truncated"
    shutil.copytree(small_example, truncated)
    (truncated / "model.safetensors").write_bytes((small_example / "model.safetensors").read_bytes()[:100])
    headless = tmp_path / "resnet"
    ResNetConfig(depths=[1], hidden_sizes=[8]).save_pretrained(headless)
    for folder, words, arguments in (
        (empty, "there is no config.json in it", ()),
        (tmp_path / "nowhere", "there is no folder", ()),
        (packed, "is quantized already", ()),
        (sharded, "which is not there; fetch the checkpoint again", ()),
        (truncated, "model.safetensors", ()),
        (headless, "", ()),
        (small_example, "matches no module", ("--keep-dense", "nothing_like_it")),
        (small_example, "--block-size 100", ("--block-size", "100")),
        (small_example, "missing.jsonl", ("--calibration", "missing.jsonl")),
        (small_example, "unrecognized arguments: --nonsense", ("--nonsense", "1")),
        (small_example, "--calibration-device", ("--calibration-device", "nonsense")),
        (small_example, "--stream-weights does not go with", ("--stream-weights", "--calibration", "self")),
    ):
        (code, mine), (same, theirs) = both(capsys, folder, tmp_path, *arguments)
        assert code == same > 0
        assert mine == theirs
        assert words in mine


def test_dtype_is_the_models_that_will_be_in_memory(weightless, capsys):
    def outside(*arguments):
        found = plan(capsys, weightless, "--no-timing", *QUICK, *arguments)
        parts = found["memory"][0]["phases"][0]["parts"]
        return next(part["bytes"] for part in parts if part["name"] == "weights outside of the blocks")

    assert outside() == outside("--dtype", "float32") == 2 * outside("--dtype", "bfloat16")
