"""CCA, SVCCA, PWCCA and Procrustes: values by hand, definitions on the raw features, invariances, errors."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from layerlens.analysis.subspace import PWCCA, SVCCA, MeanCCA, Procrustes, mean_cca, procrustes, pwcca, svcca
from layerlens.errors import BatchTooSmallError, ConfigError, DegenerateError, NonFiniteError, ShapeError

MEASURES = {"mean_cca": mean_cca, "svcca": svcca, "pwcca": pwcca, "procrustes": procrustes}
E1, E2, E3 = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]], dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related_pair(n=40, p=5, q=8, seed=0):
    """Two float64 layers of different widths with 3 factors in common and a falling spectrum."""
    shared = draw(n, 3, seed=seed)
    x = shared @ draw(3, p, seed=seed + 1) + 0.8 * draw(n, p, seed=seed + 2)
    y = shared @ draw(3, q, seed=seed + 3) + 0.8 * draw(n, q, seed=seed + 4)
    return x * torch.linspace(1, 3, p), y * torch.linspace(2, 1, q)


def low_rank_pair(n=30, p=700, q=300):
    """Two layers far wider than n, of rank 4 and 6, whose canonical correlations differ from each other and from 1."""
    x, y = draw(n, 4), draw(n, 6, seed=1)
    y[:, :4] += 2 * x
    return x @ draw(4, p, seed=2), y @ draw(6, q, seed=3)


def centred(x):
    x = x.double().flatten(1).numpy()
    return x - x.mean(0)


def basis(x, variance=1.0):
    """Left singular vectors of the raw centred features: those that explain the variance, without a null space."""
    u, s, _ = np.linalg.svd(centred(x), full_matrices=False)
    u, s = u[:, s > 1e-9 * s[0]], s[s > 1e-9 * s[0]]
    share = np.cumsum(s**2) / np.sum(s**2)
    return u[:, : 1 + np.searchsorted(share, variance - 1e-12)]


def cca_by_covariances(x, y):
    """Canonical correlations as the roots of the eigenvalues of Σxx⁻¹ Σxy Σyy⁻¹ Σyx."""
    x, y = centred(x), centred(y)
    product = np.linalg.solve(x.T @ x, x.T @ y) @ np.linalg.solve(y.T @ y, y.T @ x)
    return np.sqrt(np.sort(np.linalg.eigvals(product).real)[::-1][: min(x.shape[1], y.shape[1])])


def pwcca_of_one_side(x, y):
    """Morcos et al., with the variates from the covariances of the raw features."""
    x, y = centred(x), centred(y)
    xx, xy, yy = x.T @ x, x.T @ y, y.T @ y
    squares, maps = scipy.linalg.eigh(xy @ np.linalg.solve(yy, xy.T), xx)  # mapsᵀ Σxx maps = 1
    weights = np.abs((x @ maps).T @ x).sum(1)
    return float((np.sqrt(squares) * weights).sum() / weights.sum())


def procrustes_by_scipy(x, y):
    x, y = centred(x), centred(y)
    width = max(x.shape[1], y.shape[1])
    x, y = (np.pad(a / np.linalg.norm(a), ((0, 0), (0, width - a.shape[1]))) for a in (x, y))
    return float(np.arccos(min(scipy.linalg.orthogonal_procrustes(x, y)[1], 1.0)))


def by_definition(name, x, y):
    if name == "procrustes":
        return procrustes_by_scipy(x, y)
    if name == "pwcca":
        return pwcca_of_one_side(x, y)
    share = 0.99 if name == "svcca" else 1.0
    return float(scipy.linalg.svdvals(basis(x, share).T @ basis(y, share)).mean())


def tilted():
    """Canonical correlations 1 (along E2) and 0.6 (E1 with 0.6 E1 + 0.8 E3)."""
    return torch.stack([3 * E1, E2], dim=1), torch.stack([0.6 * E1 + 0.8 * E3, E2], dim=1)


def test_mean_cca_worked_by_hand():
    assert mean_cca(*tilted()) == pytest.approx(0.8)
    assert mean_cca(tilted()[0], tilted()[1][:, :1]) == pytest.approx(0.6)


def test_svcca_worked_by_hand():
    """x has squares 9 and 1, so that 85 % of its variance is E1 alone, and E1 with all of y correlates by 0.6."""
    assert svcca(*tilted(), variance=0.85) == pytest.approx(0.6)
    assert svcca(*tilted(), variance=0.95) == pytest.approx(0.8)


def test_pwcca_worked_by_hand():
    """Weights 1 and 3 from x: (1 + 3·0.6)/4 = 0.7; weights 1 and 1 from y: 0.8; equally many: their mean."""
    assert pwcca(*tilted()) == pytest.approx(0.75)


def test_procrustes_worked_by_hand():
    """XᵀY / (‖X‖‖Y‖) = diag(0.6, 1) · 4/8 for X = (E1, E2)."""
    x = torch.stack([E1, E2], dim=1)
    assert procrustes(x, tilted()[1]) == pytest.approx(math.acos(0.8))
    assert procrustes(x, tilted()[1], squared=True) == pytest.approx(0.4)


def test_procrustes_reaches_its_ends_for_equal_and_for_orthogonal_layers():
    assert procrustes(E1, E1) == 0.0
    assert procrustes(E1, E2) == pytest.approx(math.pi / 2)
    assert procrustes(E1, E2, squared=True) == pytest.approx(2.0)


@pytest.mark.parametrize("shape", [(40, 5, 8), (60, 12, 20), (100, 3, 30)])
@pytest.mark.parametrize("name", MEASURES)
def test_equals_its_definition_on_the_raw_features(name, shape):
    x, y = related_pair(*shape)
    assert MEASURES[name](x, y) == pytest.approx(by_definition(name, x, y), abs=1e-9)


def test_mean_cca_equals_the_eigenvalues_of_the_covariances():
    x, y = related_pair()
    assert mean_cca(x, y) == pytest.approx(cca_by_covariances(x, y).mean(), abs=1e-9)


def test_pwcca_of_equally_many_directions_is_the_mean_of_both_weightings():
    x, y = related_pair(q=5)
    sides = pwcca_of_one_side(x, y), pwcca_of_one_side(y, x)
    assert abs(sides[0] - sides[1]) > 0.01
    assert pwcca(x, y) == pytest.approx(sum(sides) / 2, abs=1e-9)


@pytest.mark.parametrize("name", ["mean_cca", "svcca", "procrustes"])
def test_equals_its_definition_where_features_outnumber_samples(name):
    x, y = low_rank_pair()
    assert MEASURES[name](x, y) == pytest.approx(by_definition(name, x, y), abs=1e-7)


def test_pwcca_equals_its_definition_where_features_outnumber_samples():
    """The neurons themselves, weighted by singular vectors in place of the covariances, which are singular here."""
    x, y = low_rank_pair(p=5000)
    left, correlations, _ = np.linalg.svd(basis(x).T @ basis(y), full_matrices=False)
    weights = np.abs((basis(x) @ left).T @ centred(x)).sum(1)
    assert pwcca(x, y) == pytest.approx((correlations * weights).sum() / weights.sum(), abs=1e-7)


@pytest.mark.parametrize(("name", "rotation_only"), [("procrustes", True), ("mean_cca", False)])
def test_agrees_with_netrep(name, rotation_only):
    """netrep (Williams et al.): LinearMetric with alpha 1 is the Procrustes angle, with 0 the angle of CCA."""
    linear = pytest.importorskip("netrep.metrics.linear")
    x, y = related_pair(q=5)
    metric = linear.LinearMetric(alpha=1.0 if rotation_only else 0.0, center_columns=True, score_method="angular")
    metric.fit(x.numpy(), y.numpy())
    found = MEASURES[name](x, y)
    assert (found if rotation_only else math.acos(found)) == pytest.approx(metric.score(x.numpy(), y.numpy()), abs=1e-6)


def test_mean_cca_agrees_with_cca_zoo():
    linear = pytest.importorskip("cca_zoo.linear")
    x, y = related_pair()
    model = linear.CCA(n_components=5).fit([centred(x), centred(y)])
    variates = model.transform([centred(x), centred(y)])
    pairs = [np.corrcoef(a, b)[0, 1] for a, b in zip(*(v.T for v in variates), strict=True)]
    assert mean_cca(x, y) == pytest.approx(np.mean(pairs), abs=1e-6)


CHANGES = {
    "rotation": lambda x: x @ torch.linalg.qr(draw(5, 5, seed=9))[0],
    "isotropic scaling": lambda x: -3e-3 * x,
    "translation": lambda x: x + torch.arange(5),
    "feature order": lambda x: x.flip(1),
    "sample order": None,
    "invertible map": lambda x: x @ (draw(5, 5, seed=9) * torch.logspace(-2, 1, 5, dtype=torch.float64)[:, None]),
}
NOTICED = {"svcca": ["invertible map"], "pwcca": ["rotation", "invertible map"], "procrustes": ["invertible map"]}
IGNORED = [(name, change) for name in MEASURES for change in CHANGES if change not in NOTICED.get(name, [])]


@pytest.mark.parametrize(("name", "change"), IGNORED)
def test_ignores(name, change):
    x, y = related_pair()
    before = MEASURES[name](x, y)
    changed = (x.flip(0), y.flip(0)) if change == "sample order" else (CHANGES[change](x), y)
    assert MEASURES[name](*changed) == pytest.approx(before, abs=1e-9)


@pytest.mark.parametrize(("name", "change"), [(name, change) for name in NOTICED for change in NOTICED[name]])
def test_notices(name, change):
    x, y = related_pair()
    assert abs(MEASURES[name](CHANGES[change](x), y) - MEASURES[name](x, y)) > 0.005


def test_mean_cca_notices_a_new_direction():
    x, y = related_pair()
    assert abs(mean_cca(torch.cat([x, draw(40, 1, seed=7)], 1), y) - mean_cca(x, y)) > 0.01


def test_pwcca_ignores_any_invertible_map_of_the_side_with_more_directions():
    x, y = related_pair(q=5, p=8)
    assert pwcca(x, CHANGES["invertible map"](y)) != pytest.approx(pwcca(x, y), abs=1e-3)
    x, y = related_pair(q=5, p=3)
    assert pwcca(x, CHANGES["invertible map"](y)) == pytest.approx(pwcca(x, y), abs=1e-9)


@pytest.mark.parametrize("widths", [(5, 8), (6, 6), (300, 4)])
@pytest.mark.parametrize("name", MEASURES)
def test_is_symmetric(name, widths):
    x, y = related_pair(40, *widths)
    assert MEASURES[name](x, y) == pytest.approx(MEASURES[name](y, x), abs=1e-9)


@pytest.mark.parametrize("name", MEASURES)
def test_prepared_layers_give_what_the_function_gives(name):
    measure = {"mean_cca": MeanCCA(), "svcca": SVCCA(), "pwcca": PWCCA(), "procrustes": Procrustes()}[name]
    x, y = related_pair()
    kept = measure.prepare(x), measure.prepare(y)
    assert measure.compare(*kept) == MEASURES[name](x, y)


@pytest.mark.parametrize("name", MEASURES)
def test_a_layer_is_as_alike_itself_as_can_be(name):
    x, _ = related_pair()
    assert MEASURES[name](x, x) == pytest.approx(0.0 if name == "procrustes" else 1.0, abs=1e-9)


@pytest.mark.parametrize("p", [5, 39, 40, 41, 5000])
@pytest.mark.parametrize("name", ["mean_cca", "svcca", "procrustes"])
def test_a_layer_is_as_alike_its_own_rotated_copy(name, p):
    x = draw(40, p)
    turned = x - 2 * (x @ torch.ones(p, 1, dtype=x.dtype)) @ torch.ones(1, p, dtype=x.dtype) / p  # a reflection
    assert MEASURES[name](x, turned) == pytest.approx(0.0 if name == "procrustes" else 1.0, abs=1e-7)


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-6, 1e-3, 0.0141, 0.0142, 1.0])
def test_procrustes_tells_small_angles(angle):
    """arccos alone can't tell an angle below 1e-8 from zero."""
    turned = math.cos(angle) * E1 + math.sin(angle) * E3
    assert procrustes(E1, turned) == pytest.approx(angle, rel=1e-3)
    assert procrustes(E1, turned, squared=True) == pytest.approx((2 * math.sin(angle / 2)) ** 2, rel=2e-3)


def test_procrustes_tells_a_slight_change_of_one_of_two_widths():
    """Padding counts: E1 beside 1e-7 E2 lies 1e-7 from E1 alone."""
    assert procrustes(torch.stack([E1, 1e-7 * E2], 1), E1) == pytest.approx(1e-7, rel=1e-3)


def test_procrustes_angles_obey_the_triangle_inequality():
    x, y = related_pair()
    z = 0.5 * y[:, :5] + x
    assert procrustes(x, y) <= procrustes(x, z) + procrustes(z, y)


def test_cca_is_one_for_any_layer_that_spans_all_samples():
    x, y = draw(20, 50), draw(20, 3, seed=1)
    assert mean_cca(x, y) == pytest.approx(1.0)
    assert pwcca(x, y) == pytest.approx(1.0)
    assert procrustes(x, y) > 0.5


@pytest.mark.parametrize("name", MEASURES)
def test_float32_of_mean_100_gives_the_answer_of_float64(name):
    x, y = related_pair()
    assert MEASURES[name]((x + 100).float(), (y + 100).float()) == pytest.approx(MEASURES[name](x, y), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 400])
@pytest.mark.parametrize("name", ["mean_cca", "pwcca"])
def test_rounding_adds_no_directions(name, width, dtype):
    """A map of 8 features to many has rank 8, whatever rounding adds."""
    z, weight, other = draw(200, 8), draw(8, width, seed=1), draw(200, 20, seed=2)
    other[:, :8] += z
    exact = MEASURES[name](z @ weight + 2, other)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert MEASURES[name]((z @ weight + 2).to(dtype), other) == pytest.approx(exact, abs=tolerance)
    assert len(MeanCCA().prepare((z @ weight + 2).to(dtype)).T) == 8


def test_directions_of_a_full_layer_in_bfloat16_are_not_taken_for_rounding():
    assert len(MeanCCA().prepare(draw(400, 256).bfloat16()).T) == 256


@pytest.mark.parametrize("name", MEASURES)
def test_doubling_every_sample_changes_nothing(name):
    x, y = related_pair()
    assert MEASURES[name](x.repeat(2, 1), y.repeat(2, 1)) == pytest.approx(MEASURES[name](x, y), abs=1e-9)


@pytest.mark.parametrize("name", MEASURES)
def test_feature_maps_are_flattened(name):
    x, y = related_pair()
    assert MEASURES[name](x, y.view(40, 2, 2, 2)) == MEASURES[name](x, y)


@pytest.mark.parametrize("name", MEASURES)
def test_refuses_a_constant_layer(name):
    with pytest.raises(DegenerateError, match="constant over its 40 samples"):
        MEASURES[name](related_pair()[0], torch.full((40, 3), 0.1))


@pytest.mark.parametrize("name", MEASURES)
def test_refuses_a_layer_that_is_constant_but_for_rounding(name):
    noise = torch.finfo(torch.float32).eps * draw(40, 3)
    with pytest.raises(DegenerateError, match="constant over its 40 samples"):
        MEASURES[name](related_pair()[0], 100 * (1 + noise))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("p", [4, 90])
@pytest.mark.parametrize("name", MEASURES)
def test_refuses_numbers_that_are_not_finite(name, value, p):
    x = draw(40, p)
    x[1, 1] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        MEASURES[name](related_pair()[0], x)


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("name", MEASURES)
def test_refuses_fewer_than_four_samples(name, n):
    with pytest.raises(BatchTooSmallError, match=f"{n} samples; at least 4"):
        MEASURES[name](draw(n, 5), draw(n, 5))


@pytest.mark.parametrize("name", MEASURES)
def test_refuses_different_row_counts(name):
    with pytest.raises(ShapeError, match="40 and 39 rows"):
        MEASURES[name](draw(40, 5), draw(39, 5))


def test_refuses_a_single_number():
    with pytest.raises(ShapeError, match="single number"):
        mean_cca(torch.tensor(1.0), draw(4, 2))


@pytest.mark.parametrize("variance", [0.0, -1.0, 1.01, float("nan")])
def test_svcca_refuses_a_share_outside_its_range(variance):
    with pytest.raises(ConfigError, match="above 0, at most 1"):
        SVCCA(variance=variance)


def test_procrustes_refuses_another_form():
    with pytest.raises(ConfigError, match="allowed: True, False"):
        Procrustes(squared="yes")


def test_prepare_detaches_and_leaves_the_rows_alone():
    x = draw(20, 3).requires_grad_()
    before = x.detach().clone()
    kept = PWCCA().prepare(x)
    assert not kept.directions.requires_grad
    assert torch.equal(x, before)
