"""The table of tiles of pairs, by its definition."""

import pytest
import torch

pytest.importorskip("triton")
from sab_kernels.expert_tiles import TABLE_ENTRIES, most_tiles, route

pytestmark = pytest.mark.usefixtures("poisoned")


def random_ids(pairs, experts, seed=0):
    """Two of them of no expert, where there are so many."""
    ids = torch.randint(0, experts, (pairs,), generator=torch.Generator().manual_seed(seed))
    ids[:2] = torch.tensor([-1, experts])[: ids[:2].numel()]
    return ids


CASES = {
    "one pair": ([0], 1, 4),
    "one pair of no expert": ([5], 5, 4),
    "in order": ([0, 0, 0, 1, 1, 2], 3, 4),
    "one expert": ([3] * 21, 8, 8),
    "none below": ([-1] * 9, 2, 4),
    "none past": ([2] * 9, 2, 4),
    "far away": ([2**40, -(2**40), 1, 0, 2**31, -(2**31) - 1], 2, 4),
    "full tiles": ([0] * 16 + [2] * 32, 4, 16),
    "a pair for each": (list(range(16)), 16, 8),
    "many": (random_ids(300, 30), 30, 16),
    "few experts": (random_ids(500, 2), 2, 64),
    "experts enough for some programs": (random_ids(40, 4100), 4100, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_tiles_hold_every_pair_once_by_its_expert(device, name):
    ids, experts, size = CASES[name]
    ids = torch.as_tensor(ids)
    found = route(ids.to(device), experts, 1, size)
    order, table = found.order.tolist(), found.table[:, :3].tolist()
    assert len(table) == most_tiles(len(ids), experts, size)
    seen = []
    for expert, first, count in table:
        assert 0 <= count <= size
        pairs = order[first : first + count]
        assert len(pairs) == count
        for pair in pairs:
            assert expert == (int(ids[pair]) if 0 <= ids[pair] < experts else -1)
        assert expert < 0 or pairs == sorted(pairs)
        seen += pairs
    assert sorted(seen) == list(range(len(ids)))
    used = sum(count > 0 for _, _, count in table)
    inside = ids[(ids >= 0) & (ids < experts)]
    expected = sum(-(-count // size) for count in torch.bincount(inside).tolist())
    below, past = int((ids < 0).sum()), int((ids >= experts).sum())
    assert used == expected - (-below // size) - (-past // size), "no tile is less full than it need be"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_ids_of_any_integer_dtype_are_taken(device, dtype):
    ids = torch.tensor([3, 0, 3, 200 if dtype == torch.uint8 else -4, 1])
    expected = route(ids.to(device), 4, 1, 4).table[:, :3]
    found = route(ids.to(dtype).to(device), 4, 1, 4).table[:, :3]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("experts", "size"), [(1, 4), (3, 8), (128, 16), (128, 64)])
def test_most_tiles_are_reached_and_not_passed(experts, size):
    """The worst there is: one more pair than whole tiles in every group."""
    for whole in (0, 3):
        pairs = (experts + 2) * (whole * size + 1)
        assert most_tiles(pairs, experts, size) == (experts + 2) * (whole + 1)
        assert most_tiles(pairs - 1, experts, size) == (experts + 2) * (whole + 1) - 1
    assert most_tiles(1, experts, size) == 1


def test_table_of_many_experts_takes_more_than_one_program():
    assert TABLE_ENTRIES // 8192 == 1 < most_tiles(40, 4100, 4)


def test_pairs_by_themselves_need_no_table():
    ids = torch.tensor([1, 0])
    assert route(ids, 2, 1, 1).table is ids
