import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from optimum_sab.core.significance import hoyer_sparsity, significance_map, unimodal_ratio

bounded = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)


def naive_hoyer(entry):
    """ρ of one entry's saliencies under the z modalities."""
    z = len(entry)
    l2 = math.sqrt(sum(s * s for s in entry))
    if z == 1 or l2 == 0:
        return 0.0
    return (math.sqrt(z) - sum(entry) / l2) / (math.sqrt(z) - 1)


def naive_ratio(total, spatial, top=0.05, quantile=0.5, threshold=0.005):
    entries = [(total[i][j], spatial[j]) for i in range(len(total)) for j in range(len(total[0]))]
    mass = sum(s for s, _ in entries)
    if mass == 0:
        return 0.0
    salient = sorted(entries, reverse=True)[: max(1, round(top * len(entries)))]
    cut = float(np.quantile([rho for _, rho in salient], quantile))
    return sum(s for s, rho in salient if rho >= cut and rho > threshold) / mass


def random_maps(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(shape, generator=generator) ** 4
    return maps * (torch.rand(shape, generator=generator) > 0.2)


# z = 2, √2 = 1.4142136:
#   (3, 4): ‖·‖₁ = 7, ‖·‖₂ = 5        → (1.4142136 − 1.4) / 0.4142136       = 0.0343146
#   (1, 0): 1 / 1                      → (1.4142136 − 1) / 0.4142136         = 1
#   (2, 2): 4 / 2.8284271              → (1.4142136 − 1.4142136) / 0.4142136 = 0
#   (0, 0): by choice                                                        = 0
# z = 3, √3 = 1.7320508:
#   (1, 2, 2): 5 / 3                   → (1.7320508 − 1.6666667) / 0.7320508 = 0.0893163
#   (0, 3, 4): 7 / 5                   → (1.7320508 − 1.4) / 0.7320508       = 0.4535899
#   (0, 5, 0): 5 / 5                                                         = 1
#   (1, 1, 1): 3 / √3                                                        = 0
@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ((3.0, 4.0), 0.0343146),
        ((1.0, 0.0), 1.0),
        ((2.0, 2.0), 0.0),
        ((0.0, 0.0), 0.0),
        ((1.0, 2.0, 2.0), 0.0893163),
        ((0.0, 3.0, 4.0), 0.4535899),
        ((0.0, 5.0, 0.0), 1.0),
        ((1.0, 1.0, 1.0), 0.0),
        ((0.0, 0.0, 0.0), 0.0),
    ],
)
def test_hoyer_sparsity_of_a_worked_entry(entry, expected):
    found = hoyer_sparsity(torch.tensor(entry)[:, None])
    assert found.tolist() == pytest.approx([expected], abs=2e-6)


def test_hoyer_sparsity_of_a_single_modality_is_zero():
    assert torch.equal(hoyer_sparsity(torch.tensor([[0.0, 1.0, 5.0]])), torch.zeros(3))


@bounded
@hypothesis.given(st.integers(0, 10**6), st.integers(2, 4))
def test_hoyer_sparsity_follows_its_formula_entry_by_entry(seed, z):
    maps = random_maps(seed, (z, 3, 5))
    found = hoyer_sparsity(maps)
    assert found.shape == (3, 5)
    for i in range(3):
        for j in range(5):
            assert float(found[i, j]) == pytest.approx(naive_hoyer(maps[:, i, j].tolist()), abs=1e-5)


@bounded
@hypothesis.given(st.integers(0, 10**6), st.integers(2, 4), st.floats(1e-6, 1e6))
def test_hoyer_sparsity_lies_in_the_unit_interval_and_ignores_scale_and_order(seed, z, factor):
    maps = random_maps(seed, (z, 40))
    rho = hoyer_sparsity(maps)
    assert ((rho >= 0) & (rho <= 1)).all()
    torch.testing.assert_close(hoyer_sparsity(maps * factor), rho, rtol=0, atol=1e-5)
    torch.testing.assert_close(hoyer_sparsity(maps.flip(0)), rho, rtol=0, atol=1e-5)


@pytest.mark.parametrize("z", [2, 3, 5])
def test_hoyer_sparsity_of_equal_modalities_is_zero_and_never_less(z):
    rho = hoyer_sparsity(random_maps(0, (1, 1000)).expand(z, -1))
    assert (rho >= 0).all()
    assert (rho < 1e-5).all()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e20, 1e30])
def test_hoyer_sparsity_does_not_overflow(magnitude):
    found = hoyer_sparsity(torch.tensor([[3.0, 1.0, 2.0], [4.0, 0.0, 2.0]]) * magnitude)
    assert found.tolist() == pytest.approx([0.0343146, 1.0, 0.0], abs=2e-6)


# ΣS sums to 40. 0.4 of the 10 entries are salient: 10, 9, 8, 7, in the columns 0, 1, 0, 1 with ρ .9, .1, .9, .1.
TOTAL = torch.tensor([[10.0, 9.0, 1.0, 1.0, 1.0], [8.0, 7.0, 1.0, 1.0, 1.0]])
SPATIAL = torch.tensor([0.9, 0.1, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("quantile", "threshold", "expected"),
    [
        (0.5, 0.005, 18 / 40),  # the quantile is half way between .1 and .9: column 0 is unimodal
        (0.0, 0.005, 34 / 40),  # the quantile is .1 and counts itself in: all four
        (0.0, 0.5, 18 / 40),  # the threshold takes column 1 away
        (1.0, 0.005, 18 / 40),
        (0.5, 0.9, 0.0),  # ρ must be above the threshold, not at it
    ],
)
def test_unimodal_ratio_of_a_worked_layer(quantile, threshold, expected):
    found = unimodal_ratio(TOTAL, SPATIAL, 0.4, quantile, threshold)
    assert found == pytest.approx(expected, rel=1e-6)


def test_unimodal_ratio_counts_at_least_one_entry_as_salient():
    assert unimodal_ratio(TOTAL, SPATIAL, 0.0) == pytest.approx(10 / 40)


def test_unimodal_ratio_of_an_all_zero_layer_is_zero():
    assert unimodal_ratio(torch.zeros(2, 3), torch.ones(3)) == 0.0


@bounded
@hypothesis.given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 0.5))
def test_unimodal_ratio_follows_its_definition(seed, top, quantile, threshold):
    generator = torch.Generator().manual_seed(seed)
    total = torch.rand(4, 15, generator=generator, dtype=torch.float64)
    spatial = torch.rand(15, generator=generator, dtype=torch.float64)
    found = unimodal_ratio(total, spatial, top, quantile, threshold)
    assert 0.0 <= found <= 1.0
    assert found == pytest.approx(naive_ratio(total.tolist(), spatial.tolist(), top, quantile, threshold), rel=1e-9)


def test_significance_map_of_a_worked_layer():
    # W = (1, 1); [H⁻¹]_jj is (1, 1) for text and (1, 1/2) for images.
    # S_text = (1, 1) with mean 1; S_vis = (1, 4) with mean 2.5, normalised (0.4, 1.6). ΣS = (1.4, 2.6), mass 4.
    # ρ₀ = (√2 − 1.4 / √1.16) / (√2 − 1) = (1.4142136 − 1.2998674) / 0.4142136 = 0.2760561
    # ρ₁ = (√2 − 2.6 / √3.56) / (√2 − 1) = (1.4142136 − 1.3779971) / 0.4142136 = 0.0874343
    # One entry is salient, 2.6; it is at its own quantile and above 0.005, so r = 2.6 / 4 = 0.65.
    # Λ₀ = 0.65 · 0.2760561 + 0.35 · 0.7239439 = 0.4328168;  Λ₁ = 0.65 · 0.0874343 + 0.35 · 0.9125657 = 0.3762303
    found = significance_map(torch.ones(1, 2), torch.tensor([[1.0, 1.0], [1.0, 0.5]]))
    assert found.spatial.tolist() == pytest.approx([0.2760561, 0.0874343], abs=2e-6)
    assert found.ratio == pytest.approx(0.65, rel=1e-6)
    assert found.map.tolist() == pytest.approx([0.4328168, 0.3762303], abs=2e-6)


@bounded
@hypothesis.given(st.integers(0, 10**6), st.integers(2, 3))
def test_significance_map_equals_the_paper_s_steps_entry_by_entry(seed, z):
    """Sensitivities as full n×m maps, in double precision; ρ and Λ come out constant along every column."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 10, generator=generator)
    inverse = torch.rand(z, 10, generator=generator) + 0.05
    maps = [[[float(w) ** 2 / float(d) ** 2 for w, d in zip(row, one)] for row in weight] for one in inverse]
    maps = [(np.array(one) / np.mean(one)).tolist() for one in maps]
    total = np.sum(maps, axis=0)
    rho = np.array([[naive_hoyer([one[i][j] for one in maps]) for j in range(10)] for i in range(6)])
    ratio = naive_ratio(total.tolist(), rho[0].tolist())
    expected = ratio * rho + (1 - ratio) * (1 - rho)
    found = significance_map(weight, inverse)
    assert found.ratio == pytest.approx(ratio, rel=1e-4)
    for i in range(6):
        np.testing.assert_allclose(found.spatial.numpy(), rho[i], atol=1e-5)
        np.testing.assert_allclose(found.map.numpy(), expected[i], atol=1e-4)


def test_significance_map_of_one_modality_is_one_everywhere():
    found = significance_map(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.rand(1, 4) + 0.1)
    assert found.ratio == 0.0
    assert torch.equal(found.spatial, torch.zeros(4))
    assert torch.equal(found.map, torch.ones(4))


def test_significance_map_of_equal_modalities_is_one_everywhere():
    inverse = (torch.rand(1, 8, generator=torch.Generator().manual_seed(0)) + 0.1).expand(2, 8)
    found = significance_map(torch.ones(3, 8), inverse)
    assert found.ratio == 0.0
    torch.testing.assert_close(found.map, torch.ones(8), rtol=0, atol=1e-5)


@bounded
@hypothesis.given(st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_significance_map_ignores_the_scale_of_one_modality(seed, factor):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 20, generator=generator)
    inverse = torch.rand(2, 20, generator=generator) + 0.1
    scaled = inverse * torch.tensor([[1.0], [factor]])
    first, second = significance_map(weight, inverse), significance_map(weight, scaled)
    assert ((first.map >= 0) & (first.map <= 1)).all()
    assert second.ratio == pytest.approx(first.ratio, rel=1e-3)
    torch.testing.assert_close(second.map, first.map, rtol=0, atol=1e-4)


def test_significance_map_of_a_zero_weight_is_one_everywhere():
    found = significance_map(torch.zeros(3, 4), torch.ones(2, 4))
    assert found.ratio == 0.0
    assert torch.equal(found.spatial, torch.zeros(4))
    assert torch.equal(found.map, torch.ones(4))


def test_map_of_three_modalities_is_the_hand_computed_one():
    """Text, pictures and sound (z = 3): W² = [[1, 4], [9, 1]] and 1/[H⁻¹]² = [1, 4], [1, 1], [4, 1].

    The maps' means are 15/2, 15/4 and 45/4, so the columns are (6, 12, 16)/45 and (24, 12, 4)/45, with sums of 34/45
    and 40/45 and norms of √436/45 and √736/45. ΣS = [[34, 160], [306, 40]]/45, of which the largest is the only salient
    one.
    """
    weight = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    inverse_diagonals = torch.tensor([[1.0, 0.5], [1.0, 1.0], [0.5, 1.0]])
    found = significance_map(weight, inverse_diagonals)
    root = math.sqrt(3.0)
    rho = [(root - 34 / math.sqrt(436)) / (root - 1), (root - 40 / math.sqrt(736)) / (root - 1)]
    ratio = 306 / 540
    assert found.spatial.tolist() == pytest.approx(rho, rel=1e-5)
    assert found.ratio == pytest.approx(ratio, rel=1e-6)
    assert found.map.tolist() == pytest.approx([ratio * r + (1 - ratio) * (1 - r) for r in rho], rel=1e-5)
    assert found.map.tolist() == pytest.approx([0.452229, 0.480257], abs=2e-6)
