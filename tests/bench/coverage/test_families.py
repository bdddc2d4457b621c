"""Vision-language models, each built small and random, go the whole way; see `optimum_sab.bench.coverage`."""

import pytest

from optimum_sab.bench.coverage import samples, trial
from optimum_sab.bench.coverage.families import all_families
from optimum_sab.bench.coverage.isolation import outcome_of
from optimum_sab.bench.coverage.outcome import NOT_BUILT, REFUSED, WORKS

# one of each way that pictures come into a decoder, or that a decoder is built; the others are in the full set
SAMPLE = (
    "qwen2_5_vl",  # rotary positions in three dimensions
    "qwen3_vl",  # features added to the hidden states between blocks
    "qwen3_5",  # blocks of linear attention among the others
    "smolvlm",  # pictures cut into tiles
    "gemma4",  # inputs of each block's own, sound
    "mllama",  # cross-attention blocks, which a text passes by
    "qwen3_vl_moe",  # fused experts
    "ernie4_5_vl_moe",  # fused experts of two kinds in a block, which are stored as one
    "blip-2",  # a decoder whose linears have biases, behind a Q-Former
)
FAMILIES = {family.name: family for family in all_families()}
SAMPLES, PICTURES = 4, 3


@pytest.fixture
def few_samples(monkeypatch):
    """A third of what the command takes, which is as good for all but the numbers."""
    monkeypatch.setattr(samples, "COUNT", SAMPLES)
    monkeypatch.setattr(samples, "WITH_PICTURES", PICTURES)


def tried(family, folder):
    """What comes of a family, in this process; that a fresh one reads its checkpoint alike is for the command."""
    trial.quantize(family, folder)
    if "outcome" not in trial.Notes(folder).known:
        trial.use(family, folder)
    return outcome_of(family, trial.Notes(folder).known)


@pytest.mark.compat
@pytest.mark.parametrize("name", SAMPLE)
def test_family_works(name, few_samples, tmp_path):
    if name not in FAMILIES:
        pytest.skip("this line of Transformers does not have it")
    found = tried(FAMILIES[name], tmp_path)
    assert (found.outcome, found.stage, found.reason) == (WORKS, "", "")
    assert found.left_out == ()
    assert found.pictures >= PICTURES
    assert found.share > 0.99


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in SAMPLE])
def test_family_works_or_is_refused(name, few_samples, tmp_path):
    found = tried(FAMILIES[name], tmp_path)
    if found.outcome == NOT_BUILT:
        pytest.skip(found.reason)
    assert found.outcome in (WORKS, REFUSED), f"{found.stage}: {found.reason}"
