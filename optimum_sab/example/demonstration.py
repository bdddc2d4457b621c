"""Quantize the embedded example, reload it in a process that knows nothing of the calibration, and compare."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from optimum_sab.errors import SABError
from optimum_sab.example import checkpoint_path
from optimum_sab.example.evaluation import evaluate, question_messages
from optimum_sab.example.tasks import TASKS, Question, held_out_questions
from optimum_sab.hf.auto import AutoModelForVision2Seq
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.estimate import expected_bytes
from optimum_sab.hf.inventory import read_inventory
from optimum_sab.hf.output.place import check_output, check_size
from optimum_sab.hf.output.saving import save_packed
from optimum_sab.hf.processor import load_processor

LOGITS_FILE = "probe.pt"
COMPUTE = torch.float32  # a processor without bfloat16 instructions takes three times as long in the checkpoint's dtype


@dataclass(frozen=True)
class TaskComparison:
    """Share of right answers of one task, 0 to 1, before and after."""

    dense: float
    packed: float


@dataclass(frozen=True)
class Demonstration:
    """What the demonstration found.

    Attributes:
        tasks: accuracy per task.
        bits_per_weight: of the binarized linears, from stored bytes.
        bytes_dense: weight files of the dense checkpoint.
        bytes_packed: weight files of the packed checkpoint.
        linear_bytes_dense: the binarized linears' weights in the dense checkpoint.
        linear_bytes_packed: the same linears packed.
        seconds: wall time in all.
        reload_identical: whether the reloaded model's logits equal the quantized model's bit for bit.
    """

    tasks: dict[str, TaskComparison]
    bits_per_weight: float
    bytes_dense: int
    bytes_packed: int
    linear_bytes_dense: int
    linear_bytes_packed: int
    seconds: float
    reload_identical: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def demonstrate(config: SABConfig, output: Path, questions: int = 100, seed: int = 0) -> Demonstration:
    """Run the whole path on the embedded example.

    Args:
        config: how to binarize.
        output: where the packed checkpoint goes; must not exist or be empty.
        questions: held-out questions per task.
        seed: of the questions.

    Raises:
        OutputExistsError, OutputError: see `check_output` and `check_size`.
    """
    started = time.perf_counter()
    source = checkpoint_path()
    where = check_output(output, sources=(source,))
    described = AutoConfig.from_pretrained(source)
    stored: torch.dtype = described.dtype
    check_size(where, expected_bytes(AutoModelForVision2Seq, described, config, stored))
    asked = draw_questions(questions, seed)
    processor = load_processor(source)
    dense = AutoModelForVision2Seq.from_pretrained(source, dtype=COMPUTE)
    before = evaluate(dense, processor, asked)
    model = AutoModelForVision2Seq.from_pretrained(source, dtype=COMPUTE, quantization_config=config)
    made = {name: buffer.clone() for name, buffer in model.named_buffers()}
    save_packed(model.to(stored), processor, where)
    _give_back(model.to(COMPUTE), made)
    logits = probe_logits(model, processor, asked)
    after = _evaluate_in_fresh_process(output, questions, seed)
    inventory = read_inventory(output)
    return Demonstration(
        tasks={t: TaskComparison(before.score(t).accuracy, after["tasks"][t]) for t in TASKS},
        bits_per_weight=inventory.bits_per_weight,
        bytes_dense=_weight_bytes(source),
        bytes_packed=_weight_bytes(output),
        linear_bytes_dense=sum(m.out_features * m.in_features * stored.itemsize for m in inventory.modules),
        linear_bytes_packed=inventory.packed_bytes,
        seconds=time.perf_counter() - started,
        reload_identical=torch.equal(logits, after["logits"]),
    )


def draw_questions(count: int, seed: int) -> list[Question]:
    """``count`` held-out questions of every task."""
    return [question for task in TASKS for question in held_out_questions(task, count, seed)]


def _give_back(model: nn.Module, made: dict[str, Tensor]) -> None:
    """Buffers as they were before the model was cast to be stored.

    Those that are not stored (a rotary embedding's frequencies) are made in float32 by whoever reads the checkpoint.
    """
    for name, buffer in model.named_buffers():
        buffer.copy_(made[name])


@torch.inference_mode()
def probe_logits(model: Any, processor: Any, questions: list[Question]) -> Tensor:
    """Logits of the first question, [tokens, vocabulary]."""
    inputs = processor.apply_chat_template(
        question_messages(questions[0]),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    logits: Tensor = model(**inputs).logits[0]
    return logits.clone()


def _evaluate_in_fresh_process(packed: Path, questions: int, seed: int) -> dict[str, Any]:
    """Evaluate a packed checkpoint in its own process: task accuracies, and the logits of the probe."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / LOGITS_FILE
        command = [
            sys.executable,
            "-m",
            "optimum_sab.example.demonstration",
            str(packed),
            str(questions),
            str(seed),
            str(result),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SABError(f"the packed checkpoint could not be evaluated in a fresh process:\n{done.stderr[-2000:]}")
        return {"tasks": json.loads(done.stdout.splitlines()[-1]), "logits": torch.load(result, weights_only=True)}


def _reload_and_evaluate(packed: str, questions: int, seed: int, result: str) -> None:
    """What the fresh process does."""
    processor = load_processor(packed)
    model = AutoModelForVision2Seq.from_pretrained(packed, dtype=COMPUTE)
    asked = draw_questions(questions, seed)
    torch.save(probe_logits(model, processor, asked), result)
    scores = evaluate(model, processor, asked)
    sys.stdout.write(json.dumps({task: scores.score(task).accuracy for task in TASKS}) + "\n")


def _weight_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


if __name__ == "__main__":
    _reload_and_evaluate(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
