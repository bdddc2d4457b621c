"""Refinement in the whole pipeline: what it improves, what it leaves alone, and that what is judged is stored."""

import copy
from dataclasses import replace

import pytest
import torch

from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.pipeline import binarize
from optimum_sab.calibration.refine import reconstruction, student, tuning
from optimum_sab.calibration.streams.placement import brought
from optimum_sab.core.refinement import RefineSettings
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import CalibrationError
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.selection import select_linears

QUICK = LayerSettings(block_size=32, iterations=2, propagation=0.01)  # two streams, and something left to refine
SIGNS = ("weight", "residual_sign", "residual_index")

pytestmark = pytest.mark.filterwarnings("ignore::optimum_sab.errors.SABWarning")


def quantize(subject, refine=None, settings=QUICK, **options):
    """A binarized copy of the subject's model, and the report."""
    model = copy.deepcopy(subject.model)
    # the temperature is half of what the tuning of so small a model is worth
    options = RunOptions(refine=refine, temperature_scaling=False, **options)
    report = binarize(model, select_linears(model, settings), subject.samples, options)
    return model, report


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, SABLinear)}


@torch.no_grad()
def divergence(dense, model, samples):
    """Mean KL per token, with nothing of the package's own."""
    found = []
    for sample in samples:
        wanted, mine = (m(**sample).logits[0].log_softmax(-1) for m in (dense, model))
        found.append(torch.nn.functional.kl_div(mine, wanted, log_target=True, reduction="none").sum(-1))
    return float(torch.cat(found).mean())


@torch.no_grad()
def block_output(model, samples, index):
    rows = []
    block = model.model.layers[index]
    handle = block.register_forward_hook(lambda m, a, out: rows.append((out[0] if isinstance(out, tuple) else out)[0]))
    for sample in samples:
        model(**sample)
    handle.remove()
    return torch.cat(rows)


@pytest.fixture(scope="module")
def llama(build):
    """Left as it is by all."""
    subject = build("llama")
    generator = torch.Generator().manual_seed(5)
    subject.samples = [{"input_ids": torch.randint(2, 60, (1, n), generator=generator)} for n in (12,) * 58 + (7, 9)]
    return subject


@pytest.fixture
def few(llama):
    """The same with a third of its samples, to break as one likes."""
    return replace(llama, model=copy.deepcopy(llama.model), samples=llama.samples[-20:])


@pytest.fixture(scope="module")
def solved(llama):
    """(model, report) without refinement."""
    return quantize(llama)


@pytest.fixture(scope="module")
def reconstructed(llama):
    """(model, report) whose blocks were refined, one by one."""
    return quantize(llama, RefineSettings(epochs=6, steps=0))


@pytest.fixture(scope="module")
def tuned(llama):
    """(model, report) that was refined as a whole."""
    return quantize(llama, RefineSettings(epochs=0, steps=20))


@pytest.mark.compat
def test_reconstruction_lowers_the_block_error_on_the_samples_that_judge(llama, solved, reconstructed):
    (plain, _), (refined, report) = solved, reconstructed
    assert report.blocks[0].reconstruction.improved
    assert report.tuning is None
    judge = llama.samples[9::10]
    wanted = block_output(llama.model, judge, 0)

    def error(model):
        return float(((block_output(model, judge, 0) - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())

    found = report.blocks[0].reconstruction
    assert error(plain) == pytest.approx(found.before, rel=1e-4)
    assert error(refined) == pytest.approx(found.after, rel=1e-4)
    assert found.after < 0.98 * found.before


@pytest.mark.compat
def test_tuning_lowers_the_divergence_and_stores_what_was_judged(llama, solved, tuned):
    (plain, _), (refined, report) = solved, tuned
    judge = llama.samples[9::10]
    assert report.tuning.improved
    assert divergence(llama.model, plain, judge) == pytest.approx(report.tuning.before, rel=1e-4)
    assert divergence(llama.model, refined, judge) == pytest.approx(report.tuning.after, rel=1e-4)
    assert report.tuning.after < 0.99 * report.tuning.before
    assert not torch.equal(refined.model.norm.weight, plain.model.norm.weight)  # behind the blocks


def test_tuning_on_a_device_brings_there_what_is_not_trained(few, monkeypatch):
    """cpu:0 is not cpu to PyTorch, so that everything is brought there."""
    places = []
    monkeypatch.setattr(student, "brought", lambda *a: places.append(a) or brought(*a))
    here, report = quantize(few, RefineSettings(epochs=0, steps=2))
    assert {device for _, device in places} == {None}
    places.clear()
    there, other = quantize(few, RefineSettings(epochs=0, steps=2), device=torch.device("cpu:0"))
    assert {module for module, _ in places} == {*there.model.layers, there.model.norm}
    assert {device for _, device in places} == {torch.device("cpu:0")}
    assert other.tuning == report.tuning
    state = there.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in here.state_dict().items())


def test_later_blocks_are_calibrated_on_the_refined_stream(llama, solved, reconstructed):
    """The second block's error at its start is that behind the refined first block, not behind the solved one."""
    (plain, _), (_, report) = solved, reconstructed
    judge = llama.samples[9::10]
    wanted = block_output(llama.model, judge, 1)
    behind_solved = ((block_output(plain, judge, 1) - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
    assert report.blocks[1].reconstruction.before < float(behind_solved)


def test_drift_is_that_of_the_refined_stream(llama, reconstructed):
    refined, report = reconstructed
    wanted, found = (block_output(m, llama.samples, 1) for m in (llama.model, refined))
    expected = float((wanted - found).square().sum() / wanted.square().sum())
    assert report.blocks[1].drift == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("row_scale", ["fp8", "fp16"])
def test_refinement_changes_scales_and_keeps_signs(llama, solved, tuned, row_scale):
    # Tuned only: what a block is given depends on the refinement of those before it.
    (plain, _), (refined, report) = solved, tuned
    if row_scale == "fp16":
        settings = QUICK.replace(row_scale="fp16", base_planes=2)
        plain, _ = quantize(llama, settings=settings)
        refined, report = quantize(llama, RefineSettings(epochs=0, steps=10), settings=settings)
    assert report.tuning.improved
    for name, layer in layers(refined).items():
        layer.packed.validate(name)
        before = layers(plain)[name].packed.tensors
        for key, tensor in layer.packed.tensors.items():
            if key in SIGNS:
                assert torch.equal(tensor, before[key])
        assert not torch.equal(layer.packed.tensors["col_scale"], before["col_scale"])


def test_reconstruction_keeps_the_signs_of_the_first_block(solved, reconstructed):
    (plain, _), (refined, _) = solved, reconstructed
    for name, layer in layers(refined).items():
        if ".layers.0." in name:
            before = layers(plain)[name].packed
            assert all(torch.equal(layer.packed.tensors[k], before.tensors[k]) for k in SIGNS)
            assert not torch.equal(layer.packed.row_scale(), before.row_scale())


def test_every_family_can_be_refined(subject):
    model, report = quantize(subject, RefineSettings(epochs=1, steps=2))
    judge = [subject.samples[-1]]
    assert report.tuning.after <= report.tuning.before
    assert all(b.reconstruction.after <= b.reconstruction.before for b in report.blocks)
    logits = model(**judge[0]).logits
    assert logits.shape == subject.model(**judge[0]).logits.shape and bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refinement_leaves_no_trace(few, dtype):
    few.model.to(dtype)
    few.model.model.embed_tokens.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in few.model.named_parameters() if p.dim() != 2}
    model, report = quantize(few, RefineSettings(epochs=1, steps=2))
    named = dict(model.named_parameters())
    assert {name: named[name].requires_grad for name in flags if "proj" not in name} == {
        name: flag for name, flag in flags.items() if "proj" not in name
    }
    assert not model.model.embed_tokens.weight.requires_grad
    assert all(p.grad is None for p in named.values())
    assert all(p.is_leaf and p.grad_fn is None for p in named.values())
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert all(p.dtype == dtype for p in named.values() if p.is_floating_point())
    assert torch.is_grad_enabled()
    assert report.tuning is not None


def test_start_is_kept_where_nothing_beats_it(llama, solved, monkeypatch):
    plain, _ = solved
    for module in (reconstruction, tuning):
        monkeypatch.setattr(module, "RATE", 100.0)  # nothing but ruin comes of this
    model, report = quantize(llama, RefineSettings(epochs=1, steps=2))
    assert not any(b.reconstruction.improved for b in report.blocks) and not report.tuning.improved
    assert report.tuning.after == report.tuning.before
    expected = plain.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_refinement_runs_a_dense_stream_even_without_the_propagated_target(few):
    _, report = quantize(few, RefineSettings(epochs=3, steps=0), settings=QUICK.replace(propagation=0.0))
    assert all(b.drift is not None for b in report.blocks) and report.blocks[0].reconstruction.improved


def test_only_text_is_judged(build, monkeypatch):
    subject = build("qwen2_5_vl")
    made, logits = [], student.Student.logits

    def watched(self, inputs, teacher, of):
        hook = self.model.lm_head.register_forward_hook(lambda head, args, both: made.append(both.shape[:2]))
        try:
            return logits(self, inputs, teacher, of)
        finally:
            hook.remove()

    monkeypatch.setattr(student.Student, "logits", watched)
    _, report = quantize(subject, RefineSettings(epochs=0, steps=1))
    texts = {int((each["input_ids"] != 60).sum()) for each in subject.samples}
    assert made and {rows for both, rows in made} <= texts and {both for both, _ in made} == {2}
    plain, _ = quantize(subject)
    sample = subject.samples[-1]  # the one that judges, and it has pictures
    with torch.no_grad():
        wanted, mine = (m(**sample).logits[0].log_softmax(-1) for m in (subject.model, plain))
    each = torch.nn.functional.kl_div(mine, wanted, log_target=True, reduction="none").sum(-1)
    text = sample["input_ids"][0] != 60
    assert bool((~text).any())
    assert report.tuning.before == pytest.approx(float(each[text].mean()), rel=1e-4)


def test_tuning_needs_a_language_head(llama):
    options = RunOptions(refine=RefineSettings(1, 1))
    with pytest.raises(CalibrationError, match="refine_steps=0"):
        binarize(llama.model.model, select_linears(llama.model.model, QUICK), llama.samples, options)
