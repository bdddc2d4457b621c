"""Where the time and memory of quantizing go, stage by stage and part by part."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from optimum_sab.bench.environment import Environment, describe_environment
from optimum_sab.bench.parts import PartUse, PartWatch
from optimum_sab.calibration.pipeline import STAGES
from optimum_sab.calibration.run import Run
from optimum_sab.calibration.stage import run_stages
from optimum_sab.calibration.stages.answers import RememberAnswers
from optimum_sab.calibration.stages.examples import WriteAfter, WriteBefore
from optimum_sab.calibration.stages.samples import GivenSamples
from optimum_sab.core.parts import part, watched_by
from optimum_sab.errors import ConfigError
from optimum_sab.hf.config import SABConfig
from optimum_sab.hf.load import auto_class, model_config
from optimum_sab.hf.run_options import run_options
from optimum_sab.hf.selection import select
from optimum_sab.nn.scratch import staying_shared
from optimum_sab.nn.unfusing import unfuse_experts
from optimum_sab.wording import did_you_mean

_SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
# one block of the language model; its vocabulary is small, since only the block counts
_BLOCK_7B = {
    "vocab_size": 1024,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 1,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
_TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SIZES: Mapping[str, tuple[Any, Any, Mapping[str, Any]]] = {
    "smollm2": (LlamaForCausalLM, LlamaConfig, _SMOLLM2),
    "7b-block": (Qwen2ForCausalLM, Qwen2Config, _BLOCK_7B),
    "tiny": (LlamaForCausalLM, LlamaConfig, _TINY),
}
_MEMORY = ("peak_memory_bytes", "own_memory_bytes", "mapped_memory_bytes")


@dataclass(frozen=True)
class Part:
    """One part of the work: a stage, or what is done inside one.

    Attributes:
        name: of the part.
        use: what it took, without what is inside of it that has a name of its own.
        inside: the parts in it.
    """

    name: str
    use: PartUse
    inside: tuple[Part, ...] = ()

    @property
    def seconds(self) -> float:
        """Wall time with everything inside."""
        return self.use.seconds + sum(each.seconds for each in self.inside)

    @property
    def cpu_seconds(self) -> float:
        """Time of the process's threads with everything inside."""
        return self.use.cpu_seconds + sum(each.cpu_seconds for each in self.inside)

    @property
    def peak_memory_bytes(self) -> int:
        """Of it and everything inside."""
        return max([self.use.peak_memory_bytes, *(each.peak_memory_bytes for each in self.inside)])

    @property
    def own_memory_bytes(self) -> int:
        """The same of `PartUse.own_memory_bytes`."""
        return max([self.use.own_memory_bytes, *(each.own_memory_bytes for each in self.inside)])

    @property
    def mapped_memory_bytes(self) -> int:
        """The same of `PartUse.mapped_memory_bytes`."""
        return max([self.use.mapped_memory_bytes, *(each.mapped_memory_bytes for each in self.inside)])

    def as_json(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        own = {name: getattr(self, name) for name in ("name", "seconds", "cpu_seconds", *_MEMORY)}
        return {**own, "calls": self.use.calls, "inside": [each.as_json() for each in self.inside]}


@dataclass(frozen=True)
class QuantizingReport:
    """One model that was quantized.

    Attributes:
        environment: where.
        model: which.
        parts: loading, the stages and saving, in order.
        bits_per_weight: of the binarized linears.
        error: mean relative output error of the blocks' linears: as a check that two runs did the same.
    """

    environment: Environment
    model: str
    parts: tuple[Part, ...]
    bits_per_weight: float
    error: float

    def as_json(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        return {
            "environment": asdict(self.environment),
            "model": self.model,
            "bits_per_weight": self.bits_per_weight,
            "error": self.error,
            "seconds": sum(each.seconds for each in self.parts),
            "cpu_seconds": sum(each.cpu_seconds for each in self.parts),
            **{name: max(getattr(each, name) for each in self.parts) for name in _MEMORY},
            "stages": [each.as_json() for each in self.parts],
        }


@dataclass(frozen=True)
class QuantizingConditions:
    """What a run is told besides the model.

    Args:
        config: how to quantize; for a random model of it what needs no processor.
        device: where a random model is made; a checkpoint is loaded on the CPU.
        dtype: of the model.
        seed: of random weights and tokens.
    """

    config: SABConfig
    device: torch.device
    dtype: torch.dtype
    seed: int = 0


def measure_checkpoint(folder: str, conditions: QuantizingConditions) -> QuantizingReport:
    """Quantize a checkpoint as `from_pretrained` does, and save it to a place that is thrown away.

    Args:
        folder: the dense checkpoint.
        conditions: everything else.

    Raises:
        SABError: as quantizing does.
    """
    environment, watch = describe_environment(conditions.device), PartWatch(conditions.device)
    factory = auto_class(model_config(folder))
    with watched_by(watch), tempfile.TemporaryDirectory() as scratch, staying_shared():
        with part("loading"):
            model = factory.from_pretrained(folder, dtype=conditions.dtype, quantization_config=conditions.config)
        with part("saving"):
            model.save_pretrained(Path(scratch) / "packed")
    report = model.hf_quantizer.report
    (loading, *rest) = _tree(watch.used)
    own = Part(loading.name, loading.use)
    errors = [block.error for block in report.blocks]
    return QuantizingReport(
        environment, folder, (own, *loading.inside, *rest), report.bits_per_weight, sum(errors) / len(errors)
    )


def measure_random(size: str, samples: int, length: int, conditions: QuantizingConditions) -> QuantizingReport:
    """Quantize a model of random weights on random tokens; the stages that need a processor are left out.

    Args:
        size: one of `SIZES`.
        samples: how many.
        length: tokens of each.
        conditions: everything else.

    Raises:
        ConfigError: the size is unknown.
    """
    if size not in SIZES:
        raise ConfigError(f"--size {size!r} must be one of {', '.join(SIZES)}{did_you_mean(size, SIZES)}")
    environment, watch = describe_environment(conditions.device), PartWatch(conditions.device)
    model = random_language_model(size, conditions)
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(conditions.seed)
    inputs = [{"input_ids": torch.randint(0, vocabulary, (1, length), generator=generator)} for _ in range(samples)]
    config = conditions.config
    selection = select(model, config, strict=True)
    unfuse_experts(model, selection.experts)
    run = Run(model, selection, run_options(config))
    needless = (RememberAnswers, WriteBefore, WriteAfter)
    stages = (GivenSamples(inputs), *(each for each in STAGES if not isinstance(each, needless)))
    with watched_by(watch):
        report = run_stages(run, stages)
    errors = [block.error for block in report.blocks]
    return QuantizingReport(
        environment, size, tuple(_tree(watch.used)), report.bits_per_weight, sum(errors) / len(errors)
    )


def random_language_model(size: str, conditions: QuantizingConditions) -> Any:
    """A model of random weights.

    Args:
        size: one of `SIZES`.
        conditions: device, dtype and seed.
    """
    architecture, configuration, shape = SIZES[size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(conditions.seed)
        model = architecture(configuration(**shape, max_position_embeddings=8192))
    return model.to(conditions.device, conditions.dtype).eval()


def _tree(used: Mapping[tuple[str, ...], PartUse], above: tuple[str, ...] = ()) -> list[Part]:
    """The parts inside of one, in the order in which they were first entered."""
    depth = len(above)
    own = dict.fromkeys(path[depth] for path in used if path[:depth] == above and len(path) > depth)
    return [Part(name, used[(*above, name)], tuple(_tree(used, (*above, name)))) for name in own]


def rows(parts: Sequence[Part], depth: int = 0) -> list[tuple[str, Part]]:
    """Every part with its name, indented by how deep it lies."""
    found: list[tuple[str, Part]] = []
    for each in parts:
        found.append(("  " * depth + each.name, each))
        found += rows(each.inside, depth + 1)
    return found
