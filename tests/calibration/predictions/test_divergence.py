"""The divergence by hand."""

import torch

from optimum_sab.calibration.predictions.divergence import ROWS, divergence, divergences


def test_divergence_is_the_sum_over_the_vocabulary():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.2, 0.4, 0.4]])
    expected = 0.5 * torch.tensor(0.5 / 0.2).log() + 0.5 * torch.tensor(0.25 / 0.4).log()
    torch.testing.assert_close(divergence(q.log() + 3.0, p.log() - 1.0), expected[None])
    assert not torch.allclose(divergence(p.log(), q.log()), expected[None])


def test_divergence_of_equal_distributions_is_zero():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(divergence(logits, logits), torch.zeros(4))


def test_tokens_in_turns_give_what_all_give_together():
    student, teacher = torch.randn(2, 2 * ROWS + 3, 9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(divergences(student, teacher), divergence(student, teacher))
