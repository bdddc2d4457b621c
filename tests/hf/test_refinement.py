"""`SABConfig(refine=True)` and ``resume_folder`` by way of from_pretrained and save_pretrained."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from optimum_sab import SABConfig
from optimum_sab.example import checkpoint_path
from optimum_sab.nn.linear import SABLinear

pytestmark = pytest.mark.filterwarnings("ignore::optimum_sab.errors.SABWarning")
REFINE = {"refine": True, "refine_epochs": 2, "refine_steps": 8}
SETTINGS = {"block_size": 32, "propagation": 0.3}


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A Llama of two blocks whose weights are large enough for the binarized ones to say something else."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint_path()).save_pretrained(folder)
    return folder


def load(folder, dtype, config=None):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


@pytest.fixture(scope="module")
def refined(llama_folder, texts, quick_config):
    """``refined(dtype)``: the same model for the same dtype, to be left as it is."""
    made = {}

    def make(dtype):
        if dtype not in made:
            config = quick_config(calibration=texts, calibration_samples=20, **SETTINGS, **REFINE)
            made[dtype] = load(llama_folder, dtype, config)
        return made[dtype]

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refined_model_reloads_to_the_same_logits(refined, token_ids, tmp_path, dtype):
    model = refined(dtype)
    assert model.hf_quantizer.report.tuning.improved
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)
    stored = loaded.config.quantization_config
    assert stored.refine and (stored.refine_epochs, stored.refine_steps) == (2, 8)


def test_refined_norms_are_saved_in_the_models_dtype(refined, llama_folder, tmp_path):
    refined(torch.bfloat16).save_pretrained(tmp_path)
    dense = load(llama_folder, torch.bfloat16)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        norm = file.get_tensor("model.norm.weight")
    assert norm.dtype == torch.bfloat16
    assert not torch.equal(norm, dense.model.norm.weight)


def test_refinement_costs_no_bit(refined, llama_folder, texts, quick_config):
    plain = load(llama_folder, torch.float32, quick_config(calibration=texts, calibration_samples=20, **SETTINGS))
    models = (plain, refined(torch.float32))
    bits = [{n: m.bits_per_weight for n, m in x.named_modules() if isinstance(m, SABLinear)} for x in models]
    assert len(bits[0]) == 14 and bits[0] == bits[1]


def test_resume_folder_replays_a_run(llama_folder, texts, quick_config, tmp_path):
    config = {"calibration": texts, "resume_folder": tmp_path / "run"}
    first = load(llama_folder, torch.float32, quick_config(**config))
    files = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert files == [*(f"block-0000{i}.safetensors" for i in range(2)), "fingerprint.json", "rules.json"]
    again = load(llama_folder, torch.float32, quick_config(**config))
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items())
    assert SABConfig(resume_folder="x").to_dict() == SABConfig().to_dict()
