"""Questions a scene answers unambiguously, by kind of question."""

from collections.abc import Callable

from optimum_sab.data.chat import Turn
from optimum_sab.data.scenes import Scene, Shape
from optimum_sab.errors import ConfigError

SCENE_TASKS = ("colour", "shape", "counting", "position")


def scene_turns(task: str, scene: Scene) -> list[Turn]:
    """Every question of a task that the scene answers unambiguously; empty if there is none.

    Raises:
        ConfigError: if the task is not about scenes.
    """
    if task == "colour":
        return [Turn(f"What colour is the {each.kind}?", each.colour) for each in _unique(scene, lambda s: s.kind)]
    if task == "shape":
        return [Turn(f"What shape is {each.colour}?", each.kind) for each in _unique(scene, lambda s: s.colour)]
    if task == "counting":
        return [Turn("How many shapes are there?", str(len(scene.shapes)))]
    if task == "position":
        subjects = _unique(scene, lambda s: (s.colour, s.kind))
        return [Turn(f"Where is the {each.colour} {each.kind}?", each.place) for each in subjects]
    raise ConfigError(f"task={task!r} is not about scenes; choose one of {', '.join(SCENE_TASKS)}.")


def _unique(scene: Scene, feature: Callable[[Shape], object]) -> list[Shape]:
    features = [feature(shape) for shape in scene.shapes]
    return [shape for shape, own in zip(scene.shapes, features, strict=True) if features.count(own) == 1]
