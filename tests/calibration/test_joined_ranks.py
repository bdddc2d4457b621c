"""Several processes give what one gives, stop together, and go on in any number."""

import json
import os

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors import safe_open

from optimum_sab.calibration.joining import TIMEOUT, joined, launched, timeout
from optimum_sab.calibration.last_words import LAST_WORDS
from optimum_sab.calibration.options import RunOptions
from optimum_sab.calibration.ranks import Ranks, require_samples, shares
from optimum_sab.calibration.refine.tuning import SAVE_EVERY
from optimum_sab.calibration.stages.agreement import require_shareable
from optimum_sab.calibration.statistics import passes
from optimum_sab.calibration.statistics.hessian import HessianPass
from optimum_sab.errors import CalibrationError, ConfigError, NonFiniteError, RankError, SampleError
from tests.calibration import rank_work
from tests.calibration.ranked import Server

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
LENGTHS = (9, 5, 1, 12, 3)
fused = pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="experts are no one module")


@pytest.fixture(scope="module")
def server(warm):
    found = Server(warm / "python")
    yield found
    found.close()


@pytest.fixture(scope="module")
def one(server):
    """What one process gives where sums are exact."""
    return values(server.run(1, rank_work.llama, LENGTHS, True))[0]


def values(outcomes):
    for each in outcomes:
        if each.error is not None:
            raise each.error
        assert each.code == 0
    return [each.value for each in outcomes]


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name][key]) for name, tensors in one.items() for key, tensor in tensors.items()
    )


# -- the same result -----------------------------------------------------------------------------------------------


@pytest.mark.compat
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.full)])
def test_planes_are_those_of_one_process_bit_for_bit_where_sums_are_exact(server, one, size):
    tensors, report = one
    assert len(tensors) == 14 and all(block.wire_bytes == 0 for block in report.blocks)
    for mine, told in values(server.run(size, rank_work.llama, LENGTHS, True)):
        assert same(mine, tensors)
        assert told.tokens == report.tokens
        for block, wanted in zip(told.blocks, report.blocks, strict=True):
            assert block.wire_bytes > 100_000
            assert block.drift == pytest.approx(wanted.drift, rel=1e-5)
            assert block.by_modality["text"] == pytest.approx(wanted.by_modality["text"], rel=1e-5)
            assert [layer.error for layer in block.layers] == [layer.error for layer in wanted.layers]


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(rank_work.pictures, marks=pytest.mark.full),
        pytest.param(rank_work.mixture, marks=[fused]),
        rank_work.crossing,
    ],
    ids=["pictures in some samples", "fused experts", "one rank alone comes to a cross-attention block"],
)
def test_rounding_of_sums_is_all_that_differs(server, work):
    [(_, one)] = values(server.run(1, work))
    first, *others = values(server.run(2, work))
    for mine, _ in others:
        assert same(mine, first[0])
    for block, wanted in zip(first[1].blocks, one.blocks, strict=True):
        assert block.error == pytest.approx(wanted.error, rel=0.03)
        assert block.drift == pytest.approx(wanted.drift, rel=0.05)
        assert block.by_modality.keys() == wanted.by_modality.keys()
        assert [(each.counts, each.mixed) for each in block.experts] == [
            (each.counts, each.mixed) for each in wanted.experts
        ]
    assert (work is rank_work.mixture) == any(block.experts for block in one.blocks)


@pytest.mark.parametrize("whose", [rank_work.in_turn, rank_work.all_on_the_last], ids=["in turn", "all on the last"])
@pytest.mark.parametrize("size", [2, 3])
def test_the_temperature_is_that_of_one_process_bit_for_bit(server, size, whose):
    [(wanted, norm, _)] = values(server.run(1, rank_work.tempered, whose))
    assert wanted.value > 1.05
    for found, mine, sent in values(server.run(size, rank_work.tempered, whose)):
        assert found == wanted and torch.equal(mine, norm)
        assert 2 * 150 * 64 * 4 < sent < 200_000 * size  # what is chosen, not all that was given to the head


def test_no_rank_has_a_token_that_is_judged(server):
    assert [found for found, *_ in values(server.run(2, rank_work.tempered, rank_work.nobodys))] == [None, None]


def test_stages_of_one_rank_each_are_done_at_the_same_time(server, tmp_path):
    assert values(server.run(2, rank_work.meeting, tmp_path)) == [{"one": 0, "other": 1}] * 2


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.full)])
def test_training_takes_the_steps_of_one_process(server, size):
    [(block, model, wanted)] = values(server.run(1, rank_work.trained))
    assert block.improved and model.improved
    for of_block, of_model, found in values(server.run(size, rank_work.trained)):
        for mine, one in ((of_block, block), (of_model, model)):
            assert (mine.before, mine.after) == pytest.approx((one.before, one.after), rel=1e-4)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_ranks_that_refine_have_one_model(server):
    (state, report), (mine, told) = values(server.run(2, rank_work.refined))
    assert all(torch.equal(tensor, state[name]) for name, tensor in mine.items())
    assert told.tuning == report.tuning and report.tuning.improved
    assert [each.reconstruction for each in told.blocks] == [each.reconstruction for each in report.blocks]
    assert report.blocks[0].reconstruction.improved


def test_gradients_are_added_up_where_any_rank_has_one(server):
    for grads, mean in values(server.run(2, rank_work.adding_gradients)):
        assert grads[0].tolist() == [1.0, 1.0] and grads[1].tolist() == [2.0, 3.0, 4.0] and grads[2] is None
        assert mean == 4.5


# -- failures ------------------------------------------------------------------------------------------------------


def test_what_one_rank_raises_stops_all_with_what_it_said(server):
    first, second = server.run(2, rank_work.failing, (9, 5, 7))
    assert isinstance(second.error, NonFiniteError)
    assert isinstance(first.error, RankError)
    assert str(first.error).startswith(f"rank 1 of 2 has stopped: NonFiniteError: {second.error}")


@pytest.mark.parametrize("size", [1, pytest.param(3, marks=pytest.mark.full)])
def test_after_a_kill_any_number_of_ranks_goes_on_to_the_same_bits(server, one, tmp_path, size):
    first, killed = server.run(2, rank_work.llama, LENGTHS, True, rank_work.QUICK, tmp_path, 1)
    assert killed.code == -9 and first.seconds - killed.seconds < LAST_WORDS + 3
    assert isinstance(first.error, RankError) and "rank 1 of 2 does not answer" in str(first.error)
    kept = {each.name: each.stat().st_mtime_ns for each in tmp_path.iterdir()}
    assert sorted(kept) == ["block-00000.safetensors", "fingerprint.json"]
    for mine, report in values(server.run(size, rank_work.llama, LENGTHS, True, rank_work.QUICK, tmp_path)):
        assert same(mine, one[0])
        assert len(report.blocks) == 2
    assert kept.items() <= {each.name: each.stat().st_mtime_ns for each in tmp_path.iterdir()}.items()


def test_after_a_kill_the_tuning_goes_on_where_it_was(server, tmp_path):
    first, killed = server.run(2, rank_work.refined, tmp_path, 1)
    assert killed.code == -9 and isinstance(first.error, RankError)
    with safe_open(tmp_path / "tuning.safetensors", framework="pt") as file:
        kept = json.loads(file.metadata()["about"])
    assert kept["step"] == SAVE_EVERY
    for _, report in values(server.run(2, rank_work.refined, tmp_path)):
        assert report.tuning.before == kept["before"] and report.tuning.after <= kept["best"]


def test_a_rank_that_is_silent_is_given_up_in_time(server):
    first, _ = server.run(2, rank_work.silent_second, environment={TIMEOUT: "2"})
    assert isinstance(first.error, RankError) and "rank 1 of 2 does not answer" in str(first.error)
    assert 2 <= first.seconds < 2 + LAST_WORDS + 3


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("checkpoint", "model is "),
        ("samples", "samples is '3 of 21 tokens, "),
        ("settings", "layers.model.layers.0.self_attn.q_proj.iterations is 2 on the others and 3 there"),
        pytest.param("version", "release is ", marks=pytest.mark.full),
    ],
)
def test_a_rank_that_does_another_run_is_named_before_the_work(server, what, words):
    for each in server.run(3 if what == "settings" else 2, rank_work.differing, what):
        assert isinstance(each.error, RankError)
        assert "rank 1 of " in str(each.error) and "does another run" in str(each.error) and words in str(each.error)


def test_a_rank_at_another_place_is_named(server):
    for each in server.run(3, rank_work.elsewhere):
        assert isinstance(each.error, RankError) and "rank 1 is at 'there' and rank 0 at 'here'" in str(each.error)


def test_fewer_samples_than_ranks_are_refused():
    require_samples(3, 3)
    with pytest.raises(SampleError, match=r"2 calibration samples are fewer than the 3 processes.*start 2"):
        require_samples(2, 3)


@pytest.mark.full
def test_fewer_samples_than_ranks_stop_all(server):
    assert all(isinstance(each.error, SampleError) for each in server.run(3, rank_work.llama, LENGTHS[:2]))


def test_what_several_processes_cannot_do_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(passes, "PASSES", dict(passes.PASSES))

    @passes.register_pass("own")
    class Own(HessianPass):
        def collect(self, name, inputs, device):
            return super().collect(name, inputs, device)

    @passes.register_pass("weighted")
    class Weighted(HessianPass):
        weighting = "tokens"

    require_shareable(RunOptions(calibration_pass="weighted"))
    with pytest.raises(ConfigError, match="calibration_pass='own' gathers what cannot be added up"):
        require_shareable(RunOptions(calibration_pass="own"))


# -- what ranks do together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("caller", [False, True], ids=["our group", "the caller's"])
def test_processes_join_again_and_leave_a_group_of_the_caller_alone(server, caller):
    for rank, found in enumerate(values(server.run(3, rank_work.joining_twice, caller))):
        for turn in range(2):
            assert found[3 * turn] == [(0, turn), (1, turn), (2, turn)]
            assert found[3 * turn + 1] == [7.0] * 3
            assert found[3 * turn + 2] == ([] if rank else [[0], [1], [2]])
        assert found[6:] == ([3.0] if caller else [])


def test_of_symmetric_sums_the_upper_half_travels(server):
    width = 8
    rows = [torch.arange(float((width + 1) * width)).view(width + 1, width) % 5 + rank for rank in range(2)]
    (_, every, sent), (matrix, also, _) = values(server.run(2, rank_work.summing, width))
    assert torch.equal(matrix, sum(each.T @ each for each in rows))
    assert torch.equal(every, sum(rows)) and torch.equal(also, every)
    assert sent == 4 * (3 * 8 + 3 * 5 + 2 * 2)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_samples_are_shared_by_their_tokens(size):
    tokens = [40, 1, 1, 30, 0, 2, 25, 9, 9, 9, 5]
    found = shares(tokens, size)
    assert sorted(index for each in found for index in each) == list(range(len(tokens)))
    assert all(each == sorted(each) and each for each in found)
    loads = [sum(tokens[index] for index in each) for each in found]
    assert max(loads) <= max(40, sum(tokens) / size * 1.2)


def test_work_goes_to_the_rank_that_has_done_least():
    ranks = Ranks(0, 3)
    assert [ranks.owner_of(cost) for cost in (5.0, 3.0, 1.0, 1.0, 2.0, 1.0, 9.0)] == [0, 1, 2, 2, 2, 1, 1]


def test_one_process_is_one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")  # some clusters set it without saying who is who
    with joined() as ranks:
        assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
        assert ranks.exchange("alone", 3) == [3] and ranks.give("alone", 0, lambda: 4) == 4
        assert ranks.gather("alone", 5) == [5] and ranks.wire_bytes == 0


@pytest.mark.parametrize(("rank", "size"), [("4", "4"), ("one", "2"), ("-1", "2")])
def test_variables_that_do_not_go_together_are_refused(monkeypatch, rank, size):
    places = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"RANK='{rank}' and WORLD_SIZE='{size}'"):
        launched()


@pytest.mark.parametrize("given", ["soon", "0", "-3", "nan", "inf"])
def test_timeout_must_be_seconds(monkeypatch, given):
    monkeypatch.setenv(TIMEOUT, given)
    with pytest.raises(ConfigError, match=f"{TIMEOUT}='{given}' must be seconds above 0"):
        timeout()
    monkeypatch.setenv(TIMEOUT, "12.5")
    assert timeout() == 12.5


def test_rank_errors_are_calibration_errors():
    assert issubclass(RankError, CalibrationError) and RankError("x", told=True).told
