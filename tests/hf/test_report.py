"""The report of a model that `from_pretrained` has made."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import optimum_sab
from optimum_sab import AutoModelForVision2Seq
from optimum_sab.errors import OutputError, warn, warnings_heard
from optimum_sab.hf.output.members import is_member
from optimum_sab.hf.output.place import check_output
from optimum_sab.hf.output.saving import save_packed


@pytest.fixture(scope="module")
def told(smallest_example, quicker_config, tmp_path_factory):
    """A model made with examples, its report as a dictionary, and where it was saved."""
    folder = tmp_path_factory.mktemp("told")
    config = quicker_config(examples=True, calibration_samples=4)
    model = AutoModelForVision2Seq.from_pretrained(smallest_example, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(folder)
    model.hf_quantizer.report.save(folder)
    return model, model.hf_quantizer.report.to_dict(), folder


def test_to_dict_holds_what_was_found(told):
    model, found, _ = told
    report = model.hf_quantizer.report
    assert found["bits_per_weight"] == report.bits_per_weight
    assert found["agreement"]["pictures"] == {
        k: getattr(report.agreement["pictures"], k) for k in ("kl", "top1", "kl_error")
    }
    assert found["verdict"]["level"] == report.verdict.level
    assert found["verdict"]["words"] == report.verdict.words
    assert [each["kind"] for each in found["examples"]] == ["text"] * 3 + ["pictures"] * 3
    assert [each["index"] for each in found["blocks"]] == [0]
    assert set(found["blocks"][0]["by_modality"]) == {"text", "visual"}
    assert 0 < found["blocks"][0]["significance"]["ratio"] < 1
    names = [each["name"] for each in found["stages"]]
    assert names == [each.name for each in report.stages] and names[0] == "processor" and "blocks" in names
    assert found["seconds"] == pytest.approx(sum(each["seconds"] for each in found["stages"]))
    assert found["sizes"]["total"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert found["warnings"] == list(report.warnings)


def test_calibration_is_told(told):
    model, found, _ = told
    assert found["calibration"] == {
        "count": 4,
        "tokens": model.hf_quantizer.report.tokens,
        "with_pictures": 2,
        "source": "builtin",
        "sequence_length": 64,
        "seed": 0,
    }


def test_save_writes_what_to_dict_says_and_a_page(told):
    _, found, folder = told
    assert json.loads((folder / "report.json").read_text()) == found
    assert "<!DOCTYPE html>" in (folder / "report.html").read_text()


def test_nothing_tells_of_the_machine(told, smallest_example):
    text = json.dumps(told[1])
    assert told[1]["about"]["model"] == smallest_example.name
    for place in (smallest_example.parent, Path(optimum_sab.__file__).parent, Path.home(), Path.cwd()):
        assert str(place) == "/" or str(place) not in text


def test_a_report_is_saved_into_a_new_folder_or_says_why_not(told, tmp_path):
    report = told[0].hf_quantizer.report
    report.save(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "report.json").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written to"):
        report.save(tmp_path / "file")


def test_examples_change_nothing_in_the_packed_model(told, smallest_example, quicker_config, tmp_path):
    _, _, folder = told
    config = quicker_config(examples=False, calibration_samples=4)
    model = AutoModelForVision2Seq.from_pretrained(smallest_example, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(tmp_path)
    assert model.hf_quantizer.report.to_dict()["examples"] == []
    one, other = (load_file(each / "model.safetensors") for each in (folder, tmp_path))
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
    assert (folder / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_warnings_before_and_after_the_weights_are_in_the_report(llama_folder, quicker_config, texts):
    config = quicker_config(calibration=[{"text": texts[0], "label": 1}], calibration_samples=1)
    with pytest.warns(optimum_sab.errors.SABWarning) as warned:
        model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=config)
    told = [str(each.message) for each in warned if issubclass(each.category, optimum_sab.errors.SABWarning)]
    report = model.hf_quantizer.report
    assert any("'label'" in each for each in report.warnings)  # while samples are read, before weights are
    assert any("fewer than" in each for each in report.warnings)  # by a stage
    assert list(report.warnings) == list(dict.fromkeys(told))
    assert report.to_dict()["no_examples"] is None


def test_a_warning_is_heard_inside_and_not_outside():
    with warnings_heard() as outer:
        with warnings_heard() as inner:
            with pytest.warns(optimum_sab.errors.SABWarning):
                warn("one")
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warn("one")
        with pytest.warns(optimum_sab.errors.SABWarning):
            warn("two")
    with pytest.warns(optimum_sab.errors.SABWarning):
        warn("three")
    assert (inner, outer) == (["one"], ["one", "two"])


def test_saving_a_packed_model_writes_its_report_and_a_loaded_one_has_none(told, tmp_path):
    model, found, folder = told
    tokenizer = AutoTokenizer.from_pretrained(optimum_sab.example.checkpoint_path())
    save_packed(model, tokenizer, check_output(tmp_path / "first"))
    assert json.loads((tmp_path / "first" / "report.json").read_text()) == found
    assert is_member(tmp_path / "first" / "report.json") and is_member(tmp_path / "first" / "report.html")
    loaded = AutoModelForVision2Seq.from_pretrained(folder)
    save_packed(loaded, tokenizer, check_output(tmp_path / "first", overwrite=True))
    assert not (tmp_path / "first" / "report.json").exists()  # of another model
    assert not (tmp_path / "first" / "report.html").exists()


def test_a_report_that_cannot_be_made_does_not_cost_the_model(told, tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("nothing to tell")

    model, _, _ = told
    monkeypatch.setattr(type(model.hf_quantizer.report), "to_dict", fail)
    tokenizer = AutoTokenizer.from_pretrained(optimum_sab.example.checkpoint_path())
    with pytest.warns(optimum_sab.errors.SABWarning, match=r"could not be written \(RuntimeError: nothing to tell\)"):
        save_packed(model, tokenizer, check_output(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").exists()
