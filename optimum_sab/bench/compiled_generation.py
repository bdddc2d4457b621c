"""Decoding on the CPU with steps that `torch.compile` has compiled, beside eager ones, dense against packed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from optimum_sab.bench import generate
from optimum_sab.bench.conditions import Conditions
from optimum_sab.bench.environment import Environment, chosen_backend, describe_environment
from optimum_sab.bench.generate import GreedyDecoder, cache_slots, check_numbers, random_prompt
from optimum_sab.bench.linear_overhead import PythonTime, python_seconds
from optimum_sab.bench.qwen import random_model
from optimum_sab.bench.room import check_room
from optimum_sab.bench.timing import call_seconds
from optimum_sab.errors import ConfigError


@dataclass(frozen=True)
class StepTiming:
    """One model in one way.

    Attributes:
        model: "dense" or "packed".
        compiled: whether its steps were.
        decode_tokens_per_second: new tokens over the time of their steps, all sequences together; median.
        first_seconds: of the first run, which compiles.
        python_seconds_per_linear: what a packed linear takes beside the kernel (`bench.linear_overhead`); None for
            dense ones, and where another backend computes.
        nothing_seconds_per_linear: what an operator takes in its place that computes nothing; None likewise.
    """

    model: str
    compiled: bool
    decode_tokens_per_second: float
    first_seconds: float
    python_seconds_per_linear: float | None
    nothing_seconds_per_linear: float | None


@dataclass(frozen=True)
class CompiledReport:
    """All of one run, and where.

    Attributes:
        environment: where.
        backend: of the packed linears.
        rows: dense and packed with eager steps, then with compiled ones.
        ratios: packed over dense in tokens per second: ``eager``, ``compiled``.
    """

    environment: Environment
    backend: str
    rows: tuple[StepTiming, ...]
    ratios: dict[str, float]


def compare_compiled(
    size: str, conditions: Conditions, prompt_tokens: int = 512, new_tokens: int = 64, batch: int = 1
) -> CompiledReport:
    """Time steps of a dense and of a packed model of one size, eager and compiled, in turns, on one random prompt.

    Both models are there at the same time, so that all four meet the same state of the machine.

    Args:
        size: one of `bench.qwen.SIZES`.
        conditions: everything else.
        prompt_tokens: per sequence.
        new_tokens: per sequence, after the first one, which the prefill gives.
        batch: sequences.

    Raises:
        ConfigError: a number is below 1, the device is no CPU, the size is unknown, or there is no room for two dense
            models.
        WrongResultError: a model computes NaN or inf.
        CompilationError: a step cannot be compiled.
    """
    device = conditions.device
    check_numbers(prompt_tokens, new_tokens, batch, conditions.repeats)
    if device.type != "cpu":
        raise ConfigError(
            f"--compile times steps on the CPU, not on {str(device)!r}, where a CUDA graph replays them; use "
            "--device cpu."
        )
    check_room(size, conditions, 4 * batch * cache_slots(prompt_tokens + new_tokens), models=2)
    with chosen_backend(conditions.backend, device) as chosen:
        environment = describe_environment(device)
        models = {
            name: random_model(size, settings, device, conditions.dtype, conditions.seed)
            for name, settings in (("dense", None), ("packed", conditions.settings))
        }
        prompt = random_prompt(models["dense"], batch, prompt_tokens, conditions)
        decoders = {
            (name, compiled): GreedyDecoder(model, prompt, new_tokens, cuda_graphs=False, compiled=compiled)
            for compiled in (False, True)
            for name, model in models.items()
        }
        first = {which: call_seconds(decoder.warm_up) for which, decoder in decoders.items()}
        samples: dict[tuple[str, bool], list[float]] = {which: [] for which in decoders}
        for _ in range(conditions.repeats):
            for which, decoder in decoders.items():
                decoder.prefill()
                samples[which].append(call_seconds(decoder.decode))
        python: list[PythonTime | None] = [None, None]
        if chosen == "cpu":
            python = [*python_seconds(models["packed"], batch, conditions.dtype, (None, generate.COMPILER))]
    speed = {which: batch * new_tokens / statistics.median(found) for which, found in samples.items()}
    rows = []
    for name, compiled in decoders:
        spent = python[compiled] if name == "packed" else None
        layer, nothing = (None, None) if spent is None else (spent.layer, spent.nothing)
        rows.append(StepTiming(name, compiled, speed[name, compiled], first[name, compiled], layer, nothing))
    ratios = {
        word: speed["packed", compiled] / speed["dense", compiled]
        for word, compiled in (("eager", False), ("compiled", True))
    }
    return CompiledReport(environment, chosen, tuple(rows), ratios)
