"""What a trial calls refused, failed and not built, and that it notices a model that computes something else."""

import shutil

import pytest
import torch

from optimum_sab.bench.coverage import samples, trial
from optimum_sab.bench.coverage.families import find_families
from optimum_sab.bench.coverage.isolation import outcome_of
from optimum_sab.bench.coverage.outcome import FAILED, NOT_BUILT, REFUSED, WORKS
from optimum_sab.calibration.stages.blocks import SolveBlocks
from optimum_sab.errors import CalibrationError


@pytest.fixture(scope="module")
def llama():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "COUNT", 3)
        yield find_families(["llama"])[0]


@pytest.fixture(scope="module")
def first_half(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    trial.quantize(llama, folder)
    return folder


@pytest.fixture
def quantized(first_half, tmp_path):
    """What the first half of a trial leaves."""
    return shutil.copytree(first_half, tmp_path / "llama")


def known(family, folder):
    return outcome_of(family, trial.Notes(folder).known)


def test_named_error_before_the_weights_is_a_refusal(llama, monkeypatch, tmp_path):
    monkeypatch.setitem(trial.QUICK, "modules_to_not_convert", ["no.such.module"])
    trial.quantize(llama, tmp_path)
    found = known(llama, tmp_path)
    assert (found.outcome, found.stage) == (REFUSED, "quantize")
    assert found.reason.startswith("ConfigError: the module rule 'no.such.module' matches no module")


def test_named_error_when_the_weights_are_read_is_a_failure(llama, monkeypatch, tmp_path):
    def apply(self, run, on_step):
        raise CalibrationError("in the middle\nof the work")

    monkeypatch.setattr(SolveBlocks, "apply", apply)
    trial.quantize(llama, tmp_path)
    found = known(llama, tmp_path)
    assert (found.outcome, found.stage, found.reason) == (FAILED, "quantize", "CalibrationError: in the middle")


def test_dense_model_that_does_not_compute_is_not_built(llama, monkeypatch, tmp_path):
    monkeypatch.setattr(llama.model_class, "forward", lambda self, **inputs: 1 / 0)
    trial.quantize(llama, tmp_path)
    found = known(llama, tmp_path)
    assert (found.outcome, found.stage, found.reason) == (NOT_BUILT, "dense", "ZeroDivisionError: division by zero")


def test_a_family_that_comes_to_the_end_works(llama, quantized):
    trial.use(llama, quantized)
    found = known(llama, quantized)
    assert (found.outcome, found.stage, found.reason, found.left_out) == (WORKS, "", "", ())
    assert found.share == 1.0
    assert found.seconds > 0


@pytest.mark.parametrize("able", [True, False])
def test_what_the_dense_model_cannot_do_is_left_out(llama, quantized, monkeypatch, able):
    if not able:
        trial.Notes(quantized).note(left_out=["generate"])
    monkeypatch.setattr(llama.model_class, "generate", lambda self, **inputs: 1 / 0)
    trial.use(llama, quantized)
    found = known(llama, quantized)
    assert (found.outcome, found.stage) == ((FAILED, "generate") if able else (WORKS, ""))


def test_other_logits_of_the_reloaded_model_are_noticed(llama, quantized):
    kept = torch.load(quantized / "expected.pt", weights_only=True)
    kept["logits"][1][0, 0, 0] += 1e-6 + kept["logits"][1][0, 0, 0].abs() * 1e-6
    torch.save(kept, quantized / "expected.pt")
    trial.use(llama, quantized)
    found = known(llama, quantized)
    assert (found.outcome, found.stage) == (FAILED, "logits")
    assert found.reason.startswith("DifferenceError: the model reloaded gives other logits, by up to")


def test_other_weights_after_a_second_save_are_noticed(llama, quantized, monkeypatch):
    real = llama.model_class.save_pretrained

    def damaged(self, folder, **arguments):
        if folder.name == "again":
            with torch.no_grad():
                self.model.norm.weight.mul_(1.01)
        real(self, folder, **arguments)

    monkeypatch.setattr(llama.model_class, "save_pretrained", damaged)
    trial.use(llama, quantized)
    found = known(llama, quantized)
    assert (found.outcome, found.stage) == (FAILED, "second save")
