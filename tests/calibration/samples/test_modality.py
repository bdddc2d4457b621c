from types import SimpleNamespace

import pytest
import torch

from optimum_sab.calibration.samples.modality import TokenModalities, token_modalities
from optimum_sab.nn.modalities import model_modalities

IDS = torch.tensor([[1, 7, 7, 2, 8, 9]])


def config(**ids):
    return SimpleNamespace(**ids)


@pytest.mark.parametrize("name", ["image_token_id", "image_token_index", "video_token_id", "video_token_index"])
def test_placeholder_ids_of_the_config_mark_visual_tokens(name):
    modalities = token_modalities({"input_ids": IDS}, config(**{name: 7}))
    assert modalities.names == ("text", "visual")
    assert modalities.labels.tolist() == [0, 1, 1, 0, 0, 0]


def test_image_and_video_tokens_are_both_visual_and_audio_is_its_own():
    modalities = token_modalities({"input_ids": IDS}, config(image_token_id=7, video_token_id=8, audio_token_id=9))
    assert modalities.names == ("text", "visual", "audio")
    assert modalities.labels.tolist() == [0, 1, 1, 0, 1, 2]
    assert [modalities.count(name) for name in modalities.names] == [2, 3, 1]


def test_placeholder_id_zero_counts():
    modalities = token_modalities({"input_ids": torch.tensor([[0, 3]])}, config(image_token_id=0))
    assert modalities.labels.tolist() == [1, 0]


def test_sample_without_pictures_is_text_under_a_model_that_reads_them():
    modalities = token_modalities({"input_ids": torch.tensor([[1, 2]])}, config(image_token_id=7))
    assert (modalities.count("text"), modalities.count("visual")) == (2, 0)


def test_token_types_of_the_processor_decide_where_the_config_has_no_ids():
    inputs = {"input_ids": IDS, "mm_token_type_ids": torch.tensor([[0, 0, 1, 2, 0, 0]])}
    modalities = token_modalities(inputs, config())
    assert modalities.names == ("text", "visual")
    assert modalities.labels.tolist() == [0, 0, 1, 1, 0, 0]


def test_ids_of_the_config_come_before_the_processors_token_types():
    inputs = {"input_ids": IDS, "mm_token_type_ids": torch.tensor([[1, 0, 0, 0, 0, 0]])}
    assert token_modalities(inputs, config(image_token_id=7)).labels.tolist() == [0, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("given", [config(), config(image_token_id=None), None])
def test_language_model_has_text_only(given):
    modalities = token_modalities({"input_ids": IDS}, given)
    assert modalities.names == model_modalities(given) == ("text",)
    assert modalities.labels.tolist() == [0] * 6


def test_inputs_without_token_ids_have_no_labels():
    assert token_modalities({"inputs_embeds": torch.zeros(1, 3, 4)}, config(image_token_id=7)).labels.numel() == 0


def test_count_of_an_absent_modality_is_zero():
    assert TokenModalities(("text",), torch.zeros(3, dtype=torch.int64)).count("visual") == 0
