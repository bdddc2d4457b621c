import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from optimum_sab import SABConfig
from optimum_sab.calibration.samples.modality import token_modalities
from optimum_sab.errors import ConfigError, OutputExistsError
from optimum_sab.eval.reader.__main__ import main
from optimum_sab.eval.reader.architecture import EMBEDDINGS, WEIGHTS, read_language_config, write_reader
from optimum_sab.eval.reader.tasks import reader_chats, reader_questions
from optimum_sab.eval.reader.tower import TOKENS
from optimum_sab.example.evaluation import answer, question_messages
from optimum_sab.nn.decoder import find_decoder_blocks
from optimum_sab.nn.linear import SABLinear
from optimum_sab.nn.modalities import VISUAL

# what is tested is what is quantized, not how well
QUICK = {"sequence_length": 64, "iterations": 2, "sweeps": 0, "allocation": "uniform", "temperature_scaling": False}


@pytest.fixture(scope="module")
def folder(language, vision, tmp_path_factory):
    return write_reader(language, tmp_path_factory.mktemp("written") / "reader", vision)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def encode(processor, question, **options):
    text = processor.apply_chat_template(question_messages(question), tokenize=False, add_generation_prompt=True)
    return processor(text=[text], images=[question.image], return_tensors="pt", **options)


def test_reader_loads_with_every_weight_in_its_place(folder, language, vision):
    model, report = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    words, seen = load_file(language / "model.safetensors"), load_file(vision)
    state = model.state_dict()
    rows = len(words[EMBEDDINGS])
    embeddings = model.get_input_embeddings().weight
    assert torch.equal(embeddings[:rows], words[EMBEDDINGS])
    torch.testing.assert_close(embeddings[rows], words[EMBEDDINGS].mean(0))
    for name, tensor in words.items():
        if name != EMBEDDINGS:
            assert torch.equal(state[f"model.language_{name}"], tensor), name
    for name, tensor in seen.items():
        ours = [f"model.{name}", f"model.{name.replace('vision_model.', '')}"]
        assert torch.equal(next(state[each] for each in ours if each in state), tensor.float()), name


def test_shipped_vision_weights_fit_the_reader(language, tmp_path):
    assert WEIGHTS.stat().st_size < 16 * 2**20
    shipped = write_reader(language, tmp_path / "shipped")
    _, report = AutoModelForImageTextToText.from_pretrained(shipped, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


def test_reader_computes_what_the_language_model_computes_on_text(folder, language, model):
    config = model.config.text_config
    theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
    assert theta == 5000.0
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_reader_gives_a_picture_its_tokens_and_they_are_visual(model, processor):
    question = reader_questions("reading", 1, seed=0)[0]
    inputs = encode(processor, question)
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    modalities = token_modalities(inputs, model.config)
    assert modalities.count(VISUAL) == TOKENS
    assert modalities.count("text") == inputs["input_ids"].numel() - TOKENS
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == TOKENS


def test_reader_sees_the_picture(model, processor):
    first, second = reader_questions("reading", 2, seed=0)
    inputs = encode(processor, first)
    other = {**inputs, "pixel_values": encode(processor, second)["pixel_values"]}
    with torch.inference_mode():
        assert not torch.allclose(model(**inputs).logits[:, -1], model(**other).logits[:, -1])


def test_reader_answers_every_question(model, processor, cifar):
    questions = [*reader_questions("reading", 2, seed=0), *reader_questions("naming", 2, seed=0, cifar=cifar)]
    replies = answer(model, processor, questions, batch_size=3)
    alone = [answer(model, processor, [question])[0] for question in questions]
    assert replies == alone


def test_reader_blocks_are_those_of_the_language_model(model):
    found = find_decoder_blocks(model)
    assert len(found.blocks) == 2
    assert found.lists.names[0].endswith("language_model.layers")


def test_reader_quantizes_and_its_vision_part_stays_dense(folder, model):
    config = SABConfig(calibration_samples=8, **QUICK)
    quantized = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    packed = {name for name, module in quantized.named_modules() if isinstance(module, SABLinear)}
    assert len(packed) == 14
    assert all(".language_model.layers." in name for name in packed)
    dense = model.state_dict()
    for name, tensor in quantized.state_dict().items():
        if "vision_tower" in name or "multi_modal_projector" in name:
            assert torch.equal(tensor, dense[name]), name


def test_reader_quantizes_on_chats_of_its_own_tasks(folder, cifar):
    chats = reader_chats(4, seed=0, cifar=cifar)
    config = SABConfig(calibration=chats, calibration_samples=4, **QUICK)
    quantized = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    assert any(isinstance(module, SABLinear) for module in quantized.modules())


def test_write_reader_reads_weights_in_several_files(language, vision, model, tmp_path):
    split = shutil.copytree(language, tmp_path / "split")
    weights = load_file(split / "model.safetensors")
    (split / "model.safetensors").unlink()
    save_file({EMBEDDINGS: weights.pop(EMBEDDINGS)}, split / "model-00001-of-00002.safetensors")
    save_file(weights, split / "model-00002-of-00002.safetensors")
    written = load_file(write_reader(split, tmp_path / "reader", vision) / "model.safetensors")
    again = load_file(write_reader(language, tmp_path / "again", vision) / "model.safetensors")
    assert written.keys() == again.keys()
    assert all(torch.equal(written[name], again[name]) for name in again)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_write_reader_names_what_is_missing(language, vision, tmp_path, name):
    broken = shutil.copytree(language, tmp_path / "broken")
    (broken / name).unlink()
    with pytest.raises(ConfigError, match=r"(?s)broken.*the page 'benchmarks' of optimum-sab's documentation says"):
        write_reader(broken, tmp_path / "reader", vision)
    assert not (tmp_path / "reader").exists()


def test_write_reader_refuses_another_width(make_language, vision, tmp_path):
    with pytest.raises(ConfigError, match=r"hidden_size=96.* 576"):
        write_reader(make_language(tmp_path / "narrow", width=96), tmp_path / "reader", vision)


def test_write_reader_refuses_another_architecture(make_language, vision, tmp_path):
    with pytest.raises(ConfigError, match="model_type='opt'"):
        write_reader(make_language(tmp_path / "other", model_type="opt"), tmp_path / "reader", vision)


def test_write_reader_names_missing_vision_weights(language, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.safetensors"):
        write_reader(language, tmp_path / "reader", tmp_path / "nowhere.safetensors")


def test_write_reader_keeps_what_is_there(language, vision, tmp_path):
    (tmp_path / "reader").mkdir()
    (tmp_path / "reader" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        write_reader(language, tmp_path / "reader", vision)
    assert (tmp_path / "reader" / "mine.txt").read_text() == "mine"


def test_read_language_config_keeps_a_scaled_rope(language, tmp_path):
    scaled = shutil.copytree(language, tmp_path / "scaled")
    config = json.loads((scaled / "config.json").read_text())
    config.pop("rope_theta", None)
    config["rope_parameters"] = {"rope_theta": 7.0, "rope_type": "linear", "factor": 2.0}
    (scaled / "config.json").write_text(json.dumps(config))
    read = read_language_config(scaled)
    assert read["rope_theta"] == 7.0
    assert read["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_main_says_why_it_wrote_nothing(tmp_path, capsys):
    assert main(["--language", str(tmp_path / "none"), "--output", str(tmp_path / "reader")]) == 2
    assert "config.json is missing" in capsys.readouterr().err
