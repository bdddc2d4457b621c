"""An interrupted calibration goes on where it stopped, to the same bits, and only for the same run."""

import copy
import json

import pytest
import torch

from optimum_sab.calibration.blocks import binarizer
from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.pipeline import binarize
from optimum_sab.calibration.refine import tuning
from optimum_sab.calibration.resume.fingerprint import fingerprint
from optimum_sab.calibration.resume.folder import ResumeFolder
from optimum_sab.calibration.run import Silent
from optimum_sab.core.refinement import RefineSettings
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import CalibrationError, FormatError
from optimum_sab.nn.selection import select_linears

QUICK = LayerSettings(block_size=32, salient_fraction=0.125, iterations=2, sweeps=1, propagation=0.3)
REFINE = RefineSettings(epochs=2, steps=6)

pytestmark = pytest.mark.filterwarnings("ignore::optimum_sab.errors.SABWarning")


class Crash(Exception):
    pass


@pytest.fixture
def llama(build):
    subject = build("llama")
    generator = torch.Generator().manual_seed(5)
    subject.samples = [{"input_ids": torch.randint(2, 60, (1, n), generator=generator)} for n in (12,) * 18 + (7, 9)]
    return subject


def quantize(subject, folder=None, refine=None, settings=QUICK, progress=None):
    model = copy.deepcopy(subject.model)
    selection = select_linears(model, settings)
    resume, options = None, RunOptions(refine=refine)
    if folder is not None:
        resume = ResumeFolder(folder, fingerprint(model, selection, subject.samples, options))
    report = binarize(model, selection, subject.samples, options, progress, resume)
    return model, report


def same(one, other):
    state = other.state_dict()
    return one.state_dict().keys() == state.keys() and all(
        torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items()
    )


class CrashAt(Silent):
    def __init__(self, index):
        self.index = index

    def on_block(self, report, blocks):
        if report.index == self.index:
            raise Crash


@pytest.fixture
def solved(monkeypatch):
    """Counts the linears' groups that are solved."""
    calls = []
    original = binarizer.solve
    monkeypatch.setattr(binarizer, "solve", lambda *args: calls.append(args[-1]) or original(*args))
    return calls


@pytest.mark.compat
@pytest.mark.parametrize("refine", [None, REFINE], ids=["solved", "refined"])
def test_resumed_run_ends_with_the_same_bits(llama, tmp_path, solved, refine):
    whole, report = quantize(llama, refine=refine)
    with pytest.raises(Crash):
        quantize(llama, tmp_path / "run", refine, progress=CrashAt(0))
    solved.clear()
    resumed, again = quantize(llama, tmp_path / "run", refine)
    assert len(solved) == 4 and all(".layers.1." in name for name in solved)  # the first block's four were done
    assert same(resumed, whole)
    assert [b.layers for b in again.blocks] == [b.layers for b in report.blocks]
    assert [b.reconstruction for b in again.blocks] == [b.reconstruction for b in report.blocks]
    assert [b.drift for b in again.blocks] == [b.drift for b in report.blocks]
    assert again.tuning == report.tuning


def test_folder_does_not_change_the_result(llama, tmp_path):
    assert same(quantize(llama)[0], quantize(llama, tmp_path)[0])


def test_every_family_can_be_resumed(subject, tmp_path):
    whole, _ = quantize(subject)
    with pytest.raises(Crash):
        quantize(subject, tmp_path, progress=CrashAt(0))
    assert same(quantize(subject, tmp_path)[0], whole)


def test_finished_run_is_replayed_without_solving(llama, tmp_path, solved):
    whole, report = quantize(llama, tmp_path, REFINE)
    solved.clear()
    replayed, again = quantize(llama, tmp_path, REFINE)
    assert not solved
    assert same(replayed, whole) and again.tuning == report.tuning


@pytest.mark.parametrize("stop", [3, 5])
def test_interrupted_tuning_goes_on_to_the_same_bits(llama, tmp_path, monkeypatch, stop):
    whole, report = quantize(llama, refine=REFINE)
    monkeypatch.setattr(tuning, "SAVE_EVERY", 2)
    original, steps = tuning._gradients, []

    def gradients(*args):
        if len(steps) == stop:
            raise Crash
        steps.append(args)
        original(*args)

    monkeypatch.setattr(tuning, "_gradients", gradients)
    with pytest.raises(Crash):
        quantize(llama, tmp_path, REFINE)
    stop, done = None, len(steps)
    resumed, again = quantize(llama, tmp_path, REFINE)
    assert len(steps) - done == REFINE.steps - done // 2 * 2  # from the last state that was kept
    assert same(resumed, whole) and again.tuning == report.tuning


def changed_weight(subject):
    with torch.no_grad():
        subject.model.model.layers[1].mlp.up_proj.weight[0, 0] += 1


def changed_sample(subject):
    subject.samples[3]["input_ids"][0, 4] += 1


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        (changed_weight, {}, "model is"),
        (changed_sample, {}, "samples is"),
        (None, {"settings": QUICK.replace(damping=0.02)}, r"q_proj\.damping is 0\.1 there and 0\.02 now"),
        (None, {"refine": REFINE}, "refine is None there"),
    ],
    ids=["weights", "samples", "settings", "refine"],
)
def test_folder_of_another_run_is_refused_by_what_differs(llama, tmp_path, change, options, named):
    with pytest.raises(Crash):
        quantize(llama, tmp_path, progress=CrashAt(0))
    if change is not None:
        change(llama)
    with pytest.raises(CalibrationError, match=named):
        quantize(llama, tmp_path, **options)


def test_folder_with_other_files_is_refused(llama, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CalibrationError, match="name an empty folder"):
        quantize(llama, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_damaged_block_file_is_named(llama, tmp_path):
    quantize(llama, tmp_path)
    path = tmp_path / "block-00000.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CalibrationError, match=r"block-00000\.safetensors cannot be read.*delete it"):
        quantize(llama, tmp_path)
    path.unlink()
    assert same(quantize(llama, tmp_path)[0], quantize(llama)[0])


def test_block_file_with_a_foreign_tensor_is_refused(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    quantize(llama, tmp_path)
    path = tmp_path / "block-00001.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith("|col_scale"))
    tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, path, metadata={"about": json.dumps({"errors": {}, "reconstruction": None})})
    with pytest.raises(FormatError, match="'col_scale'"):
        quantize(llama, tmp_path)


def test_no_partial_file_is_left(llama, tmp_path):
    quantize(llama, tmp_path, REFINE)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["block-00000.safetensors", "block-00001.safetensors", "fingerprint.json", "tuning.safetensors"]
