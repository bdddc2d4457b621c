"""The six tasks of the embedded example and their questions.

Held out means never trained on. Every question hangs on a key that says what is in it: the layout of a scene (which
shape of which colour in which cell), the number on a sign, the facts of a text. Some keys are reserved (see
`optimum_sab.data.held_out`); `held_out_questions` draws only those, `training_conversation` never does. A held-out
question is thus a new combination of known parts: its layout, number or facts occur in no training example.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from optimum_sab.data.chat import Turn
from optimum_sab.data.documents import number_sign
from optimum_sab.data.documents import render as render_document
from optimum_sab.data.held_out import draw
from optimum_sab.data.questions import SCENE_TASKS, scene_turns
from optimum_sab.data.scenes import GRID, Scene, random_scene
from optimum_sab.data.scenes import render as render_scene
from optimum_sab.errors import ConfigError

TASKS: tuple[str, ...] = ("colour", "shape", "counting", "position", "reading", "text")
SUBJECTS: tuple[str, ...] = ("scene", "sign", "text")
IMAGE_SIZE = 112
NOTHING = "none"

NAMES = ("Tom", "Ann", "Sam", "Eva", "Ben", "Mia", "Leo", "Zoe", "Max", "Ivy", "Dan", "Amy", "Jon", "Kim", "Ned", "Sue")
THINGS = (
    "ball", "key", "book", "cup", "hat", "map", "pen", "bag", "coin", "lamp",
    "rope", "drum", "ring", "box", "bell", "fork", "kite", "shoe", "card", "comb",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One question and the only answer that counts as right.

    Attributes:
        task: one of `TASKS`.
        image: the picture asked about, None for the `text` task.
        prompt: what the user says.
        answer: what the model must answer, exactly.
        key: what the question is about; reserved or not, see `optimum_sab.data.held_out`.
    """

    task: str
    image: Image.Image | None
    prompt: str
    answer: str
    key: str


@dataclass(frozen=True)
class Conversation:
    """Several turns, about one picture if there is one; what the example model is trained on."""

    image: Image.Image | None
    turns: tuple[Turn, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """A short text whose statements answer questions.

    Attributes:
        passage: the sentences that come before the question.
        key: what is stated, whatever will be asked.
        turns: the questions it can answer, without the passage.
    """

    passage: str
    key: str
    turns: tuple[Turn, ...]


def held_out_questions(task: str, count: int, seed: int) -> list[Question]:
    """Questions that training never draws; equal seeds give equal questions.

    Args:
        task: one of `TASKS`.
        count: number of questions.
        seed: seed of the generator.

    Raises:
        ConfigError: if the task is unknown or `count` is not positive.
    """
    return _questions(task, count, random.Random(f"held out {task} {seed}"), reserved=True)


def training_questions(task: str, count: int, seed: int) -> list[Question]:
    """Single questions from the part that training draws from, for calibration and for comparison.

    Args:
        task: one of `TASKS`.
        count: number of questions.
        seed: seed of the generator.

    Raises:
        ConfigError: if the task is unknown or `count` is not positive.
    """
    return _questions(task, count, random.Random(f"training {task} {seed}"), reserved=False)


def check_asked(task: str, known: Sequence[str], count: int) -> None:
    """Refuse to ask what is no task, or nothing.

    Raises:
        ConfigError: if the task is not one of `known` or `count` is not positive.
    """
    if task not in known:
        raise ConfigError(f"task={task!r} is unknown; choose one of {', '.join(known)}.")
    if count < 1:
        raise ConfigError(f"count={count} must be at least 1.")


def training_conversation(rng: random.Random, about: str) -> Conversation:
    """Draw a training conversation: the tasks' questions in random order, then one question that asks for everything.

    That last turn, which some scenes and every text have, belongs to no task. It has the model spell out every
    cell of the scene, or repeat a list, and teaches where things are much sooner than the tasks' short answers do.
    Coming last, it gives none of them away.

    Args:
        rng: source of every random choice.
        about: what it is about, one of `SUBJECTS`: "scene" asks about one scene, "sign" about one sign and
            a text, "text" about three texts without a picture.

    Raises:
        ConfigError: if `about` is unknown.
    """
    if about not in SUBJECTS:
        raise ConfigError(f"about={about!r} is unknown; choose one of {', '.join(SUBJECTS)}.")
    if about == "scene":
        scene = training_scene(rng)
        turns = [turn for task in SCENE_TASKS for turn in scene_turns(task, scene)]
        rng.shuffle(turns)
        turns = [*turns[:7], inventory(scene)] if rng.random() < 0.3 else turns[:9]
        return Conversation(render_scene(scene, IMAGE_SIZE), tuple(turns), (scene.layout,))
    facts = [draw(rng, random_facts, lambda facts: facts.key, reserved=False) for _ in range(3)]
    turns = [turn for each in facts for turn in _discussed(each, rng, questions=3)]
    keys = tuple(each.key for each in facts)
    if about == "text":
        words = " ".join(rng.sample(THINGS, rng.randint(3, 12)))
        return Conversation(None, (*turns, Turn(f"Repeat: {words}", words)), keys)
    number = training_number(rng)
    sign = number_sign(number, rng)
    asked = list(sign.questions)
    rng.shuffle(asked)
    return Conversation(render_document(sign, IMAGE_SIZE), (*asked, *turns[:3]), (str(number), keys[0]))


def training_scene(rng: random.Random) -> Scene:
    """Draw a scene from the part that training may see."""
    return draw(rng, random_scene, lambda scene: scene.layout, reserved=False)


def training_number(rng: random.Random) -> int:
    """Draw the number of a sign from the part that training may see."""
    return draw(rng, _random_number, str, reserved=False)


def inventory(scene: Scene) -> Turn:
    """The question for all nine cells in reading order."""
    cells = {(shape.row, shape.column): f"{shape.colour} {shape.kind}" for shape in scene.shapes}
    places = [(row, column) for row in range(GRID) for column in range(GRID)]
    return Turn("List the cells.", " ".join(cells.get(place, NOTHING) for place in places))


def random_facts(rng: random.Random) -> Facts:
    """Draw a text that states who has what, or lists things in order; what training draws from."""
    if rng.random() < 0.5:
        return random_list(rng)
    count = rng.choice((2, 2, 3))
    names, things = rng.sample(NAMES, count), rng.sample(THINGS, count)
    passage = " ".join(f"{name} has the {thing}." for name, thing in zip(names, things, strict=True))
    turns = [Turn(f"Who has the {thing}?", name) for name, thing in zip(names, things, strict=True)]
    turns += [Turn(f"What does {name} have?", thing) for name, thing in zip(names, things, strict=True)]
    return Facts(passage=passage, key=passage, turns=tuple(turns))


def random_list(rng: random.Random) -> Facts:
    """Draw a list of three to five things; its first two questions ask for the first and the last.

    Those two are the `text` task. The others, and who has what, are trained on too, but a model of this size answers
    them little better than by chance, so the task does not ask them.
    """
    things = rng.sample(THINGS, rng.randint(3, 5))
    turns = [Turn("What is the first word of the list?", things[0])]
    turns += [Turn("What is the last word of the list?", things[-1])]
    turns += [Turn(f"What comes after {before}?", after) for before, after in zip(things, things[1:], strict=False)]
    passage = f"List: {', '.join(things)}."
    return Facts(passage=passage, key=passage, turns=tuple(turns))


def _questions(task: str, count: int, rng: random.Random, reserved: bool) -> list[Question]:
    check_asked(task, TASKS, count)
    return [_ASK[task](rng, reserved) for _ in range(count)]


def _ask_about_scene(task: str) -> Callable[[random.Random, bool], Question]:
    def ask(rng: random.Random, reserved: bool) -> Question:
        scene = draw(rng, random_scene, lambda scene: scene.layout, reserved)
        while not (turns := scene_turns(task, scene)):
            scene = draw(rng, random_scene, lambda scene: scene.layout, reserved)
        turn = rng.choice(turns)
        return Question(task, render_scene(scene, IMAGE_SIZE), turn.prompt, turn.answer, scene.layout)

    return ask


def _ask_to_read(rng: random.Random, reserved: bool) -> Question:
    number = draw(rng, _random_number, str, reserved)
    sign = number_sign(number, rng)
    asked = sign.questions[0]
    return Question("reading", render_document(sign, IMAGE_SIZE), asked.prompt, asked.answer, str(number))


def _ask_about_text(rng: random.Random, reserved: bool) -> Question:
    facts = draw(rng, random_list, lambda facts: facts.key, reserved)
    turn = _posed(facts, rng.choice(facts.turns[:2]))
    return Question("text", None, turn.prompt, turn.answer, facts.key)


_ASK: dict[str, Callable[[random.Random, bool], Question]] = {
    **{task: _ask_about_scene(task) for task in SCENE_TASKS},
    "reading": _ask_to_read,
    "text": _ask_about_text,
}


def _discussed(facts: Facts, rng: random.Random, questions: int) -> list[Turn]:
    """Several questions about the same facts, which are stated with the first one."""
    first, *others = rng.sample(facts.turns, questions)
    return [_posed(facts, first), *others]


def _posed(facts: Facts, turn: Turn) -> Turn:
    return Turn(f"{facts.passage} {turn.prompt}", turn.answer)


def _random_number(rng: random.Random) -> int:
    return rng.randint(10, 999)
