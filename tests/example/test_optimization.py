import pytest
import torch

from optimum_sab.example.optimization import Journal, Outcome, StackOptimizer, make_optimizers, optimize


@pytest.fixture
def weight():
    return torch.nn.Parameter(torch.tensor([3.0, 4.0]))


def descend(weight, rates, batches=None, clipped=(), **noted):
    """Plain gradient descent on `weight · batch`, whose gradient is the batch."""
    batches = iter(torch.ones(100, 2)) if batches is None else batches
    marks = iter([True, False, True, True] * 25)

    def outcome(batch):
        return Outcome((weight * batch).sum(), {"first": torch.tensor([next(marks)])})

    journal = Journal("descent", **noted)
    optimize(journal, outcome, batches, [torch.optim.SGD([weight], lr=1.0)], rates, clipped)


def test_optimize_takes_a_step_for_every_rate_and_draws_no_batch_more(weight):
    batches = iter(torch.ones(10, 2))
    descend(weight, [0.5, 0.25, 0.125], batches)
    assert weight.tolist() == [3 - 0.875, 4 - 0.875]
    assert len(list(batches)) == 7


def test_optimize_clips_the_gradient_as_one_vector(weight):
    descend(weight, [1.0], iter(torch.tensor([[30.0, 40.0]])), clipped=[weight])
    torch.testing.assert_close(weight.detach(), torch.tensor([3 - 0.6, 4 - 0.8]))
    descend(weight, [1.0], iter(torch.tensor([[0.3, 0.4]])), clipped=[weight])
    torch.testing.assert_close(weight.detach(), torch.tensor([3 - 0.9, 4 - 1.2]))


def test_optimize_reports_means_since_the_line_before(weight):
    lines = []
    descend(weight, [1.0, 1.0, 0.0, 0.0, 0.0], report=lines.append, report_every=2)
    parts = [line.split()[:6] for line in lines]
    assert parts == [
        ["descent", "2", "loss", "6.0000", "first", "0.500"],
        ["descent", "4", "loss", "3.0000", "first", "1.000"],
    ]


@pytest.mark.parametrize(("steps", "saves"), [(0, 0), (1, 1), (4, 2), (5, 3)])
def test_optimize_saves_at_times_and_at_the_end(weight, steps, saves):
    saved = []
    descend(weight, [0.1] * steps, save=lambda: saved.append(weight.tolist()), save_every=2)
    assert len(saved) == saves
    assert not saved or saved[-1] == weight.tolist()


def test_make_optimizers_share_all_that_is_trained():
    module = torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    module[2].weight.requires_grad_(False)
    muon, adam = make_optimizers(module, learning_rate=0.1, weight_decay=0.05)
    assert [group["params"] for group in muon.param_groups] == [[module[1].weight]]
    assert adam.param_groups[0]["params"] == [module[0].weight, module[1].bias, module[2].bias]


def test_an_optimizer_of_stacks_moves_every_matrix_as_if_it_were_alone():
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(2, 3, 4))
    alone = [torch.nn.Parameter(each.clone()) for each in stack.detach()]
    factors = torch.randn(2, 3, 4)

    def losses(matrices):
        return sum((each * factor).square().sum() for each, factor in zip(matrices, factors, strict=True))

    def optimizer(matrices):
        return torch.optim.SGD(matrices, lr=1.0, momentum=0.9)

    whole, single = StackOptimizer([stack], optimizer), optimizer(alone)
    for rate in (0.1, 0.05):
        for each, trained in ((whole, stack), (single, alone)):
            each.param_groups[0]["lr"] = rate
            each.zero_grad()
            losses(trained).backward()
            each.step()
    torch.testing.assert_close(stack.detach(), torch.stack([each.detach() for each in alone]))
    module = torch.nn.Linear(3, 3)
    module.experts = stack
    assert make_optimizers(module, 0.1, 0.0)[-1].param_groups[0]["params"] == [stack]
