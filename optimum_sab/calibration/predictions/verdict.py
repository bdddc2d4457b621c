"""What is said of a finished model in a word, and how that is decided.

By its agreement with the dense model (`optimum_sab.calibration.predictions.agreement`) on what did not calibrate it.
The limits are read off docs/benchmarks.md, where KL is known together with right answers, or with perplexity;
docs/report.md says which rows. They differ by kind: an answer about a picture has few tokens that are not certain, so
the same mean falls on fewer of them than in plain text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from optimum_sab.calibration.predictions.agreement import Agreement

CLOSE, CARE, FAR, UNKNOWN = "close", "care", "far", "unknown"
WORDS = {
    CLOSE: "close to the dense model",
    CARE: "usable with care",
    FAR: "far from the dense model",
    UNKNOWN: "not compared with the dense model",
}


@dataclass(frozen=True)
class Limits:
    """Where one level ends and the next begins.

    Attributes:
        close_kl: nats per token up to which a model is close, ...
        close_top1: ... if at least this share of the likeliest tokens is the same.
        far_kl: nats per token above which it is far.
        far_top1: share of the likeliest tokens below which it is far, whatever its KL: that of a model which is hardly
            sure of anything is small.
    """

    close_kl: float
    close_top1: float
    far_kl: float
    far_top1: float = 0.25


TEXT, PICTURES = "text", "pictures"
LIMITS: Mapping[str, Limits] = {TEXT: Limits(0.1, 0.75, 1.0), PICTURES: Limits(0.1, 0.8, 0.6)}
_OWN = "own "  # in front of the kind of what somebody gave for it
_FEW_BITS = 2.0


@dataclass(frozen=True)
class Verdict:
    """What is said of a finished model.

    Attributes:
        level: `CLOSE`, `CARE`, `FAR` or `UNKNOWN`.
        kind: of the samples that decided: those on which it is worst; empty where nothing was compared.
        reason: what was measured there, beside the limits.
        advice: what to do.
    """

    level: str
    kind: str
    reason: str
    advice: str

    @property
    def words(self) -> str:
        """The level in plain words."""
        return WORDS[self.level]

    def __str__(self) -> str:
        return f"{self.words}: {self.reason}. {self.advice}"


def own(kind: str) -> str:
    """The kind of evaluation samples that somebody gave."""
    return f"{_OWN}{kind}"


def limits_of(kind: str) -> Limits:
    """Of samples of one kind, ours or somebody's own."""
    return LIMITS[kind.removeprefix(_OWN)]


def level_of(kind: str, agreement: Agreement) -> str:
    """`CLOSE`, `CARE` or `FAR`, on samples of one kind; what is no number is far."""
    limits = limits_of(kind)
    if not agreement.kl <= limits.far_kl or not agreement.top1 >= limits.far_top1:
        return FAR
    return CLOSE if agreement.kl <= limits.close_kl and agreement.top1 >= limits.close_top1 else CARE


def judge(agreement: Mapping[str, Agreement], bits_per_weight: float) -> Verdict:
    """The verdict, by the kind of samples on which the model is worst, of somebody's own where there are such.

    Args:
        agreement: by kind (`TEXT`, `PICTURES`, `own` of them); empty where nothing was compared.
        bits_per_weight: of the binarized linears, by which the advice is chosen.
    """
    if not agreement:
        reason = "it has no predictions to compare, or did not read the samples for that"
        return Verdict(UNKNOWN, "", reason, "Compare its answers with the dense model's on your own tasks.")
    order = (CLOSE, CARE, FAR)
    deciding = {kind: each for kind, each in agreement.items() if kind.startswith(_OWN)} or agreement
    levels = {kind: level_of(kind, each) for kind, each in deciding.items()}
    kind = max(levels, key=lambda name: (order.index(levels[name]), agreement[name].kl - limits_of(name).far_kl))
    limits = limits_of(kind)
    reason = (
        f"on {kind} that did not calibrate it: {agreement[kind]} (close: at most {limits.close_kl:g} nats and "
        f"at least {limits.close_top1:.0%} the same; far: above {limits.far_kl:g} nats, or below "
        f"{limits.far_top1:.0%} the same)"
    )
    return Verdict(levels[kind], kind, reason, _advice(levels[kind], bits_per_weight))


def forgotten(agreement: Mapping[str, Agreement]) -> list[str]:
    """The kinds of the package's own samples on which a model is far that somebody's own samples decide about."""
    if not any(kind.startswith(_OWN) for kind in agreement):
        return []
    return [kind for kind, each in agreement.items() if not kind.startswith(_OWN) and level_of(kind, each) == FAR]


def _advice(level: str, bits_per_weight: float) -> str:
    if level == CLOSE:
        return "Expect its answers to be nearly all the dense model's; try the tasks that matter to you."
    more = "the preset two-bit" if bits_per_weight < _FEW_BITS else f"target_bits above {bits_per_weight:.2f}"
    if level == CARE:
        return (
            "Compare its answers with the dense model's on your own tasks before you rely on it; calibration samples "
            f"of those tasks, or more bits ({more}), bring it closer."
        )
    return (
        "Do not rely on it as it is. It has lost what the calibration samples do not show: give more or more varied "
        f"ones (builtin_samples mixes some of the built-in set into data of your own), or more bits ({more})."
    )
