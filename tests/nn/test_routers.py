"""Routers of mixtures of experts stay dense, wherever a family puts them; projections beside experts do not."""

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from optimum_sab.core.settings import LayerSettings
from optimum_sab.nn.routers import find_routers
from optimum_sab.nn.selection import select_linears

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES = {
    "afmoe": {"num_experts": 6, "num_dense_layers": 0, "moe_intermediate_size": 32},
    "hunyuan_v1_moe": {"num_experts": 6, "moe_topk": 2, "moe_intermediate_size": 32},
    "jetmoe": {"num_local_experts": 6, "kv_channels": 16},
    "zaya": {"num_experts": 6, "router_hidden_size": 24, "moe_intermediate_size": 32},
    "granitemoe": {"num_local_experts": 6},
    "phimoe": {"num_local_experts": 6},
    "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "mixtral": {"num_local_experts": 6},
    "muse_spark_text": {"num_local_experts": 6, "moe_hidden_size": 32, "mlp_layer_types": ["sparse"] * 2},
    "nemotron_h": {
        "hybrid_override_pattern": "ME",
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_latent_size": 32,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
    },
}
PLACES = {  # of the routers, and linears that are none
    "afmoe": ({"mlp.router.gate"}, {"mlp.shared_experts.up_proj"}),
    "hunyuan_v1_moe": ({"mlp.gate.wg"}, {"mlp.shared_mlp.up_proj"}),
    "jetmoe": ({"mlp.router.layer", "self_attention.experts.router.layer"}, {"self_attention.kv_proj"}),
    "zaya": (
        {f"mlp.gate.{each}" for each in ("down_proj", "router_mlp.fc1", "router_mlp.fc2", "router_mlp.out_proj")},
        {"self_attn.qkv_proj.q_proj"},
    ),
    "granitemoe": (set(), {"self_attn.q_proj"}),
    "phimoe": ({"mlp.router"}, {"self_attn.q_proj"}),
    "qwen2_moe": ({"mlp.shared_expert_gate"}, {"mlp.shared_expert.down_proj"}),
    "mixtral": (set(), {"self_attn.q_proj"}),
    "muse_spark_text": (set(), {"mlp.pre_expert_proj", "mlp.post_expert_proj"}),
    "nemotron_h": (set(), {"mixer.fc1_latent_proj", "mixer.fc2_latent_proj"}),
}
LINE_4 = {  # Transformers 4.57, whose experts are linears of their own
    "granitemoe": {"block_sparse_moe.router.layer"},
    "phimoe": {"block_sparse_moe.gate"},
    "qwen2_moe": {"mlp.gate", "mlp.shared_expert_gate"},
    "mixtral": {"block_sparse_moe.gate"},
}


def skeleton(family):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of Transformers has no {family}")
    with torch.device("meta"):
        return AutoModel.from_config(CONFIG_MAPPING[family](**SIZES, **FAMILIES[family]))


@pytest.mark.filterwarnings("ignore::optimum_sab.errors.SABWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_routers_of_a_family_stay_dense_and_nothing_else_does(family):
    found = select_linears(skeleton(family), LayerSettings(block_size=32))
    below = {name.removeprefix(f"{found.lists.names[0]}.").partition(".")[2] for name in found.left_dense}
    selected = {name.removeprefix(f"{found.lists.names[0]}.").partition(".")[2] for name in found.settings}
    routers, others = PLACES[family]
    if transformers.__version__.startswith("4."):
        routers = LINE_4.get(family, routers)
    assert below == routers
    assert others <= selected


class Mixture(nn.Module):
    """Experts of which nothing shows how many they are, as in DBRX: flat tensors, and a router with a linear in it."""

    def __init__(self):
        super().__init__()
        self.router = nn.ModuleDict({"layer": nn.Linear(16, 4, bias=False)})
        self.experts = nn.ParameterDict({"w1": nn.Parameter(torch.zeros(4 * 8, 16))})
        self.up_proj = nn.Linear(16, 8)
        self.narrow_gate = nn.Linear(16, 3)


def test_router_beside_experts_that_do_not_show_their_number_is_known_by_its_name():
    assert find_routers(nn.ModuleDict({"mlp": Mixture()})) == {"mlp.router.layer", "mlp.narrow_gate"}


def test_a_shared_expert_as_wide_as_there_are_experts_is_no_router():
    """Qwen3-Next has 512 experts, and a shared one of width 512."""
    model = nn.Module()
    model.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))
    model.shared_expert = nn.ModuleDict({"up": nn.Linear(16, 8), "down": nn.Linear(8, 16)})
    model.choice = nn.Linear(16, 8)
    assert find_routers(model) == {"choice"}


def test_convolutions_are_not_taken_for_experts():
    model = nn.Module()
    for name in ("q_conv", "k_conv"):
        conv = nn.Module()
        conv.weight = nn.Parameter(torch.zeros(8, 1, 4))
        setattr(model, name, conv)
    model.q_proj = nn.Linear(16, 8)
    assert find_routers(model) == set()
