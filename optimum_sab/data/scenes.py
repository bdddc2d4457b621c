"""Procedural pictures of coloured shapes.

A scene is a description, not a bitmap: shapes on a three-by-three grid, each with a kind, a colour and a little jitter
in size, position, angle and tint. Lengths are fractions of the image side, so one scene renders at any size. The scenes
feed two things: the questions of the embedded example and the pictures of the built-in calibration set.
"""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from optimum_sab.errors import ConfigError

Colour = tuple[int, int, int]
Point = tuple[float, float]

PALETTE: dict[str, Colour] = {
    "red": (214, 36, 36),
    "orange": (245, 140, 24),
    "yellow": (246, 222, 40),
    "green": (36, 152, 58),
    "blue": (38, 78, 208),
    "purple": (136, 44, 168),
    "black": (24, 24, 26),
    "white": (248, 248, 248),
}
COLOURS: tuple[str, ...] = tuple(PALETTE)
KINDS: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")
PLACES: tuple[tuple[str, ...], ...] = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
GRID = len(PLACES)
MAX_SHAPES = GRID * GRID
SUPERSAMPLING = 3


@dataclass(frozen=True)
class Shape:
    """One coloured shape of a scene.

    Attributes:
        kind: one of `KINDS`.
        colour: name of the colour, one of `COLOURS`.
        row: row of the grid cell, 0 at the top.
        column: column of the grid cell, 0 at the left.
        centre: (x, y) of the centre as fractions of the image side.
        radius: radius of the enclosing circle as a fraction of the image side.
        angle: rotation in degrees.
        tint: the RGB colour that is drawn, the palette colour plus jitter.
    """

    kind: str
    colour: str
    row: int
    column: int
    centre: Point
    radius: float
    angle: float
    tint: Colour

    @property
    def place(self) -> str:
        """Name of the grid cell, such as "top left" or "centre"."""
        return PLACES[self.row][self.column]


@dataclass(frozen=True)
class Scene:
    """Shapes on a plain background, at most one for each grid cell."""

    background: Colour
    shapes: tuple[Shape, ...]

    @property
    def layout(self) -> str:
        """What is in the scene and where, without jitter or background; equal for scenes that look alike."""
        cells = sorted((shape.row, shape.column, shape.colour, shape.kind) for shape in self.shapes)
        return ";".join(f"{row}{column} {colour} {kind}" for row, column, colour, kind in cells)


def random_scene(rng: random.Random, count: int | None = None, colours: tuple[str, ...] = COLOURS) -> Scene:
    """Draw a scene from the generator's distribution.

    Args:
        rng: source of every random choice; equal states give equal scenes.
        count: number of shapes, 1 to `MAX_SHAPES`; by default uniform in 1 to 5.
        colours: names the shapes' colours are drawn from, with repetition.

    Raises:
        ConfigError: if `count` does not fit the grid.
    """
    if count is None:
        count = rng.randint(1, 5)
    if not 1 <= count <= MAX_SHAPES:
        raise ConfigError(f"count={count} must be between 1 and {MAX_SHAPES}: the grid holds one shape for each cell.")
    cells = rng.sample([(row, column) for row in range(GRID) for column in range(GRID)], count)
    shapes = tuple(_random_shape(rng, rng.choice(KINDS), rng.choice(colours), row, column) for row, column in cells)
    grey = rng.randint(120, 190)
    background = (_jitter(rng, grey, 12), _jitter(rng, grey, 12), _jitter(rng, grey, 12))
    return Scene(background=background, shapes=shapes)


def describe_scene(scene: Scene) -> str:
    """One sentence naming every shape and its place, in reading order."""
    ordered = sorted(scene.shapes, key=lambda shape: (shape.row, shape.column))
    phrases = [f"{_article(shape.colour)} {shape.colour} {shape.kind} at the {shape.place}" for shape in ordered]
    listing = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return f"The image shows {listing}."


def render(scene: Scene, size: int) -> Image.Image:
    """Draw a scene as a square RGB image of `size` by `size` pixels, antialiased.

    Raises:
        ConfigError: if `size` is not positive.
    """
    if size < 1:
        raise ConfigError(f"size={size} must be a positive number of pixels.")
    side = size * SUPERSAMPLING
    image = Image.new("RGB", (side, side), scene.background)
    canvas = ImageDraw.Draw(image)
    for shape in scene.shapes:
        _draw(canvas, shape, side)
    return image.reduce(SUPERSAMPLING)


def _random_shape(rng: random.Random, kind: str, colour: str, row: int, column: int) -> Shape:
    pitch = 1 / GRID
    centre = (
        (column + 0.5 + rng.uniform(-0.07, 0.07)) * pitch,
        (row + 0.5 + rng.uniform(-0.07, 0.07)) * pitch,
    )
    red, green, blue = (_jitter(rng, channel, 14) for channel in PALETTE[colour])
    return Shape(
        kind=kind,
        colour=colour,
        row=row,
        column=column,
        centre=centre,
        radius=rng.uniform(0.115, 0.143),
        angle=rng.uniform(-10, 10),
        tint=(red, green, blue),
    )


def _jitter(rng: random.Random, channel: int, spread: int) -> int:
    return min(255, max(0, channel + rng.randint(-spread, spread)))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _draw(canvas: ImageDraw.ImageDraw, shape: Shape, side: int) -> None:
    x, y, radius = shape.centre[0] * side, shape.centre[1] * side, shape.radius * side
    if shape.kind in ("circle", "ring"):
        radius *= 0.9
        box = (x - radius, y - radius, x + radius, y + radius)
        if shape.kind == "circle":
            canvas.ellipse(box, fill=shape.tint)
        else:
            canvas.ellipse(box, outline=shape.tint, width=max(1, round(radius * 0.36)))
        return
    points = [(x + radius * u, y + radius * v) for u, v in _outline(shape.kind, math.radians(shape.angle))]
    canvas.polygon(points, fill=shape.tint)


def _outline(kind: str, angle: float) -> list[Point]:
    """Corners of a polygon inside the unit circle, turned by `angle` radians."""
    if kind == "square":
        corners = [(math.pi * (0.25 + 0.5 * index), 1.0) for index in range(4)]
    elif kind == "triangle":
        corners = [(math.pi * (-0.5 + 2 * index / 3), 1.0) for index in range(3)]
    elif kind == "star":
        corners = [(math.pi * (-0.5 + index / 5), 0.42 if index % 2 else 1.0) for index in range(10)]
    elif kind == "cross":
        return _turned(_CROSS, angle)
    else:
        raise ConfigError(f"kind={kind!r} is not a shape this module draws; choose one of {', '.join(KINDS)}.")
    return [(length * math.cos(theta + angle), length * math.sin(theta + angle)) for theta, length in corners]


def _turned(points: tuple[Point, ...], angle: float) -> list[Point]:
    cosine, sine = math.cos(angle), math.sin(angle)
    return [(u * cosine - v * sine, u * sine + v * cosine) for u, v in points]


_ARM, _REACH = 0.28, 0.93
_CROSS: tuple[Point, ...] = (
    (-_ARM, -_REACH),
    (_ARM, -_REACH),
    (_ARM, -_ARM),
    (_REACH, -_ARM),
    (_REACH, _ARM),
    (_ARM, _ARM),
    (_ARM, _REACH),
    (-_ARM, _REACH),
    (-_ARM, _ARM),
    (-_REACH, _ARM),
    (-_REACH, -_ARM),
    (-_ARM, -_ARM),
)
