"""Models without a language head, with one number for a whole text, or with an encoder: quantized, saved, reloaded."""

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from optimum_sab import SABLinear
from optimum_sab.errors import SABWarning
from optimum_sab.example import checkpoint_path

VOCABULARY = 1024
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 256,
}
START = {"decoder_start_token_id": 0, "pad_token_id": 0}

MODELS = {
    "reward": ("LlamaForSequenceClassification", "LlamaConfig", {**LLAMA, "num_labels": 1}, 14),
    "classes of a text": ("LlamaForSequenceClassification", "LlamaConfig", {**LLAMA, "num_labels": 3}, 14),
    "classes of tokens": ("LlamaForTokenClassification", "LlamaConfig", {**LLAMA, "num_labels": 3}, 14),
    "hidden states": ("LlamaModel", "LlamaConfig", LLAMA, 14),
    "encoder and decoder": ("BartForConditionalGeneration", "BartConfig", {**BART, **START}, 32),
    "weights that are read": ("T5ForConditionalGeneration", "T5Config", {**T5, **START}, 28),
}


@pytest.mark.filterwarnings("ignore::optimum_sab.errors.SABWarning")
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_of_any_kind_is_quantized_and_reloads_bit_for_bit(kind, quick_config, texts, tmp_path):
    model_class, config_class, settings, packed = MODELS[kind]
    cls = getattr(transformers, model_class)
    torch.manual_seed(0)
    dense, saved = tmp_path / "dense", tmp_path / "saved"
    cls(getattr(transformers, config_class)(**settings)).save_pretrained(dense)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    config = quick_config(calibration=texts, processor=tokenizer)
    model = cls.from_pretrained(dense, quantization_config=config)
    model.save_pretrained(saved)
    loaded = cls.from_pretrained(saved)
    ids = torch.arange(5, 30)[None]
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], loaded(**inputs)[0])
    assert sum(isinstance(module, SABLinear) for module in loaded.modules()) == packed
    assert model.hf_quantizer.report.section("allocation") is not None


def test_what_a_model_reads_stays_dense_with_a_word_and_so_does_the_temperature(quick_config, texts, tmp_path):
    """T5 casts to the dtype of ``wo``'s weight, and scales between its last norm and its head."""
    transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, **START)).save_pretrained(tmp_path)
    config = quick_config(calibration=texts, processor=AutoTokenizer.from_pretrained(checkpoint_path()))
    with pytest.warns(SABWarning) as said:
        model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config)
    told = " ".join(str(each.message) for each in said)
    assert "20.0% of the weights that were to be binarized stay dense. 4 linears, such as encoder.block.0" in told
    assert "is not fitted: no norm of it gives the output embedding its input" in told
    assert type(model.decoder.block[1].layer[2].DenseReluDense.wo) is torch.nn.Linear
    assert isinstance(model.decoder.block[1].layer[2].DenseReluDense.wi, SABLinear)
