"""`SABConfig`: every setting of a binarization, as Transformers passes and stores it."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping, Sequence, Sized
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_sab.core.code import NO_CODE
from optimum_sab.core.refinement import RefineSettings
from optimum_sab.core.settings import LayerSettings
from optimum_sab.data.named_source import recorded_source
from optimum_sab.errors import ConfigError, FormatVersionError
from optimum_sab.format.layout import FORMAT_VERSIONS
from optimum_sab.format.layout import format_version as version_of
from optimum_sab.hf.config_types import check_types
from optimum_sab.hf.replay import replayed
from optimum_sab.hf.verification import VERIFY
from optimum_sab.nn.rules import check_rules
from optimum_sab.presets import SELF, RunSettings, check_values, find_preset
from optimum_sab.version import QUANT_METHOD
from optimum_sab.wording import did_you_mean

PROGRESS = ("bar", "lines", "none")

_LAYER = tuple(f.name for f in fields(LayerSettings))
_TRANSIENT = (  # of one call
    "processor",
    "progress",
    "dequantize",
    "backend",
    "verify",
    "resume_folder",
    "examples",
    "evaluation",
    "stream_weights",
    "activation_memory",
    "ignore_plan",
)
_LATER = ("expert_tokens", "builtin_samples")  # which the first release did not have
_SAVE = "weights"  # in ``measured``: the save the configuration was written by
_ORDER = "dynamic_order"  # in a stored ``measured``: Transformers sorts what it stores, and rules apply in their order


class SABConfig(QuantizationConfigMixin):
    """Settings for binarizing a model, and the record stored with a packed checkpoint.

    The first thirteen are the settings of a layer; see `optimum_sab.core.settings.LayerSettings` for their meaning.
    The defaults are the default preset: one base plane, a residual plane on 3/16 of the columns, fp8 row scales.

    Args:
        allocation: "sensitivity" spends bits where errors cost most: planes and salient columns are chosen per group
            of linears of one shape that share an input, from measured sensitivities
            (`optimum_sab.calibration.allocation`), except where a rule of ``dynamic`` sets them. Together they take at
            most what ``base_planes``, ``residual_planes`` and ``salient_fraction`` would take everywhere. The choice
            is stored in ``dynamic``.
            "uniform" gives every linear those three.
        target_bits: with "sensitivity", stored bits per weight at most, all binarized linears together, in the place
            of what the three settings would take.
        modules_to_not_convert: module rules to keep dense, in addition to the defaults (everything outside the
            decoder blocks): dotted name parts such as "down_proj" or "layers.0.mlp", or regular expressions behind
            ``re:``.
        dynamic: regular expression → layer settings for the modules it is found in, e.g.
            ``{"layers\\.0\\.": {"base_planes": 2}}``, or the whole name of a linear (`optimum_sab.nn.rules`).
        calibration: the data: rows (texts, chats, mappings) in a list, a dataset or a generator, or the name of a file
            or of a Hub dataset; see `optimum_sab.calibration.samples.reading.read_samples`. None is the built-in set,
            "self" lets the dense model write its own. What a generator gives is remembered, so that the configuration
            can be used again.
        calibration_samples: how many samples to use at most.
        builtin_samples: of these, how many of the built-in set are taken beside ``calibration``'s own, so that a model
            that is calibrated on one kind of work keeps more of the rest.
        sequence_length: calibration texts are cut to this many tokens.
        seed: seed of the built-in set, of what the model writes for itself, and of a dataset's order.
        calibration_pass: a registered calibration pass.
        expert_tokens: "routed" calibrates fused experts on the tokens that come to them; "all" on all tokens, while
            what the model computes stays routed.
        calibration_device: device on which blocks are worked on, e.g. "cuda"; None leaves each where it is.
        refine: after solving, train scales, norms and biases with the signs frozen: block by block to the dense
            model's hidden states, then all together to its next-token distributions.
        refine_epochs: rounds over the samples per block; 0 leaves that part out.
        refine_steps: steps of the second part, which needs memory for a training step; 0 leaves it out.
        temperature_scaling: at the end, scale the norm before the output embedding so that the predictions are closest
            to the dense model's; needs the dense stream that ``propagation`` runs.
        stream_weights: leave the dense weights of the decoder blocks in their safetensors files and read one block at a
            time, while it is worked on: for a model that does not fit into memory. The packed model is the same, bit
            for bit. Needs Transformers 5, and goes with no ``device_map`` but the CPU's. Not stored.
        activation_memory: GiB of the samples' activations that may wait in memory while others compute; what is
            beyond lies in memory-mapped files, in ``resume_folder`` or else the system's folder for temporary files
            (TMPDIR). None for no bound. Changes nothing in the packed model. Not stored.
        resume_folder: keeps what is finished; the same call after an interruption goes on from there. Not stored.
        ignore_plan: begin although more is certainly needed at once, of memory or disk, than this machine has
            (docs/large-models.md). Not stored.
        examples: let the dense model and the finished one write a few words to the same few prompts, for the report.
            Changes nothing in the model. Not stored.
        evaluation: samples of your own work, in any form that ``calibration`` takes, on which the finished model is
            compared with the dense one beside the package's own; they decide the verdict. Texts are cut to
            ``sequence_length``; 64 at most are used. Give some that do not calibrate. Changes nothing in the model.
            Not stored.
        processor: the processor or tokenizer to use, or where to load it from; None takes the checkpoint's own, from
            the revision and with the token and other arguments that ``from_pretrained`` was given. Not stored.
        progress: "bar", "lines" (one line per block) or "none". Not stored.
        dequantize: when loading a packed checkpoint, give back a dense model. Not stored.
        backend: what computes with packed layers (`optimum_sab.ops.backends`); None or "auto" leaves it to the device.
            May be given when a packed checkpoint is loaded. Not stored.
        verify: whether loading compares packed layers with the digests they were saved with; "all" compares everything
            else too. Not stored.
        format_version: of a stored configuration; None where it is not stored. It follows from the codes.
        measured: what was measured when the checkpoint was made; written by the quantizer.

    Raises:
        ConfigError: an unknown setting or a value out of range, by name.
        FormatVersionError: ``format_version`` is not one this release reads.
    """

    def __init__(
        self,
        block_size: int = LayerSettings.block_size,
        base_planes: int = LayerSettings.base_planes,
        residual_planes: int = LayerSettings.residual_planes,
        salient_fraction: float = LayerSettings.salient_fraction,
        iterations: int = LayerSettings.iterations,
        significance: str = LayerSettings.significance,
        feedback: str = LayerSettings.feedback,
        refit: bool = LayerSettings.refit,
        sweeps: int = LayerSettings.sweeps,
        row_scale: str = LayerSettings.row_scale,
        damping: float = LayerSettings.damping,
        propagation: float | None = LayerSettings.propagation,
        code: str = LayerSettings.code,
        allocation: str = RunSettings.allocation,
        target_bits: float | None = RunSettings.target_bits,
        modules_to_not_convert: Sequence[str] | None = None,
        dynamic: Mapping[str, Mapping[str, Any]] | None = None,
        calibration: Any = RunSettings.calibration,
        calibration_samples: int = RunSettings.calibration_samples,
        builtin_samples: int = RunSettings.builtin_samples,
        sequence_length: int = RunSettings.sequence_length,
        seed: int = RunSettings.seed,
        calibration_pass: str = RunSettings.calibration_pass,
        expert_tokens: str = RunSettings.expert_tokens,
        calibration_device: str | None = RunSettings.calibration_device,
        refine: bool = RunSettings.refine,
        refine_epochs: int = RunSettings.refine_epochs,
        refine_steps: int = RunSettings.refine_steps,
        temperature_scaling: bool = RunSettings.temperature_scaling,
        stream_weights: bool = RunSettings.stream_weights,
        activation_memory: float | None = RunSettings.activation_memory,
        resume_folder: str | Path | None = RunSettings.resume_folder,
        ignore_plan: bool = RunSettings.ignore_plan,
        examples: bool = RunSettings.examples,
        evaluation: Any = RunSettings.evaluation,
        processor: Any = None,
        progress: str = "bar",
        dequantize: bool = False,
        backend: str | None = RunSettings.backend,
        verify: bool | str = True,
        format_version: int | None = None,
        measured: dict[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise _unknown(next(iter(unknown)))
        if quant_method != QUANT_METHOD:
            raise ConfigError(
                f"quant_method={quant_method!r} is not {QUANT_METHOD!r}; this is not a SAB configuration."
            )
        check_types(
            {
                **({} if format_version is None else {"format_version": format_version}),
                "modules_to_not_convert": _listed(modules_to_not_convert),
                "dynamic": dynamic,
                "calibration": calibration,
                "evaluation": evaluation,
                "calibration_pass": calibration_pass,
                "calibration_device": calibration_device,
                "measured": measured,
            }
        )
        self.quant_method: Any = QUANT_METHOD
        self.block_size = block_size
        self.base_planes = base_planes
        self.residual_planes = residual_planes
        self.salient_fraction = salient_fraction
        self.iterations = iterations
        self.significance = significance
        self.feedback = feedback
        self.refit = refit
        self.sweeps = sweeps
        self.row_scale = row_scale
        self.damping = damping
        self.propagation = propagation
        self.code = code
        self.allocation = allocation
        self.target_bits = target_bits
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.dynamic = {pattern: dict(changes) for pattern, changes in (dynamic or {}).items()}
        self.calibration = replayed(calibration)
        self.calibration_samples = calibration_samples
        self.builtin_samples = builtin_samples
        self.sequence_length = sequence_length
        self.seed = seed
        self.calibration_pass = calibration_pass
        self.expert_tokens = expert_tokens
        self.calibration_device = calibration_device
        self.refine = refine
        self.refine_epochs = refine_epochs
        self.refine_steps = refine_steps
        self.temperature_scaling = temperature_scaling
        self.stream_weights = stream_weights
        self.activation_memory = activation_memory
        self.resume_folder = resume_folder
        self.ignore_plan = ignore_plan
        self.examples = examples
        self.evaluation = replayed(evaluation)
        self.processor = processor
        self.progress = progress
        self.dequantize = dequantize
        self.backend = backend
        self.verify = verify
        self.measured = measured
        self._call_settings: tuple[str, ...] = ()  # those that `from_dict` found in its dictionary
        self.validate()
        if format_version is not None:
            self._check_version(format_version)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SABConfig:
        """The settings of a preset, by the name that the command line knows it under.

        Args:
            name: one of `optimum_sab.presets.PRESETS`.
            changes: further settings, which come before the preset's.

        Raises:
            ConfigError: there is no such preset; and as the class says.
        """
        return cls(**{**find_preset(name).changes, **changes})

    @classmethod
    def light(cls, **changes: Any) -> SABConfig:
        """The default's bits in a fraction of the time, for a first look."""
        return cls.preset("light", **changes)

    @classmethod
    def best(cls, **changes: Any) -> SABConfig:
        """The default's bits with a code, trained after solving, for several times the time; wants many samples."""
        return cls.preset("best", **changes)

    @classmethod
    def two_bit(cls, **changes: Any) -> SABConfig:
        """The bits of two base planes and a residual plane on an eighth of the columns: at most 2.25 per weight.

        With twice the default's sweeps of sign descent, which pay at two bits and not at one (docs/benchmarks.md).
        """
        return cls.preset("two-bit", **changes)

    @classmethod
    def paper(cls, **changes: Any) -> SABConfig:
        """SAB-LVLM as published: its map Λ, 15 rounds, block-wise compensation, two base planes and a residual one.

        Its row scales are fp16 and nothing is refit or propagated. This is the baseline, not the recommendation.
        """
        return cls.preset("paper", **changes)

    @property
    def layer_settings(self) -> LayerSettings:
        """The settings of a layer without a ``dynamic`` override."""
        return LayerSettings(**{name: getattr(self, name) for name in _LAYER})

    @property
    def refine_settings(self) -> RefineSettings | None:
        """How long to refine; None without ``refine``."""
        return RefineSettings(self.refine_epochs, self.refine_steps) if self.refine else None

    def validate(self) -> None:
        """Check every value; raises as the class says."""
        check_rules(self.modules_to_not_convert, self.dynamic)
        check_values(vars(self))
        if not isinstance(self.dequantize, bool):
            raise ConfigError(f"dequantize={self.dequantize!r} must be true or false.")
        if self.progress not in PROGRESS:
            raise ConfigError(f"progress={self.progress!r} must be one of {', '.join(PROGRESS)}.")
        if self.stream_weights and isinstance(self.calibration, str) and self.calibration == SELF:
            raise ConfigError(
                "stream_weights does not go with calibration='self': a model that writes its samples would read all "
                "its weights from disk for every token. Use calibration='builtin', or give samples."
            )
        if self.verify not in VERIFY or not isinstance(self.verify, (bool, str)):
            raise ConfigError(f"verify={self.verify!r} must be true, false or 'all'.")

    @property
    def format_version(self) -> int:
        """The version in which these settings are stored."""
        return version_of([self.code, *(changes.get("code", self.code) for changes in self.dynamic.values())])

    def _check_version(self, given: int) -> None:
        _check_readable(given)
        if given != self.format_version:
            raise FormatVersionError(
                f"format_version={given} does not fit the settings, with which it is {self.format_version}: version 1 "
                "has no codes, and version 2 is written only where there are some. config.json was changed since then; "
                "fetch it again."
            )

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From a dictionary such as config.json's ``quantization_config``; unknown keys raise `ConfigError`."""
        own = {k: kwargs.pop(k) for k in list(kwargs) if k in _PARAMETERS}
        state = {**config_dict, **own}
        check_types({name: state[name] for name in ("format_version",) if name in state})
        _check_readable(state.get("format_version", 1))  # first: a later version may have settings unknown here
        unknown = next((name for name in state if name not in _PARAMETERS), None)
        if unknown is not None:
            raise _unknown(unknown)
        config = cls(**state)
        config._restore_order()
        config._call_settings = tuple(name for name in _TRANSIENT if name in config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def _restore_order(self) -> None:
        order = (self.measured or {}).get(_ORDER)
        if self.measured is not None and order is not None:
            self.measured = {key: value for key, value in self.measured.items() if key != _ORDER} or None
            if sorted(order) == sorted(self.dynamic):
                self.dynamic = {rule: self.dynamic[rule] for rule in order}

    def refuse_call_settings(self) -> None:
        """Settings that belong to one call must not come with a checkpoint.

        Raises:
            ConfigError: the dictionary this was made `from_dict` holds one.
        """
        if self._call_settings:
            name = self._call_settings[0]
            raise ConfigError(
                f"the checkpoint's quantization_config holds {name}={getattr(self, name)!r}, which belongs to a call "
                f"and not to a checkpoint; remove it from config.json, and give SABConfig({name}=...) when loading."
            )

    @property
    def saved_as(self) -> str | None:
        """The save that this configuration was written by, where it says so."""
        return (self.measured or {}).get(_SAVE)

    @saved_as.setter
    def saved_as(self, save: str) -> None:
        self.measured = {**(self.measured or {}), _SAVE: save}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: everything but what belongs to one call (processor, progress, ...), and ``code``,
        ``expert_tokens`` and ``builtin_samples`` only if they are no defaults.

        Calibration samples given as objects are stored as their number only.
        """
        left_out = (*_TRANSIENT, "calibration", "_call_settings")
        state = {k: copy.deepcopy(v) for k, v in self.__dict__.items() if k not in left_out}
        state["format_version"] = self.format_version
        if self.code == NO_CODE:  # which a reader of version 1 does not know
            del state["code"]
        for name in _LATER:  # nor earlier releases these
            if state[name] == getattr(RunSettings, name):
                del state[name]
        state["calibration"] = describe_calibration(self.calibration)
        if list(self.dynamic) != sorted(self.dynamic):
            state["measured"] = {**(state["measured"] or {}), _ORDER: list(self.dynamic)}
        return state

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict` without the values that are the defaults."""
        plain = SABConfig().to_dict()
        kept = ("quant_method", "format_version")
        return {k: v for k, v in self.to_dict().items() if k in kept or v != plain.get(k)}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What may be given again when a packed checkpoint is loaded."""
        return {"dequantize": self.dequantize, "backend": self.backend, "verify": self.verify}

    def __deepcopy__(self, memo: dict[int, Any]) -> SABConfig:
        """Transformers copies configs; samples and processor are shared, not copied."""
        shared = {id(v): v for v in (self.calibration, self.evaluation, self.processor) if v is not None}
        twin = copy.copy(self)
        twin.__dict__.update(copy.deepcopy(self.__dict__, {**memo, **shared}))
        return twin

    def __iter__(self) -> Any:
        return iter(self.to_dict().items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SABConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def describe_calibration(calibration: Any, used: int | None = None) -> Any:
    """How calibration data is recorded: a name as it is, samples as ``{"samples": count}``.

    Args:
        calibration: `SABConfig.calibration`.
        used: how many samples calibrated; None before that, when it is as many as were given, or None where they
            are not counted. Once samples have calibrated, a file's folders are of no use any more, and are left out.
    """
    if calibration is None:
        return None
    if isinstance(calibration, (str, os.PathLike)):
        return os.fspath(calibration) if used is None else recorded_source(calibration)
    if used is None and is_record(calibration):
        return calibration
    if used is None and isinstance(calibration, Sized) and not isinstance(calibration, Mapping):
        used = len(calibration)
    return {"samples": used}


def is_record(calibration: Any) -> bool:
    """Whether this is what `describe_calibration` says of samples, and not samples."""
    return (
        isinstance(calibration, Mapping)
        and set(calibration) == {"samples"}
        and isinstance(calibration["samples"], int | None)
    )


_PARAMETERS = tuple(p for p in inspect.signature(SABConfig.__init__).parameters if p not in ("self", "unknown"))


def _listed(rules: Any) -> Any:
    if isinstance(rules, str):
        raise ConfigError(f"modules_to_not_convert={rules!r} must be a list; write [{rules!r}].")
    return rules


def _check_readable(version: int) -> None:
    if version not in FORMAT_VERSIONS:
        raise FormatVersionError(
            f"format_version={version!r} cannot be read; this release reads {' and '.join(map(str, FORMAT_VERSIONS))}. "
            "Upgrade optimum-sab, or quantize the model again."
        )


def _unknown(name: str) -> ConfigError:
    if name in ("preset", "presets"):
        return ConfigError("a preset is no setting; write SABConfig.preset('two-bit') or SABConfig.two_bit().")
    every = f"; the settings are {', '.join(_PARAMETERS)}."
    return ConfigError(f"unknown setting {name!r}{did_you_mean(name, _PARAMETERS, every)}")
