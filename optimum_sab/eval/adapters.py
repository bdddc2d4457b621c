"""What an adapter gives back: `python -m optimum_sab.eval.adapters --seeds 0 1 2`.

Quantizes the embedded example with the default settings, trains LoRA beside the packed layers on conversations of the
example's own training, and asks held-out questions before and after. Needs the extra `adapters`.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from optimum_sab.core.bounds import check_integer
from optimum_sab.core.refinement import MOST_STEPS
from optimum_sab.errors import MissingDependencyError
from optimum_sab.example import checkpoint_path
from optimum_sab.example.demonstration import COMPUTE, draw_questions
from optimum_sab.example.evaluation import evaluate
from optimum_sab.example.learning_rate import cosine_rates
from optimum_sab.example.optimization import Journal, Outcome, optimize
from optimum_sab.example.tasks import TASKS
from optimum_sab.example.training import TrainingSettings, batches, weighted_loss
from optimum_sab.failure import one_line
from optimum_sab.hf.auto import AutoModelForVision2Seq
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.processor import load_processor
from optimum_sab.json_values import json_line
from optimum_sab.nn.linear import SABLinear
from optimum_sab.presets import MOST_SAMPLES, MOST_SEED

Accuracy = dict[str, float]  # share of right answers, 0 to 1, by task


@dataclass(frozen=True)
class AdapterSettings:
    """LoRA on every packed layer, and its training.

    Attributes:
        rank: of the adapter.
        alpha: the adapter's output is scaled by this over the rank.
        steps: of the optimizer (AdamW).
        learning_rate: peak of the cosine schedule.
        warmup: steps of linear warm-up.
        scenes: conversations about scenes in a step.
        signs: conversations about signs in a step.
        texts: conversations without a picture in a step.
    """

    rank: int = 4
    alpha: int = 8
    steps: int = 80
    learning_rate: float = 5e-3
    warmup: int = 8
    scenes: int = 2
    signs: int = 1
    texts: int = 4


@dataclass(frozen=True)
class Recovery:
    """What one adapter gave back.

    Attributes:
        seed: of calibration, adapter and training conversations.
        share: parameters of the adapter over those of the dense model, 0 to 1.
        packed: accuracy of the packed model.
        adapted: accuracy with the adapter.
        losses: mean over the first and over the last tenth of the training steps.
        seconds: of the training.
    """

    seed: int
    share: float
    packed: Accuracy
    adapted: Accuracy
    losses: tuple[float, float]
    seconds: float


class Trial:
    """The embedded example, and the held-out questions that every model of it is asked."""

    def __init__(self, questions: int) -> None:
        self.source = checkpoint_path()
        self.processor = load_processor(self.source)
        self.questions = draw_questions(questions, 0)
        self.parameters = self.load(self.source).num_parameters()

    def load(self, source: Path, **options: Any) -> Any:
        return AutoModelForVision2Seq.from_pretrained(source, dtype=COMPUTE, **options)

    def accuracy(self, model: Any) -> Accuracy:
        """Of a model with or without an adapter."""
        scores = evaluate(model.eval(), self.processor, self.questions)
        return {task: scores.score(task).accuracy for task in TASKS}

    def recover(self, seed: int, settings: AdapterSettings, packed: Path | None = None) -> Recovery:
        """Quantize with the default settings, train an adapter, and compare.

        Args:
            seed: of calibration, adapter and training conversations.
            settings: of the adapter.
            packed: a packed checkpoint of the example to adapt; None quantizes.
        """
        config = None if packed else SABConfig(seed=seed, progress="none")
        model = self.load(packed or self.source, **({"quantization_config": config} if config else {}))
        before = self.accuracy(model)
        torch.manual_seed(seed)
        add_adapter(model, settings)
        started = time.perf_counter()
        losses = train(model, self.processor, settings, seed)
        seconds = time.perf_counter() - started
        share = sum(each.numel() for each in model.parameters() if each.requires_grad) / self.parameters
        ends = max(1, settings.steps // 10)
        first, last = statistics.mean(losses[:ends]), statistics.mean(losses[-ends:])
        return Recovery(seed, share, before, self.accuracy(model), (first, last), seconds)


def check_peft() -> None:
    """Whether PEFT is there.

    Raises:
        MissingDependencyError: it is not.
    """
    try:
        importlib.import_module("peft")
    except ImportError as error:
        raise MissingDependencyError("adapters need PEFT: pip install 'optimum-sab[adapters]'.") from error


def add_adapter(model: Any, settings: AdapterSettings) -> None:
    """Put LoRA beside every packed layer, in place; nothing else is trained."""
    from peft import LoraConfig, get_peft_model

    targets = [name for name, each in model.named_modules() if isinstance(each, SABLinear)]
    get_peft_model(model, LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets))


def train(model: Any, processor: Any, settings: AdapterSettings, seed: int) -> list[float]:
    """Train what has gradients on conversations of the example's training; the loss of every step."""
    given = TrainingSettings(scenes=settings.scenes, signs=settings.signs, texts=settings.texts, seed=seed)
    losses: list[float] = []

    def converse(batch: Any) -> Outcome:
        loss = weighted_loss(model, batch)
        losses.append(loss.item())
        return Outcome(loss)

    trained = [each for each in model.parameters() if each.requires_grad]
    model.train()
    optimize(
        Journal(f"seed {seed}, step", report=_progress, report_every=20),
        converse,
        batches(processor, given),
        [torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.0)],
        cosine_rates(settings.learning_rate, settings.steps, settings.warmup),
        clipped=trained,
    )
    return losses


def _progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def table(dense: Accuracy, rows: Sequence[Recovery]) -> Iterator[str]:
    """A line for each task, then what the adapters cost."""
    yield "task         dense   " + "  ".join(f"seed {row.seed}: packed → adapted" for row in rows)
    for task in TASKS:
        parts = "  ".join(f"        {row.packed[task]:6.1%} → {row.adapted[task]:<7.1%}" for row in rows)
        yield f"{task:<10} {dense[task]:>7.1%}   {parts}"
    for row in rows:
        first, last = row.losses
        yield (
            f"seed {row.seed}: adapter {row.share:.2%} of the parameters; loss {first:.3f} → {last:.3f}; "
            f"{row.seconds:.0f} s of training"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 if everything was measured, 2 if it cannot be, with the reason on standard error."""
    defaults = AdapterSettings()
    parser = argparse.ArgumentParser(prog="python -m optimum_sab.eval.adapters", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default: 0")
    parser.add_argument("--questions", type=int, default=100, metavar="N", help="held-out ones per task; default: 100")
    parser.add_argument("--steps", type=int, default=defaults.steps, metavar="N", help=f"default: {defaults.steps}")
    parser.add_argument("--packed", type=Path, metavar="DIR", help="adapt this packed example, quantize none")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    try:
        check_integer("steps", given.steps, 1, MOST_STEPS)
        check_integer("questions", given.questions, 1, MOST_SAMPLES)
        for seed in given.seeds:
            check_integer("seed", seed, 0, MOST_SEED)
        check_peft()
        trial = Trial(given.questions)
        dense = trial.accuracy(trial.load(trial.source))
        settings = AdapterSettings(steps=given.steps)
        rows = [trial.recover(seed, settings, given.packed) for seed in given.seeds]
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        sys.stderr.write(f"error: {line}\n")
        return 2
    if given.json:
        sys.stdout.write(json_line({"dense": dense, "rows": [asdict(row) for row in rows]}) + "\n")
    else:
        sys.stdout.write("\n".join(table(dense, rows)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
