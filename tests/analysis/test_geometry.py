"""Alignment, uniformity, invariance and diversity: values by hand, brute force, invariances, ranges, errors."""

import math

import pytest
import torch

from layerlens.analysis.geometry import alignment, diversity, invariance, uniformity
from layerlens.errors import ConfigError, DegenerateError, NonFiniteError, ShapeError


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(x):
    x = x.double()
    return x / x.square().sum(-1, keepdim=True).sqrt()


def test_alignment_of_right_angles_and_opposites_worked_by_hand():
    """Squared distances 2 and 4, mean 3; to the first power (√2 + 2) / 2; lengths do not count."""
    x, y = torch.tensor([[1.0, 0], [0, 5]]), torch.tensor([[0.0, 3], [0, -1]])
    assert alignment(x, y) == pytest.approx(3.0)
    assert alignment(x, y, alpha=1.0) == pytest.approx((math.sqrt(2) + 2) / 2)
    assert alignment(x, 2 * x) == pytest.approx(0.0, abs=1e-12)


def test_uniformity_of_three_directions_worked_by_hand():
    """Squared distances 2, 4, 2 between (1,0), (0,1), (−1,0): log of the mean of e⁻⁴, e⁻⁸, e⁻⁴."""
    x = torch.tensor([[2.0, 0], [0, 1], [-3, 0]])
    assert uniformity(x) == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3))
    assert uniformity(x, t=1.0) == pytest.approx(math.log((2 * math.exp(-2) + math.exp(-4)) / 3))


@pytest.mark.parametrize("n", [2, 3, 100, 1024, 1025, 2100])
def test_uniformity_equals_brute_force_over_all_pairs(n):
    x = draw(n, 5, seed=n)
    squared = torch.pdist(unit(x)).square()
    assert uniformity(x) == pytest.approx(float((-2 * squared).exp().mean().log()), abs=1e-9)


def test_alignment_equals_its_definition():
    x, y = draw(2, 50, 6)
    expected = float((unit(x) - unit(y)).square().sum(1).mean())
    assert alignment(x, y) == pytest.approx(expected, abs=1e-12)


def test_invariance_and_diversity_worked_by_hand():
    """Cosines with the sample: 1, 0, −1; among the three views: 0, −1, 0."""
    x, views = torch.tensor([[1.0, 0]]), torch.tensor([[[2.0, 0], [0, 1], [-1, 0]]])
    assert invariance(x, views) == pytest.approx(0.0, abs=1e-12)
    assert invariance(x, views[:, :2]) == pytest.approx(0.5)
    assert diversity(views) == pytest.approx(-1 / 3)
    assert diversity(views[:, :2]) == pytest.approx(0.0, abs=1e-12)


def test_invariance_and_diversity_equal_loops_over_samples_and_views():
    x, views = draw(7, 4), draw(7, 3, 4, seed=1)
    cosine = torch.nn.functional.cosine_similarity
    own = [cosine(x[i].double(), views[i, a].double(), dim=0) for i in range(7) for a in range(3)]
    among = [
        cosine(views[i, a].double(), views[i, b].double(), dim=0)
        for i in range(7)
        for a in range(3)
        for b in range(3)
        if a != b
    ]
    assert invariance(x, views) == pytest.approx(float(torch.stack(own).mean()), abs=1e-9)
    assert diversity(views) == pytest.approx(float(torch.stack(among).mean()), abs=1e-9)


CHANGES = {
    "rotation": lambda x: x @ torch.linalg.qr(draw(6, 6, seed=9))[0],
    "length of a row": lambda x: x * torch.arange(1, x.shape[0] + 1).view(-1, *[1] * (x.ndim - 1)),
    "order of samples": lambda x: x.flip(0),
}
MEASURES = {
    "alignment": lambda change: alignment(change(draw(20, 6)), change(draw(20, 6, seed=1))),
    "uniformity": lambda change: uniformity(change(draw(20, 6))),
    "invariance": lambda change: invariance(change(draw(20, 6)), change(draw(20, 3, 6, seed=1))),
    "diversity": lambda change: diversity(change(draw(20, 3, 6, seed=1))),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("measure", MEASURES)
def test_geometry_ignores(measure, change):
    plain = MEASURES[measure](lambda x: x)
    assert MEASURES[measure](CHANGES[change]) == pytest.approx(plain, abs=1e-5)


def test_geometry_reaches_the_ends_of_its_ranges():
    x = draw(10, 4)
    poles = torch.tensor([[1.0, 0], [-1, 0]])
    assert alignment(x, -x) == pytest.approx(4.0)
    assert alignment(x, -x, alpha=1.0) == pytest.approx(2.0)
    assert uniformity(poles) == pytest.approx(-8.0)
    assert uniformity(poles, t=3.0) == pytest.approx(-12.0)
    assert uniformity(x[:1].expand(5, 4)) == pytest.approx(0.0, abs=1e-9)
    assert invariance(x, torch.stack([x, 2 * x], 1)) == pytest.approx(1.0)
    assert invariance(x, -x[:, None]) == pytest.approx(-1.0)
    assert diversity(torch.stack([x, -x], 1)) == pytest.approx(-1.0)


def test_float32_embeddings_are_measured_in_float64():
    x = 100 + draw(300, 16) * 1e-2
    squared = torch.pdist(unit(x)).square()
    assert uniformity(x) == pytest.approx(float((-2 * squared).exp().mean().log()), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: alignment(draw(4, 3), draw(5, 3)), ShapeError, r"\(4, 3\) and \(5, 3\)"),
        (lambda: alignment(draw(3), draw(3)), ShapeError, r"\(n, d\)"),
        (lambda: alignment(draw(0, 3), draw(0, 3)), ShapeError, r"\(0, 3\)"),
        (lambda: uniformity(draw(1, 3)), ShapeError, "at least two rows"),
        (lambda: uniformity(draw(3)), ShapeError, "at least two rows"),
        (lambda: uniformity(draw(4, 3), t=0.0), ConfigError, "t=0.0; allowed: above 0"),
        (lambda: invariance(draw(4, 3), draw(5, 2, 3)), ShapeError, r"invariance needs \(n, d\)"),
        (lambda: invariance(draw(4, 3), draw(4, 2, 2)), ShapeError, r"invariance needs \(n, d\)"),
        (lambda: invariance(draw(4, 3), draw(4, 3)), ShapeError, r"invariance needs \(n, d\)"),
        (lambda: invariance(draw(4), draw(4, 2, 3)), ShapeError, r"invariance needs \(n, d\)"),
        (lambda: invariance(draw(0, 3), draw(0, 2, 3)), ShapeError, "invariance needs"),
        (lambda: invariance(draw(4, 3), draw(4, 0, 3)), ShapeError, "invariance needs"),
        (lambda: diversity(draw(4, 1, 3)), ShapeError, "at least two views"),
        (lambda: diversity(draw(4, 3)), ShapeError, "at least two views"),
        (lambda: diversity(draw(0, 2, 3)), ShapeError, "diversity needs"),
        (lambda: uniformity(torch.zeros(3, 2)), DegenerateError, "3 of 3 embeddings are zero"),
        (lambda: alignment(torch.eye(2), torch.tensor([[1.0, 0], [0, 0]])), DegenerateError, "1 of 2 embeddings"),
    ],
    ids=lambda value: getattr(value, "__name__", value) if not callable(value) or isinstance(value, type) else "call",
)
def test_geometry_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("measure", ["alignment", "uniformity", "invariance", "diversity"])
def test_geometry_refuses_embeddings_that_are_not_finite(measure, value):
    bad = draw(6, 3)
    bad[2, 1] = value
    calls = {
        "alignment": lambda: alignment(bad, draw(6, 3)),
        "uniformity": lambda: uniformity(bad),
        "invariance": lambda: invariance(bad, draw(6, 2, 3)),
        "diversity": lambda: diversity(torch.stack([bad, bad], 1)),
    }
    with pytest.raises(NonFiniteError, match=r"NaN|infinit|finite"):
        calls[measure]()
