"""An interrupted calibration goes on where it stopped, to the same bits, and only for the same run."""

import copy
import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from optimum_sab.calibration.blocks import binarizer
from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.pipeline import binarize
from optimum_sab.calibration.refine import tuning
from optimum_sab.calibration.resume.fingerprint import WeightsDigest, fingerprint
from optimum_sab.calibration.resume.folder import ResumeFolder
from optimum_sab.calibration.run import Silent
from optimum_sab.core.refinement import RefineSettings
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import CalibrationError
from optimum_sab.nn.selection import select_linears

QUICK = LayerSettings(block_size=32, salient_fraction=0.125, iterations=2, sweeps=1, propagation=0.3)
REFINE = RefineSettings(epochs=2, steps=6)

pytestmark = pytest.mark.filterwarnings("ignore::optimum_sab.errors.SABWarning")


class Crash(Exception):
    pass


@pytest.fixture
def llama(build):
    return _llama(build)


def _llama(build):
    subject = build("llama")
    generator = torch.Generator().manual_seed(5)
    subject.samples = [{"input_ids": torch.randint(2, 60, (1, n), generator=generator)} for n in (12,) * 9 + (7, 9)]
    return subject


def quantize(subject, folder=None, refine=None, settings=QUICK, progress=None):
    model = copy.deepcopy(subject.model)
    selection = select_linears(model, settings)
    resume, options = None, RunOptions(refine=refine)
    if folder is not None:
        resume = ResumeFolder(folder, fingerprint(WeightsDigest.of(model), selection, subject.samples, options))
    report = binarize(model, selection, subject.samples, options, progress, resume)
    return model, report


def same(one, other):
    state = other.state_dict()
    return one.state_dict().keys() == state.keys() and all(
        torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items()
    )


@pytest.fixture(scope="module")
def undisturbed(build):
    """``undisturbed(refine)``: (model, report) of a run of the Llama that nothing ended, to be left as it is."""
    made = {}

    def run(refine=None):
        if refine not in made:
            made[refine] = quantize(_llama(build), refine=refine)
        return made[refine]

    return run


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
    monkeypatch.setattr(binarizer, "solve", lambda *args: calls.append(args[3]) or original(*args))
    return calls


@pytest.mark.compat
@pytest.mark.parametrize("refine", [None, REFINE], ids=["solved", "refined"])
def test_resumed_run_ends_with_the_same_bits(llama, undisturbed, tmp_path, solved, refine):
    whole, report = undisturbed(refine)
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


def test_folder_does_not_change_the_result(llama, undisturbed, tmp_path):
    assert same(undisturbed()[0], quantize(llama, tmp_path)[0])


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
def test_interrupted_tuning_goes_on_to_the_same_bits(llama, undisturbed, tmp_path, monkeypatch, stop):
    whole, report = undisturbed(REFINE)
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
        (changed_sample, {}, r"samples is '\d+ of \d+ tokens, "),
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


def test_damaged_block_file_is_named(llama, undisturbed, tmp_path):
    quantize(llama, tmp_path)
    path = tmp_path / "block-00000.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CalibrationError, match=r"block-00000\.safetensors cannot be used.*delete it"):
        quantize(llama, tmp_path)
    path.unlink()
    assert same(quantize(llama, tmp_path)[0], undisturbed()[0])


def changed_file(path, change):
    """Rewrites a safetensors file whose tensors and metadata go through ``change``."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def flipped_sign(tensors, metadata):
    key = next(k for k in tensors if k.endswith("|weight"))
    tensors[key].view(-1)[0] ^= 1


def another_error(tensors, metadata):
    about = json.loads(metadata["about"])
    about["errors"] = {name: error / 2 for name, error in about["errors"].items()}
    metadata["about"] = json.dumps(about)


@pytest.mark.parametrize("change", [flipped_sign, another_error])
def test_block_file_whose_content_has_changed_is_refused(llama, undisturbed, tmp_path, change):
    quantize(llama, tmp_path)
    changed_file(tmp_path / "block-00001.safetensors", change)
    with pytest.raises(CalibrationError, match=r"block-00001\.safetensors cannot be used .*damaged.*delete it"):
        quantize(llama, tmp_path)
    (tmp_path / "block-00001.safetensors").unlink()
    assert same(quantize(llama, tmp_path)[0], undisturbed()[0])


def test_block_files_of_another_block_or_run_are_refused(llama, tmp_path):
    quantize(llama, tmp_path / "one")
    changed_sample(llama)
    quantize(llama, tmp_path / "other")
    for source in ("other/block-00001.safetensors", "one/block-00000.safetensors"):
        shutil.copy(tmp_path / source, tmp_path / "other" / "block-00000.safetensors")
        if source.startswith("other"):
            with pytest.raises(CalibrationError, match=r"block-00000\.safetensors cannot be used .*of another run"):
                quantize(llama, tmp_path / "other")
    with pytest.raises(CalibrationError, match=r"block-00000\.safetensors cannot be used .*of another run"):
        quantize(llama, tmp_path / "other")


def test_block_of_other_layers_is_refused(llama, tmp_path):
    """As when the rules were deleted and are chosen otherwise: every file is what the run wrote."""
    quantize(llama, tmp_path)
    model = copy.deepcopy(llama.model)
    folder = ResumeFolder(
        tmp_path, fingerprint(WeightsDigest.of(model), select_linears(model, QUICK), llama.samples, RunOptions())
    )
    others = select_linears(model, QUICK.replace(base_planes=2))
    with pytest.raises(CalibrationError, match=r"block-00000\.safetensors cannot be used .*'weight'.*delete it"):
        binarize(model, others, llama.samples, resume=folder)


MARKS = {"model": "abc", "layers": {"a.b": {"block_size": 32}}}
DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "no text": lambda path: path.write_bytes(b"\xff\xfe" * 9),
    "a list": lambda path: path.write_text("[]"),
    "of an earlier release": lambda path: path.write_text('{"a.b": {"base_planes": 1}}'),
    "a key too many": lambda path: path.write_text('{"sha256": "", "content": 1, "more": 2}'),
    "another value": lambda path: path.write_text(path.read_text().replace("32", "64")),
    "nested": lambda path: path.write_text("[" * 100_000),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["fingerprint.json", "rules.json"])
def test_damaged_json_is_named_with_its_remedy(tmp_path, name, damage):
    folder = ResumeFolder(tmp_path, MARKS)
    folder.write_json("rules.json", MARKS["layers"])
    assert ResumeFolder(tmp_path, MARKS).read_json("rules.json") == MARKS["layers"]
    DAMAGES[damage](tmp_path / name)
    with pytest.raises(CalibrationError, match=rf"{name} cannot be used .*; delete it"):
        ResumeFolder(tmp_path, MARKS).read_json("rules.json")


TENSOR_DAMAGES = {
    "truncated": DAMAGES["truncated"],
    "empty": DAMAGES["empty"],
    "a folder": DAMAGES["a folder"],
    "no metadata": lambda path: save_file({"a": torch.ones(3)}, path),
    "metadata without keys": lambda path: save_file({"a": torch.ones(3)}, path, metadata={"x": "y"}),
    "about nothing": lambda path: changed_file(path, lambda tensors, metadata: metadata.pop("about")),
    "about no JSON": lambda path: changed_file(path, lambda tensors, metadata: metadata.update(about="{")),
    "a bit": lambda path: changed_file(path, lambda tensors, metadata: tensors["a"].neg_()),
    "another name": lambda path: changed_file(path, lambda tensors, metadata: tensors.update(b=tensors.pop("a"))),
    "another shape": lambda path: changed_file(path, lambda tensors, metadata: tensors.update(a=tensors["a"][None])),
    "another number": lambda path: changed_file(path, lambda tensors, metadata: metadata.update(about='{"step": 8}')),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGES)
def test_damaged_tensors_are_named_with_their_remedy(tmp_path, damage):
    folder = ResumeFolder(tmp_path, MARKS)
    folder.write_tensors("tuning.safetensors", {"a": torch.arange(3.0)}, {"step": 7})
    tensors, about = ResumeFolder(tmp_path, MARKS).read_tensors("tuning.safetensors")
    assert torch.equal(tensors["a"], torch.arange(3.0)) and about == {"step": 7}
    TENSOR_DAMAGES[damage](tmp_path / "tuning.safetensors")
    with pytest.raises(CalibrationError, match=r"tuning\.safetensors cannot be used .*; delete it"):
        ResumeFolder(tmp_path, MARKS).read_tensors("tuning.safetensors")


@pytest.mark.parametrize("left", [["fingerprint.json.partial-4711"], [], ["block-00000.safetensors.partial-4711"]])
def test_a_run_killed_before_its_first_file_was_there_leaves_a_usable_folder(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("{")
    ResumeFolder(tmp_path, MARKS).write_json("rules.json", {})
    assert ResumeFolder(tmp_path, MARKS).read_json("rules.json") == {}


def test_a_damaged_fingerprint_can_be_deleted_and_the_work_is_kept(tmp_path):
    ResumeFolder(tmp_path, MARKS).write_json("rules.json", {"a": 1})
    (tmp_path / "fingerprint.json").unlink()
    assert ResumeFolder(tmp_path, MARKS).read_json("rules.json") == {"a": 1}
    (tmp_path / "fingerprint.json").unlink()
    with pytest.raises(CalibrationError, match=r"rules\.json cannot be used .*of another run"):
        ResumeFolder(tmp_path, {**MARKS, "model": "other"}).read_json("rules.json")


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CalibrationError, match=r"resume_folder='.*file' cannot be used .*name a folder"):
        ResumeFolder(tmp_path / "file", MARKS)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    folder = ResumeFolder(tmp_path, MARKS)
    (tmp_path / "rules.json").mkdir()
    with pytest.raises(CalibrationError, match=r"rules\.json cannot be written .*repeat the call"):
        folder.write_json("rules.json", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fingerprint.json", "rules.json"]


def test_no_partial_file_is_left(llama, tmp_path):
    quantize(llama, tmp_path, REFINE)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["block-00000.safetensors", "block-00001.safetensors", "fingerprint.json", "tuning.safetensors"]
