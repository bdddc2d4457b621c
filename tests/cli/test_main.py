"""The command line in one process: what it prints, what it writes, and what it refuses."""

import argparse
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from optimum_sab import AutoModelForVision2Seq, SABConfig
from optimum_sab.cli.arguments.parser import build_parser, command_names
from optimum_sab.cli.commands.inspect import _rules
from optimum_sab.cli.main import main
from optimum_sab.hf.estimate import expected_bytes
from optimum_sab.ops.backends import _triton_problem as triton_problem

QUICK = ["--calibration-samples", "8", "--sequence-length", "64", "--iterations", "2", "--no-examples"]
QUICKER = [*QUICK, "--allocation", "uniform", "--sweeps", "0", "--no-temperature-scaling"]


@pytest.fixture(scope="module")
def packed(small_example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "example-sab"
    assert main(["quantize", str(small_example), "--output", str(folder), *QUICK]) == 0
    return folder


def json_of(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_quantize_writes_a_whole_checkpoint(packed):
    names = {p.name for p in packed.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= names
    assert {"report.json", "report.html"} <= names
    assert [p.name for p in packed.parent.iterdir()] == [packed.name]  # no partial folder is left


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_size_is_known_before_the_work(small_example, packed, dtype):
    config = SABConfig.from_dict(json.loads((packed / "config.json").read_text())["quantization_config"])
    config.dynamic = {}  # what was chosen
    source = AutoConfig.from_pretrained(small_example)
    expected = expected_bytes(AutoModelForVision2Seq, source, config, dtype)
    assert expected == pytest.approx((packed / "model.safetensors").stat().st_size, rel=0.02)


def test_quantize_reports_blocks_and_json(small_example, tmp_path, capsys):
    code = main(["quantize", str(small_example), "--output", str(tmp_path / "out"), "--json", *QUICKER])
    captured = capsys.readouterr()
    report = json.loads(captured.out)  # nothing but the object on standard output
    assert code == 0
    assert [b["index"] for b in report["blocks"]] == list(range(len(report["blocks"])))
    assert all(b["error"] > 0 and b["seconds"] > 0 for b in report["blocks"])
    assert 1.0 < report["bits_per_weight"] < 1.5
    for block in report["blocks"]:
        assert f"block {block['index']:3d}" in captured.err


def test_quantize_refuses_a_folder_with_files(small_example, packed, capsys):
    before = {p: p.stat().st_mtime_ns for p in packed.iterdir()}
    assert main(["quantize", str(small_example), "--output", str(packed), *QUICK]) == 1
    assert "not empty" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in packed.iterdir()} == before


def test_quantize_overwrites_when_asked(small_example, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for stale in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (folder / stale).write_text("old")
    assert main(["quantize", str(small_example), "--output", str(folder), "--overwrite", *QUICKER]) == 0
    assert (folder / "config.json").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert [p.name for p in folder.glob("model*")] == ["model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_quantize_leaves_nothing_behind_when_it_fails(small_example, tmp_path, capsys):
    command = ["quantize", str(small_example), "--output", str(tmp_path / "out"), "--keep-dense", "nothing_like_it"]
    assert main([*command, *QUICK]) == 1
    assert "'nothing_like_it'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "100"], "--block-size 100"),
        (["--dynamic", "{"], "not JSON"),
        (["--dynamic", "[1]"], "object of objects"),
        (["--calibration", "missing.jsonl"], "missing.jsonl"),
        (["--calibration-pass", "none"], "--calibration-pass none"),
    ],
)
def test_quantize_names_bad_values(small_example, tmp_path, capsys, arguments, message):
    command = ["quantize", str(small_example), "--output", str(tmp_path / "out"), *QUICK, *arguments]
    assert main(command) == 1
    assert message in capsys.readouterr().err


def test_quantize_refuses_what_is_no_model_or_packed_already(packed, tmp_path, capsys):
    (tmp_path / "no-model").mkdir()
    assert main(["quantize", str(tmp_path / "no-model"), "--output", str(tmp_path / "out")]) == 1
    assert "no model can be read" in capsys.readouterr().err
    assert main(["quantize", str(packed), "--output", str(tmp_path / "out")]) == 1
    assert "quantized already" in capsys.readouterr().err


def test_inspect_counts_every_byte(packed, capsys):
    assert main(["inspect", str(packed), "--json"]) == 0
    found = json_of(capsys)
    header = 8 + int.from_bytes((packed / "model.safetensors").read_bytes()[:8], "little")
    assert found["bytes_packed"] + found["bytes_dense"] + header == (packed / "model.safetensors").stat().st_size
    bits = sum(8 * m["bytes"] for m in found["modules"]) / sum(
        m["out_features"] * m["in_features"] for m in found["modules"]
    )
    assert found["bits_per_weight"] == pytest.approx(bits)
    assert found["format_version"] == 1
    assert found["settings"]["iterations"] == 2


def test_inspect_prints_modules_and_settings(packed, capsys):
    assert main(["inspect", str(packed)]) == 0
    text = capsys.readouterr().out
    assert "\nlayers.0.mlp.up_proj " in text
    assert 0 < text.index("\nverdict: ") < text.index("settings other than") < text.index("iterations: 2")
    assert "format version 1" in text


def test_inspect_shows_rules_that_set_the_same_together():
    chosen = {"base_planes": 1, "residual_planes": 0, "salient_fraction": 0.1875}
    dynamic = {f"layers.{block}.mlp.up_proj": chosen for block in range(5)}
    dynamic |= {"layers.0.self_attn": {"base_planes": 2}, "layers.4.mlp.gate_proj": False}
    assert list(_rules(dynamic)) == [
        "  dynamic: 7 rules, what the allocation of bits chose among them",
        "    base_planes 1, residual_planes 0: "
        "layers.0.mlp.up_proj, layers.1.mlp.up_proj, layers.2.mlp.up_proj and 2 more",
        "    base_planes 2: layers.0.self_attn",
        "    dense: layers.4.mlp.gate_proj",
    ]


def test_inspect_verifies_and_names_every_tensor_that_differs(packed, tmp_path, capsys):
    assert main(["inspect", str(packed), "--verify"]) == 0
    assert re.search(r"verified: (\d+) of \1 tensors", capsys.readouterr().out)
    folder = shutil.copytree(packed, tmp_path / "damaged")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    names = sorted(
        name for name in tensors if name.endswith(("layers.1.mlp.up_proj.weight", "layers.0.mlp.down_proj.bias"))
    )
    names += [next(name for name in sorted(tensors) if "visual" in name)]
    for name in names:
        tensors[name].view(-1).view(torch.uint8)[0] ^= 1
    with safe_open(path, framework="pt") as handle:
        save_file(tensors, path, handle.metadata())
    assert main(["inspect", str(folder)]) == 0  # headers alone are as they were
    capsys.readouterr()
    assert main(["inspect", str(folder), "--verify"]) == 1
    found = capsys.readouterr()
    assert all(f"  {name} is not what was saved" in found.out for name in names)
    assert f"{len(names)} of {len(tensors)} tensors" in found.err
    assert main(["inspect", str(folder), "--verify", "--json"]) == 1
    assert json_of(capsys)["verified"] == {"tensors": len(tensors), "differ": sorted(names)}


def test_inspect_says_that_there_is_nothing_to_verify(packed, tmp_path, capsys):
    folder = shutil.copytree(packed, tmp_path / "old")
    path = folder / "model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["measured"]["weights"]
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(folder)]) == 0
    assert main(["inspect", str(folder), "--verify"]) == 1
    assert "carries no digests" in capsys.readouterr().err


def test_inspect_refuses_a_dense_checkpoint(small_example, capsys):
    assert main(["inspect", str(small_example)]) == 1
    said = capsys.readouterr().err
    assert "not a packed SAB checkpoint" in said
    assert f"'optimum-sab quantize {small_example} --output PACKED' makes one" in said and "another folder" in said


@pytest.fixture
def half_example(small_example, tmp_path):
    """The small example as the embedded one is stored."""
    folder = shutil.copytree(small_example, tmp_path / "example-vlm")
    config = (folder / "config.json").read_text().replace('"float32"', '"bfloat16"')
    (folder / "config.json").write_text(config)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_demo_reports_what_the_issue_asks_for(half_example, warm, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(warm / "python"))  # of which it starts another
    monkeypatch.setattr("optimum_sab.example.demonstration.checkpoint_path", lambda: half_example)  # CI runs it whole
    assert main(["demo", "--questions", "4", "--json", *QUICKER]) == 0
    found = json_of(capsys)
    assert set(found["tasks"]) == {"colour", "shape", "counting", "position", "reading", "text"}
    assert all(0 <= score[side] <= 1 for score in found["tasks"].values() for side in ("dense", "packed"))
    assert found["reload_identical"] is True
    assert found["bytes_packed"] < found["bytes_dense"]
    assert found["linear_bytes_packed"] < 0.1 * found["linear_bytes_dense"]
    assert found["seconds"] > 0
    assert 1.0 < found["bits_per_weight"] < 1.5


def test_env_says_what_computes_and_why(capsys, monkeypatch):
    monkeypatch.delenv("OPTIMUM_SAB_BACKEND", raising=False)
    assert main(["env", "--json"]) == 0
    found = json_of(capsys)
    cpu = found["devices"][0]
    assert (cpu["device"], cpu["backend"]) == ("cpu", "cpu")
    assert found["packages"]["torch"]
    optional = {"accelerate", "greenlet", "jinja2", "matplotlib", "peft", "pillow"}
    assert all(found["packages"][name] == importlib.metadata.version(name) for name in optional)
    assert found["forced"] is None
    assert main(["env"]) == 0
    assert f"backend  cpu ({cpu['reason']})" in capsys.readouterr().out


@pytest.mark.parametrize(("threads", "words"), [(1, "cpu: 1 thread\n"), (2, "cpu: 2 threads\n")])
def test_env_counts_threads(capsys, monkeypatch, threads, words):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert main(["env"]) == 0
    assert words in capsys.readouterr().out


def test_optimum_cli_lists_the_commands_one_a_line():
    pytest.importorskip("optimum.commands")
    from optimum_sab.cli.register.register_sab import SABCommand

    parser = argparse.ArgumentParser("optimum-cli")
    lines = SABCommand(parser.add_subparsers()).parser.format_help().splitlines()
    table = lines[lines.index("commands:") + 1 : lines.index("", lines.index("commands:"))]
    names = command_names(build_parser("optimum-cli sab"))
    assert [line.split(maxsplit=1) for line in table] == [[name, purpose] for name, purpose in names.items()]
    assert len({line.index(purpose) for line, purpose in zip(table, names.values())}) == 1


def test_env_shows_a_forced_backend_that_cannot_be_used(capsys, monkeypatch):
    monkeypatch.setenv("OPTIMUM_SAB_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    triton_problem.cache_clear()
    assert main(["env", "--json"]) == 0
    found = json_of(capsys)
    assert found["forced"] == "triton"
    assert found["devices"][0]["backend"] is None
    assert "OPTIMUM_SAB_BACKEND" in found["devices"][0]["reason"]
    triton_problem.cache_clear()


def installed():
    try:
        importlib.metadata.distribution("optimum-sab")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.skipif(not installed(), reason="the package is not installed, only on the path")
def test_optimum_cli_runs_the_same_commands(packed, warm):
    pytest.importorskip("optimum.commands")
    tool = Path(sys.executable).with_name("optimum-cli")
    done = subprocess.run([tool, "sab", "inspect", str(packed), "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["format_version"] == 1
    again = [warm / "optimum-cli", "sab", "inspect", "nowhere"]
    bad = subprocess.run(again, capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert "nowhere" in bad.stderr
