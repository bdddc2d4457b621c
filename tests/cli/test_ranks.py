"""`optimum-sab quantize` in several processes: one checkpoint, one voice, one error."""

import json
import os
import subprocess
import sys

import pytest
import transformers
from packaging.version import Version

from tests.calibration import rank_work
from tests.calibration.ranked import Server

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
QUICK = (
    *("--calibration-samples", "6", "--sequence-length", "32"),
    *("--iterations", "2", "--sweeps", "0", "--no-examples"),
)


@pytest.fixture(scope="module")
def server(warm):
    found = Server(warm / "python")
    yield found
    found.close()


def quantized(server, size, example, output, *more, **options):
    arguments = ("quantize", str(example), "--output", str(output), "--json", *QUICK, *more)
    found = server.run(size, rank_work.command, *arguments, **options)
    for each in found:
        if each.error is not None:
            raise each.error
    return [each.value for each in found]


def stored(folder):
    return [(folder / name).read_bytes() for name in ("model.safetensors", "config.json")]


def test_one_checkpoint_is_written_and_only_the_first_process_speaks(server, smallest_example, tmp_path):
    kept = tmp_path / "kept"
    first, second = quantized(server, 2, smallest_example, tmp_path / "out", "--resume-folder", str(kept))
    assert second == (0, "", "")
    assert first[0] == 0 and json.loads(first[1])["bits_per_weight"] > 1
    assert first[2].count("block   0") == 1 and "Measuring sensitivities: " in first[2]
    assert sorted(each.name for each in kept.iterdir()) == ["block-00000.safetensors", "fingerprint.json", "rules.json"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["blocks"][0]["wire_bytes"] > 10_000 and report["calibration"]["count"] == 6
    assert set(report["agreement"]) == {"text", "pictures"} and report["temperature"] is not None

    [again] = quantized(server, 1, smallest_example, tmp_path / "alone", "--resume-folder", str(kept))
    assert again[0] == 0
    assert json.loads((tmp_path / "alone" / "report.json").read_text())["blocks"][0]["error"] == pytest.approx(
        report["blocks"][0]["error"]
    )


def test_what_the_first_process_refuses_ends_all(server, smallest_example, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    first, second = quantized(server, 2, smallest_example, tmp_path)
    assert first[0] == 1 and "is not empty" in first[2]
    assert second == (1, "", "")


@pytest.mark.full
def test_what_another_process_fails_with_is_said_by_the_first(server, smallest_example, tmp_path):
    arguments = ("quantize", str(smallest_example), "--output", str(tmp_path / "out"), *QUICK)
    first, second = (
        each.value for each in server.run(2, rank_work.failing_command, *arguments, "--allocation", "uniform")
    )
    assert first[0] == 1 and first[2].endswith("error: rank 1 of 2 has stopped: NonFiniteError: it holds NaN.\n")
    assert second == (1, "", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_the_preset_that_refines_goes_through_several_processes(server, smallest_example, tmp_path):
    preset = ("--preset", "best", "--refine-epochs", "1", "--refine-steps", "4")
    first, second = quantized(server, 2, smallest_example, tmp_path / "out", *preset)
    assert (first[0], second) == (0, (0, "", ""))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["tuning"]["after"] <= report["tuning"]["before"] and report["temperature"] is not None


@pytest.mark.full
@pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="streaming is refused by name there")
def test_streamed_weights_in_several_processes_give_the_same_bytes(server, small_example, tmp_path):
    plain = ("--allocation", "uniform")
    for name, more in (("held", ()), ("streamed", ("--stream-weights", "--activation-memory", "0.00001"))):
        assert [each[0] for each in quantized(server, 2, small_example, tmp_path / name, *plain, *more)] == [0, 0]
    assert stored(tmp_path / "held") == stored(tmp_path / "streamed")


@pytest.mark.full
def test_torchrun_starts_them(smallest_example, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "optimum_sab"]
    arguments = ["quantize", str(smallest_example), "--output", str(tmp_path / "out"), *QUICK]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("verdict:") == 1
    assert json.loads((tmp_path / "out" / "report.json").read_text())["blocks"][0]["wire_bytes"] > 0
    again = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
    assert again.returncode == 1 and "is not empty" in again.stderr
