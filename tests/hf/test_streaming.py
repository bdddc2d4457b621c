"""Models whose dense weights stay in their files: the same packed model, one decoder block in memory at a time."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from optimum_sab import AutoModelForVision2Seq
from optimum_sab.calibration.blocks.binarizer import BlockBinarizer
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.stages.blocks import SolveBlocks
from optimum_sab.calibration.stages.comparison import CompareAnswers
from optimum_sab.calibration.stages.resume import OpenResumeFolder
from optimum_sab.calibration.streams import mapped
from optimum_sab.errors import ConfigError, FormatError, SampleError, StreamError
from optimum_sab.hf import streaming
from optimum_sab.nn import scratch, streamed
from optimum_sab.nn.experts import SABExperts
from optimum_sab.nn.scratch import in_scratch
from tests.hf.conftest import save_llama

streams = pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="refused by name there")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The Llama with three blocks, so that one has others on both sides, in several files that tear them apart."""
    folder = save_llama(tmp_path_factory.mktemp("sharded"), blocks=3, max_shard_size="700KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def few(texts):
    return texts[:4]


@pytest.fixture(scope="module")
def plain(sharded, quicker_config, few, tmp_path_factory):
    """What is saved of a run in memory."""
    model = quantize(sharded, quicker_config(calibration=few))
    return saved(model, tmp_path_factory.mktemp("plain"))


@pytest.fixture
def held(monkeypatch):
    """How many blocks' dense weights are there at once, at the most, and how often any were fetched."""
    counts = {"now": 0, "most": 0, "fetched": 0}
    bring, drop, keep = streamed._Stream._bring, streamed._Stream._drop, streamed._Stream.keep

    def brought(self):
        bring(self)
        counts["now"] += 1
        counts["fetched"] += 1
        counts["most"] = max(counts["most"], counts["now"])

    def dropped(self):
        drop(self)
        counts["now"] -= 1

    def kept(self):
        before = self.stays
        keep(self)
        counts["now"] -= not before

    monkeypatch.setattr(streamed._Stream, "_bring", brought)
    monkeypatch.setattr(streamed._Stream, "_drop", dropped)
    monkeypatch.setattr(streamed._Stream, "keep", kept)
    return counts


def quantize(folder, config, kind=AutoModelForCausalLM, **arguments):
    return kind.from_pretrained(folder, quantization_config=config, **{"dtype": torch.float32, **arguments})


def saved(model, folder):
    """What the files of a checkpoint hold, by their names."""
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}


def section(model, name):
    return next(stage.section for stage in model.hf_quantizer.report.stages if stage.name == name)


@streams
@pytest.mark.parametrize(
    ("changes", "room"),
    [
        ({}, {}),
        ({}, {"activation_memory": 0}),
        ({"refine": True, "refine_epochs": 1, "refine_steps": 1, "allocation": "uniform"}, {"activation_memory": 0}),
    ],
    ids=["allocation", "allocation-with-mapped-activations", "refinement-with-mapped-activations"],
)
def test_packed_model_is_the_same_bit_for_bit(sharded, quick_config, few, tmp_path, held, monkeypatch, changes, room):
    given = {"calibration": few, "iterations": 1, "sweeps": 0, **changes}
    plain = saved(quantize(sharded, quick_config(**given)), tmp_path / "plain")
    bounds, bound = [], Run.bound
    monkeypatch.setattr(Run, "bound", lambda self: bounds.append(bound(self)) or bounds[-1])
    monkeypatch.setattr(mapped, "SMALL", 1024)
    model = quantize(sharded, quick_config(**given, stream_weights=True, **room))
    # answers, sensitivities, errors for the allocation, blocks
    assert [each is not None and each.mapped > 0 for each in bounds] == [bool(room)] * (2 if changes else 4)
    assert saved(model, tmp_path / "streamed") == plain
    assert held["now"] == 0 and held["most"] == 1
    # finite, forwards, answers, forth and back, errors, norm, solving of three blocks, and one block that is rehearsed;
    # without an allocation three less
    assert held["fetched"] == 3 * (5 if changes else 8) + 1
    assert not any(each.is_meta for each in (*model.parameters(), *model.buffers()))
    assert not any("forward" in vars(module) or streamed._MARK in vars(module) for module in model.modules())


@streams
def test_experts_that_are_renamed_and_merged_come_block_by_block(mixture, quicker_config, few, tmp_path, held):
    plain = saved(quantize(mixture, quicker_config(calibration=few)), tmp_path / "plain")
    config = quicker_config(calibration=few, stream_weights=True, activation_memory=0)
    found = saved(quantize(mixture, config), tmp_path / "streamed")
    assert found == plain
    assert held["most"] == 1


@streams
def test_stacks_of_experts_lie_in_files_before_and_after_they_compute(mixture, quicker_config, few, monkeypatch):
    own, seen = CompareAnswers.apply, []

    def apply(self, run, on_step):
        found = []
        for computed in (False, True):
            if computed:
                found.append(own(self, run, on_step))
            stacks = [each for each in run.model.modules() if isinstance(each, SABExperts)]
            tensors = [tensor for each in stacks for tensor in each.stacked_tensors()]
            seen.append((len(tensors), all(map(in_scratch, tensors))))
            memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
            views = [parameter for each in stacks for expert in each.experts() for parameter in expert.parameters()]
            assert views and {each.untyped_storage().data_ptr() for each in views} <= memory  # held once
        return found[0]

    monkeypatch.setattr(CompareAnswers, "apply", apply)
    model = quantize(mixture, quicker_config(calibration=few, stream_weights=True))
    assert seen[0] == seen[1] and seen[0][0] > 0 and seen[0][1]
    assert section(model, "comparison")["text"].kl > 0


@streams
@pytest.mark.full
def test_vision_language_model_with_pictures_is_the_same(example, quicker_config, tmp_path):
    found = {}
    for stream in (False, True):
        config = quicker_config(calibration_samples=6, stream_weights=stream)
        found[stream] = saved(quantize(example, config, AutoModelForVision2Seq), tmp_path / str(stream))
    assert found[False] == found[True]


@streams
def test_a_block_that_stays_dense_stays_and_the_report_says_what_is_left_out(
    sharded, quicker_config, few, tmp_path, held
):
    given = {"calibration": few, "modules_to_not_convert": ["layers.1"]}
    wanted = saved(quantize(sharded, quicker_config(**given)), tmp_path / "plain")
    model = quantize(sharded, quicker_config(**given, examples=True, stream_weights=True))
    assert saved(model, tmp_path / "streamed") == wanted
    assert held["now"] == 0
    assert "every token" in section(model, "dense examples")
    assert section(model, "comparison")["text"].kl > 0


class StoppedError(Exception):
    pass


@streams
@pytest.mark.parametrize(
    "first",
    [pytest.param(True, id="streamed-first"), pytest.param(False, id="in-memory-first", marks=pytest.mark.full)],
)
def test_an_interrupted_run_is_gone_on_with_to_the_same_bytes(
    sharded, quicker_config, few, plain, tmp_path, monkeypatch, first
):
    given = {"calibration": few, "resume_folder": tmp_path / "run"}
    leave = BlockBinarizer.leave

    def stopping(self, index, drift):
        leave(self, index, drift)
        if index == 1:
            raise StoppedError

    monkeypatch.setattr(BlockBinarizer, "leave", stopping)
    with pytest.raises(StoppedError):
        quantize(sharded, quicker_config(**given, stream_weights=first))
    monkeypatch.setattr(BlockBinarizer, "leave", leave)
    known = []
    asked = BlockBinarizer.known
    monkeypatch.setattr(BlockBinarizer, "known", lambda self, index: known.append(asked(self, index)) or known[-1])
    resumed = saved(quantize(sharded, quicker_config(**given, stream_weights=True)), tmp_path / "resumed")
    assert any(known) and not all(known)
    assert resumed == plain


# -- memory -----------------------------------------------------------------------------------------------------------

GROWTH = """
import ctypes, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from optimum_sab import SABConfig
from optimum_sab.calibration.blocks.binarizer import BlockBinarizer
from optimum_sab.calibration.samples import inputs
from optimum_sab.nn import scratch

torch.set_num_threads(1)
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of malloc.h: what is freed does not count
assert ctypes.CDLL(None).mallopt(TRIM_THRESHOLD, 1 << 17) and ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)
inputs.unseen_texts = lambda: ["few words"] * 2  # nobody reads how far the model is from the dense one

def own():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024

ends, leave = [], BlockBinarizer.leave
def told(self, *arguments):
    leave(self, *arguments)
    ends.append(own())
BlockBinarizer.leave = told
config = SABConfig(stream_weights=True, allocation="uniform", temperature_scaling=False, iterations=1, sweeps=0,
                   examples=False, progress="none", modules_to_not_convert=["mlp"], calibration=["few words"] * 2)
with scratch.staying_shared():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
    finished = own()
    model.save_pretrained(sys.argv[2])
whole = sum(each.nbytes for each in (*model.parameters(), *model.buffers())) / 2**20
print(*ends, finished, own(), whole)
"""


@streams
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell what is resident")
def test_memory_does_not_grow_with_the_model(warm, llama_folder, tmp_path):
    """Most weights stay dense here, so what a block leaves is large and made in no time."""
    blocks, folder = 6, tmp_path / "dense"
    shape = {"hidden_size": 128, "intermediate_size": 8192, "num_hidden_layers": blocks, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", **shape, vocab_size=16384, num_key_value_heads=2, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(folder)
    command = [warm / "python", "-c", GROWTH, str(folder), str(tmp_path / "packed")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *ends, finished, saved_at, whole = map(float, done.stdout.splitlines()[-1].split())
    assert len(ends) == blocks and whole > 70
    block = 3 * 128 * 8192 * 4 / 2**20
    assert max(ends) - ends[0] < block + 12  # one may be there; all would be six
    assert finished - ends[0] < 20 and saved_at - ends[0] < 20


@streams
def test_all_of_a_model_that_is_only_saved_lies_in_files(sharded, quicker_config, few, tmp_path):
    given = {"calibration": few, "modules_to_not_convert": ["layers.1"]}
    with scratch.staying_shared():
        model = quantize(sharded, quicker_config(**given, stream_weights=True))
        assert all(map(in_scratch, model.parameters()))
        found = saved(model, tmp_path / "streamed")
    assert found == saved(quantize(sharded, quicker_config(**given)), tmp_path / "in-memory")


@streams
def test_the_model_is_an_ordinary_one_afterwards(sharded, quicker_config, few, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = quantize(sharded, quicker_config(calibration=few, stream_weights=True))
    assert not any(map(in_scratch, (*model.parameters(), *model.buffers()))) and not list(tmp_path.iterdir())
    ids = {"input_ids": torch.arange(5, 15)[None]}
    with torch.no_grad():
        wanted = model(**ids).logits
        for again in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            model.to(torch.float64).to(torch.float32),
        ):
            assert torch.equal(again(**ids).logits, wanted)
    assert saved(model, tmp_path / "streamed") == plain


def full_from(monkeypatch, block):
    """The disk has room for what is outside of the blocks, and for so many of these."""
    reserve, count = scratch.reserve, []

    def reserved(handle, size):
        count.append(size)
        if len(count) > 1 + block:
            raise OSError(28, "No space left on device")
        reserve(handle, size)

    monkeypatch.setattr(scratch, "reserve", reserved)
    return count


@streams
def test_a_disk_that_fills_up_is_named_and_finished_blocks_are_kept(
    sharded, quicker_config, few, plain, tmp_path, monkeypatch
):
    config = quicker_config(calibration=few, stream_weights=True, resume_folder=tmp_path / "run")
    with monkeypatch.context() as patch:
        full_from(patch, 1)
        with pytest.raises(StreamError, match=r"No space left.*resume_folder"):
            quantize(sharded, config)
    kept = sorted(each.name for each in (tmp_path / "run").iterdir())
    assert kept == ["block-00000.safetensors", "block-00001.safetensors", "fingerprint.json"]
    assert saved(quantize(sharded, config), tmp_path / "resumed") == plain


@streams
def test_a_disk_that_is_full_before_the_work_is_named(sharded, quicker_config, few, monkeypatch):
    full_from(monkeypatch, -1)
    with pytest.raises(StreamError, match=r"weights do not find room.*TMPDIR"):
        quantize(sharded, quicker_config(calibration=few, stream_weights=True))


# -- what is refused ---------------------------------------------------------------------------------------------------


@streams
@pytest.mark.parametrize("places", ["auto", {"model.layers.0": "cpu", "": "meta"}])
def test_a_device_map_over_several_places_is_refused(sharded, quicker_config, few, places):
    with pytest.raises(ConfigError, match="device_map"):
        quantize(sharded, quicker_config(calibration=few, stream_weights=True), device_map=places)


@streams
def test_weights_of_another_format_are_refused_by_name(llama_folder, quicker_config, few, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(llama_folder, folder)
    model = LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is none.*save_pretrained"):
        quantize(folder, quicker_config(calibration=few, stream_weights=True))


@streams
def test_weights_that_are_given_in_memory_are_refused(sharded, quicker_config, few):
    model = LlamaForCausalLM.from_pretrained(sharded, dtype=torch.float32)
    config = quicker_config(calibration=few, stream_weights=True)
    with pytest.raises(ConfigError, match="state_dict"):
        LlamaForCausalLM.from_pretrained(
            None, config=model.config, state_dict=model.state_dict(), quantization_config=config
        )


def test_samples_that_the_model_writes_are_refused(quicker_config):
    with pytest.raises(ConfigError, match="every token"):
        quicker_config(calibration="self", stream_weights=True)


@streams
def test_blocks_that_share_weights_are_refused(sharded, quicker_config, few, monkeypatch):
    tied = {"model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"}
    monkeypatch.setattr(LlamaForCausalLM, "get_expanded_tied_weights_keys", lambda self, all_submodels=False: tied)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight .* is shared with"):
        quantize(sharded, quicker_config(calibration=few, stream_weights=True))


@streams
@pytest.mark.parametrize("stage", [SolveBlocks, OpenResumeFolder], ids=["while-solving", "before"])
@pytest.mark.parametrize("damage", ["changed", "gone", "cut"])
def test_files_that_change_during_the_run_end_it_by_name(
    sharded, quicker_config, few, tmp_path, monkeypatch, stage, damage
):
    folder = tmp_path / "moving"
    shutil.copytree(sharded, folder)
    file = Path(
        folder,
        json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][
            "model.layers.2.mlp.up_proj.weight"
        ],
    )
    apply = stage.apply

    def moved(self, run, on_step):
        if damage == "changed":
            os.utime(file, ns=(1, 1))
        elif damage == "gone":
            file.unlink()
        else:
            os.truncate(file, file.stat().st_size // 2)
        return apply(self, run, on_step)

    monkeypatch.setattr(stage, "apply", moved)
    config = quicker_config(calibration=few, stream_weights=True, resume_folder=tmp_path / "run")
    with pytest.raises(StreamError, match=rf"{file.name}.*resume_folder"):
        quantize(folder, config)


@streams
def test_a_shard_that_goes_between_two_blocks_ends_the_run_and_what_is_finished_is_gone_on_with(
    sharded, quicker_config, few, plain, tmp_path, monkeypatch
):
    folder = tmp_path / "moving"
    shutil.copytree(sharded, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index["model.layers.2.mlp.up_proj.weight"]
    leave = BlockBinarizer.leave

    def moved(self, index, drift):
        leave(self, index, drift)
        if index == 1:
            file.rename(tmp_path / "away")

    config = quicker_config(calibration=few, stream_weights=True, resume_folder=tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(BlockBinarizer, "leave", moved)
        with pytest.raises(StreamError, match=rf"{file.name}.*resume_folder"):
            quantize(folder, config)
    assert len(list((tmp_path / "run").glob("block-*"))) == 2
    (tmp_path / "away").rename(file)
    assert saved(quantize(folder, config), tmp_path / "resumed") == plain


@streams
def test_a_missing_shard_is_named_before_a_weight_is_read(sharded, quicker_config, few, tmp_path):
    folder = tmp_path / "incomplete"
    shutil.copytree(sharded, folder)
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises((FormatError, SampleError), match=file.name):
        quantize(folder, quicker_config(calibration=few, stream_weights=True))


def test_a_line_of_transformers_without_conversions_is_refused(monkeypatch):
    monkeypatch.setattr(streaming, "RENAMES", False)
    with pytest.raises(ConfigError, match="needs Transformers 5"):
        streaming.check_streaming({}, None)
