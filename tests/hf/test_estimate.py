"""How large a checkpoint will be, as the documents say it of a large model."""

import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from optimum_sab import SABConfig
from optimum_sab.bench.qwen import model_config
from optimum_sab.calibration.streams.memory import calibration_bytes
from optimum_sab.hf.estimate import checkpoint_bytes
from optimum_sab.hf.selection import select

PAGE = Path(__file__).parents[2] / "docs" / "presets.md"


def test_the_page_of_presets_says_what_7b_takes():
    config = model_config("7b")
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    said = re.search(r"^\| 7B \|(.*)$", PAGE.read_text(), re.MULTILINE)[1]
    dense, default, two_bit, _ = map(float, re.findall(r"([\d.]+) GB", said))
    assert dense == pytest.approx(2e-9 * sum(each.numel() for each in model.parameters()), abs=0.05)
    for figure, preset in ((default, SABConfig()), (two_bit, SABConfig.two_bit())):
        found = checkpoint_bytes(model, select(model, preset, strict=True), torch.bfloat16, None)
        assert figure == pytest.approx(1e-9 * found, abs=0.05)
    text = config.text_config
    tokens = SABConfig().calibration_samples * SABConfig().sequence_length
    needed = calibration_bytes(tokens, 2, text.hidden_size, text.intermediate_size, torch.bfloat16)
    assert float(re.search(r"([\d.]+) GiB", said)[1]) == pytest.approx(needed / 2**30, abs=0.5)
