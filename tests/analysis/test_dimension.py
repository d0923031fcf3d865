"""Effective rank, RankMe and participation ratio: by hand, by singular values, ranges, invariances, errors."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from layerlens.analysis.dimension import effective_rank, participation_ratio, rankme
from layerlens.errors import BatchTooSmallError, DegenerateError, NonFiniteError

MEASURES = {"effective_rank": effective_rank, "rankme": rankme, "participation_ratio": participation_ratio}
NEW = ["rankme", "participation_ratio"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rank_by_svd(name, x):
    """Entropy of the singular values of the raw features, by SciPy."""
    x = x.double().flatten(1).numpy()
    singular = np.linalg.svd(x if name == "rankme" else x - x.mean(0), compute_uv=False)
    return math.exp(stats.entropy(singular))


CROSS = torch.tensor([[1.0, 0], [-1, 0], [0, 3], [0, -3]])


def test_effective_rank_and_rankme_worked_by_hand():
    """Singular values √2·(1, 3): p = (¼, ¾), entropy ¼ log 4 + ¾ log 4/3; the mean is zero."""
    expected = 4**0.25 * (4 / 3) ** 0.75
    assert effective_rank(CROSS) == pytest.approx(expected, abs=1e-6)
    assert rankme(CROSS) == pytest.approx(expected, abs=1e-12)


def test_rankme_counts_the_mean_as_a_direction():
    """A column of ones makes (√2, 3√2, 2) of the singular values."""
    expected = math.exp(stats.entropy([2**0.5, 3 * 2**0.5, 2]))
    assert rankme(torch.cat([CROSS, torch.ones(4, 1)], 1)) == pytest.approx(expected)


def test_participation_ratio_worked_by_hand():
    """Eigenvalues in the ratio 1 to 9: 10² / (1 + 81)."""
    assert participation_ratio(CROSS) == pytest.approx(100 / 82)


@pytest.mark.parametrize("mean", [0, 100])
@pytest.mark.parametrize(("n", "p"), [(20, 5), (64, 64), (64, 65), (50, 2000), (99, 7000)])
@pytest.mark.parametrize("name", ["effective_rank", "rankme"])
def test_ranks_equal_their_definition_by_singular_values(name, n, p, mean):
    x = draw(n, p) * torch.linspace(0.2, 2, p) + mean
    assert MEASURES[name](x) == pytest.approx(rank_by_svd(name, x), rel=1e-5)


@pytest.mark.parametrize("mean", [0, 100])
@pytest.mark.parametrize(("n", "p"), [(20, 5), (64, 64), (64, 65), (50, 300)])
def test_participation_ratio_equals_its_definition_by_covariance(n, p, mean):
    x = draw(n, p) * torch.linspace(0.2, 2, p) + mean
    values = np.linalg.eigvalsh(np.cov(x.numpy(), rowvar=False))
    assert participation_ratio(x) == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-9)


def test_participation_ratio_agrees_with_scikit_dimension():
    """skdim's lPCA with ver="participation_ratio"."""
    skdim = pytest.importorskip("skdim.id")
    x = draw(100, 6) * torch.arange(1, 7)
    found = skdim.lPCA(ver="participation_ratio").fit(x.numpy()).dimension_
    assert participation_ratio(x) == pytest.approx(found, rel=1e-9)


def test_rankme_differs_from_the_paper_by_its_epsilon_only():
    x = draw(100, 30)
    p = torch.linalg.svdvals(x)
    p = p / p.sum() + 1e-7
    assert rankme(x) == pytest.approx(math.exp(float(-(p * p.log()).sum())), rel=1e-4)


@pytest.mark.parametrize(("n", "d"), [(100, 1), (100, 2), (100, 10), (5, 100), (4, 3)])
@pytest.mark.parametrize("name", MEASURES)
def test_stays_between_one_and_its_ceiling(name, n, d):
    ceiling = min(n if name == "rankme" else n - 1, d)
    assert 1 - 1e-9 <= MEASURES[name](draw(n, d)) <= ceiling * (1 + 1e-9)


@pytest.mark.parametrize("name", MEASURES)
def test_reaches_its_ceiling_for_equal_singular_values(name):
    x = torch.cat([torch.eye(6), -torch.eye(6)])
    assert MEASURES[name](x) == pytest.approx(6.0)


@pytest.mark.parametrize("name", MEASURES)
def test_a_layer_of_rank_one_has_dimension_one(name):
    x = draw(50, 1) @ draw(1, 400, seed=1)
    assert MEASURES[name](x) == pytest.approx(1.0, abs=1e-6)
    assert MEASURES[name](x.float()) == pytest.approx(1.0, abs=1e-2)


CHANGES = {
    "rotation": lambda x: x @ torch.linalg.qr(draw(8, 8, seed=9))[0],
    "isotropic scaling": lambda x: 1e-4 * x,
    "translation": lambda x: x + torch.arange(8),
    "sample order": lambda x: x.flip(0),
    "feature order": lambda x: x.flip(1),
    "channels last": lambda x: x.view(40, 2, 2, 2).contiguous(memory_format=torch.channels_last),
    "invertible map": lambda x: x * torch.arange(1, 9),
}
NOTICED = [*((name, "invertible map") for name in MEASURES), ("rankme", "translation")]


@pytest.mark.parametrize(("name", "change"), [(m, c) for m in MEASURES for c in CHANGES if (m, c) not in NOTICED])
def test_ignores(name, change):
    x = draw(40, 8) * torch.arange(1, 9)
    assert MEASURES[name](CHANGES[change](x)) == pytest.approx(MEASURES[name](x), rel=1e-9)


@pytest.mark.parametrize(("name", "change"), NOTICED)
def test_notices(name, change):
    x = draw(40, 8) * torch.arange(1, 9)
    assert abs(MEASURES[name](CHANGES[change](x)) - MEASURES[name](x)) > 0.1


@pytest.mark.parametrize("p", [8, 300])
@pytest.mark.parametrize("name", MEASURES)
def test_doubling_every_sample_changes_nothing(name, p):
    x = draw(40, p)
    assert MEASURES[name](x.repeat(2, 1)) == pytest.approx(MEASURES[name](x), rel=1e-6)


@pytest.mark.parametrize("p", [8, 300])
@pytest.mark.parametrize("name", MEASURES)
def test_float32_of_mean_100_gives_the_answer_of_float64(name, p):
    x = draw(40, p) + 100
    assert MEASURES[name](x.float()) == pytest.approx(MEASURES[name](x), rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.0])
def test_a_constant_layer_has_no_dimension(value):
    x = torch.full((10, 4), value)
    assert math.isnan(effective_rank(x))
    for name in NEW:
        with pytest.raises(DegenerateError, match="constant over its 10 samples"):
            MEASURES[name](x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", MEASURES)
def test_refuses_numbers_that_are_not_finite(name, value):
    x = draw(10, 4)
    x[1, 1] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        MEASURES[name](x)


@pytest.mark.parametrize("name", NEW)
def test_refuses_fewer_than_four_samples(name):
    with pytest.raises(BatchTooSmallError, match="3 samples; at least 4"):
        MEASURES[name](draw(3, 4))
