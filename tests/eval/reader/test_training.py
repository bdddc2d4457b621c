import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_sab.eval.reader.answers import BEFORE_PICTURE, after_picture, answered_rows
from optimum_sab.eval.reader.architecture import write_reader
from optimum_sab.eval.reader.cifar import read_cifar
from optimum_sab.eval.reader.dialogue import DialogueSettings, teach_dialogue
from optimum_sab.eval.reader.language import load_language
from optimum_sab.eval.reader.prompt import PROMPT_TOKENS, PromptSettings
from optimum_sab.eval.reader.sight import SightSettings
from optimum_sab.eval.reader.tasks import reader_questions
from optimum_sab.eval.reader.training import main, make_sight, tune_prompt, written_prompt
from optimum_sab.example.evaluation import question_messages


@pytest.mark.usefixtures("quick_muon")
def test_training_writes_weights_that_the_reader_takes_and_goes_on_from_them(language, cifar, tmp_path):
    arguments = ["--language", str(language), "--cifar", str(cifar), "--no-compile"]
    small = ["--sight-steps", "2", "--sight-signs", "2", "--sight-pictures", "2", "--sight-warmup", "1"]
    short = ["--prompt-steps", "2", "--prompt-captions", "1"]
    short += ["--dialogue-steps", "2", "--dialogue-signs", "1", "--dialogue-pictures", "1"]
    main([*arguments, "--output", str(tmp_path / "first"), *small, *short])
    trained = load_file(tmp_path / "first" / "vision.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.bfloat16}
    assert load_file(tmp_path / "first" / "prompt.safetensors")["prompt"].shape == (PROMPT_TOKENS, 576)
    folder = write_reader(language, tmp_path / "reader", tmp_path / "first" / "vision.safetensors")
    _, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    # With a learning rate of nothing, going on leaves everything as it was.
    still = ["--initial", str(tmp_path / "first" / "sight.safetensors"), "--sight-learning-rate", "0"]
    still += ["--dialogue-steps", "0"]
    main([*arguments, "--output", str(tmp_path / "second"), *small, "--prompt-steps", "0", *still])
    again = load_file(tmp_path / "second" / "vision.safetensors")
    assert all(torch.equal(again[name], trained[name]) for name in trained)
    assert not (tmp_path / "second" / "prompt.safetensors").exists()


def test_training_frames_a_picture_as_the_chat_template_does(language, vision, tmp_path):
    processor = AutoProcessor.from_pretrained(write_reader(language, tmp_path / "reader", vision))
    question = reader_questions("reading", 1, seed=0)[0]
    text = processor.apply_chat_template(question_messages(question), tokenize=False, add_generation_prompt=True)
    assert text == f"{BEFORE_PICTURE}<image>{after_picture(question.prompt)}"


def test_tune_prompt_changes_the_prompt_and_not_the_model(language):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(language)
    model = LlamaForCausalLM.from_pretrained(language, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = written_prompt(tokenizer, model.get_input_embeddings().weight)
    lines = []
    settings = PromptSettings(steps=20, captions=2, learning_rate=2e-2)
    tuned = tune_prompt(model, tokenizer, start, settings, lines.append)
    assert not torch.equal(tuned, start)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    first, last = (float(line.split("loss")[1].split()[0]) for line in lines)
    assert last < first


@pytest.mark.full  # the two stages before it, which share its loop, show in every run that they lower their losses
def test_teach_dialogue_lowers_the_answers_loss_and_leaves_the_model(language, cifar):
    speaker = load_language(language)
    before = {name: tensor.clone() for name, tensor in speaker.model.state_dict().items()}
    pictures = read_cifar(cifar, "train")
    sight = make_sight(576, pictures, SightSettings(signs=4, pictures=4))
    settings = DialogueSettings(steps=30, signs=2, pictures=2, learning_rate=2e-3)
    lines = []
    teach_dialogue(speaker, sight, pictures, settings, lines.append)
    first, _, last = (float(line.split("loss")[1].split()[0]) for line in lines)
    assert last < first
    assert all(torch.equal(tensor, before[name]) for name, tensor in speaker.model.state_dict().items())


def test_answered_rows_learn_answers_and_their_ends_only():
    rows = answered_rows([[5, 6], [5]], [[7], [8, 9]], end=0)
    assert rows.ids.tolist() == [[5, 6, 7, 0], [5, 8, 9, 0]]
    assert rows.learnt.tolist() == [[False, False, True, True], [False, True, True, True]]
    assert rows.lengths == (2, 3)
