"""What a group of linears is given, on this rank and on all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from optimum_sab.calibration.ranks import Ranks
from optimum_sab.calibration.samples.modality import MIXED, TokenModalities
from optimum_sab.calibration.statistics.by_modality import Piece, rows_by_modality
from optimum_sab.calibration.statistics.pairing import GroupFacts, PairedInputs, pair_streams
from optimum_sab.calibration.streams.arrival import DENSE, Arrival


@dataclass(frozen=True)
class GroupInputs:
    """Rows of this rank's samples, and what is known of all.

    Attributes:
        pairs: of this rank, by sample.
        two_streams: whether all samples have dense rows.
        known: whether it is known of all what the linear's output is added to.
        several: whether any sample can have tokens of more modalities than one.
        half: one of two halves of the samples, drawn, because neighbouring samples often take turns in kind; empty
            with one sample or one stream.
        tokens: rows of each modality of all ranks, those of samples in ``half`` (True) and of the others (False), in
            the order in which the run's samples show them.
    """

    pairs: Mapping[int, PairedInputs]
    two_streams: bool
    known: bool
    several: bool
    half: frozenset[int]
    tokens: Mapping[bool, Mapping[str, int]]

    @classmethod
    def of(cls, arrivals: Sequence[Arrival], modalities: Sequence[TokenModalities], ranks: Ranks) -> GroupInputs:
        """What all ranks bring to one group of linears.

        Args:
            arrivals: of this rank.
            modalities: of the tokens of every sample of the run.
            ranks: all of them call this.
        """
        given = (arrivals[0].company or len(modalities)) if arrivals else 0
        told = ranks.exchange("rows", (given, GroupFacts.of(arrivals, modalities)))
        company, facts = max(each for each, _ in told), GroupFacts.of_all([each for _, each in told])
        here = [a.sample for a in arrivals if a.stream != DENSE]
        pairs = dict(zip(here, pair_streams(arrivals, modalities, facts), strict=True))
        two_streams = bool(facts.came) and facts.paired(company)
        known = two_streams and not facts.by_token and not facts.strange
        several = any(len(modalities[sample].names) > 1 for sample in facts.came)
        half = _half(facts.came) if two_streams else frozenset()
        shown = ranks.exchange("modalities", _shown(pairs, several, half))
        return cls(pairs, two_streams, known, several, half, _counted([each for some in shown for each in some]))

    @classmethod
    def alone(cls, inputs: Sequence[PairedInputs]) -> GroupInputs:
        """Of samples that are all there are, and come in the order of the run."""
        pairs = dict(enumerate(inputs))
        two_streams = bool(inputs) and all(pair.dense is not None for pair in inputs)
        known = two_streams and all(pair.residuals is not None for pair in inputs)
        several = any(len(pair.modalities.names) > 1 for pair in inputs)
        half = _half(tuple(pairs)) if two_streams else frozenset()
        return cls(pairs, two_streams, known, several, half, _counted(_shown(pairs, several, half)))

    @property
    def count(self) -> dict[str, int]:
        """Rows of each modality, of all ranks."""
        names = dict.fromkeys(name for some in self.tokens.values() for name in some)
        return {name: sum(some.get(name, 0) for some in self.tokens.values()) for name in names}

    def pieces(self, half: bool | None = None) -> dict[str, list[Piece]]:
        """This rank's rows by modality; of the samples in the half, of the others, or of all."""
        wanted = [pair for sample, pair in self.pairs.items() if half is None or (sample in self.half) is half]
        return rows_by_modality(wanted, self.several)


_Shown = tuple[int, int, str, bool, int]  # sample, place among its modalities, modality, whether in the half, rows


def _half(came: Sequence[int]) -> frozenset[int]:
    order = torch.randperm(len(came), generator=torch.Generator().manual_seed(0)).tolist()
    return frozenset(came[place] for place in order[: len(came) // 2])


def _shown(pairs: Mapping[int, PairedInputs], several: bool, half: frozenset[int]) -> list[_Shown]:
    found = []
    for sample, pair in pairs.items():
        names = pair.modalities.names
        for modality, pieces in rows_by_modality([pair], several).items():
            place = names.index(modality) if modality != MIXED else len(names)
            found.append((sample, place, modality, sample in half, sum(piece.count for piece in pieces)))
    return found


def _counted(shown: Sequence[_Shown]) -> dict[bool, dict[str, int]]:
    counts: dict[bool, dict[str, int]] = {True: {}, False: {}}
    for _, _, modality, within, rows in sorted(shown):
        counts[within][modality] = counts[within].get(modality, 0) + rows
    return counts
