from types import SimpleNamespace

import pytest

from optimum_sab.calibration.samples.vocabulary import read_vocabulary

MARKS = frozenset({60, 61, 62, 63})  # placeholders and borders of pictures in the tiny models


class Tokenizer(SimpleNamespace):
    def __len__(self):
        return 50


def test_vocabulary_has_the_ends_of_model_and_tokenizer(build):
    model = build("qwen2_5_vl").model
    model.generation_config.update(eos_token_id=[1, 5], pad_token_id=None, bos_token_id=0)
    processor = SimpleNamespace(tokenizer=Tokenizer(eos_token_id=6, pad_token_id=4))
    found = read_vocabulary(model, processor)
    assert found.ends == {1, 5, 6}
    assert found.forbidden == {0, *MARKS}
    assert found.padding == 4
    assert found.size == 50


@pytest.mark.parametrize(("own", "ends", "expected"), [(3, [5], 3), (None, [5], 5), (-1, [5], 5), (None, None, 0)])
def test_padding_is_found_where_the_tokenizer_names_none(build, own, ends, expected):
    model = build("llama").model
    model.generation_config.update(eos_token_id=ends, pad_token_id=own, bos_token_id=None)
    assert read_vocabulary(model, Tokenizer(eos_token_id=None, pad_token_id=None)).padding == expected
