import pytest

from optimum_sab.example.learning_rate import cosine_rates, linear_rates


def test_cosine_rates_warm_up_and_decay_to_a_hundredth():
    factors = cosine_rates(1.0, steps=10, warmup=4)
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[-1] == pytest.approx(0.01)
    assert all(later < earlier for earlier, later in zip(factors[3:], factors[4:]))


def test_linear_rates_rise_to_the_peak_and_fall_to_their_last_share():
    rates = linear_rates(2.0, steps=20, warmup=4, last=0.05)
    assert len(rates) == 20
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2 * (1.05 - 4 / 20)])
    assert rates[-1] == pytest.approx(2 * 0.05)
    assert all(later < earlier for earlier, later in zip(rates[3:], rates[4:]))


@pytest.mark.parametrize("warmup", [0, 1])
def test_linear_rates_of_a_few_steps_need_no_warm_up(warmup):
    assert linear_rates(1.0, steps=2, warmup=warmup, last=0.05) == pytest.approx([0.55, 0.05])
    assert linear_rates(1.0, steps=0, warmup=warmup, last=0.05) == []
