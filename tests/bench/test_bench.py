"""The benchmarks on a tiny random language model: that they measure what they say, not how fast."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from optimum_sab.bench.perplexity import perplexity
from optimum_sab.bench.text import mixed_windows, text_windows
from optimum_sab.cli.main import main
from optimum_sab.errors import ConfigError
from optimum_sab.example import checkpoint_path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench-llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint_path()).save_pretrained(folder)
    return folder


def test_text_halves_are_disjoint_and_bounded(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    windows = [text_windows(tokenizer, "passages", part, 4, 64) for part in ("calibration", "held-out")]
    assert windows[0].shape == (4, 64)
    assert not torch.equal(*windows)
    assert len(mixed_windows(tokenizer, "mixed", "calibration", 6, 32)) == 6
    with pytest.raises(ConfigError, match=r"has \d+ windows"):
        text_windows(tokenizer, "passages", "held-out", 10**6, 64)


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    class Uniform:
        def __call__(self, input_ids):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 50)})

    assert perplexity(Uniform(), torch.randint(0, 50, (3, 20))) == pytest.approx(50, rel=1e-4)


def test_bench_layers_prints_every_method(llama, capsys):
    command = ["bench", "layers", str(llama), "--layers", "0", "1", "--samples", "8", "--length", "128", "--json"]
    assert main(command) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["methods"]}
    assert 0 < rows["default"]["error"] < rows["same planes, block compensation, no refit"]["error"]
    assert rows["GPTQ 3-bit g128"]["error"] < rows["GPTQ 2-bit g128"]["error"]
    assert rows["GPTQ 2-bit g128"]["bits_per_weight"] == pytest.approx(2.25)
    assert set(rows["default"]["by_source"]) == {"reference", "passages"}


def test_bench_layers_names_a_linear_that_is_not_there(llama, capsys):
    assert main(["bench", "layers", str(llama), "--linears", "w1", "--samples", "2", "--length", "32"]) == 1
    assert "w1" in capsys.readouterr().err


def test_bench_perplexity_compares_dense_and_packed(llama, capsys):
    command = ["bench", "perplexity", str(llama), "--samples", "4", "--length", "64", "--held-out", "2", "--json"]
    assert main([*command, "--iterations", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    for source in ("reference", "passages"):
        assert found["ratio"][source] == pytest.approx(found["packed"][source] / found["dense"][source])
        assert found["packed"][source] != found["dense"][source]
    assert 1.0 < found["bits_per_weight"] < 1.6
