import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from optimum_sab.core.factorization import factor_hessian
from optimum_sab.core.hessian import STRIP, InputMoments, InputStatistics, accumulate_hessian
from optimum_sab.errors import CalibrationError, NonFiniteError

bounded = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
CPU = torch.device("cpu")


def naive_moment(left, right):
    """Σ over tokens of l rᵀ, in double precision."""
    total = np.zeros((left.shape[1], right.shape[1]))
    for token in range(left.shape[0]):
        for i in range(left.shape[1]):
            for j in range(right.shape[1]):
                total[i, j] += float(left[token, i]) * float(right[token, j])
    return total


def tokens(count, width, seed=0, offset=0.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + offset


def positive(width, seed=0):
    mixing = tokens(width + 5, width, seed)
    return mixing.T @ mixing / (width + 5)


@pytest.mark.parametrize("width", [5, STRIP, 2 * STRIP + 7])
def test_accumulate_hessian_in_strips_adds_the_whole_product(width):
    inputs = torch.randn(70, width, generator=torch.Generator().manual_seed(0))
    hessian = torch.zeros(width, width)
    for some in inputs.split(40):
        accumulate_hessian(hessian, some)
    assert torch.equal(hessian[STRIP:, :STRIP], hessian[:STRIP, STRIP:].T)
    torch.testing.assert_close(hessian, (inputs.double().T @ inputs.double()).float(), rtol=1e-4, atol=1e-4)


def test_accumulate_hessian_adds_the_outer_product_of_every_token():
    inputs = tokens(7, 4)
    hessian = torch.zeros(4, 4)
    accumulate_hessian(hessian, inputs[:3])
    accumulate_hessian(hessian, inputs[3:])
    np.testing.assert_allclose(hessian.numpy(), naive_moment(inputs, inputs), rtol=1e-5, atol=1e-5)


def test_statistics_hold_the_mean_second_moment_of_every_modality():
    text, visual = tokens(9, 4, 0), tokens(30, 4, 1, offset=0.5)
    moments = InputMoments(4, CPU, False, "layer")
    moments.add("text", text[:4])
    moments.add("visual", visual)
    moments.add("text", text[4:])
    found = moments.statistics()
    assert found.tokens == {"text": 9, "visual": 30}
    assert found.drift is None
    for name, inputs in (("text", text), ("visual", visual)):
        expected = 2 / len(inputs) * naive_moment(inputs, inputs)
        np.testing.assert_allclose(found.by_modality[name].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_statistics_balance_the_modalities_by_their_traces(statistics_of):
    text, visual = tokens(9, 4, 0), 100 * tokens(30, 4, 1, offset=0.5)
    found = statistics_of(text=text, visual=visual)
    each = [naive_moment(x, x) for x in (text, visual)]
    expected = sum(H / np.trace(H) for H in each) * 4 / 2
    np.testing.assert_allclose(found.hessian.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert float(found.hessian.diagonal().mean()) == pytest.approx(1.0)


def test_statistics_of_two_halves_are_those_of_all_and_hold_the_first_half_s_part():
    each = {m: [tokens(n, 4, seed + i) for i in range(4)] for seed, (m, n) in enumerate((("text", 9), ("visual", 30)))}

    def moments(*of):
        found = InputMoments(4, CPU, True, "layer")
        for modality, halves in each.items():
            for i in of:
                found.add(modality, halves[i], halves[i + 2], halves[i][:, :3])
        return found

    whole, split = moments(1, 0).statistics(), moments(1).statistics(part=moments(0))
    for name in ("hessian", "drift", "residual"):
        torch.testing.assert_close(getattr(split, name), getattr(whole, name))
    for modality, halves in each.items():
        torch.testing.assert_close(split.by_modality[modality], whole.by_modality[modality])
        assert split.tokens[modality] == 2 * len(halves[0])
    expected = np.zeros((4, 4))
    for halves in each.values():
        x = torch.cat(halves[:2])
        expected += 4 / 2 / np.trace(naive_moment(x, x)) * naive_moment(halves[2] - halves[0], halves[0])
    np.testing.assert_allclose(split.half.drift.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("dead", [False, True])
def test_a_modality_that_one_half_alone_has_is_in_both_sums(dead):
    """Where the other half's modality has no energy, one of this half's is the first to be summed into."""
    inputs = {"text": tokens(9, 4), "visual": tokens(7, 4, 1), "audio": tokens(5, 4, 2)}
    rest, part = (InputMoments(4, CPU, False, "layer") for _ in range(2))
    rest.add("text", 0 * inputs["text"] if dead else inputs["text"])
    for name in ("visual", "audio"):
        part.add(name, inputs[name])
    found = rest.statistics(part=part)
    assert found.tokens == {"text": 9, "visual": 7, "audio": 5}
    live = list(inputs)[dead:]
    each = {n: naive_moment(inputs[n], inputs[n]) for n in live}
    each = {n: H * 4 / len(live) / np.trace(H) for n, H in each.items()}
    np.testing.assert_allclose(found.hessian.numpy(), sum(each.values()), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.half.hessian.numpy(), each["visual"] + each["audio"], rtol=1e-5, atol=1e-5)
    assert found.hessian.data_ptr() != found.half.hessian.data_ptr()


def test_statistics_without_data_take_every_input_for_as_likely():
    found = InputStatistics.without_data(5, CPU)
    assert torch.equal(found.hessian, torch.eye(5))
    assert found.drift is None
    assert found.tokens == {}


@bounded
@hypothesis.given(st.integers(0, 10**6), st.integers(2, 5))
def test_statistics_do_not_change_when_one_modality_s_tokens_are_repeated(seed, times):
    moments, repeated = (InputMoments(5, CPU, True, "layer") for _ in range(2))
    for modality, count in (("text", times), ("visual", 1)):
        quantized, dense = tokens(6, 5, seed), tokens(6, 5, seed + 1)
        moments.add(modality, quantized, dense)
        for _ in range(count):
            repeated.add(modality, quantized, dense)
        seed += 2
    first, second = moments.statistics(), repeated.statistics()
    assert second.tokens == {"text": 6 * times, "visual": 6}
    torch.testing.assert_close(second.hessian, first.hessian, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second.drift, first.drift, rtol=1e-5, atol=1e-5)
    for modality in ("text", "visual"):
        torch.testing.assert_close(second.by_modality[modality], first.by_modality[modality], rtol=1e-5, atol=1e-6)


def test_statistics_do_not_change_with_the_magnitude_of_one_modality(statistics_of):
    text, visual = tokens(9, 4, 0), tokens(30, 4, 1, offset=0.5)
    torch.testing.assert_close(
        statistics_of(text=text, visual=8 * visual).hessian, statistics_of(text=text, visual=visual).hessian
    )


def test_statistics_of_one_modality_hold_the_drift_in_the_hessian_s_scale(statistics_of):
    quantized, dense = tokens(9, 3, 0), tokens(9, 3, 1)
    found = statistics_of(dense={"text": dense}, text=quantized)
    scale = 3 / np.trace(naive_moment(quantized, quantized))
    np.testing.assert_allclose(found.drift.numpy(), scale * naive_moment(dense - quantized, quantized), atol=1e-5)


def test_statistics_hold_the_drift_of_several_modalities_in_the_hessian_s_scale(statistics_of):
    quantized = {"text": tokens(9, 3, 0), "visual": tokens(20, 3, 1)}
    dense = {"text": tokens(9, 3, 2), "visual": tokens(20, 3, 3)}
    found = statistics_of(dense=dense, **quantized)
    expected = np.zeros((3, 3))
    for name, x in quantized.items():
        expected += 3 / 2 / np.trace(naive_moment(x, x)) * naive_moment(dense[name] - x, x)
    np.testing.assert_allclose(found.drift.numpy(), expected, atol=1e-5)


def test_statistics_leave_out_a_modality_without_tokens_or_with_zero_inputs():
    moments = InputMoments(4, CPU, False, "layer")
    alone = InputMoments(4, CPU, False, "layer")
    for each in (moments, alone):
        each.add("text", tokens(9, 4))
    moments.add("visual", torch.zeros(5, 4))
    moments.add("audio", torch.zeros(0, 4))
    found = moments.statistics()
    assert list(found.by_modality) == ["text"]
    assert found.tokens == {"text": 9, "visual": 5}
    assert torch.equal(found.hessian, alone.statistics().hessian)


def test_statistics_accept_half_precision_inputs():
    moments = InputMoments(4, CPU, False, "layer")
    inputs = tokens(9, 4).to(torch.bfloat16)
    moments.add("text", inputs)
    found = moments.statistics()
    assert found.hessian.dtype == torch.float32
    expected = 2 / 9 * naive_moment(inputs, inputs)
    np.testing.assert_allclose(found.by_modality["text"].numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", [[], [("text", torch.zeros(0, 4))], [("text", torch.zeros(3, 4))]])
def test_statistics_without_a_live_token_name_the_module(inputs):
    moments = InputMoments(4, CPU, False, "model.layers.3.q_proj")
    for modality, x in inputs:
        moments.add(modality, x)
    with pytest.raises(CalibrationError, match=r"model\.layers\.3\.q_proj"):
        moments.statistics()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_moments_refuse_an_input_that_is_not_finite_and_name_the_module(bad):
    moments = InputMoments(4, CPU, False, "model.layers.3.q_proj")
    inputs = tokens(5, 4)
    inputs[2, 1] = bad
    with pytest.raises(NonFiniteError, match=r"model\.layers\.3\.q_proj.*visual"):
        moments.add("visual", inputs)


def test_moments_refuse_infinities_that_cancel():
    moments = InputMoments(2, CPU, False, "layer")
    with pytest.raises(NonFiniteError, match="layer"):
        moments.add("text", torch.tensor([[math.inf, -math.inf]]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_moments_refuse_a_dense_input_that_is_not_finite_and_name_the_module(bad):
    moments = InputMoments(4, CPU, True, "model.layers.3.q_proj")
    dense = tokens(5, 4)
    dense[2, 1] = bad
    with pytest.raises(NonFiniteError, match=r"model\.layers\.3\.q_proj"):
        moments.add("text", tokens(5, 4, 1), dense)


def test_moments_refuse_a_missing_dense_stream_that_was_announced():
    moments = InputMoments(4, CPU, True, "model.layers.3.q_proj")
    with pytest.raises(CalibrationError, match=r"model\.layers\.3\.q_proj"):
        moments.add("text", tokens(5, 4))


def test_moments_of_finite_inputs_that_overflow_are_refused_by_the_factorization():
    moments = InputMoments(3, CPU, False, "layer")
    moments.add("text", torch.full((4, 3), 3e38))  # their sum is inf, they are not
    with pytest.raises(NonFiniteError, match="layer"):
        factor_hessian(moments.statistics().hessian, 0.01, "layer")


def test_statistics_factor_their_hessian_once_for_every_damping():
    hessian = positive(6, 3)
    statistics = InputStatistics(hessian, {"text": hessian}, None, {"text": 1})
    for damping in (0.05, 0.2):
        first, expected = statistics.factored(damping), factor_hessian(hessian, damping)
        assert torch.equal(first.inverse_factor, expected.inverse_factor)
        assert statistics.factored(damping) is first


def test_other_weightings_let_tokens_or_text_decide(correlated_inputs):
    text, visual = correlated_inputs(10, 6, 0), 3.0 * correlated_inputs(40, 6, 1)

    def statistics(weighting):
        moments = InputMoments(6, CPU, False, "layer")
        moments.add("text", text)
        moments.add("visual", visual)
        return moments.statistics(weighting)

    def unit(matrix):
        return matrix / matrix.diagonal().mean()

    together = torch.cat([text, visual])
    for weighting, wanted in (("tokens", together), ("text", text)):
        found = statistics(weighting)
        torch.testing.assert_close(found.hessian, unit(wanted.T @ wanted), rtol=1e-4, atol=1e-5)
        assert set(found.by_modality) == {"text", "visual"}
    balanced = 0.5 * (unit(text.T @ text) + unit(visual.T @ visual))
    torch.testing.assert_close(statistics("balanced").hessian, balanced, rtol=1e-4, atol=1e-5)


def test_text_weighting_without_text_takes_what_there_is(correlated_inputs):
    visual = correlated_inputs(40, 6, 1)
    moments = InputMoments(6, torch.device("cpu"), False, "layer")
    moments.add("visual", visual)
    assert float(moments.statistics("text").hessian.diagonal().mean()) == pytest.approx(1.0)
