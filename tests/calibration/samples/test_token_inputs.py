import torch

from optimum_sab.calibration.samples.token_inputs import cut_inputs, extend_inputs


def test_inputs_are_extended_and_cut_along_the_tokens_only():
    inputs = {
        "input_ids": torch.tensor([[1, 2, 3, 4]]),
        "attention_mask": torch.ones(1, 4, dtype=torch.int64),
        "mm_token_type_ids": torch.tensor([[0, 1, 1, 0]]),
        "cross_attention_mask": torch.tensor([0, 1, 1, 0]).view(1, 4, 1, 1).expand(1, 4, 2, 3),
        "pixel_values": torch.zeros(4, 5),
        "names": ["a"],
    }
    longer = extend_inputs(inputs, (8, 9))
    assert longer["input_ids"].tolist() == [[1, 2, 3, 4, 8, 9]]
    assert longer["attention_mask"].tolist() == [[1] * 6]
    assert longer["mm_token_type_ids"].tolist() == [[0, 1, 1, 0, 0, 0]]
    assert longer["cross_attention_mask"].shape == (1, 6, 2, 3)
    assert longer["pixel_values"] is inputs["pixel_values"]
    shorter = cut_inputs(longer, 4)
    assert all(torch.equal(shorter[k], v) for k, v in inputs.items() if isinstance(v, torch.Tensor))
    assert shorter["names"] == ["a"]
