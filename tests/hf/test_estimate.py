"""How large a checkpoint will be, as the documents say it of a large model."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from optimum_sab import SABConfig
from optimum_sab.bench.qwen import model_config
from optimum_sab.calibration.plan.memory import ACCELERATOR, memory_of
from optimum_sab.calibration.plan.workload import SampleSizes
from optimum_sab.hf.compat import RENAMES
from optimum_sab.hf.estimate import checkpoint_bytes
from optimum_sab.hf.selection import select
from optimum_sab.hf.workload import workload

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


TOKENS = {
    512: 87_685,
    256: 44_526,
    128: 22_509,
    64: 10_935,
    32: 5_524,
}  # of built-in samples


def test_the_page_of_large_models_says_what_a_card_holds_of_7b():
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(model_config("7b")).to(torch.bfloat16)
    page = (PAGE.parent / "large-models.md").read_text()
    for count, total in TOKENS.items():
        row = re.search(rf"^\| {count} \| ([\d.]+) GB", page, re.MULTILINE)
        config = SABConfig(calibration_samples=count, stream_weights=RENAMES)
        sizes = SampleSizes((total // count,) * count)
        work = workload(model, select(model, config, strict=True), config, sizes, (None, None))
        there = memory_of(replace(work, options=replace(work.options, device=torch.device("cuda"))))
        (card,) = [each for each in there if each.device == ACCELERATOR]
        assert float(row[1]) == pytest.approx(1e-9 * card.peak.bytes, abs=0.06)
