import itertools
import json

from optimum_sab.example import checkpoint_path
from optimum_sab.example.architecture import SPECIAL_TOKENS, VOCABULARY_SIZE
from optimum_sab.example.tokenization import tokenizer_texts, write_processor
from optimum_sab.hf.processor import load_processor


def test_write_processor_writes_what_the_shipped_checkpoint_has(tmp_path):
    write_processor(tmp_path / "processor", itertools.islice(tokenizer_texts(0), 3000))
    for name in ("chat_template.jinja", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / "processor" / name).read_text() == (checkpoint_path() / name).read_text(), name
    tokenizer = load_processor(tmp_path / "processor").tokenizer
    assert len(tokenizer) == VOCABULARY_SIZE
    assert tokenizer.convert_ids_to_tokens(list(range(len(SPECIAL_TOKENS)))) == list(SPECIAL_TOKENS)
    assert tokenizer.decode(tokenizer.encode("naïve 漢字 407")) == "naïve 漢字 407"
    stored = json.loads((tmp_path / "processor" / "tokenizer.json").read_text())
    assert {token["content"] for token in stored["added_tokens"]} == set(SPECIAL_TOKENS)
