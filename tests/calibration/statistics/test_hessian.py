import pytest
import torch

from optimum_sab.calibration.samples.modality import TokenModalities
from optimum_sab.calibration.statistics import gathering as gathering_module
from optimum_sab.calibration.statistics import hessian
from optimum_sab.calibration.statistics.gathering import Gathering
from optimum_sab.calibration.statistics.group_inputs import GroupInputs
from optimum_sab.calibration.statistics.hessian import HessianPass
from optimum_sab.calibration.statistics.pairing import PairedInputs
from optimum_sab.core.settings import LayerSettings
from optimum_sab.core.target import cross_validated_alpha
from optimum_sab.errors import CalibrationError, NonFiniteError

CPU = torch.device("cpu")
WIDTH = 6


def rows(count, seed=0, scale=1.0):
    return scale * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def modalities(*labels, names=("text", "visual")):
    return TokenModalities(names, torch.tensor(labels))


def collect(*inputs):
    return HessianPass().collect("the.linear", inputs, CPU)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    return True


def test_hessian_is_the_second_moment_of_each_modality():
    x, y = rows(5), rows(3, seed=1)
    statistics = collect(
        PairedInputs(x, None, modalities(0, 1, 1, 0, 1)),
        PairedInputs(y, None, modalities(0, 0, 0)),
    )
    text, visual = torch.cat([x[[0, 3]], y]), x[[1, 2, 4]]
    assert statistics.tokens == {"text": 5, "visual": 3}
    assert close(statistics.by_modality["text"], 2 / 5 * text.T @ text)
    assert close(statistics.by_modality["visual"], 2 / 3 * visual.T @ visual)
    assert statistics.drift is None


def test_hessians_of_each_modality_are_left_out_unless_they_are_asked_for():
    pairs = [PairedInputs(rows(5, seed=i), rows(5, seed=9 + i), modalities(0, 1, 1, 0, 1)) for i in range(3)]
    collector = HessianPass()
    collector.by_modality = False
    lean, full = collector.collect("the.linear", pairs, CPU), collect(*pairs)
    assert lean.by_modality == {}
    assert set(full.by_modality) == {"text", "visual"}
    assert torch.equal(lean.hessian, full.hessian)
    assert torch.equal(lean.drift, full.drift)
    assert torch.equal(lean.half.hessian, full.half.hessian)


def test_hessian_weighs_modalities_alike_however_many_tokens_they_have():
    x = torch.cat([rows(40, scale=9.0), rows(4, seed=1)])
    statistics = collect(PairedInputs(x, None, modalities(*[1] * 40, *[0] * 4)))
    parts = [statistics.by_modality[m] / statistics.by_modality[m].trace() for m in ("text", "visual")]
    assert close(statistics.hessian, WIDTH / 2 * (parts[0] + parts[1]))


def test_drift_is_what_the_dense_stream_has_more_in_the_scale_of_the_hessian():
    quantized, dense = rows(6), rows(6, seed=1)
    labels = (0, 0, 1, 1, 1, 1)
    statistics = collect(PairedInputs(quantized, dense, modalities(*labels)))
    expected = torch.zeros(WIDTH, WIDTH)
    for index, name in enumerate(("text", "visual")):
        here = torch.tensor(labels) == index
        weight = WIDTH / 2 / statistics.by_modality[name].trace()
        expected += weight * 2 / int(here.sum()) * (dense - quantized)[here].T @ quantized[here]
    assert close(statistics.drift, expected)


@pytest.mark.parametrize("residuals", [True, False])
def test_with_a_weight_the_correction_is_gathered_in_the_place_of_the_drift(residuals):
    weight = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(7))

    def pair(seed):
        beside = tuple(rows(5, seed=seed + k)[:, :3] for k in (20, 30)) if residuals else None
        return PairedInputs(rows(5, seed=seed), rows(5, seed=seed + 10), modalities(0, 1, 1, 0, 1), beside)

    pairs = [pair(seed) for seed in range(4)]
    collector = HessianPass()
    plain = collector.collect("the.linear", pairs, CPU)
    collector.weight = weight
    found = collector.collect("the.linear", pairs, CPU)
    assert found.drift is None and found.two_streams
    assert torch.equal(found.hessian, plain.hessian)
    for mine, theirs in ((found, plain), (found.half, plain.half)):
        expected = weight @ theirs.drift
        assert close(mine.residual, expected if theirs.residual is None else expected + theirs.residual)
    assert cross_validated_alpha(weight, found, 0.1) == pytest.approx(
        cross_validated_alpha(weight, plain, 0.1), rel=1e-4
    )


def test_with_a_weight_and_one_stream_nothing_is_gathered_for_it():
    collector = HessianPass()
    collector.weight = torch.ones(3, WIDTH)
    found = collector.collect("the.linear", [PairedInputs(rows(5), None, modalities(0, 1, 1, 0, 1))], CPU)
    assert found.drift is None and found.residual is None and not found.two_streams


@pytest.mark.parametrize(
    ("shapes", "residual", "scale", "gathered"),
    [
        ([(5, WIDTH)], True, 1.0, True),  # fewer outputs than inputs
        ([(6, WIDTH)], True, 1.0, False),
        ([(2, WIDTH)], False, 1.0, True),  # fewer than half as many
        ([(3, WIDTH)], False, 1.0, False),
        ([(2, WIDTH), (2, WIDTH)], True, 1.0, False),
        ([(2, WIDTH)], True, 2.0**60, False),  # products of extreme weights may be too large
    ],
)
def test_the_weight_is_given_where_that_saves_work(shapes, residual, scale, gathered, monkeypatch):
    pairs = []
    for seed in range(2):
        beside = (rows(5, seed)[:, : shapes[0][0]], rows(5, seed + 5)[:, : shapes[0][0]]) if residual else None
        pairs.append(PairedInputs(rows(5, seed), rows(5, seed + 9), modalities(0, 1, 1, 0, 1), beside))
    gathering, group = Gathering(HessianPass(), []), GroupInputs.alone(pairs)
    weights = {f"linear{i}": scale * torch.ones(shape) for i, shape in enumerate(shapes)}
    assert gathering.statistics(weights, group, [LayerSettings()], CPU).drift is not None  # WIDTH is far below WIDE
    monkeypatch.setattr(gathering_module, "WIDE", WIDTH)
    found = gathering.statistics(weights, group, [LayerSettings()], CPU)
    assert (found.drift is None) == gathered
    assert gathering.collector.weight is None


def test_drift_is_left_out_without_a_dense_stream():
    pairs = [PairedInputs(rows(3), rows(3, seed=1), modalities(0, 0, 0)), PairedInputs(rows(2), None, modalities(0, 0))]
    assert collect(*pairs).drift is None


def test_statistics_of_many_samples_are_summed_in_a_few_bounded_products(monkeypatch):
    sizes = []
    add = hessian.InputMoments.add

    def spy(self, modality, quantized, dense=None, residual=None):
        sizes.append(quantized.shape[0])
        add(self, modality, quantized, dense, residual)

    monkeypatch.setattr(hessian.InputMoments, "add", spy)
    x = [rows(2000, seed=i) for i in range(10)]
    y = [rows(2000, seed=100 + i) for i in range(10)]
    statistics = collect(*(PairedInputs(a, b, modalities(*[0, 1, 1, 1] * 500)) for a, b in zip(x, y, strict=True)))
    text, visual = (torch.cat([a.view(500, 4, WIDTH)[:, s].flatten(0, 1) for a in x]) for s in (slice(1), slice(1, 4)))
    assert statistics.tokens == {"text": 5000, "visual": 15000}
    assert close(statistics.by_modality["text"], 2 / 5000 * text.T @ text)
    assert close(statistics.by_modality["visual"], 2 / 15000 * visual.T @ visual)
    assert len(sizes) < 10  # of 20 pieces
    assert max(sizes) < 4096 + 1500  # a batch ends with the sample that fills it


def test_rows_that_do_not_match_the_tokens_are_mixed():
    pairs = [PairedInputs(rows(2), None, modalities(0, 1, 1)), PairedInputs(rows(3, seed=1), None, modalities(0, 0, 0))]
    statistics = collect(*pairs)
    assert statistics.tokens == {"mixed": 2, "text": 3}


def test_rows_of_an_expert_are_mixed_also_where_a_sample_can_only_be_text():
    text = PairedInputs(rows(2), None, modalities(0, 0, 0, names=("text",)), routed=True)
    assert collect(text, PairedInputs(rows(2), None, modalities(0, 1, 1), routed=True)).tokens == {"mixed": 4}


def test_rows_that_do_not_match_the_tokens_are_text_in_a_language_model():
    assert collect(PairedInputs(rows(2), None, modalities(0, 0, 0, names=("text",)))).tokens == {"text": 2}


def test_half_precision_inputs_are_summed_in_float32():
    x = rows(300).half()
    expected = 2 / 300 * x.double().T @ x.double()
    statistics = collect(PairedInputs(x, None, modalities(*[0] * 300)))
    assert statistics.by_modality["text"].dtype == torch.float32
    torch.testing.assert_close(statistics.by_modality["text"].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_input_that_is_not_finite_names_the_linear_and_the_modality(value):
    x = rows(3)
    x[1, 2] = value
    with pytest.raises(NonFiniteError, match=r"the input of the\.linear holds NaN or inf for visual tokens"):
        collect(PairedInputs(x, None, modalities(0, 1, 0)))


def test_dense_input_that_is_not_finite_names_the_linear():
    x, dense = rows(3), rows(3)
    dense[0, 0] = float("inf")  # the dense stream alone may overflow in float16
    with pytest.raises(NonFiniteError, match=r"the\.linear"):
        collect(PairedInputs(x, dense, modalities(0, 0, 0)))


@pytest.mark.parametrize("inputs", [(), (PairedInputs(torch.zeros(0, WIDTH), None, modalities()),)])
def test_linear_without_tokens_is_named(inputs):
    with pytest.raises(CalibrationError, match=r"reached the\.linear.*modules_to_not_convert"):
        collect(*inputs)
