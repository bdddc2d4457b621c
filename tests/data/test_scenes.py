import random

import pytest

from optimum_sab.data.scenes import (
    COLOURS,
    KINDS,
    MAX_SHAPES,
    PALETTE,
    Scene,
    Shape,
    describe_scene,
    random_scene,
    render,
)
from optimum_sab.errors import ConfigError


def shape(kind: str, colour: str, row: int, column: int) -> Shape:
    centre = ((column + 0.5) / 3, (row + 0.5) / 3)
    return Shape(kind, colour, row, column, centre, radius=0.13, angle=0.0, tint=PALETTE[colour])


def test_scene_is_determined_by_the_generator():
    assert random_scene(random.Random(3)) == random_scene(random.Random(3))
    assert random_scene(random.Random(3)) != random_scene(random.Random(4))


@pytest.mark.parametrize("count", [1, 5, MAX_SHAPES])
def test_scene_has_as_many_shapes_as_asked_each_in_its_own_cell(count):
    scene = random_scene(random.Random(count), count=count)
    assert len({(each.row, each.column) for each in scene.shapes}) == len(scene.shapes) == count


@pytest.mark.parametrize("count", [0, -1, MAX_SHAPES + 1])
def test_scene_refuses_a_count_that_does_not_fit(count):
    with pytest.raises(ConfigError, match=f"count={count} "):
        random_scene(random.Random(0), count=count)


def test_scene_uses_only_the_colours_it_is_given():
    scene = random_scene(random.Random(0), count=9, colours=("red", "blue"))
    assert {each.colour for each in scene.shapes} <= {"red", "blue"}


def test_shape_stays_inside_its_image():
    for seed in range(200):
        for each in random_scene(random.Random(seed), count=MAX_SHAPES).shapes:
            assert each.radius <= each.centre[0] <= 1 - each.radius
            assert each.radius <= each.centre[1] <= 1 - each.radius


def test_layout_ignores_order_jitter_and_background():
    first, second = shape("circle", "red", 0, 0), shape("star", "blue", 2, 1)
    moved = Shape("circle", "red", 0, 0, (0.2, 0.15), radius=0.12, angle=4.0, tint=(200, 30, 30))
    assert Scene((120,) * 3, (first, second)).layout == Scene((160,) * 3, (second, moved)).layout


@pytest.mark.parametrize("changed", [("square", "red", 0, 0), ("circle", "blue", 0, 0), ("circle", "red", 0, 1)])
def test_layout_tells_kind_colour_and_cell_apart(changed):
    one = Scene((150,) * 3, (shape("circle", "red", 0, 0),))
    assert one.layout != Scene((150,) * 3, (shape(*changed),)).layout


@pytest.mark.parametrize("size", [112, 336, 448])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ring"])
@pytest.mark.parametrize("colour", COLOURS)
def test_render_paints_a_shape_where_it_belongs(kind, colour, size):
    image = render(Scene((150, 151, 152), (shape(kind, colour, 1, 2),)), size)
    assert (image.size, image.mode) == ((size, size), "RGB")
    assert image.getpixel((size * 5 // 6, size // 2)) == PALETTE[colour]
    assert image.getpixel((size // 6, size // 2)) == (150, 151, 152)


def test_render_leaves_a_ring_hollow():
    image = render(Scene((150, 151, 152), (shape("ring", "red", 1, 1),)), 300)
    assert image.getpixel((150, 150)) == (150, 151, 152)
    assert image.getpixel((150 + round(300 * 0.13 * 0.9 * 0.8), 150)) == PALETTE["red"]


def test_render_gives_every_kind_its_own_outline():
    pictures = {render(Scene((150,) * 3, (shape(kind, "red", 1, 1),)), 112).tobytes() for kind in KINDS}
    assert len(pictures) == len(KINDS)


def test_render_refuses_an_unknown_kind_and_an_empty_image():
    with pytest.raises(ConfigError, match="hexagon"):
        render(Scene((150,) * 3, (shape("hexagon", "red", 1, 1),)), 112)
    with pytest.raises(ConfigError, match="size=0"):
        render(random_scene(random.Random(0)), 0)


def test_describe_scene_names_every_shape_in_reading_order():
    shapes = (shape("star", "orange", 2, 0), shape("circle", "red", 0, 1), shape("ring", "blue", 1, 1))
    scene = Scene((150,) * 3, shapes)
    listing = "a red circle at the top, a blue ring at the centre and an orange star at the bottom left"
    assert describe_scene(scene) == f"The image shows {listing}."
    assert describe_scene(Scene((150,) * 3, scene.shapes[1:2])) == "The image shows a red circle at the top."
