"""RSA: values by hand, SciPy's distances and correlations, ties, invariances of each distance, errors."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import pdist

from layerlens.analysis.rsa import CORRELATIONS, DISTANCES, RSA, mean_ranks, rsa
from layerlens.errors import BatchTooSmallError, ConfigError, DegenerateError, NonFiniteError, ShapeError

OPTIONS = [(correlation, distance) for correlation in CORRELATIONS for distance in DISTANCES]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related_pair(n=30, p=8, q=12, seed=0):
    shared = draw(n, 3, seed=seed)
    x = shared @ draw(3, p, seed=seed + 1) + 0.7 * draw(n, p, seed=seed + 2)
    y = shared @ draw(3, q, seed=seed + 3) + 0.7 * draw(n, q, seed=seed + 4)
    return x + 0.3, y - 0.2


def by_scipy(x, y, correlation, distance, digits=12):
    """Rounded, so that distances that are equal but for rounding are ties."""
    a, b = (pdist(z.double().flatten(1).numpy(), distance).round(digits) for z in (x, y))
    return (stats.spearmanr if correlation == "spearman" else stats.pearsonr)(a, b).statistic


LINE = torch.tensor([[0.0], [1], [3], [7]]), torch.tensor([[7.0], [1], [3], [0]])


def test_rsa_of_points_on_a_line_worked_by_hand():
    """Distances 1 3 7 2 6 4 and 6 4 7 2 1 3: Σd² of the ranks 34; Σ of products 89, of squares 115, mean 23/6."""
    assert rsa(*LINE, distance="euclidean") == pytest.approx(1 - 6 * 34 / (6 * 35))
    pearson = (89 - 23**2 / 6) / (115 - 23**2 / 6)
    assert rsa(*LINE, distance="euclidean", correlation="pearson") == pytest.approx(pearson)


def test_rsa_by_cosine_worked_by_hand():
    """Directions east, north, west, south: 1 2 1 1 2 1; north and west exchanged: 2 1 1 1 1 2; mean 4/3."""
    x = torch.tensor([[1.0, 0], [0, 3], [-2, 0], [0, -1]])
    found = rsa(x, x[[0, 2, 1, 3]], distance="cosine", correlation="pearson")
    assert found == pytest.approx((10 - 32 / 3) / (12 - 32 / 3))


@pytest.mark.parametrize("shape", [(30, 8, 12), (12, 5000, 3), (40, 4, 4)])
@pytest.mark.parametrize(("correlation", "distance"), OPTIONS)
def test_rsa_equals_scipy(correlation, distance, shape):
    x, y = related_pair(*shape)
    found = rsa(x, y, correlation=correlation, distance=distance)
    assert found == pytest.approx(by_scipy(x, y, correlation, distance), abs=1e-9)


@pytest.mark.parametrize(
    ("correlation", "method", "distance"),
    [
        ("spearman", "spearman", "correlation"),
        ("pearson", "corr", "correlation"),
        ("spearman", "spearman", "euclidean"),
    ],
)
def test_rsa_agrees_with_rsatoolbox(correlation, method, distance):
    """Its Euclidean distance is squared, which Spearman can't tell and Pearson would."""
    rdm = pytest.importorskip("rsatoolbox.rdm")
    data = pytest.importorskip("rsatoolbox.data")
    x, y = related_pair()
    a, b = (rdm.calc_rdm(data.Dataset(z.numpy()), method=distance) for z in (x, y))
    expected = rdm.compare(a, b, method=method).item()
    assert rsa(x, y, correlation=correlation, distance=distance) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("correlation", CORRELATIONS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("p", [8, 777])
def test_a_batch_of_duplicates_equals_scipy_with_ties(correlation, distance, p):
    x, y = (z.repeat(3, 1) for z in related_pair(10, p, p))
    found = rsa(x, y, correlation=correlation, distance=distance)
    assert found == pytest.approx(by_scipy(x, y, correlation, distance, digits=6), abs=1e-5)


def test_correlations_of_two_features_are_all_ties():
    """Two features correlate by 1 or -1: whatever rounding says, only two ranks exist."""
    x, y = related_pair(30, 2, 6)
    assert rsa(x, y) == pytest.approx(by_scipy(x, y, "spearman", "correlation", digits=9), abs=1e-12)
    assert RSA().prepare(x).unique().numel() == 2


CHANGES = {
    "rotation": lambda x: x @ torch.linalg.qr(draw(8, 8, seed=9))[0],
    "isotropic scaling": lambda x: 3e-3 * x,
    "translation": lambda x: x + torch.arange(8),
    "feature order": lambda x: x.flip(1),
    "sample offset": lambda x: x + draw(len(x), 1, seed=8),
    "sample scaling": lambda x: x * (0.2 + draw(len(x), 1, seed=8).abs()),
    "invertible map": lambda x: x @ draw(8, 8, seed=9),
}
IGNORED = {
    "correlation": ["isotropic scaling", "feature order", "sample offset", "sample scaling"],
    "euclidean": ["isotropic scaling", "feature order", "rotation", "translation"],
    "cosine": ["isotropic scaling", "feature order", "rotation", "sample scaling"],
}


@pytest.mark.parametrize("correlation", CORRELATIONS)
@pytest.mark.parametrize(("distance", "change"), [(d, c) for d in DISTANCES for c in IGNORED[d]])
def test_rsa_ignores(distance, change, correlation):
    x, y = related_pair()
    before = rsa(x, y, distance=distance, correlation=correlation)
    assert rsa(CHANGES[change](x), y, distance=distance, correlation=correlation) == pytest.approx(before, abs=1e-9)


@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_euclidean_distances_ignore_a_far_translation(correlation):
    x, y = related_pair()
    options = {"correlation": correlation, "distance": "euclidean"}
    assert rsa(x + 1e5, y, **options) == pytest.approx(rsa(x, y, **options), abs=1e-8)


@pytest.mark.parametrize(("distance", "change"), [(d, c) for d in DISTANCES for c in CHANGES if c not in IGNORED[d]])
def test_rsa_notices(distance, change):
    x, y = related_pair()
    assert abs(rsa(CHANGES[change](x), y, distance=distance) - rsa(x, y, distance=distance)) > 0.005


@pytest.mark.parametrize("distance", DISTANCES)
def test_ties_survive_a_change_that_the_distance_ignores(distance):
    """Rounding must not order pairs that are equally far apart."""
    x = related_pair(10)[0].repeat(3, 1)
    for change in IGNORED[distance]:
        if not change.startswith("sample"):
            assert rsa(x, CHANGES[change](x), distance=distance) == pytest.approx(1.0, abs=1e-12), change


@pytest.mark.parametrize(("correlation", "distance"), OPTIONS)
def test_rsa_ignores_the_order_of_the_samples(correlation, distance):
    x, y = related_pair()
    before = rsa(x, y, correlation=correlation, distance=distance)
    assert rsa(x.flip(0), y.flip(0), correlation=correlation, distance=distance) == pytest.approx(before, abs=1e-12)


@pytest.mark.parametrize(("correlation", "distance"), OPTIONS)
def test_rsa_is_symmetric_and_one_with_itself(correlation, distance):
    x, y = related_pair()
    options = {"correlation": correlation, "distance": distance}
    assert rsa(x, y, **options) == rsa(y, x, **options)
    assert rsa(x, x, **options) == pytest.approx(1.0, abs=1e-12)
    assert rsa(x, x, **options) <= 1.0


def test_opposite_orders_of_the_dissimilarities_give_minus_one():
    a = RSA().prepare(related_pair()[0])
    assert RSA().compare(a, -a) == pytest.approx(-1.0, abs=1e-12)
    assert RSA().compare(a, -a) >= -1.0


def test_prepared_layers_give_what_the_function_gives():
    x, y = related_pair()
    a, b = RSA().prepare(x), RSA().prepare(y)
    assert a.shape == (30 * 29 // 2,)
    assert RSA().compare(a, b) == rsa(x, y)


@pytest.mark.parametrize(("correlation", "distance"), OPTIONS)
def test_float32_of_mean_100_gives_the_answer_of_float64(correlation, distance):
    x, y = (z + 100 for z in related_pair())
    exact = rsa(x, y, correlation=correlation, distance=distance)
    assert rsa(x.float(), y.float(), correlation=correlation, distance=distance) == pytest.approx(exact, abs=1e-5)


def test_feature_maps_are_flattened():
    x, y = related_pair()
    assert rsa(x.view(30, 2, 2, 2), y) == rsa(x, y)


@pytest.mark.parametrize("resolution", [0.0, 1e-9])
def test_mean_ranks_equal_scipy(resolution):
    values = draw(500).mul(10).round() + resolution / 1e3 * draw(500, seed=1)
    assert np.array_equal(mean_ranks(values, resolution).numpy(), stats.rankdata(values.numpy().round(6)))


@pytest.mark.parametrize("distance", DISTANCES)
def test_rsa_refuses_a_constant_layer(distance):
    with pytest.raises(DegenerateError, match="constant over its 30 samples"):
        rsa(related_pair()[0], torch.arange(5.0).repeat(30, 1), distance=distance)


@pytest.mark.parametrize("correlation", CORRELATIONS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_rsa_refuses_samples_that_are_all_equally_far_apart(distance, correlation):
    with pytest.raises(DegenerateError, match=f"equally far apart in {distance} distance"):
        rsa(torch.eye(8), draw(8, 3), distance=distance, correlation=correlation)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_rsa_refuses_samples_that_are_equally_far_apart_but_for_rounding(distance):
    directions = torch.linalg.qr(draw(8, 8))[0].float()
    with pytest.raises(DegenerateError, match="equally far apart"):
        rsa(directions, draw(8, 3), distance=distance)
    nearly_one = torch.arange(1, 9)[:, None] * (1 + 1e-6 * torch.eye(8, dtype=torch.float64))
    with pytest.raises(DegenerateError, match="equally far apart"):
        rsa(nearly_one, draw(8, 3), distance="cosine")


@pytest.mark.parametrize("correlation", CORRELATIONS)
@pytest.mark.parametrize("distance", ["correlation", "cosine"])
def test_rsa_refuses_samples_that_differ_in_length_only(distance, correlation):
    x = torch.arange(1.0, 9, dtype=torch.float64)[:, None] * draw(1, 5)
    with pytest.raises(DegenerateError, match="equally far apart"):
        rsa(x, draw(8, 3), distance=distance, correlation=correlation)


def test_correlation_distance_refuses_samples_without_variance():
    x, y = related_pair()
    x[[2, 5]] = torch.tensor([[0.1], [1e3]], dtype=torch.float64)
    with pytest.raises(DegenerateError, match=r"2 of 30 samples have no variance over their features.*euclidean"):
        rsa(x, y)
    assert -1 <= rsa(x, y, distance="euclidean") <= 1


def test_correlation_distance_refuses_a_single_feature():
    with pytest.raises(DegenerateError, match="30 of 30 samples have no variance"):
        rsa(draw(30, 1), draw(30, 4))


def test_cosine_distance_refuses_samples_of_norm_zero():
    x, y = related_pair()
    x[[1, 2, 7]] = 0.0
    with pytest.raises(DegenerateError, match="3 of 30 samples have norm zero"):
        rsa(x, y, distance="cosine")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("distance", DISTANCES)
def test_rsa_refuses_numbers_that_are_not_finite(value, distance):
    x, y = related_pair()
    y[3, 3] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        rsa(x, y, distance=distance)


def test_rsa_refuses_fewer_than_four_samples():
    with pytest.raises(BatchTooSmallError, match="3 samples; at least 4"):
        rsa(draw(3, 5), draw(3, 5))


def test_rsa_refuses_different_row_counts():
    with pytest.raises(ShapeError, match="30 and 29 rows"):
        rsa(draw(30, 5), draw(29, 5))


def test_rsa_refuses_another_correlation_or_distance():
    with pytest.raises(ConfigError, match="correlation='kendall'; allowed: spearman, pearson"):
        RSA(correlation="kendall")
    with pytest.raises(ConfigError, match="distance='l1'; allowed: correlation, euclidean, cosine"):
        RSA(distance="l1")
