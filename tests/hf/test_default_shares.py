"""Of mixtures of experts at the sizes that are published, nearly all of the language model is binarized; on meta."""

import gc

import pytest
import torch
import transformers
from packaging.version import Version

from optimum_sab import SABConfig
from optimum_sab.bench.coverage.exceptions import exceptions_of
from optimum_sab.bench.coverage.families import find_families
from optimum_sab.hf.selection import select
from optimum_sab.nn.dense_share import dense_share
from optimum_sab.nn.unfusing import unfuse_experts

pytestmark = pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="experts are no one module")
BLOCKS = 8  # at most, of the decoder's; the others are like them
LEAST = 0.97
SAMPLE = ["qwen3_vl_moe", "gpt_oss"]
FAMILIES = [
    *SAMPLE,
    *(
        pytest.param(name, marks=pytest.mark.full)
        for name in (
            "qwen3_5_moe",
            "llama4",
            "glm4v_moe",
            "kimi_k25",
            "aria",
            "ernie4_5_vl_moe",
            "minimax_m3_vl",
            "mistral_large4",
            "muse_spark",
            "step3p7",
            "qwen3_omni_moe_thinker",
            "nemotron_h_omni",
            "inkling2",
            "mixtral",
            "qwen3_moe",
            "deepseek_v3",
            "unlimited_ocr",
            "mistral4",
        )
    ),
]


def cut(config):
    """Fewer blocks, and what has an entry for each."""
    blocks = config.get("num_hidden_layers")
    small = {}
    for name, value in config.items():
        if isinstance(value, dict):
            small[name] = cut(value)
        elif isinstance(value, (list, tuple)) and len(value) == blocks and blocks > BLOCKS:
            small[name] = list(value)[:BLOCKS]
        elif name == "num_hidden_layers":
            small[name] = min(value, BLOCKS)
        else:
            small[name] = value
    return small


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mixture_of_default_size_is_binarized(name):
    [family] = find_families([name])
    default = family.config_class(**exceptions_of(name).default)
    with torch.device("meta"):
        model = family.model_class(family.config_class.from_dict(cut(default.to_dict())))
    selection = select(model, SABConfig(), strict=True)
    unfuse_experts(model, selection.experts)
    found = dense_share(model, selection)
    assert found.share <= 1 - LEAST, str(found)
    assert selection.experts
    del model
    gc.collect()
