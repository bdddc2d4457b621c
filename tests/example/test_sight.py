import pytest
import torch

from optimum_sab.data.scenes import COLOURS, KINDS, PALETTE, Scene, Shape
from optimum_sab.example import checkpoint_path
from optimum_sab.example.architecture import build_model
from optimum_sab.example.processor import load_processor
from optimum_sab.example.sight import (
    IGNORED,
    MAX_DIGITS,
    SCENE_SLOTS,
    SightSettings,
    digit_slots,
    scene_slots,
    sight_batches,
    teach_sight,
)


def test_scene_slots_name_colour_and_kind_of_every_cell():
    shape = Shape("star", "blue", 1, 2, (0.8, 0.5), radius=0.13, angle=0.0, tint=PALETTE["blue"])
    expected = [0] * SCENE_SLOTS
    expected[2 * 5 : 2 * 5 + 2] = [1 + COLOURS.index("blue"), 1 + KINDS.index("star")]
    assert scene_slots(Scene((150,) * 3, (shape,))) == expected


@pytest.mark.parametrize(("number", "slots"), [(407, [5, 1, 8]), (10, [2, 1, 0])])
def test_digit_slots_count_from_the_left(number, slots):
    assert digit_slots(number) == slots


def test_sight_batches_ask_scenes_for_cells_and_signs_for_digits():
    batch = next(sight_batches(load_processor(checkpoint_path()), SightSettings(scenes=2, signs=3)))
    assert batch.targets.shape == (5, SCENE_SLOTS + MAX_DIGITS)
    assert batch.image_grid_thw.tolist() == [[1, 8, 8]] * 5
    assert (batch.targets == IGNORED).tolist() == [[False] * SCENE_SLOTS + [True] * MAX_DIGITS] * 2 + [
        [True] * SCENE_SLOTS + [False] * MAX_DIGITS
    ] * 3


def test_teach_sight_changes_the_tower_and_nothing_else():
    torch.manual_seed(0)
    model = build_model()
    before = {name: each.clone() for name, each in model.named_parameters()}
    lines = []
    teach_sight(model, load_processor(checkpoint_path()), SightSettings(steps=4, scenes=1, signs=1), lines.append)
    changed = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert changed == {name for name in before if name.startswith("model.visual.")}
    assert lines == []
