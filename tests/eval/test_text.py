import pytest
import torch
from transformers import AutoTokenizer

from optimum_sab.errors import ConfigError
from optimum_sab.eval.text import mixed_windows, text_windows


@pytest.fixture(scope="module")
def tokenizer(llama_folder):
    return AutoTokenizer.from_pretrained(llama_folder)


@pytest.mark.parametrize("source", ["reference", "passages"])
def test_halves_share_no_window(tokenizer, source):
    calibration, held_out = (text_windows(tokenizer, source, part, 8, 64) for part in ("calibration", "held-out"))
    assert calibration.shape == held_out.shape == (8, 64)
    assert not set(map(tuple, calibration.tolist())) & set(map(tuple, held_out.tolist()))


def test_seed_draws_other_windows_of_the_same_half(tokenizer):
    everything = text_windows(tokenizer, "reference", "calibration", 200, 64)
    first, again, second = (text_windows(tokenizer, "reference", "calibration", 8, 64, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    rows = set(map(tuple, text_windows(tokenizer, "reference", "calibration", 500, 64).tolist()))
    assert len(everything) == 200
    assert len(set(map(tuple, first.tolist())) & rows) > 0


def test_mixed_windows_are_half_and_half(tokenizer):
    mixed = mixed_windows(tokenizer, "mixed", "calibration", 6, 32)
    assert torch.equal(mixed[:3], text_windows(tokenizer, "reference", "calibration", 3, 32))
    assert torch.equal(mixed[3:], text_windows(tokenizer, "passages", "calibration", 3, 32))


def test_mixed_windows_go_on_with_the_longer_text_where_the_shorter_one_ends(tokenizer):
    passages = text_windows(tokenizer, "passages", "calibration", 8, 512)
    with pytest.raises(ConfigError, match=r"has (\d+) windows") as refused:
        text_windows(tokenizer, "passages", "calibration", 10**6, 512)
    every = int(str(refused.value).split(" has ")[1].split()[0])
    mixed = mixed_windows(tokenizer, "mixed", "calibration", 2 * every + 9, 512)
    assert len(mixed) == 2 * every + 9
    assert torch.equal(mixed[-every:][:8], passages)
    assert torch.equal(mixed[:-every], text_windows(tokenizer, "reference", "calibration", every + 9, 512))


def test_unknown_or_short_text_is_named(tokenizer):
    with pytest.raises(ConfigError, match=r"has \d+ windows"):
        text_windows(tokenizer, "passages", "held-out", 10**6, 64)
    with pytest.raises(ConfigError, match="text='novels' is unknown"):
        text_windows(tokenizer, "novels", "held-out", 1, 64)
