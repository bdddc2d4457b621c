"""What tells a run from every other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.samples.forward_inputs import token_count
from optimum_sab.format.layout import FORMAT_VERSIONS
from optimum_sab.nn.selection import Selection
from optimum_sab.nn.streamed import parameters_in_turn
from optimum_sab.version import __version__


@dataclass(frozen=True)
class Fingerprint:
    """What `fingerprint` has found of a run.

    Attributes:
        marks: JSON values.
    """

    marks: Mapping[str, Any]


PROBES = 4096  # values of every parameter that go into the fingerprint


class WeightsDigest:
    """A digest of a model's parameters: of names, shapes, dtypes, and `PROBES` values of each."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    @classmethod
    def of(cls, model: nn.Module) -> WeightsDigest:
        """Of all parameters, streamed ones too, which are read for it."""
        found = cls()
        for name, parameter in parameters_in_turn(model):
            found.add(name, parameter)
        return found

    def add(self, name: str, parameter: Tensor) -> None:
        """The next one of `parameters_in_turn`."""
        flat = parameter.detach().flatten()
        _update(self._digest, name, parameter, flat[:: max(1, flat.numel() // PROBES)])

    def hexdigest(self) -> str:
        """Of all that were added."""
        return self._digest.hexdigest()


def fingerprint(
    weights: WeightsDigest | None,
    selection: Selection,
    samples: Sequence[Mapping[str, Any]] | None,
    options: RunOptions,
) -> dict[str, Any]:
    """What decides the result, as JSON values: two runs may share a folder only if theirs are equal.

    Args:
        weights: of the dense model; None before they are read, which leaves them out.
        selection: the linears with their settings.
        samples: forward keyword arguments, one dict per sample; all they hold counts. None before the model has written
            them, which leaves them out.
        options: of which that counts what changes the result.
    """
    allocation = options.allocation
    return {
        "release": __version__,
        "torch": torch.__version__,
        "format_version": max(FORMAT_VERSIONS),
        **({} if weights is None else {"model": weights.hexdigest()}),
        **({} if samples is None else {"samples": _of_samples(samples)}),
        "calibration_pass": options.calibration_pass,
        "expert_tokens": options.expert_tokens,
        "refine": None if options.refine is None else asdict(options.refine),
        "layers": {name: asdict(settings) for name, settings in selection.settings.items()},
        "allocation": "uniform" if allocation is None else "sensitivity",
        "target_bits": None if allocation is None else allocation.target_bits,
        "temperature_scaling": options.temperature_scaling,
        "free_linears": {} if allocation is None else dict.fromkeys(allocation.free(selection), True),
    }


def _of_samples(samples: Sequence[Mapping[str, Any]]) -> str:
    data = hashlib.sha256()
    for sample in samples:
        for name, value in sample.items():
            if isinstance(value, Tensor):
                _update(data, name, value, value.flatten())
            else:
                data.update(repr((name, value)).encode())
    return f"{len(samples)} of {sum(map(token_count, samples))} tokens, {data.hexdigest()[:16]}"


def _update(digest: Any, name: str, tensor: Tensor, values: Tensor) -> None:
    digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
    digest.update(values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
