"""The baselines against their definitions, and as quantizers that behave as published."""

import pytest
import torch

from optimum_sab.core.hessian import InputMoments, InputStatistics
from optimum_sab.core.solver import output_error
from optimum_sab.errors import ConfigError, NonFiniteError
from optimum_sab.eval.baselines import BASELINES, arb, arb_rc, billm, gptq, pb_llm, rtn_sign, sab_published


def weight_of(out, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, width, generator=generator) * (0.2 + torch.rand(width, generator=generator) ** 2)


def inputs_of(tokens, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)


def statistics_of(**modalities):
    width = next(iter(modalities.values())).shape[1]
    moments = InputMoments(width, torch.device("cpu"), False, "layer")
    for name, inputs in modalities.items():
        moments.add(name, inputs)
    return moments.statistics()


def plain(hessian):
    return InputStatistics(hessian, {"text": hessian}, None, {"text": 1})


@pytest.fixture(scope="module")
def layer():
    return weight_of(48, 256), statistics_of(text=inputs_of(1024, 256, 1), visual=inputs_of(1024, 256, 2))


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_handles_odd_widths_dead_columns_and_repeats(name):
    inputs = inputs_of(400, 200, 3)
    inputs[:, 150] = 0.0
    weight, statistics = weight_of(24, 200), statistics_of(text=inputs)
    kept = weight.clone()
    first = BASELINES[name](weight, statistics)
    assert first.weight.shape == weight.shape
    assert torch.isfinite(first.weight).all()
    assert 1.0 < first.bits_per_weight < 6.0
    assert torch.equal(weight, kept)
    assert torch.equal(first.weight, BASELINES[name](weight, statistics).weight)
    assert output_error(weight, first.weight, statistics.hessian) < 0.9


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_refuses_a_weight_that_is_not_finite(name):
    weight = weight_of(8, 128)
    weight[3, 4] = float("inf")
    with pytest.raises(NonFiniteError, match="NaN or inf"):
        BASELINES[name](weight, statistics_of(text=inputs_of(300, 128)))


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "rtn-sign"])
def test_every_calibrated_baseline_refuses_a_hessian_that_is_not_finite(name):
    hessian = torch.eye(128)
    hessian[3, 4] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or inf"):
        BASELINES[name](weight_of(8, 128), plain(hessian))


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_takes_rows_and_blocks_of_zeros(name):
    weight = weight_of(12, 256)
    weight[3] = 0.0
    inputs = inputs_of(400, 256)
    inputs[:, 128:] = 0.0
    found = BASELINES[name](weight, statistics_of(text=inputs, visual=inputs.flip(0))).weight
    assert torch.isfinite(found).all()
    assert found[3, :128].abs().max() < 1e-3


def test_methods_stand_in_the_published_order(layer):
    weight, statistics = layer
    error = {n: output_error(weight, f(weight, statistics).weight, statistics.hessian) for n, f in BASELINES.items()}
    assert error["gptq-4"] < error["gptq-3"] < error["gptq-2"] < error["rtn-sign"]
    assert error["arb-rc-cgb-rows"] < error["arb-rc-cgb"] < error["arb-rc"] < error["billm"] < error["rtn-sign"]
    assert error["pb-llm"] < error["rtn-sign"]


# -- bits, by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (rtn_sign, 1 + 16 / 128),
        (lambda w, s: gptq(w, s, bits=3), 3 + 32 / 128),
        # mask, 8 bits on an eighth, 1 on the rest, a scale per block, two numbers per row
        (lambda w, s: pb_llm(w, s, salient_share=0.125), 1 + 0.125 * 8 + 0.875 + 16 / 128 + 32 / 256),
        # salient columns have a second sign and no group: two bits, however many they are
        (billm, 2 + 1 / 48 + 7 * 16 / 128),
    ],
    ids=["rtn-sign", "gptq-3", "pb-llm", "billm"],
)
def test_bits_count_everything_a_decoder_needs(layer, method, expected):
    assert method(*layer).bits_per_weight == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # per row: signs, the others' group, row scales; per block: which are salient, column scales of 5 and 123
        ("arb-rc", (128 + 5 + 123 + 4 * 16) / 128 + (128 + 16 * (2 * 123 + 2 * 5)) / (48 * 128)),
        ("arb-rc-cgb", (128 + 5 + 128 + 6 * 16) / 128 + (128 + 16 * (2 * 123 + 4 * 5)) / (48 * 128)),
        ("arb-rc-cgb-rows", (128 + 5 + 128 + 6 * 16) / 128 + (128 + 16 * (2 * 123 + 4 * 5)) / (48 * 128)),
        ("sab-published", (128 + 5 + 128 + 6 * 16) / 128 + (128 + 16 * (2 * 123 + 4 * 5)) / (48 * 128)),
    ],
)
def test_arb_bits_count_the_scales_of_every_plane_and_group(monkeypatch, layer, name, expected):
    monkeypatch.setattr(arb, "salient_columns", lambda saliencies: torch.arange(128) < 5)
    assert BASELINES[name](*layer).bits_per_weight == pytest.approx(expected)


@pytest.mark.parametrize(("bits", "width", "expected"), [(2, 256, 2.25), (3, 128, 3.25), (2, 192, 2 + 64 / 192)])
def test_gptq_bits_count_scales_and_offsets(bits, width, expected):
    result = gptq(torch.randn(4, width), plain(torch.eye(width)), bits)
    assert result.bits_per_weight == pytest.approx(expected)
    assert all(row.unique().numel() <= 2**bits * -(-width // 128) for row in result.weight)


# -- single steps -------------------------------------------------------------------------------------------------


def test_gptq_with_an_identity_hessian_rounds_to_nearest():
    weight = weight_of(6, 64, 1)
    result = gptq(weight, plain(torch.eye(64)), bits=3, group_size=32)
    for start in (0, 32):
        block = weight[:, start : start + 32]
        low, high = block.amin(1).clamp_max(0), block.amax(1).clamp_min(0)
        scale = ((high - low) / 7).half().float()[:, None]
        zero = torch.round(-low[:, None] / scale)
        nearest = ((torch.round(block / scale) + zero).clamp(0, 7) - zero) * scale
        torch.testing.assert_close(result.weight[:, start : start + 32], nearest)


@pytest.mark.parametrize("method", [gptq, pb_llm, billm, arb_rc])
def test_compensation_under_the_true_hessian_beats_none(layer, method):
    weight, statistics = layer
    blind = plain(torch.eye(weight.shape[1]))
    aware, unaware = method(weight, statistics).weight, method(weight, blind).weight
    assert output_error(weight, aware, statistics.hessian) < output_error(weight, unaware, statistics.hessian)


def test_rounds_lower_the_weighted_error_of_a_fit():
    block = weight_of(16, 64)
    error_weight = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.1
    group = torch.rand(16, 64, generator=torch.Generator().manual_seed(4)) > 0.3
    errors = [
        float((error_weight * (block * group - arb._fit(block, group, error_weight, order, rounds)).square()).sum())
        for order in (1, 2)
        for rounds in (0, 1, 5, 15)
    ]
    for order in (errors[:4], errors[4:]):
        assert order == sorted(order, reverse=True)
        assert order[3] < order[0]
    assert errors[7] < errors[3]


def test_two_planes_take_the_nearest_of_their_four_levels():
    values, ones = weight_of(9, 20), torch.ones(9, 20)
    rows = [torch.randn(9, 1, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]  # of either sign
    planes = [arb._Plane(a, torch.rand(20, generator=torch.Generator().manual_seed(3)) + 0.1, ones) for a in rows]
    first, second = (plane.value for plane in planes)
    best = torch.stack([(values - s * first - t * second).abs() for s in (-1, 1) for t in (-1, 1)]).amin(0)
    arb._update_signs(planes, values, ones.bool())
    torch.testing.assert_close((values - planes[0].value - planes[1].value).abs(), best)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("rounds", [0, 15])
def test_a_fit_leaves_rows_and_columns_without_entries_at_zero(order, rounds):
    block, group = weight_of(6, 10), torch.ones(6, 10, dtype=torch.bool)
    group[2], group[:, 7] = False, False
    found = arb._fit(block, group, torch.ones(10), order, rounds)
    assert torch.equal(found != 0, group)
    assert torch.isfinite(found).all()


def test_weighted_fit_spends_its_scales_where_the_weight_is():
    block, group = weight_of(16, 64), torch.ones(16, 64, dtype=torch.bool)
    error_weight = torch.where(torch.arange(64) < 32, 1.0, 1e-3)
    # without rounds there is no column scale that could follow its own column
    gap = [(block - arb._fit(block, group, w, 1, 0)).square().sum(0) for w in (error_weight, torch.ones(64))]
    assert gap[0][:32].sum() < gap[1][:32].sum()
    assert gap[0][32:].sum() > gap[1][32:].sum()


@pytest.mark.parametrize("column_groups", [False, True])
def test_rounds_lower_the_error_of_the_layer(layer, column_groups):
    weight, statistics = layer
    errors = [
        output_error(weight, arb_rc(weight, statistics, column_groups, rounds).weight, statistics.hessian)
        for rounds in (0, 15)
    ]
    assert errors[1] < errors[0]


# -- SAB ----------------------------------------------------------------------------------------------------------


def test_sab_with_one_modality_is_arb_with_column_groups():
    """One modality makes Λ = 1, and its Hessian is the text's."""
    weight, statistics = weight_of(32, 256), statistics_of(text=inputs_of(1024, 256))
    text = plain(statistics.by_modality["text"])
    found = sab_published(weight, statistics).weight
    torch.testing.assert_close(found, arb_rc(weight, text, column_groups=True).weight)


def test_sab_compensates_with_text_alone(monkeypatch, layer):
    weight, statistics = layer
    monkeypatch.setattr(
        arb, "significance_map", lambda w, d: type("Map", (), {"map": torch.ones(w.shape[1])})
    )  # what is left of the visual tokens is the compensation
    other = statistics_of(text=inputs_of(1024, 256, 1), visual=inputs_of(512, 256, 9))
    torch.testing.assert_close(sab_published(weight, statistics).weight, sab_published(weight, other).weight)
    text = plain(statistics.by_modality["text"])
    torch.testing.assert_close(
        sab_published(weight, statistics).weight, arb_rc(weight, text, column_groups=True).weight
    )


def test_sab_s_map_depends_on_both_modalities(layer):
    weight, statistics = layer
    other = statistics_of(text=inputs_of(1024, 256, 1), visual=inputs_of(512, 256, 9))
    assert not torch.equal(sab_published(weight, statistics).weight, sab_published(weight, other).weight)


def test_gptq_names_bad_bits(layer):
    with pytest.raises(ConfigError, match="bits=0"):
        gptq(*layer, bits=0)


def test_pb_llm_names_a_bad_share(layer):
    with pytest.raises(ConfigError, match=r"salient_share=1\.5"):
        pb_llm(*layer, salient_share=1.5)


def test_pb_llm_keeps_salient_weights_nearly_exact():
    weight = weight_of(32, 128)
    weight[5, 7] = 20.0
    found = pb_llm(weight, plain(torch.eye(128))).weight
    assert found[5, 7] == pytest.approx(20.0, rel=0.01)
