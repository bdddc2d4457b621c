"""Procedural pictures of text: signs, labels, receipts, tables and forms, each with questions and answers.

A document is rows of text cells, whatever it stands for. One renderer lays the rows out, so a document renders at any
size; small print needs pixels, and only `sign` stays legible below about 300. The typeface is the one inside Pillow.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

from optimum_sab.data.chat import Turn
from optimum_sab.data.typeface import typeface
from optimum_sab.errors import ConfigError

Colour = tuple[int, int, int]

MARGIN = 0.07
MAX_ROW_HEIGHT = 0.55
FILL = 0.72

GOODS = ("bread", "milk", "tea", "rice", "apples", "soap", "paper", "eggs", "honey", "salt", "lamp", "rope", "nails")
PEOPLE = ("Ada", "Ben", "Carla", "Dmitri", "Eve", "Farid", "Grace", "Hiro", "Ines", "Jonas", "Kim", "Lena")
TOWNS = ("Lisbon", "Oslo", "Quito", "Kyoto", "Accra", "Turin", "Leeds", "Perth", "Lima", "Graz", "Pune", "Malmo")
SHOPS = ("CORNER SHOP", "CITY MARKET", "OLD MILL STORE", "HARBOUR FOODS", "STATION KIOSK")
NOTICES = ("EXIT", "OPEN", "CLOSED", "STOP", "PUSH", "PULL", "TICKETS", "PARKING", "NO ENTRY", "WET PAINT", "SALE")


@dataclass(frozen=True)
class Document:
    """Rows of text on a coloured page.

    Attributes:
        kind: one of `KINDS`.
        rows: the cells of each row from top to bottom; a row of one cell is centred, others are spread over columns.
        ruled: whether lines are drawn between rows and columns.
        ink: RGB colour of text and lines.
        paper: RGB colour of the page.
        shift: (x, y) displacement of the text as fractions of the image side.
        scale: multiplies the largest type that fits; 1 fills the page.
        questions: what can be asked of the document; the answers are printed in it, or follow from what is printed.
    """

    kind: str
    rows: tuple[tuple[str, ...], ...]
    ruled: bool
    ink: Colour
    paper: Colour
    shift: tuple[float, float]
    scale: float
    questions: tuple[Turn, ...]

    @property
    def text(self) -> str:
        """Everything printed on the page, row by row."""
        return "\n".join(" ".join(row) for row in self.rows)


def random_document(rng: random.Random, kind: str | None = None) -> Document:
    """Draw a document from the generator's distribution.

    Args:
        rng: source of every random choice; equal states give equal documents.
        kind: one of `KINDS`; by default any of them.

    Raises:
        ConfigError: if `kind` is unknown.
    """
    kind = rng.choice(KINDS) if kind is None else kind
    if kind not in _WRITERS:
        raise ConfigError(f"kind={kind!r} is not a document this module draws; choose one of {', '.join(KINDS)}.")
    return _WRITERS[kind](rng)


def number_sign(number: int, rng: random.Random) -> Document:
    """A sign that shows one number in large type.

    Args:
        number: what the sign shows.
        rng: source of the sign's colours, position and type size.
    """
    digits = str(number)
    questions = (
        Turn("What number is shown?", digits),
        Turn("What is the first digit?", digits[0]),
        Turn("What is the last digit?", digits[-1]),
    )
    return _sheet(rng, "sign", ((digits,),), questions)


def render(document: Document, size: int) -> Image.Image:
    """Draw a document as a square RGB image of `size` by `size` pixels.

    Raises:
        ConfigError: if `size` is too small to hold the document's rows.
    """
    height = min(size * (1 - 2 * MARGIN) / len(document.rows), MAX_ROW_HEIGHT * size)
    type_size = round(document.scale * min(FILL * height, *(_fitting_size(row, size) for row in document.rows)))
    if type_size < 4:
        raise ConfigError(f"size={size} is too small for a document of {len(document.rows)} rows; use 300 or more.")
    image = Image.new("RGB", (size, size), document.paper)
    canvas = ImageDraw.Draw(image)
    top = (size - height * len(document.rows)) / 2
    for index, row in enumerate(document.rows):
        y = top + (index + 0.5) * height
        for x, cell in zip(_cell_centres(row, size), row, strict=True):
            place = (x + document.shift[0] * size, y + document.shift[1] * size)
            canvas.text(place, cell, fill=document.ink, font=typeface(type_size), anchor="mm")
    if document.ruled:
        _rule(canvas, document, size, top, height)
    return image


def _fitting_size(row: tuple[str, ...], size: int) -> float:
    """Largest type size, in pixels, at which every cell of a row fits its column."""
    reference = 100
    longest = max(typeface(reference).getlength(cell) for cell in row)
    column = size * (1 - 2 * MARGIN) / len(row)
    return 0.94 * reference * column / longest


def _cell_centres(row: tuple[str, ...], size: int) -> list[float]:
    column = size * (1 - 2 * MARGIN) / len(row)
    return [size * MARGIN + (index + 0.5) * column for index in range(len(row))]


def _rule(canvas: ImageDraw.ImageDraw, document: Document, size: int, top: float, height: float) -> None:
    left, right = size * MARGIN, size * (1 - MARGIN)
    width = max(1, size // 220)
    for index in range(len(document.rows) + 1):
        y = top + index * height
        canvas.line((left, y, right, y), fill=document.ink, width=width)
    for x in (left, right):
        canvas.line((x, top, x, top + height * len(document.rows)), fill=document.ink, width=width)


def _sheet(
    rng: random.Random,
    kind: str,
    rows: tuple[tuple[str, ...], ...],
    questions: tuple[Turn, ...],
    ruled: bool = False,
) -> Document:
    dark = (rng.randint(0, 90), rng.randint(0, 90), rng.randint(0, 90))
    light = (rng.randint(185, 255), rng.randint(185, 255), rng.randint(185, 255))
    ink, paper = (light, dark) if kind in ("sign", "label") and rng.random() < 0.4 else (dark, light)
    reach = 0.04 if kind == "sign" else 0.01
    return Document(
        kind=kind,
        rows=rows,
        ruled=ruled,
        ink=ink,
        paper=paper,
        shift=(rng.uniform(-reach, reach), rng.uniform(-reach, reach)),
        scale=rng.uniform(0.8, 1.0),
        questions=questions,
    )


def _sign(rng: random.Random) -> Document:
    if rng.random() < 0.5:
        return number_sign(rng.randint(10, 9999), rng)
    notice = rng.choice(NOTICES)
    questions = (Turn("What does the sign say?", notice),)
    return _sheet(rng, "sign", tuple((word,) for word in notice.split()), questions)


def _label(rng: random.Random) -> Document:
    person, town = rng.choice(PEOPLE), rng.choice(TOWNS)
    street, postcode = rng.randint(1, 199), rng.randint(1000, 99999)
    rows = ((person,), (f"{street} {rng.choice(('Mill', 'High', 'North', 'Park'))} Street",), (f"{postcode} {town}",))
    questions = (
        Turn("To whom is the parcel addressed?", person),
        Turn("To which town does it go?", town),
        Turn("What is the postcode?", str(postcode)),
        Turn("What is the house number?", str(street)),
    )
    return _sheet(rng, "label", rows, questions)


def _receipt(rng: random.Random) -> Document:
    goods = rng.sample(GOODS, rng.randint(2, 5))
    prices = [rng.randint(50, 1999) for _ in goods]
    shop = rng.choice(SHOPS)
    lines = tuple((good, _money(price)) for good, price in zip(goods, prices, strict=True))
    rows = ((shop,), *lines, ("TOTAL", _money(sum(prices))))
    asked = rng.randrange(len(goods))
    questions = (
        Turn("What is the total?", _money(sum(prices))),
        Turn(f"How much was the {goods[asked]}?", _money(prices[asked])),
        Turn("Which shop is this receipt from?", shop),
        Turn("How many items were bought?", str(len(goods))),
    )
    return _sheet(rng, "receipt", rows, questions)


def _table(rng: random.Random) -> Document:
    years = sorted(rng.sample(range(2001, 2030), 2))
    towns = rng.sample(TOWNS, rng.randint(3, 5))
    counts = {(town, year): rng.randint(10, 999) for town in towns for year in years}
    head = ("Town", *(str(year) for year in years))
    rows = (head, *((town, *(str(counts[town, year]) for year in years)) for town in towns))
    town, year = rng.choice(towns), rng.choice(years)
    leader = max(towns, key=lambda name: counts[name, year])
    questions = [
        Turn(f"What is the value for {town} in {year}?", str(counts[town, year])),
        Turn("How many towns are listed?", str(len(towns))),
    ]
    if sum(counts[name, year] == counts[leader, year] for name in towns) == 1:
        questions.append(Turn(f"Which town has the highest value in {year}?", leader))
    return _sheet(rng, "table", rows, tuple(questions), ruled=True)


def _form(rng: random.Random) -> Document:
    fields = {
        "Name": rng.choice(PEOPLE),
        "Town": rng.choice(TOWNS),
        "Age": str(rng.randint(18, 90)),
        "Room": str(rng.randint(100, 999)),
        "Date": f"{rng.randint(1, 28)}/{rng.randint(1, 12)}/{rng.randint(2001, 2030)}",
    }
    names = rng.sample(sorted(fields), rng.randint(3, 5))
    rows = (("REGISTRATION",), *((f"{name}:", fields[name]) for name in names))
    questions = tuple(Turn(f"What is entered under {name}?", fields[name]) for name in names)
    return _sheet(rng, "form", rows, questions, ruled=True)


def _money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


_WRITERS: dict[str, Callable[[random.Random], Document]] = {
    "sign": _sign,
    "label": _label,
    "receipt": _receipt,
    "table": _table,
    "form": _form,
}
KINDS: tuple[str, ...] = tuple(_WRITERS)
