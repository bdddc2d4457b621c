"""How often a streamed run reads the decoder blocks' dense weights."""

from __future__ import annotations

from dataclasses import dataclass

from optimum_sab.calibration.plan.workload import Workload


@dataclass(frozen=True)
class Pass:
    """One thing that is done with the dense model.

    Attributes:
        name: what.
        times: that every block is read for it.
    """

    name: str
    times: int


def passes(work: Workload) -> tuple[Pass, ...]:
    """In order; in memory there are none."""
    if not work.streamed:
        return ()
    options = work.options
    found = [Pass("are weights finite", 1)]
    if options.resume_folder is not None:
        found.append(Pass("fingerprint", 1))
    found += [
        Pass("what the model does with its linears", work.samples.kinds + 1),
        Pass("rehearsal", 1),
        Pass("answers to compare with", 1),
    ]
    if options.allocation is not None:
        found += [Pass("sensitivities", 2), Pass("errors for the allocation", 1)]
    if options.temperature_scaling and work.two_streams:
        found.append(Pass("the norm before the output embedding", 2))
    found.append(Pass("solving", 1))
    return tuple(found)
