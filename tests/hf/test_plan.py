"""A plan from a model on meta says what the run then does, and what cannot fit is refused with it."""

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, ResNetConfig, ResNetModel

from optimum_sab import AutoModelForVision2Seq
from optimum_sab.calibration.plan.duration import stage_times
from optimum_sab.calibration.plan.expectation import Fit
from optimum_sab.calibration.plan.fit import refuse_what_cannot_fit
from optimum_sab.calibration.plan.limits import Room
from optimum_sab.calibration.plan.memory import ACCELERATOR, MACHINE, memory_of
from optimum_sab.errors import ConfigError, MissingDependencyError, SABWarning, SampleError
from optimum_sab.hf import hold_to_plan
from optimum_sab.hf import workload as hf_workload
from optimum_sab.hf.plan import EMBEDDINGS, KEPT, SENSES, VECTORS, PlannedModel, make_plan
from optimum_sab.hf.processor import load_processor
from optimum_sab.nn import streamed

streams = pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="refused by name there")


def planned(folder, config, dtype=torch.float32, kind=AutoModelForCausalLM, timing=False):
    """The plan of a folder's model."""
    source = AutoConfig.from_pretrained(folder)
    pictures = kind is AutoModelForVision2Seq
    processor = load_processor(folder) if pictures else AutoTokenizer.from_pretrained(folder)
    files = sorted(map(str, Path(folder).glob("*.safetensors")))
    return make_plan(PlannedModel(kind, source, dtype, files), config, processor, timing)


def test_plan_of_the_example_is_what_was_made_of_it(example, example_packed, quick_config):
    model, folder = example_packed
    plan = planned(example, quick_config(), kind=AutoModelForVision2Seq)
    report = model.hf_quantizer.report
    assert plan.output == pytest.approx((folder / "model.safetensors").stat().st_size, rel=0.02)
    assert plan.work.samples.total == sum(report.tokens.values())
    assert plan.work.samples.exact
    assert plan.linears == sum(len(block.layers) for block in report.blocks)
    # a choice by sensitivity spends what the settings would, or a little less
    assert 0.97 * plan.bits_per_weight < report.bits_per_weight <= plan.bits_per_weight + 1e-6


def test_every_weight_is_binarized_or_dense_for_a_reason(example, quick_config):
    plan = planned(example, quick_config(modules_to_not_convert=["layers.0"]), kind=AutoModelForVision2Seq)
    whole = sum(each.numel() for each in AutoModelForVision2Seq.from_pretrained(example).parameters())
    binarized = sum(block.binarized for block in plan.work.model.blocks)
    assert sum(plan.dense.values()) + binarized == whole
    assert set(plan.dense) == {EMBEDDINGS, SENSES, KEPT, VECTORS}
    assert plan.share == binarized / sum(block.weights for block in plan.work.model.blocks)
    assert 0.4 < plan.share < 0.6  # one of two blocks


def test_linears_that_share_an_input_are_one_group(llama_folder, quick_config):
    plan = planned(llama_folder, quick_config())
    groups = plan.work.model.blocks[0].groups
    assert [(g.members, g.out_features, g.in_features, g.at_residual) for g in groups] == [
        (3, 144 + 2 * 72, 144, False),
        (1, 144, 144, True),
        (2, 400, 144, False),
        (1, 144, 200, True),
    ]


def test_samples_that_are_not_here_are_bounded_by_the_settings(llama_folder, quick_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", ModuleType("datasets"))
    for calibration in ("self", "somebody/dataset"):
        plan = planned(llama_folder, quick_config(calibration=calibration, calibration_samples=7, sequence_length=40))
        assert not plan.work.samples.exact
        assert plan.work.samples.total == 7 * 40
        assert "upper bound" in plan.tokens_from


def test_a_dataset_that_no_package_here_reads_is_an_error(llama_folder, quick_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="the datasets package is missing: pip install datasets"):
        planned(llama_folder, quick_config(calibration="somebody/dataset"))


def test_weights_of_another_dtype_are_copied(llama_folder, quick_config, texts):
    config = quick_config(calibration=texts[:2])
    assert planned(llama_folder, config, torch.float32).work.model.copied == 0.0
    assert planned(llama_folder, config, torch.bfloat16).work.model.copied == 1.0


def test_times_are_of_the_stages_of_a_run(llama_folder, quick_config, texts):
    config = quick_config(calibration=texts[:4], examples=True)
    plan = planned(llama_folder, config, timing=True)
    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32, quantization_config=config)
    names = {stage.name for stage in model.hf_quantizer.report.stages}
    told = [each.name for each in plan.times]
    assert set(told) - {"loading", "saving"} <= names
    assert {"sensitivities", "allocation", "blocks", "temperature", "comparison"} <= set(told)
    assert plan.seconds == pytest.approx(sum(each.seconds for each in plan.times))
    assert plan.speeds.seconds < 60
    # twice the tokens take longer, and nothing else has changed
    longer = replace(plan.work, samples=replace(plan.work.samples, tokens=plan.work.samples.tokens * 2))
    both = plan.times, stage_times(longer, plan.speeds)
    before, after = (next(each.seconds for each in times if each.name == "blocks") for times in both)
    assert before < after < 2.1 * before


@streams
def test_reads_are_counted_as_they_are_done(llama_folder, quick_config, texts, tmp_path, monkeypatch):
    fetched = []
    bring = streamed._Stream._bring
    monkeypatch.setattr(streamed._Stream, "_bring", lambda self: (fetched.append(1), bring(self)))
    config = quick_config(calibration=texts[:4], stream_weights=True, resume_folder=tmp_path / "unfinished")
    plan = planned(llama_folder, config)
    assert plan.work.streamed
    AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32, quantization_config=config)
    blocks = len(plan.work.model.blocks)
    assert len(fetched) == blocks * sum(each.times for each in plan.reads) + 1  # a block is rehearsed


@pytest.fixture
def small_machine(monkeypatch):
    """Makes this machine one of so many bytes, and reading weights an error."""

    def make(total):
        monkeypatch.setattr(hf_workload, "machine_room", lambda: Room(total, total // 2, "memory"))
        monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", refuse)

    def refuse(*arguments, **options):
        raise AssertionError("weights were read")

    return make


def load(folder, config, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


@streams
def test_what_cannot_fit_is_refused_before_a_weight_is_read(llama_folder, quick_config, texts, small_machine):
    config = quick_config(calibration=texts[:2])
    plan = planned(llama_folder, config, torch.bfloat16)  # another dtype: copied, so it must all be there
    needed = plan.memory[0].certain.certain
    small_machine(needed - 1)
    with pytest.raises(
        ConfigError, match=r"at least .* MB of the machine's memory .* With stream_weights=True it is at least"
    ):
        load(llama_folder, config, torch.bfloat16)
    with pytest.raises(AssertionError, match="weights were read"):
        load(llama_folder, quick_config(calibration=texts[:2], stream_weights=True), torch.bfloat16)
    small_machine(needed)
    with pytest.raises(AssertionError, match="weights were read"):
        load(llama_folder, config, torch.bfloat16)


@pytest.fixture
def crowded(monkeypatch):
    """Makes so many bytes of this machine's memory free."""

    def make(free):
        monkeypatch.setattr(hf_workload, "machine_room", lambda: Room(2**45, free, "memory"))

    return make


def test_what_is_not_free_is_warned_of_before_a_weight_is_read(llama_folder, quick_config, texts, crowded, unread):
    config = quick_config(calibration=texts[:2])
    plan = planned(llama_folder, config)
    (memory,) = memory_of(plan.work)
    assert plan.warnings[-1:] == () or "expected to take" not in plan.warnings[-1]
    crowded(memory.peak.bytes - 1)
    message = planned(llama_folder, config).warnings[-1]
    assert message.startswith("quantizing is expected to take") and "weights that are mapped" in message
    with pytest.warns(SABWarning, match="quantizing is expected to take .* of the machine's memory in the stage"):
        with pytest.raises(AssertionError, match="weights were read"):
            load(llama_folder, config)


@streams
def test_streaming_is_named_only_where_it_would_be_taken(llama_folder, quick_config, monkeypatch, tmp_path):
    def streamable(device_map=None, files=None):
        found = sorted(map(str, Path(llama_folder).glob("*.safetensors"))) if files is None else files
        source = AutoConfig.from_pretrained(llama_folder)
        model = PlannedModel(AutoModelForCausalLM, source, torch.float32, found, device_map)
        return make_plan(model, quick_config(), AutoTokenizer.from_pretrained(llama_folder), False).work.streamable

    assert streamable() and streamable("cpu")
    assert not streamable("auto")
    assert not streamable(files=[str(tmp_path / "pytorch_model.bin")])
    monkeypatch.setattr(hf_workload, "_free", lambda folder: 1000)
    assert not streamable()


def test_a_processor_that_cannot_read_our_texts_stops_no_plan(llama_folder, quick_config, texts, unread):
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)

    class Particular(type(tokenizer)):
        def __call__(self, text, *arguments, **options):
            if text not in texts:
                raise KeyError(text)
            return super().__call__(text, *arguments, **options)

    tokenizer.__class__ = Particular
    config = quick_config(calibration=texts[:2], processor=tokenizer)
    with pytest.raises(AssertionError, match="weights were read"):  # and no KeyError before
        load(llama_folder, config)
    source = AutoConfig.from_pretrained(llama_folder)
    plan = make_plan(PlannedModel(AutoModelForCausalLM, source, torch.float32), config, tokenizer, False)
    assert plan.work.samples.unseen == ()


def test_processes_on_this_machine_share_what_is_free(llama_folder, quick_config, texts, crowded, unread, monkeypatch):
    config = quick_config(calibration=texts[:4])
    (memory,) = memory_of(planned(llama_folder, config).work)
    crowded(2 * memory.peak.bytes)
    monkeypatch.setattr(hold_to_plan, "launched", lambda: (0, 4))
    for local, warned in (("1", 0), ("4", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(AssertionError, match="weights were read"):
                load(llama_folder, config)
        assert sum("expected to take" in str(each.message) for each in caught) == warned


def test_the_report_keeps_what_was_warned_of_memory_once(llama_folder, quicker_config, texts, crowded):
    crowded(10**6)
    model = load(llama_folder, quicker_config(calibration=texts[:2]))
    said = [each for each in model.hf_quantizer.report.warnings if "expected to take" in each]
    assert len(said) == 1 and "it takes a machine with more memory" in said[0]


def test_ignore_plan_begins_all_the_same(llama_folder, quick_config, texts, small_machine):
    small_machine(1)
    with pytest.raises(ConfigError, match="ignore_plan=True"):
        load(llama_folder, quick_config(calibration=texts[:2]))
    with pytest.raises(AssertionError, match="weights were read"):
        load(llama_folder, quick_config(calibration=texts[:2], ignore_plan=True))


def test_a_resume_folder_without_room_is_refused(llama_folder, quick_config, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_workload, "_free", lambda folder: 1000)
    config = quick_config(calibration=texts[:2], resume_folder=tmp_path / "unfinished")
    with pytest.raises(
        ConfigError, match=r"finished blocks take at least .*unfinished', whose disk has .*resume_folder"
    ):
        load(llama_folder, config)


def test_ignore_plan_is_not_stored(llama_folder, quicker_config, texts, tmp_path):
    model = load(llama_folder, quicker_config(calibration=texts[:2], ignore_plan=True))
    model.save_pretrained(tmp_path)
    assert "ignore_plan" not in (tmp_path / "config.json").read_text()


def test_what_may_be_spread_over_devices_is_not_refused(llama_folder, quick_config, monkeypatch):
    plan = planned(llama_folder, quick_config())
    room = Room(1, 1, "cuda")
    monkeypatch.setattr(hf_workload, "accelerator_room", lambda device: room)
    monkeypatch.setattr(hf_workload, "is_here", lambda device: True)
    one = hf_workload.rooms_of(replace(plan.work, main=torch.device("cuda")))
    several = hf_workload.rooms_of(replace(plan.work, main=torch.device("cuda"), spread=True))
    assert one[ACCELERATOR] == room and several[ACCELERATOR].total is several[ACCELERATOR].free is None
    with pytest.raises(ConfigError, match=r"accelerator's memory.*it takes a device with more memory"):
        refuse_what_cannot_fit(replace(plan.work, main=torch.device("cuda")), one)
    refuse_what_cannot_fit(replace(plan.work, main=torch.device("cuda"), spread=True), several)


@pytest.mark.skipif(torch.cuda.is_available(), reason="such a device is here")
def test_a_device_of_another_machine_is_planned_and_not_measured(llama_folder, quick_config, texts):
    config = quick_config(calibration=texts[:2], calibration_device="cuda")
    plan = planned(llama_folder, config, timing=True)
    assert [each.device for each in plan.memory] == [MACHINE, ACCELERATOR]
    there = plan.memory[1]
    assert there.peak.bytes >= plan.work.model.largest_block
    assert plan.fits[ACCELERATOR] is Fit.UNKNOWN and plan.rooms[ACCELERATOR].total is None
    assert plan.speeds is None and plan.times == ()
    assert [each for each in plan.warnings if each.startswith("this machine has no cuda: the plan is for another")]
    refuse_what_cannot_fit(plan.work, plan.rooms, plan.disks)
    with pytest.raises(ConfigError, match="calibration_device='cuda' cannot be used here"):
        load(llama_folder, config)
    with pytest.raises(ConfigError, match="calibration_device='gpu' cannot be used here"):
        planned(llama_folder, quick_config(calibration=texts[:2], calibration_device="gpu"))


def test_how_many_samples_are_read_is_told(llama_folder, quick_config, texts):
    told = []
    source, processor = AutoConfig.from_pretrained(llama_folder), AutoTokenizer.from_pretrained(llama_folder)
    model = PlannedModel(AutoModelForCausalLM, source, torch.float32)
    make_plan(model, quick_config(calibration=texts[:3], calibration_samples=9), processor, False, _noting(told))
    assert told == [(1, 9), (2, 9), (3, 9), (3, 3)]


def _noting(told):
    return lambda done, total: told.append((done, total))


def test_samples_that_cannot_be_read_are_an_error(llama_folder, quick_config):
    with pytest.raises(SampleError, match="does not exist"):
        planned(llama_folder, quick_config(calibration="./nothing.jsonl"))


@streams
def test_experts_are_counted_one_by_one(mixture, quick_config, texts):
    plan = planned(mixture, quick_config(calibration=texts[:2]))
    experts = [group for group in plan.work.model.blocks[0].groups if group.expert]
    assert len(experts) == 4 * 2
    assert {group.share for group in experts} == {0.5}
    assert 0 < plan.work.model.copied < 1  # they are merged when they are read
    assert KEPT in plan.dense  # the router
    block = plan.work.model.blocks[0]
    assert block.computed == block.weights - sum(group.weights for group in experts) / 2


def test_a_model_without_a_decoder_is_refused_by_name(quick_config):
    class Factory:
        from_config = staticmethod(ResNetModel)

    with pytest.raises(ConfigError, match="no list of decoder blocks"):
        make_plan(
            PlannedModel(Factory, ResNetConfig(depths=[1], hidden_sizes=[8]), torch.float32), quick_config(), None
        )
