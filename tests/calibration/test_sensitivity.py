import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_sab.calibration.sensitivity import output_sensitivity
from optimum_sab.errors import CalibrationError, NonFiniteError

NAMES = ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj")


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.2, **sizes)).eval()


def samples(count, length=24):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (1, length), generator=generator)} for _ in range(count)]


@torch.no_grad()
def divergence_under_noise(model, name, inputs, energy, draws):
    """Mean KL per token when the linear's output gets noise of the relative energy given, token by token."""
    generator = torch.Generator().manual_seed(2)
    total = count = 0.0
    for sample in inputs:
        wanted = model(**sample).logits[0].log_softmax(-1)
        for _ in range(draws):

            def disturb(module, args, output):
                noise = torch.randn(output.shape, generator=generator)
                scale = (energy * output.square().mean(-1, keepdim=True)).sqrt()
                return output + scale * noise

            handle = model.get_submodule(name).register_forward_hook(disturb)
            given = model(**sample).logits[0].log_softmax(-1)
            handle.remove()
            total += float(torch.nn.functional.kl_div(given, wanted, log_target=True, reduction="sum"))
            count += wanted.shape[0]
    return total / count


@pytest.mark.parametrize("name", NAMES)
def test_sensitivity_times_the_error_is_the_divergence(llama, name):
    inputs = samples(8)
    found = sum(output_sensitivity(llama, [name], inputs, seed)[name] for seed in range(12)) / 12
    energy = 1e-3
    assert found * energy == pytest.approx(divergence_under_noise(llama, name, inputs, energy, 12), rel=0.15)


def test_sensitivity_repeats_and_leaves_the_model_as_it_was(llama):
    llama.model.norm.weight.requires_grad_(False)
    before = torch.get_rng_state()
    with torch.no_grad():
        first = output_sensitivity(llama, NAMES, samples(2))
    assert first == output_sensitivity(llama, NAMES, samples(2))
    assert first != output_sensitivity(llama, NAMES, samples(2), seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert not llama.model.norm.weight.requires_grad
    assert llama.lm_head.weight.requires_grad
    assert all(p.grad is None for p in llama.parameters())
    assert not any(m._forward_hooks for m in llama.modules())
    llama.model.norm.weight.requires_grad_(True)


def test_sensitivity_refuses_what_it_cannot_measure(llama):
    class Headless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama.model

        def get_input_embeddings(self):
            return llama.get_input_embeddings()

        def forward(self, **kwargs):
            return self.inner(**kwargs)

    with pytest.raises(CalibrationError, match="gives no logits"):
        output_sensitivity(Headless(), [], samples(1))
    weight = llama.lm_head.weight.data
    kept = weight.clone()
    weight[0] = float("nan")
    with pytest.raises((NonFiniteError, RuntimeError)):
        output_sensitivity(llama, NAMES, samples(1))
    weight.copy_(kept)
