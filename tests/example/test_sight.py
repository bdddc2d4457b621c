import pytest
import torch

from optimum_sab.data.scenes import PALETTE, PLACES, Scene, Shape
from optimum_sab.example import checkpoint_path
from optimum_sab.example.architecture import build_model
from optimum_sab.example.sight import (
    CELL_TOKENS,
    SightSettings,
    number_words,
    recognized,
    scene_words,
    sight_batches,
    teach_sight,
)
from optimum_sab.hf.processor import load_processor


@pytest.fixture(scope="module")
def processor():
    return load_processor(checkpoint_path())


def test_scene_words_name_what_is_in_every_cell_and_where_it_is():
    shape = Shape("star", "blue", 1, 2, (0.8, 0.5), radius=0.13, angle=0.0, tint=PALETTE["blue"])
    expected = [["none", place] for row in PLACES for place in row]
    expected[5] = ["blue", "star", "right"]
    assert scene_words(Scene((150,) * 3, (shape,))) == expected


@pytest.mark.parametrize(("number", "row"), [(407, ["4", "0", "7"]), (10, ["1", "0", "none"])])
def test_number_words_spell_the_digits_in_every_row(number, row):
    assert number_words(number) == [[word] for word in row] * 3


def test_recognized_wants_all_words_of_a_cell_before_any_other():
    words = torch.tensor([True, True, False])
    logits = torch.tensor([[2.0, 3.0, 1.0], [2.0, 0.0, 1.0], [2.0, 3.0, 4.0]])
    assert recognized(logits, words.expand(3, 3)).tolist() == [True, False, False]


def test_sight_batches_give_every_cell_a_distribution_over_its_words(processor):
    batch = next(sight_batches(processor, SightSettings(scenes=2, signs=3)))
    assert batch.image_grid_thw.tolist() == [[1, 8, 8]] * 5
    assert batch.words.shape == (5, len(CELL_TOKENS), len(processor.tokenizer))
    torch.testing.assert_close(batch.words.sum(-1), torch.ones(5, len(CELL_TOKENS)))
    digits = processor.tokenizer.decode(batch.words[2, :2].argmax(-1))
    assert digits.isdigit()


@pytest.mark.usefixtures("quick_muon")
def test_teach_sight_changes_the_tower_and_nothing_else(processor):
    torch.manual_seed(0)
    model = build_model()
    before = {name: each.clone() for name, each in model.named_parameters()}
    teach_sight(model, processor, SightSettings(steps=4, scenes=1, signs=1), report=print)
    changed = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert changed == {name for name in before if name.startswith("model.visual.")}


@pytest.mark.full  # the reader's, of the same loop, shows it in every run
def test_teach_sight_lowers_its_loss(processor):
    torch.manual_seed(0)
    model = build_model()
    lines = []
    teach_sight(model, processor, SightSettings(steps=100, scenes=4, signs=2), report=lines.append)
    losses = [float(line.split()[3]) for line in lines]
    assert len(losses) == 2
    assert losses[1] < losses[0] - 0.5
