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
    """In order; in memory there are none. The rehearsal with packed layers reads one block of every kind besides."""
    if not work.streamed:
        return ()
    options = work.options
    found = [
        Pass("are weights finite" if options.resume_folder is None else "are weights finite, and their fingerprint", 1),
        Pass("what the model does with its linears", 1),
        Pass("answers to compare with", 1),
    ]
    if options.allocation is not None:
        found += [Pass("sensitivities", 2), Pass("errors for the allocation", 1)]
    if options.temperature_scaling and work.two_streams:
        found.append(Pass("the norm before the output embedding", 1))
    found.append(Pass("solving", 1))
    return tuple(found)
