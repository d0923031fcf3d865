"""Effective rank: a value by hand, the definition by singular values, invariances, and the profile over batches."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from layerlens.analysis.dimension import effective_rank
from layerlens.analysis.profiles import measure_layers
from layerlens.errors import NonFiniteError


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rank_by_svd(x):
    x = x.detach().double().flatten(1)
    s = torch.linalg.svdvals(x - x.mean(0))
    p = s / s.sum()
    return math.exp(float(torch.special.entr(p).sum()))


def test_effective_rank_worked_by_hand():
    """Singular values √2·(1, 3): p = (¼, ¾), entropy ¼ log 4 + ¾ log 4/3."""
    x = torch.tensor([[1.0, 0], [-1, 0], [0, 3], [0, -3]])
    assert effective_rank(x) == pytest.approx(4**0.25 * (4 / 3) ** 0.75, abs=1e-6)


@pytest.mark.parametrize("mean", [0, 100])
@pytest.mark.parametrize(("n", "p"), [(20, 5), (64, 64), (50, 2000), (99, 7000)])
def test_effective_rank_equals_its_definition_by_singular_values(n, p, mean):
    x = draw(n, p) * torch.linspace(0.2, 2, p) + mean
    assert effective_rank(x) == pytest.approx(rank_by_svd(x), rel=2e-3)


@pytest.mark.parametrize(("rank", "p", "mean"), [(1, 64, 0), (2, 4096, 100), (10, 64, 0)])
def test_effective_rank_of_a_low_rank_layer_is_not_raised_by_rounding(p, rank, mean):
    x = draw(100, rank) @ draw(rank, p, seed=1) + mean
    assert effective_rank(x) == pytest.approx(rank_by_svd(x), rel=5e-3)


@pytest.mark.parametrize(("n", "d"), [(100, 1), (100, 2), (100, 10), (5, 100), (2, 3)])
def test_effective_rank_stays_between_one_and_its_ceiling(n, d):
    found = effective_rank(draw(n, d))
    assert 1 - 1e-6 <= found <= min(n - 1, d) * (1 + 1e-3)


CHANGES = {
    "rotation": lambda x: x @ torch.linalg.qr(draw(8, 8, seed=9))[0],
    "scaling": lambda x: 1e-4 * x,
    "translation": lambda x: x + torch.arange(8),
    "sample order": lambda x: x.flip(0),
    "feature order": lambda x: x.flip(1),
    "channels last": lambda x: x.view(40, 2, 2, 2).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("change", CHANGES)
def test_effective_rank_ignores(change):
    x = draw(40, 8) * torch.arange(1, 9)
    assert effective_rank(CHANGES[change](x)) == pytest.approx(effective_rank(x), rel=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.0])
def test_a_constant_layer_has_no_effective_rank(value):
    assert math.isnan(effective_rank(torch.full((10, 4), value)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_effective_rank_refuses_numbers_that_are_not_finite(value):
    x = draw(10, 4)
    x[1, 1] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        effective_rank(x)


def network():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        model[0].weight.copy_(draw(12, 6, seed=1))
        model[2].weight.copy_(draw(3, 12, seed=2))
    return model


def test_the_profile_is_the_mean_over_batches_with_a_t_interval():
    model, x = network(), draw(80, 6)
    found = measure_layers(model, x.split(20), ["0", "2"])
    ranks = np.array([[rank_by_svd(model[0](part)), rank_by_svd(model(part))] for part in x.split(20)])
    assert found.layers == ("0", "2")
    assert (found.measure, found.ceiling, found.samples) == ("effective_rank", 19.0, 80)
    np.testing.assert_allclose(found.values, ranks.mean(0), rtol=1e-2)
    reach = stats.t.ppf(0.975, 3) * stats.sem(ranks)
    np.testing.assert_allclose(np.array(found.high) - found.values, reach, rtol=0.05)
    np.testing.assert_allclose(found.values - np.array(found.low), reach, rtol=0.05)


def test_a_higher_level_widens_the_profile():
    x = draw(80, 6).split(20)
    narrow, wide = (measure_layers(network(), x, ["0"], level=level) for level in (0.5, 0.99))
    assert wide.low[0] < narrow.low[0] < narrow.high[0] < wide.high[0]


def test_a_profile_of_one_batch_has_no_interval():
    found = measure_layers(network(), [draw(20, 6)], ["0"])
    assert math.isfinite(found.values[0])
    assert math.isnan(found.low[0])


def test_a_constant_layer_is_nan_in_the_profile_and_the_others_are_not():
    model = network()
    with torch.no_grad():
        model[2].weight.zero_()
    found = measure_layers(model, draw(40, 6).split(20), ["0", "2"])
    assert math.isnan(found.values[1])
    assert math.isfinite(found.values[0])


def test_the_profile_refuses_nan_and_names_the_layer():
    x = draw(20, 6)
    x[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="'0'"):
        measure_layers(network(), [x], ["0"])
