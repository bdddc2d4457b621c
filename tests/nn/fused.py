"""Small modules of fused experts, of every layout that Transformers has."""

from importlib import import_module
from types import SimpleNamespace

import torch

HIDDEN, INNER, EXPERTS = 64, 32, 5

_CONFIG = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "moe_hidden_size": HIDDEN,
    "moe_latent_size": None,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "swiglu_alpha": 1.7,
    "swiglu_limit": 2.0,
    "post_norm_eps": 1e-6,
    "_experts_implementation": "eager",
}
# model, class, and what is special about it
LAYOUTS = {
    "plain": ("qwen3_moe", "Qwen3MoeExperts"),
    "interleaved, transposed, biased": ("gpt_oss", "GptOssExperts"),
    "transposed": ("aria", "AriaExperts"),
    "no gate": ("nemotron_h", "NemotronHExperts"),
    "a norm behind": ("muse_spark", "MuseSparkExperts"),
    "limited": ("deepseek_v4", "DeepseekV4Experts"),
    "outside of the interface": ("step3p7", "Step3p7Experts"),
    "tokens come expert by expert": ("llama4", "Llama4TextExperts"),
}


def fused(layout, implementation="eager", seed=0):
    """A module of random weights."""
    model, kind = LAYOUTS[layout]
    module = import_module(f"transformers.models.{model}.modeling_{model}")
    own = getattr(module, kind)(SimpleNamespace(**{**_CONFIG, "_experts_implementation": implementation})).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in own.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return own


def given(own, tokens=7, top_k=2, seed=1):
    """What its forward takes."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k, generator=generator)
    if type(own).__name__ != "Llama4TextExperts":
        return hidden, chosen, weights
    scores = torch.zeros(tokens, EXPERTS).scatter(1, chosen, weights)
    return (hidden.repeat(EXPERTS, 1) * scores.T.reshape(-1, 1),)
