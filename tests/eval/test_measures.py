import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_sab.errors import ConfigError
from optimum_sab.eval.measures import agreement, layer_errors, perplexity
from optimum_sab.example import checkpoint_path
from optimum_sab.hf.auto import AutoModelForVision2Seq

NAMES = ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"]


@pytest.fixture(scope="module")
def llama(llama_folder):
    return AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def probes():
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, 1024, (1, 20 + i), generator=generator)} for i in range(3)]


class Fixed:
    """Predicts the same logits everywhere."""

    config = None

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, input_ids):
        return type("Output", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    assert perplexity(Fixed(torch.zeros(50)), torch.randint(0, 50, (3, 20))) == pytest.approx(50, rel=1e-4)


def test_agreement_of_a_model_from_itself_is_nothing(llama, probes):
    found = agreement(llama, llama, probes)
    assert found.kl == pytest.approx(0.0, abs=1e-6)
    assert found.top1 == 1.0


def test_agreement_is_the_kl_of_the_dense_predictions(probes):
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.5, 0.3])
    found = agreement(Fixed(p.log()), Fixed(q.log()), probes)
    assert found.kl == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
    assert found.top1 == 0.0


def test_agreement_leaves_image_positions_out():
    dense = AutoModelForVision2Seq.from_pretrained(checkpoint_path(), dtype=torch.float32)
    only_images = {"input_ids": torch.full((1, 4), dense.config.image_token_id)}

    class Any:
        config = dense.config

        def __call__(self, input_ids):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 8)})

    with pytest.raises(ConfigError, match="no text token"):
        agreement(Any(), Any(), [only_images])


def test_layer_error_is_the_output_error_on_the_dense_model_s_inputs(llama, probes):
    other = copy.deepcopy(llama)
    with torch.no_grad():
        for name in NAMES:
            weight = other.get_submodule(name).weight
            weight.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    inputs = {name: [] for name in NAMES}
    handles = [
        llama.get_submodule(n).register_forward_pre_hook(lambda m, a, n=n: inputs[n].append(a[0][0])) for n in NAMES
    ]
    with torch.no_grad():
        for probe in probes:
            llama(**probe)
    for handle in handles:
        handle.remove()
    wanted = 0.0
    for name in NAMES:
        x = torch.cat(inputs[name])
        W, Q = (m.get_submodule(name).weight for m in (llama, other))
        wanted += float((x @ (W - Q).T).square().sum() / (x @ W.T).square().sum()) / len(NAMES)
    found = layer_errors(llama, other, NAMES, probes)
    assert found == {"text": pytest.approx(wanted, rel=1e-4)}
    assert not any(m._forward_pre_hooks for m in llama.modules())


def test_layer_errors_are_told_apart_by_modality():
    from optimum_sab.calibration.samples.encoding import encode_samples
    from optimum_sab.data.builtin import builtin_samples
    from optimum_sab.hf.processor import load_processor

    dense = AutoModelForVision2Seq.from_pretrained(checkpoint_path(), dtype=torch.float32).eval()
    other = copy.deepcopy(dense)
    name = "model.language_model.layers.2.mlp.down_proj"
    with torch.no_grad():
        other.get_submodule(name).weight.mul_(0.9)
    probes = encode_samples(builtin_samples(2, 5), load_processor(checkpoint_path()), 64)
    found = layer_errors(dense, other, [name], probes)
    assert found == {"text": pytest.approx(0.01, rel=1e-3), "visual": pytest.approx(0.01, rel=1e-3)}
