"""Everything of a model is read from where the model is: the same revision, with the same arguments."""

import json
import shutil
import warnings

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from optimum_sab import AutoModelForVision2Seq
from optimum_sab.cli.main import main
from optimum_sab.errors import CalibrationError, ConfigError, MissingDependencyError, SampleError
from optimum_sab.hf.find_processor import ReadSamplesEarly
from optimum_sab.hf.origin import Origin, origin_of
from optimum_sab.hf.processor import PictureProcessor, find_processor, load_processor
from optimum_sab.hf.quantizer import SABHfQuantizer

OLD, NEW = "a" * 40, "b" * 40
CLASSES = (LlamaForCausalLM, AutoModelForCausalLM)


class WeightsWereReadError(Exception):
    """Carries what was found before."""


@pytest.fixture
def stopped(monkeypatch):
    """Loading stops where binarizing begins; the error carries the stages with what they found, and the origin."""
    seen = {}
    before = SABHfQuantizer._process_model_before_weight_loading

    def look(self, model, **kwargs):
        seen["origin"] = origin_of(model)
        return before(self, model, **kwargs)

    def stop(self, model, **kwargs):
        raise WeightsWereReadError(seen["origin"], self._stages)

    monkeypatch.setattr(SABHfQuantizer, "_process_model_before_weight_loading", look)
    monkeypatch.setattr(SABHfQuantizer, "_process_model_after_weight_loading", stop)

    def load(factory, *args, **kwargs):
        with pytest.raises(WeightsWereReadError) as stop:
            factory.from_pretrained(*args, **kwargs)
        return stop.value.args

    return load


@pytest.fixture(scope="module")
def hub(llama_folder, tmp_path_factory):
    """A cache with two revisions of a model, whose tokenizers say which they are of; one in a subfolder, too."""
    cache = tmp_path_factory.mktemp("hub")
    for name, within in (("someone/lm", ""), ("someone/parts", "language")):
        repository = cache / ("models--" + name.replace("/", "--"))
        (repository / "refs").mkdir(parents=True)
        for reference, commit in (("old", OLD), ("main", NEW)):
            (repository / "refs" / reference).write_text(commit)
            snapshot = repository / "snapshots" / commit / within
            shutil.copytree(llama_folder, snapshot)
            settings = json.loads((snapshot / "tokenizer_config.json").read_text())
            (snapshot / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": reference}))
    return cache


@pytest.mark.compat
@pytest.mark.parametrize("factory", CLASSES)
@pytest.mark.parametrize(("revision", "commit"), [("old", OLD), (OLD, OLD), (None, NEW)])
def test_the_processor_is_of_the_models_revision(hub, stopped, quick_config, texts, factory, revision, commit):
    given = {} if revision is None else {"revision": revision}
    origin, stages = stopped(
        factory, "someone/lm", cache_dir=hub, quantization_config=quick_config(calibration=texts), **given
    )
    assert (origin.name, origin.place["revision"]) == ("someone/lm", commit)
    assert [str(hub) in file and commit in file for file in origin.files] == [True]
    assert stages[0]._found.pad_token == {OLD: "old", NEW: "main"}[commit]


@pytest.mark.compat
@pytest.mark.parametrize("factory", CLASSES)
def test_all_that_leads_to_the_model_leads_to_its_processor(hub, stopped, quick_config, texts, factory, monkeypatch):
    called = {}

    def from_pretrained(name, **arguments):
        called.update(name=name, **arguments)
        raise OSError("seen")

    monkeypatch.setattr("optimum_sab.hf.processor.AutoTokenizer.from_pretrained", from_pretrained)
    access = {"cache_dir": hub, "token": "hf_secret", "local_files_only": True, "trust_remote_code": True}
    with pytest.raises(SampleError, match=r"'someone/parts', revision='a{40}', subfolder='language'") as error:
        factory.from_pretrained(
            "someone/parts",
            revision="old",
            subfolder="language",
            quantization_config=quick_config(calibration=texts),
            **access,
        )
    assert called == {"name": "someone/parts", "revision": OLD, "subfolder": "language", **access}
    assert "hf_secret" not in str(error.value)


@pytest.mark.compat
@pytest.mark.parametrize("factory", CLASSES)
def test_code_of_others_is_not_trusted_unless_the_caller_did(hub, stopped, quick_config, texts, factory):
    origin, stages = stopped(
        factory,
        "someone/parts",
        subfolder="language",
        cache_dir=hub,
        quantization_config=quick_config(calibration=texts),
    )
    assert not {"trust_remote_code", "token"} & set(origin.arguments)
    assert stages[0]._found.pad_token == "main"


def test_another_repository_is_reached_the_same_way_but_at_its_own_place():
    origin = Origin.of("a/b", {"revision": "old", "subfolder": "c", "token": "hf_secret", "proxies": None})
    assert origin.arguments == {"revision": "old", "subfolder": "c", "token": "hf_secret"}
    assert origin.at("a/b") is origin
    assert origin.at("d/e") == Origin("d/e", access={"token": "hf_secret"})
    assert "hf_secret" not in repr(origin)


def test_a_loaded_model_says_its_name(llama_folder):
    model = LlamaForCausalLM.from_pretrained(llama_folder)
    assert origin_of(model) == Origin(str(llama_folder))
    assert origin_of(torch.nn.Linear(2, 2)).name == ""


def test_command_line_passes_on_what_leads_to_the_model(hub, stopped, tmp_path):
    options = ["--revision", "old", "--subfolder", "language", "--cache-dir", str(hub), "--local-files-only"]
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "The red boat left the harbour."}\n')
    with pytest.raises(WeightsWereReadError) as stop:
        main(["quantize", "someone/parts", "--output", str(tmp_path / "out"), "--calibration", str(data), *options])
    origin, stages = stop.value.args
    assert origin.place == {"revision": OLD, "subfolder": "language"}
    assert stages[0]._found.pad_token == "old"


def test_command_line_takes_another_processor(llama_folder, stopped, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(llama_folder, other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "other"}))
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "The red boat left the harbour."}\n')
    arguments = ["quantize", str(llama_folder), "--output", str(tmp_path / "out"), "--calibration", str(data)]
    with pytest.raises(WeightsWereReadError) as stop:
        main([*arguments, "--processor", str(other)])
    assert stop.value.args[1][0]._found.pad_token == "other"
    assert main([*arguments, "--processor", str(tmp_path / "gone")]) == 1


# -- before weights are read -------------------------------------------------------------------------------------------


def reader(stages):
    """The stage that has read the samples."""
    [found] = [stage for stage in stages if isinstance(stage, ReadSamplesEarly)]
    return found


@pytest.mark.compat
def test_samples_are_read_and_encoded_before_a_weight_is(llama_folder, stopped, quick_config, texts):
    """Transformers 5 builds models where tensors are on meta and in the model's dtype; samples are not made there."""
    _, stages = stopped(
        AutoModelForCausalLM,
        llama_folder,
        dtype=torch.bfloat16,
        quantization_config=quick_config(calibration=iter(texts), calibration_samples=3),
    )
    inputs = reader(stages)._inputs
    expected = stages[0]._found(texts[:3])["input_ids"]
    assert [sample["input_ids"].tolist() for sample in inputs] == [[ids[:64]] for ids in expected]
    assert {sample["input_ids"].device.type for sample in inputs} == {"cpu"}


def test_pictures_are_prepared_in_their_own_dtype(example, stopped, quick_config):
    _, stages = stopped(
        AutoModelForVision2Seq,
        example,
        dtype=torch.bfloat16,
        quantization_config=quick_config(calibration_samples=1),
    )
    [inputs] = reader(stages)._inputs
    assert inputs["pixel_values"].dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (["fine", [{"role": "user", "content": [{"type": "image"}]}]], "calibration sample 1"),
        (["fine", {"text": "a", "image": "gone.png"}], "calibration sample 1: the picture 'gone.png' does not exist"),
        ("gone.jsonl", "'gone.jsonl' does not exist"),
        ([], "no calibration samples"),
        (
            [{"input_ids": [5, 2000]}],
            "calibration sample 0 has the token 2000, and the model's vocabulary 1024 entries",
        ),
    ],
)
def test_bad_samples_are_refused_before_a_weight_is_read(llama_folder, stopped, quick_config, calibration, message):
    with pytest.raises(SampleError, match=message):
        AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=quick_config(calibration=calibration))


def test_two_loads_with_one_generator_are_calibrated_alike(llama_folder, stopped, quick_config, texts):
    config = quick_config(calibration=(text for text in texts))
    first, second = (reader(stopped(LlamaForCausalLM, llama_folder, quantization_config=config)[1]) for _ in range(2))
    assert len(first._inputs) == len(second._inputs) == 8
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first._inputs, second._inputs, strict=True))


# -- torchvision -------------------------------------------------------------------------------------------------------


def of_another_family(folder, source):
    """The example's files as those of a Qwen2-VL checkpoint, whose processor needs torchvision too."""
    shutil.copytree(source, folder)
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("Qwen2_5_VL", "Qwen2VL").replace("qwen2_5_vl", "qwen2_vl"))
    return folder


def test_a_torchvision_that_does_not_fit_torch_is_told_by_its_cause(example, monkeypatch):
    def broken(*args, **kwargs):
        raise ModuleNotFoundError("Could not import module 'X'.") from RuntimeError(
            "operator torchvision::nms does not"
        )

    monkeypatch.setattr("optimum_sab.hf.processor.AutoProcessor.from_pretrained", broken)
    monkeypatch.setattr("optimum_sab.hf.processor.is_torchvision_available", lambda: True)
    with pytest.raises(MissingDependencyError, match=r"broken: operator torchvision::nms .*belongs to the installed"):
        load_processor(example)


@pytest.mark.compat
def test_without_torchvision_only_its_own_family_gets_the_processor_without_videos(example, tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_sab.hf.processor.is_torchvision_available", lambda: False)

    def missing(*args, **kwargs):
        raise ImportError("needs the Torchvision library: pip install torchvision")

    monkeypatch.setattr("optimum_sab.hf.processor.AutoProcessor.from_pretrained", missing)
    other = of_another_family(tmp_path / "other", example)
    for visual_call in (lambda: load_processor(other), lambda: find_processor(None, Origin(str(other)), True)):
        with pytest.raises(MissingDependencyError, match=r"other' needs a package .*pip install torchvision"):
            visual_call()
    assert isinstance(load_processor(example), PictureProcessor)
    (tmp_path / "alone").mkdir()
    load_processor(example).save_pretrained(tmp_path / "alone")
    assert isinstance(load_processor(tmp_path / "alone"), PictureProcessor)
    config = tmp_path / "alone" / "config.json"  # another architecture's, with this processor, as the mixture has it
    config.write_text((example / "config.json").read_text().replace("qwen2_5_vl", "qwen3_vl_moe"))
    assert isinstance(load_processor(tmp_path / "alone"), PictureProcessor)


@pytest.mark.compat
def test_a_limit_of_pixels_holds_without_a_warning_and_is_saved(example, tmp_path):
    def tokens(processor):
        inputs = processor(text=["<|image_pad|>"], images=[Image.new("RGB", (300, 200))], return_tensors="pt")
        return int(inputs["image_grid_thw"].prod()) // 4

    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        small = load_processor(example, max_pixels=8 * 28 * 28)
        assert tokens(small) == 2 * 3 < tokens(load_processor(example)) == 3 * 4
        small.save_pretrained(tmp_path)
        assert tokens(load_processor(tmp_path)) == 2 * 3
    assert "max_pixels" not in (tmp_path / "tokenizer_config.json").read_text()


def test_what_is_missing_beside_torchvision_is_named(example, monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("requires the sentencepiece library")

    for name in ("AutoProcessor", "AutoTokenizer"):
        monkeypatch.setattr(f"optimum_sab.hf.processor.{name}.from_pretrained", missing)
    for visual, kind in ((True, MissingDependencyError), (False, SampleError)):
        with pytest.raises(kind, match="requires the sentencepiece library"):
            find_processor(None, Origin(str(example)), visual)


def test_a_model_that_cannot_write_its_samples_is_refused_before_a_weight_is_read(llama_folder, stopped, quick_config):
    config = quick_config(calibration="self", temperature_scaling=False)
    with pytest.raises(CalibrationError, match="LlamaModel cannot generate, so it cannot write its own calibration"):
        AutoModel.from_pretrained(llama_folder, quantization_config=config)
    _, stages = stopped(AutoModelForCausalLM, llama_folder, quantization_config=config)
    assert reader(stages)._inputs is None


@pytest.mark.compat
def test_a_size_that_does_nothing_is_refused(example):
    given = {"shortest_edge": 3136, "longest_edge": 8 * 28 * 28}
    with pytest.raises(ConfigError, match=r"'longest_edge': 6272\} does nothing .* with 12544; give max_pixels=6272"):
        load_processor(example, size=given)
    load_processor(example, size={"shortest_edge": 3136, "longest_edge": 12544})  # what the file says
