import json

import pytest
import torch

from optimum_sab.cli.commands.eval import table
from optimum_sab.cli.main import main
from optimum_sab.errors import ConfigError
from optimum_sab.eval.methods import read_method
from optimum_sab.eval.picture import draw_quality
from optimum_sab.eval.quality import Measurement, Quality, compare_quality
from optimum_sab.eval.subject import Budget, find_subject
from optimum_sab.example import checkpoint_path

SMALL = Budget(samples=8, length=64, held_out=2, window=64, questions=2, probes=2)
OURS = (
    "default,iterations=2,sweeps=0,allocation=uniform"  # an allocation of its own would give every seed bits of its own
)


@pytest.fixture(scope="module")
def quality(llama_folder):
    methods = [read_method(m) for m in (OURS, "gptq-2", "gptq-4", "rtn-sign")]
    return compare_quality(find_subject(llama_folder, None, SMALL), methods, seeds=(0, 1))


def test_every_method_is_measured_under_every_seed(quality):
    assert [(r.method, r.seed) for r in quality.rows] == [(m, s) for m in quality.methods() for s in (0, 1)]
    assert quality.dense.bits_per_weight == 32.0
    for row in quality.rows:
        assert set(row.perplexity) == {"reference", "passages"}
        assert row.layer_error["text"] > 0
        assert row.kl > 0
        assert 0 <= row.top1 < 1
        assert row.accuracy == {}


def test_finer_grids_are_closer_to_the_dense_model(quality):
    figures = {m: quality.spread(m, lambda r: r.kl).mean for m in quality.methods()}
    assert figures["gptq-4"] < figures["gptq-2"] < figures["rtn-sign"]
    errors = {m: quality.spread(m, lambda r: r.layer_error["text"]).mean for m in quality.methods()}
    assert errors["gptq-4"] < errors["gptq-2"] < errors["rtn-sign"]
    assert errors[OURS] < errors["rtn-sign"]


def test_seeds_change_the_calibration_and_repeat(quality, llama_folder):
    spread = quality.spread("gptq-2", lambda r: r.kl)
    assert spread.low < spread.mean < spread.high
    again = compare_quality(find_subject(llama_folder, None, SMALL), [read_method("gptq-2")], seeds=(1,))
    assert again.rows[0].kl == pytest.approx(next(r.kl for r in quality.rows if (r.method, r.seed) == ("gptq-2", 1)))


def test_bits_come_from_the_packed_tensors(quality):
    bits = {r.bits_per_weight for r in quality.rows if r.method.startswith("default")}
    assert len(bits) == 1
    assert 1.2 < bits.pop() < 2.0  # blocks of 64 and 128 columns, whose scales weigh more


def test_table_shows_ranges_only_where_seeds_differ(quality):
    lines = table(quality).splitlines()
    assert lines[0].startswith("method")
    assert lines[1].startswith("dense")
    row = next(line for line in lines if line.startswith("gptq-2"))
    assert "–" in row
    assert f"{quality.rows[2].bits_per_weight:.3f} " in row


def test_picture_is_drawn(quality, tmp_path):
    draw_quality(quality, tmp_path / "quality.svg")
    drawn = (tmp_path / "quality.svg").read_text()
    assert drawn.count('<g id="line2d') > 4


def test_example_is_asked_its_tasks(small_example, capsys, monkeypatch):
    monkeypatch.setattr("optimum_sab.eval.subject.checkpoint_path", lambda: small_example)
    command = [
        "eval",
        "quality",
        "example",
        "--methods",
        "two-bit,iterations=2,sweeps=0,allocation=uniform",
        "--calibration",
        "tasks",
        "--json",
    ]
    sizes = ["--samples", "12", "--length", "64", "--questions", "3", "--probes", "6"]
    assert main([*command, *sizes]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert set(rows[0]["accuracy"]) == {"colour", "shape", "counting", "position", "reading", "text"}
    assert set(rows[1]["layer_error"]) == {"text", "visual"}
    assert rows[1]["bits_per_weight"] < rows[0]["bits_per_weight"]


def test_any_vision_language_model_is_given_text_and_pictures():
    subject = find_subject(str(checkpoint_path()), None, SMALL)
    assert set(subject.texts) == {"reference", "passages"}
    assert subject.questions == ()
    assert any("pixel_values" in probe for probe in subject.probes)
    seen = compare_quality(subject, [])
    assert set(seen.dense.perplexity) == {"reference", "passages"}
    assert seen.rows == ()


def test_unknown_model_or_method_is_an_error_before_any_work(capsys, tmp_path):
    assert main(["eval", "quality", str(tmp_path / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err
    assert main(["eval", "quality", "example", "--methods", "magic"]) == 1
    assert "magic" in capsys.readouterr().err


def test_accuracy_is_the_mean_of_tasks():
    row = Measurement("m", "f", 0, 1.0, 0.0, {}, {"a": 1.0, "b": 0.5}, {}, 0.0, 1.0)
    assert row.mean_accuracy == 0.75
    assert Measurement("m", "f", 0, 1.0, 0.0, {}, {}, {}, 0.0, 1.0).mean_accuracy is None
    assert Quality("q", row, (row,)).spread("m", lambda r: r.bits_per_weight).mean == 1.0


def test_calibration_goes_with_the_model(llama_folder):
    greedy = find_subject(llama_folder, "passages", Budget(samples=10**6, length=64, held_out=1, window=32))
    with pytest.raises(ConfigError, match=r"has \d+ windows"):
        greedy.calibration(0)
    assert isinstance(find_subject(llama_folder, "self", SMALL).calibration(0), str)
    assert find_subject("example", None, SMALL, torch.bfloat16).dtype == torch.bfloat16
