"""The model card says what is so, and is nobody else's."""

import copy
import logging
import pickle
import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from optimum_sab import AutoModelForVision2Seq, SABConfig
from optimum_sab.errors import ConfigError, SABWarning
from optimum_sab.hf.hub.authorship import CARD, keeps
from optimum_sab.hf.hub.base import describe_base
from optimum_sab.hf.hub.card import HERE, card_data, model_card, named
from optimum_sab.hf.hub.companions import FolderCard
from optimum_sab.hf.hub.facts import model_facts
from optimum_sab.hf.hub.processor_files import ProcessorSource
from optimum_sab.hf.hub.remote_code import add_remote_code
from optimum_sab.hf.inventory import read_inventory
from optimum_sab.hf.origin import Origin
from tests.hub.conftest import packed_model

COMMIT = "c" * 40


@pytest.fixture(scope="module")
def card(packed):
    return ModelCard.load(packed[0] / "README.md")


@pytest.fixture(scope="module")
def model(packed):
    return AutoModelForVision2Seq.from_pretrained(packed[0])


def test_metadata_files_the_model_under_its_base(card):
    assert card.data.to_dict() == {
        "base_model": "owner/dense",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "image-text-to-text",
        "tags": ["optimum-sab", "sab", "quantized", "binarization", "1-bit"],
    }


def test_bytes_and_bits_are_those_of_the_files(card, packed):
    inventory = read_inventory(packed[0])
    assert f"{inventory.bits_per_weight:.3f} bits per weight" in card.text
    assert f"| {inventory.packed_bytes:,} |" in card.text
    assert f"| {inventory.dense_bytes:,} | {inventory.dense_bytes:,} |" in card.text
    dense = sum(m.out_features * m.in_features for m in inventory.modules) * 4  # in float32
    assert model_facts(AutoModelForVision2Seq.from_pretrained(packed[0]), inventory.config).dense_bytes > dense


@pytest.mark.parametrize(
    "line",
    [
        "| data | the built-in set of optimum-sab |",
        "| samples | 12, 9 of them with pictures |",
        "| tokens, visual | 400 |",
        "| seed | 0 |",
        "Verdict of the run that made it: **usable with care**.",
        "| text | 0.250 | 87.5% |",
        "| 0 | 0.1250 | 0.0625 |",
        "| 1 | 0.2500 |  |",
        "pip install optimum-sab  # before there is a release on PyPI: from a clone, which whoever made this",
        "This processor needs torchvision: install the torchvision that belongs to the installed torch",
        'processor = load_processor("path/to/this/checkpoint")',
        "import optimum_sab  # registers the quantization method with Transformers",
    ],
)
def test_the_text_says_what_was_measured_and_how_to_load(card, line):
    assert line in card.text.splitlines() or any(each.startswith(line) for each in card.text.splitlines())


@pytest.mark.parametrize(
    ("architecture", "tag", "said", "without"),
    [
        ("Qwen2_5_VLForConditionalGeneration", "image-text-to-text", True, True),
        ("LlavaForConditionalGeneration", "image-text-to-text", True, False),
        ("LlamaForCausalLM", "text-generation", False, False),
        ("WhisperForConditionalGeneration", "automatic-speech-recognition", False, False),
    ],
)
def test_torchvision_is_named_where_a_processor_needs_it(model, architecture, tag, said, without):
    facts = replace(model_facts(model, SABConfig()), architecture=architecture, pipeline_tag=tag)
    text = model_card(facts).text
    assert ("torchvision" in text) == said
    assert ("optimum_sab.hf.processor import load_processor" in text) == without


def test_the_code_of_the_card_answers_a_question(smallest_example, card, tmp_path, monkeypatch, capsys):
    text = card.text.replace(HERE, str(smallest_example))  # dense, which makes no difference to it
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (84, 84), "red").save("picture.jpg")
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:2]
    assert "AutoProcessor.from_pretrained(" in first
    found = {}
    first = f"from optimum_sab.hf.processor import load_processor\n{first}"  # as the card says of torchvision
    exec(first.replace("AutoProcessor.from_pretrained(", "load_processor("), found)
    capsys.readouterr()
    exec(second, found)
    new = found["answer"][0, found["inputs"]["input_ids"].shape[1] :]
    assert capsys.readouterr().out.strip() == found["processor"].tokenizer.decode(new, skip_special_tokens=True).strip()
    assert 0 < len(new) <= 64 and "pixel_values" in found["inputs"]


@pytest.mark.parametrize(("base", "title"), [({}, "mine"), ({"model": "owner/dense"}, "dense")])
def test_the_title_is_the_base_or_else_the_repository(model, base, title):
    card = model_card(model_facts(model, SABConfig(measured={"base": base})))
    first = title if base else type(model).__name__
    assert f"\n# {first}, packed by optimum-sab\n" in f"\n{card.text.lstrip()}"
    pushed = named(card, "owner/mine").text
    assert f"\n# {title}, packed by optimum-sab\n" in f"\n{pushed.lstrip()}" and HERE not in pushed
    assert 'load_processor("owner/mine")' in pushed


def test_of_many_blocks_some_are_shown(model):
    config = copy.deepcopy(model.config.quantization_config)
    config.measured = {"block_errors": [[0.5, 0.25]] * 80}
    text = model_card(model_facts(model, config)).text
    assert text.count("| 0.5000 | 0.2500 |") == 16 and "16 of 80 blocks" in text


def test_what_is_not_known_is_left_out(model):
    card = model_card(model_facts(model, SABConfig(calibration="/home/somebody/secret/data.jsonl")))
    assert card.data.base_model is None and card.data.license is None
    assert "None" not in card.text and "/home" not in card.text and "`data.jsonl`" in card.text


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("# Mine\n", True),
        ("---\nlicense: mit\n---\n", True),
        ("---\n: [not yaml\n---\n", True),
        (None, False),
    ],
)
def test_a_card_in_the_folder_stays_where_somebody_wrote_it(model, tmp_path, content, kept):
    path = tmp_path / "README.md"
    if content is not None:
        path.write_text(content)
    assert keeps(path) == kept
    model.save_pretrained(tmp_path)
    assert (path.read_text() == content) == kept
    if not kept:
        assert not keeps(path)
        path.write_text(path.read_text().replace("binarization", "binarisation", 1))
        assert not keeps(path)  # tags are the Hub's tools' to change
        path.write_text(path.read_text().replace("## Size", "## How large"))
        assert keeps(path)


def test_of_a_card_without_a_head_nobody_complains(tmp_path, caplog):
    (tmp_path / CARD).write_text("# Mine\n")
    logger = logging.getLogger("huggingface_hub.repocard")
    logger.addHandler(caplog.handler)
    try:
        assert keeps(tmp_path / CARD)
        assert caplog.records == []
        ModelCard.load(tmp_path / CARD)  # which would have been heard
        assert caplog.records
    finally:
        logger.removeHandler(caplog.handler)


def test_the_base_is_named_by_the_hub_and_licensed_by_its_card(tmp_path):
    snapshot = tmp_path / "models--org--vlm" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: odd\nlicense_link: LICENSE\n---\n")
    licence = {"license": "other", "license_name": "odd", "license_link": "LICENSE"}
    assert describe_base(Origin(str(snapshot))) == {"model": "org/vlm", "revision": COMMIT, **licence}
    (tmp_path / "models--org--vlm" / "refs").mkdir()
    (tmp_path / "models--org--vlm" / "refs" / "main").write_text(COMMIT)
    there = Origin("org/vlm", {"revision": COMMIT}, {"cache_dir": str(tmp_path)})
    assert describe_base(there) == {"model": "org/vlm", "revision": COMMIT, **licence}
    assert describe_base(Origin("org/other", {}, {"cache_dir": str(tmp_path)})) == {"model": "org/other"}
    mine = tmp_path / "mine"
    mine.mkdir()
    assert describe_base(Origin(str(mine))) == {}  # a path says nothing to others


def test_a_quantized_model_records_what_its_card_needs(smallest_example, tmp_path):
    (tmp_path / "dense").symlink_to(smallest_example)
    quick = {"iterations": 1, "sweeps": 0, "allocation": "uniform", "temperature_scaling": False, "progress": "none"}
    config = SABConfig(calibration_samples=3, sequence_length=32, **quick)
    model = AutoModelForVision2Seq.from_pretrained(tmp_path / "dense", quantization_config=config)
    measured = dict(model.config.quantization_config.measured)
    report = model.hf_quantizer.report
    shown = measured["calibration_samples"]
    assert shown["samples"] == 3 and 0 < shown["with_pictures"] <= 3
    assert measured["block_errors"] == [pytest.approx([report.blocks[0].error, report.blocks[0].drift], rel=1e-3)]
    model.save_pretrained(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "tokenizer.json", "preprocessor_config.json", "config.json"} <= names
    stored = SABConfig.from_dict(model.config.quantization_config.to_dict()).measured
    assert {name: value for name, value in stored.items() if name != "weights"} == measured


def test_a_processor_in_the_folder_stays(model, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").read_text() == "{}"
    assert (tmp_path / "tokenizer.json").is_file()


def test_a_model_without_a_processor_is_saved(packed, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(packed[0] / name)
    AutoModelForVision2Seq.from_pretrained(bare).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "tokenizer.json").exists()
    assert (tmp_path / "again" / "README.md").is_file()


def test_a_copied_model_shares_its_processor_and_a_pickled_one_leaves_it_and_the_token_behind():
    source = ProcessorSource(None, Origin("org/vlm", access={"token": "hf_secret"}))
    assert copy.deepcopy(source) is source
    assert b"hf_secret" not in pickle.dumps(source) and pickle.loads(pickle.dumps(source)).origin is None


def test_code_of_the_model_itself_is_not_replaced(model):
    twin = copy.copy(model)
    twin.config = copy.deepcopy(model.config)
    twin.config.auto_map = {"AutoConfig": "modeling_own.OwnConfig"}
    with pytest.raises(ConfigError, match="brings code of its own"):
        add_remote_code(twin)


def test_the_kind_of_model_is_read_off_its_class(model):
    data = card_data(model_facts(model, SABConfig(measured={"base": {"pipeline_tag": "visual-question-answering"}})))
    assert data.pipeline_tag == "visual-question-answering"


def test_name_that_would_end_its_cell_is_escaped(tmp_path):
    model = packed_model(0)
    model.hf_quantizer.quantization_config.calibration = "/data/a|b\n# c.jsonl"
    model.save_pretrained(tmp_path)
    lines = (tmp_path / CARD).read_text().splitlines()
    assert r"| data | the file `a\|b # c.jsonl` |" in lines and "# c.jsonl` |" not in lines


def test_names_in_a_card_are_no_markup(model):
    base = {"model": "owner/x](elsewhere) <img src=x> *y*", "revision": "`<b>`"}
    measured = {"base": base, "calibration_tokens": {"<i>|": 3}, "agreement": {"<u>": {"kl": None, "top1": None}}}
    text = model_card(model_facts(model, SABConfig(measured=measured, calibration="own`er<s>.jsonl"))).text
    lines = text.splitlines()
    assert r"# x\](elsewhere) \<img src=x\> \*y\*, packed by optimum-sab" in lines
    assert "`owner/x](elsewhere) <img src=x> *y*` at `` `<b>` `` with its" in text  # no link, and code
    assert r"| tokens, \<i\>\| | 3 |" in lines
    assert r"| \<u\> | no number | no number |" in lines
    assert "| data | the file ``own`er<s>.jsonl`` |" in lines


@pytest.mark.parametrize(
    ("calibration", "line"),
    [
        ("owner/name:train", "| data | `owner/name:train` |"),
        ("customers/secret.jsonl", "| data | the file `secret.jsonl` |"),
        ("customers/secret.parquet", "| data | the file `secret.parquet` |"),
        ("self", "| data | written by the dense model itself |"),
        ({"samples": 3}, "| data | given as objects |"),
    ],
)
def test_a_card_names_a_dataset_and_of_a_file_the_last_part(model, calibration, line):
    assert line in model_card(model_facts(model, SABConfig(calibration=calibration))).text.splitlines()


@pytest.mark.parametrize("text", ["---\n[1, 2]\n---\nmine", "---\nlicense: [\n---\nmine"])
def test_card_whose_head_cannot_be_read_is_pushed_as_it_is(tmp_path, text):
    (tmp_path / CARD).write_text(text)
    with pytest.warns(SABWarning, match="goes to the Hub as it is"):
        FolderCard("---\ntags: [x]\n---\nother").save(tmp_path / CARD)
    assert (tmp_path / CARD).read_text() == text
