"""The experiment on what an adapter gives back, on one block of the example and two steps."""

import json
import sys

import pytest
import torch

from optimum_sab import AutoModelForVision2Seq, SABConfig
from optimum_sab.eval import adapters
from optimum_sab.eval.adapters import AdapterSettings, Trial, add_adapter, main, train
from optimum_sab.example.tasks import TASKS

pytest.importorskip("peft")

SETTINGS = AdapterSettings(steps=2, scenes=1, signs=1, texts=1)


@pytest.fixture(scope="module")
def packed(smallest_example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "packed"
    quick = {"calibration_samples": 4, "sequence_length": 64, "iterations": 1, "sweeps": 0, "allocation": "uniform"}
    config = SABConfig(**quick, temperature_scaling=False, progress="none")
    model = AutoModelForVision2Seq.from_pretrained(smallest_example, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def trial(smallest_example, monkeypatch):
    monkeypatch.setattr(adapters, "checkpoint_path", lambda: smallest_example)
    return Trial(questions=1)


def test_adapter_alone_is_trained(trial, packed):
    model = trial.load(packed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_adapter(model, SETTINGS)
    losses = train(model, trial.processor, SETTINGS, seed=0)
    assert len(losses) == 2
    after = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 14 and all("language_model" in n and "lora_" in n for n in trained)
    assert any(bool(model.get_parameter(n).abs().sum() > 0) for n in trained if "lora_B" in n)


def test_recovery_of_a_packed_checkpoint_counts_what_it_trained(trial, packed):
    found = trial.recover(3, SETTINGS, packed)
    assert found.seed == 3 and found.packed.keys() == found.adapted.keys() == set(TASKS)
    block = 4 * (3 * (256 + 256) + 2 * (256 + 128) + (256 + 256))  # q, o, gate, up, down of 256 by 256; k, v
    assert found.share == pytest.approx((block + 4 * (256 + 256)) / trial.parameters)


def test_same_seed_gives_the_same_losses(trial, packed):
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = trial.load(packed)
        add_adapter(model, SETTINGS)
        runs.append(train(model, trial.processor, SETTINGS, seed=0))
    assert runs[0] == runs[1]


def test_command_prints_every_task_and_seed(trial, packed, capsys):
    assert main(["--seeds", "5", "--questions", "1", "--steps", "1", "--packed", str(packed), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["seed"] for row in found["rows"]] == [5] and set(found["dense"]) == set(TASKS)
    rows = [adapters.Recovery(**row) for row in found["rows"]]
    text = "\n".join(adapters.table(found["dense"], rows))
    assert all(task in text for task in TASKS) and "seed 5" in text and "of the parameters" in text


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--questions", "0"], ["--seeds", "-1"], ["--seeds", str(2**64)]])
def test_wrong_numbers_are_one_line(wrong, trial, capsys):
    assert main(wrong) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_missing_peft_is_named_with_the_extra(trial, packed, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["--questions", "1", "--packed", str(packed)]) == 2
    assert "pip install 'optimum-sab[adapters]'" in capsys.readouterr().err
