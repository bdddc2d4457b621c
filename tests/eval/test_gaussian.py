import pytest

from optimum_sab.errors import ConfigError
from optimum_sab.eval.gaussian import UNGERBOECK, gaussian_loss, main, read_code


def test_more_states_lose_less_of_a_gaussian():
    losses = [gaussian_loss(read_code(taps), columns=512) for taps in ("5,2", "11,4", "19,4", "67,20")]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] == pytest.approx(0.30, abs=0.01)  # a sign loses 0.363, no code less than 0.25


def test_a_free_plane_on_top_loses_a_quarter_less_than_two_signs():
    assert gaussian_loss(read_code("19,4"), free=1, columns=512) == pytest.approx(0.090, abs=0.004)  # two signs 0.118


def test_beside_a_free_plane_the_other_code_loses_less():
    alone, beside = (gaussian_loss(read_code(taps), free=1, columns=1024) for taps in ("19,4", "25,23"))
    assert beside < 0.98 * alone


def test_a_line_for_each_code(capsys):
    assert main(["--taps", "5,2", "11,4", "--columns", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["5,2", "11,4"]
    assert [line.split()[1] for line in lines] == ["4", "8"]
    assert all(0.25 < float(line.split()[-1]) < 0.4 for line in lines)
    assert len(UNGERBOECK) == 5


@pytest.mark.parametrize("taps", ["", "19", "19;4", "0,4", "200,4", "1,2,3,4", "a,b"])
def test_bad_taps_are_named(taps):
    if taps == "19":
        assert read_code(taps).memory == 4
        return
    with pytest.raises(ConfigError, match="taps"):
        read_code(taps)
