"""Tokens per second and memory of a randomly initialised vision-language model, dense against packed."""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers import StaticCache

from optimum_sab.bench.conditions import Conditions
from optimum_sab.bench.environment import Environment, chosen_backend, describe_environment
from optimum_sab.bench.qwen import random_model, weight_bytes
from optimum_sab.bench.room import check_room
from optimum_sab.bench.timing import capture
from optimum_sab.bench.verification import WrongResultError
from optimum_sab.core.settings import LayerSettings
from optimum_sab.errors import ConfigError, SABError
from optimum_sab.hf.compat import CACHE_ARGUMENT

WARM_STEPS = 3
COMPILER = "inductor"  # of `torch.compile`
CACHE_MULTIPLE = 64  # cache lengths are rounded up to it, which attention kernels like


class CompilationError(SABError, RuntimeError):
    """A decode step that was to be timed cannot be compiled."""


@dataclass(frozen=True)
class GenerationTiming:
    """One model.

    Attributes:
        model: "dense" or "packed".
        prefill_tokens_per_second: prompt tokens over the time to the first new token, all sequences together.
        decode_tokens_per_second: new tokens over the time of their steps, all sequences together.
        peak_memory_bytes: most memory that torch had allocated on the device; None on the CPU.
        weight_bytes: of all parameters, as stored.
    """

    model: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int | None
    weight_bytes: int


@dataclass(frozen=True)
class GenerationReport:
    """Both models of one run, how they ran, and where.

    Attributes:
        environment: where.
        backend: of the packed linears.
        cuda_graphs: whether a decode step was one replayed graph.
        rows: dense, packed.
        ratios: packed over dense, per measured quantity; None where there is none.
    """

    environment: Environment
    backend: str
    cuda_graphs: bool
    rows: tuple[GenerationTiming, GenerationTiming]
    ratios: dict[str, float | None]


class GreedyDecoder:
    """Greedy decoding over a static cache, with one forward for the prompt and one per token.

    Everything a step reads and writes keeps its address, so that a step can be replayed as a CUDA graph. A compiled
    step's forward is one graph of `torch.compile`, or an error.

    Args:
        model: one of `bench.qwen`.
        prompt: ids [batch, tokens], text only.
        new_tokens: steps that `decode` makes.
        cuda_graphs: replay one captured step; needs CUDA.
        compiled: compile the forward of a step.

    Attributes:
        generated: ids [batch, 1 + new_tokens] of the last run: the prompt's successor, and one per step.
    """

    def __init__(self, model: Any, prompt: Tensor, new_tokens: int, cuda_graphs: bool, compiled: bool = False) -> None:
        batch, length = prompt.shape
        self.model = model
        self.prompt = prompt
        self.new_tokens = new_tokens
        self.cuda_graphs = cuda_graphs
        slots = cache_slots(length + new_tokens)
        self._cache = StaticCache(config=model.config, max_cache_len=slots)
        self._slots = torch.arange(slots, device=prompt.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=prompt.device)
        self._token = torch.zeros(batch, 1, dtype=torch.int64, device=prompt.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        # Transformers 4 is told where in the cache to write; 5 counts itself
        self._tell_position = "cache_position" in inspect.signature(model.forward).parameters
        self._next: Callable[[Tensor, Tensor], Tensor] = self._forward
        if compiled:
            self._next = torch.compile(self._forward, fullgraph=True, dynamic=False, backend=COMPILER)
        self.generated = torch.zeros(batch, 1 + new_tokens, dtype=torch.int64, device=prompt.device)

    @torch.no_grad()
    def warm_up(self) -> None:
        """Convert weights, compile kernels and capture the step; `prefill` afterwards starts anew.

        Raises:
            WrongResultError: the model computes NaN or inf.
            CaptureError: the step cannot be captured.
            CompilationError: it cannot be compiled.
        """
        logits = self._start()
        if not bool(torch.isfinite(logits).all()):
            raise WrongResultError(
                f"the logits of the {'x'.join(map(str, self.prompt.shape))} prompt are not finite; choose another "
                "--backend, or --dtype bfloat16 where it is float16."
            )
        try:
            for _ in range(min(WARM_STEPS, self.new_tokens)):
                self._step()
        except TorchDynamoException as error:
            said = " ".join(str(error).strip().splitlines()[:2])  # "backend='inductor' raised:" and what
            raise CompilationError(
                f"the decode step cannot be compiled: {said}. torch.compile needs a C++ compiler ($CXX, g++ or "
                "clang++); without --compile nothing is compiled."
            ) from error
        if self.cuda_graphs:
            self._start()
            with torch.cuda.device(self.prompt.device):
                self._graph = capture([self._step], "the decode step")

    @torch.no_grad()
    def prefill(self) -> None:
        """Read the prompt into an emptied cache and choose the first token."""
        self._start()

    @torch.no_grad()
    def decode(self) -> None:
        """``new_tokens`` further tokens after `prefill`."""
        for _ in range(self.new_tokens):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()

    def _start(self) -> Tensor:
        self._cache.reset()
        length = self.prompt.shape[1]
        logits = self._forward(self.prompt, self._slots[:length])
        self._token.copy_(logits.argmax(-1, keepdim=True))
        self.generated[:, :1] = self._token
        self._position.fill_(length)
        return logits

    def _step(self) -> None:
        logits = self._next(self._token, self._position)
        self._token.copy_(logits.argmax(-1, keepdim=True))
        self._position.add_(1)
        self.generated.index_copy_(1, self._position - self.prompt.shape[1], self._token)

    def _forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Logits [batch, vocabulary] behind the last of ``tokens`` [batch, n] at ``position`` [n]."""
        # mask and positions are given, because the library's own way to them may wait for the device
        mask = (self._slots[None, :] <= position[:, None])[None, None].expand(len(tokens), -1, -1, -1)
        output = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=position.expand(3, len(tokens), -1),
            use_cache=True,
            logits_to_keep=1,
            **{CACHE_ARGUMENT: self._cache},
            **({"cache_position": position} if self._tell_position else {}),
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def compare_generation(
    size: str,
    conditions: Conditions,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    batch: int = 1,
    cuda_graphs: bool | None = None,
) -> GenerationReport:
    """Time a dense and a packed model of one size, one after the other, on the same random prompt.

    Args:
        size: one of `bench.qwen.SIZES`.
        conditions: everything else.
        prompt_tokens: per sequence.
        new_tokens: per sequence, after the first one, which the prefill gives.
        batch: sequences.
        cuda_graphs: replay the decode step as a CUDA graph; None: on CUDA.

    Raises:
        ConfigError: a number is below 1, CUDA graphs are asked for without CUDA, the size is unknown, or
            the device has no room for the dense model.
        WrongResultError: a model computes NaN or inf.
        CaptureError: the decode step cannot be captured.
    """
    device, repeats = conditions.device, conditions.repeats
    check_numbers(prompt_tokens, new_tokens, batch, repeats)
    if cuda_graphs is None:
        cuda_graphs = device.type == "cuda"
    if cuda_graphs and device.type != "cuda":
        raise ConfigError(f"--cuda-graphs needs a CUDA device, not {str(device)!r}; use --no-cuda-graphs.")
    check_room(size, conditions, batch * cache_slots(prompt_tokens + new_tokens))

    def measure(name: str, settings: LayerSettings | None) -> GenerationTiming:
        _reset_memory(device)
        model = random_model(size, settings, device, conditions.dtype, conditions.seed)
        stored = weight_bytes(model)  # before the first forward, which may convert the packed weights
        prompt = random_prompt(model, batch, prompt_tokens, conditions)
        decoder = GreedyDecoder(model, prompt, new_tokens, cuda_graphs)
        decoder.warm_up()
        prefill, decode = zip(
            *((_seconds(decoder.prefill, device), _seconds(decoder.decode, device)) for _ in range(repeats))
        )
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return GenerationTiming(
            model=name,
            prefill_tokens_per_second=batch * prompt_tokens / statistics.median(prefill),
            decode_tokens_per_second=batch * new_tokens / statistics.median(decode),
            peak_memory_bytes=peak,
            weight_bytes=stored,
        )

    with chosen_backend(conditions.backend, device) as chosen:
        environment = describe_environment(device)
        rows = (measure("dense", None), measure("packed", conditions.settings))
    return GenerationReport(environment, chosen, cuda_graphs, rows, _ratios(*rows))


def check_numbers(prompt_tokens: int, new_tokens: int, batch: int, repeats: int) -> None:
    """Refuse what cannot be generated.

    Raises:
        ConfigError: names the first number below 1.
    """
    numbers = {"--prompt-tokens": prompt_tokens, "--new-tokens": new_tokens, "--batch": batch, "--repeats": repeats}
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{name} {value} must be at least 1.")


def random_prompt(model: Any, batch: int, tokens: int, conditions: Conditions) -> Tensor:
    """Ids [batch, tokens] of the model's vocabulary on the device."""
    generator = torch.Generator().manual_seed(conditions.seed)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (batch, tokens), generator=generator).to(conditions.device)


def cache_slots(tokens: int) -> int:
    """Tokens that the cache of a sequence has room for."""
    return -(-tokens // CACHE_MULTIPLE) * CACHE_MULTIPLE


def _ratios(dense: GenerationTiming, packed: GenerationTiming) -> dict[str, float | None]:
    ratios: dict[str, float | None] = {}
    for name in ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes", "weight_bytes"):
        above, below = getattr(packed, name), getattr(dense, name)
        ratios[name] = None if above is None else above / below
    return ratios


def _seconds(work: Any, device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
