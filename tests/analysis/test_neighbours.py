"""Mutual k-NN and the two-neighbour dimension: by hand, against scikit-learn and SciPy, ties, blocks, errors."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from sklearn.neighbors import NearestNeighbors

from layerlens.analysis import neighbours
from layerlens.analysis.neighbours import MutualKNN, mutual_knn, two_nn
from layerlens.errors import BatchTooSmallError, ConfigError, DegenerateError, NonFiniteError, ShapeError


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related_pair(n=60, p=8, q=12, seed=0):
    shared = draw(n, 3, seed=seed)
    x = shared @ draw(3, p, seed=seed + 1) + 0.7 * draw(n, p, seed=seed + 2)
    y = shared @ draw(3, q, seed=seed + 3) + 0.7 * draw(n, q, seed=seed + 4)
    return x, y


def neighbours_by_sklearn(x, k):
    """Among the others, by cosine."""
    search = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(x.flatten(1).numpy())
    return search.kneighbors(return_distance=False)


def by_sklearn(x, y, k):
    pairs = zip(neighbours_by_sklearn(x, k), neighbours_by_sklearn(y, k), strict=True)
    return np.mean([len(set(a) & set(b)) / k for a, b in pairs])


def test_mutual_knn_worked_by_hand():
    """At 0 10 40 90 and at 0 40 10 90 degrees: nearest 1 0 1 2 and 2 2 0 1; the two nearest are the same."""
    x, y = (torch.deg2rad(torch.tensor(a)) for a in ([0.0, 10, 40, 90], [0.0, 40, 10, 90]))
    x, y = (torch.stack([a.cos(), a.sin()], dim=1) for a in (x, y))
    assert MutualKNN(k=1).prepare(x).flatten().tolist() == [1, 0, 1, 2]
    assert MutualKNN(k=1).prepare(y).flatten().tolist() == [2, 2, 0, 1]
    assert mutual_knn(x, y, k=1) == 0.0
    assert mutual_knn(x, y, k=2) == 1.0


def test_scores_are_the_overlaps_of_single_samples():
    a, b = torch.tensor([[1, 2], [2, 0], [3, 1]]), torch.tensor([[2, 1], [0, 3], [0, 2]])
    assert MutualKNN(k=2).scores(a, b).tolist() == [1.0, 0.5, 0.0]
    assert MutualKNN(k=2).compare(a, b) == 0.5


@pytest.mark.parametrize(("n", "p", "k"), [(60, 8, 10), (20, 5000, 3), (1030, 6, 10), (60, 8, 1), (60, 8, 58)])
def test_mutual_knn_equals_sklearn(n, p, k):
    x, y = related_pair(n, p)
    assert mutual_knn(x, y, k=k) == pytest.approx(by_sklearn(x, y, k), abs=1e-12)
    assert np.array_equal(MutualKNN(k=k).prepare(x).numpy(), neighbours_by_sklearn(x, k))


@pytest.mark.parametrize("rows", [1, 7, 60, 100])
def test_the_size_of_a_block_changes_nothing(rows, monkeypatch):
    x, y = related_pair()
    before, dimension = mutual_knn(x, y), two_nn(x)
    monkeypatch.setattr(neighbours, "_ROWS", rows)
    assert mutual_knn(x, y) == before
    assert two_nn(x) == pytest.approx(dimension, abs=1e-12)


def test_equal_cosines_go_to_the_lower_index():
    assert MutualKNN(k=2).prepare(torch.eye(5)).tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]


def test_copies_of_a_sample_go_to_the_lower_index():
    x = draw(7, 300).repeat(5, 1)
    expected = [[j for j in range(i % 7, 35, 7) if j != i][:3] for i in range(35)]
    assert MutualKNN(k=3).prepare(x).tolist() == expected
    assert mutual_knn(x, 3 * x.flip(1), k=3) == 1.0


@pytest.mark.parametrize("k", [1, 10, 59])
def test_a_layer_shares_all_neighbours_with_itself(k):
    assert mutual_knn(*related_pair()[:1] * 2, k=k) == 1.0


def test_all_others_are_common_neighbours():
    assert mutual_knn(*related_pair(), k=59) == 1.0


def test_unrelated_layers_share_k_of_n_less_one():
    measure = MutualKNN(k=10)
    scores = measure.scores(measure.prepare(draw(1000, 20)), measure.prepare(draw(1000, 20, seed=1)))
    assert float(scores.mean()) == pytest.approx(10 / 999, abs=4 * float(scores.std()) / 1000**0.5)


def test_prepared_layers_give_what_the_function_gives():
    x, y = related_pair()
    measure = MutualKNN(k=5)
    a, b = measure.prepare(x), measure.prepare(y)
    assert measure.compare(a, b) == mutual_knn(x, y, k=5) == mutual_knn(y, x, k=5)
    assert float(measure.scores(a, b).mean()) == measure.compare(a, b)
    assert measure.scores(a, b).dtype == torch.float64


CHANGES = {
    "rotation": lambda x: x @ torch.linalg.qr(draw(8, 8, seed=9))[0],
    "isotropic scaling": lambda x: 3e-3 * x,
    "feature order": lambda x: x.flip(1),
    "sample scaling": lambda x: x * (0.2 + draw(len(x), 1, seed=8).abs()),
    "translation": lambda x: x + torch.arange(8) / 4,
    "invertible map": lambda x: x @ draw(8, 8, seed=9),
}


@pytest.mark.parametrize("change", ["rotation", "isotropic scaling", "feature order", "sample scaling"])
def test_mutual_knn_ignores(change):
    x, y = related_pair()
    assert mutual_knn(CHANGES[change](x), y) == mutual_knn(x, y)
    assert mutual_knn(CHANGES[change](x), x) == 1.0


@pytest.mark.parametrize("change", ["translation", "invertible map"])
def test_mutual_knn_notices(change):
    x, _ = related_pair()
    assert mutual_knn(CHANGES[change](x), x) < 0.95


def test_mutual_knn_ignores_the_order_of_the_samples():
    x, y = related_pair()
    assert mutual_knn(x.flip(0), y.flip(0)) == pytest.approx(mutual_knn(x, y), abs=1e-12)


def test_mutual_knn_of_float32_of_mean_100_gives_the_answer_of_float64():
    x, y = (z + 100 for z in related_pair())
    assert mutual_knn(x.float(), y.float()) == pytest.approx(mutual_knn(x, y), abs=1e-5)


def test_feature_maps_are_flattened():
    x, y = related_pair()
    assert mutual_knn(x.view(60, 2, 2, 2), y) == mutual_knn(x, y)
    assert two_nn(x.view(60, 2, 2, 2)) == two_nn(x)


@pytest.mark.parametrize("k", [0, -1, 2.0, True])
def test_mutual_knn_refuses_a_k_that_is_no_count(k):
    with pytest.raises(ConfigError, match="whole number from 1"):
        MutualKNN(k=k)


def test_mutual_knn_refuses_as_many_neighbours_as_samples():
    with pytest.raises(ConfigError, match="k=10 with 10 samples; allowed: 1 to 9"):
        mutual_knn(draw(10, 5), draw(10, 5))


def test_mutual_knn_refuses_samples_without_direction():
    x, y = related_pair()
    y[[3, 4]] = 0.0
    with pytest.raises(DegenerateError, match="2 of 60 samples are zero"):
        mutual_knn(x, y)


def test_mutual_knn_refuses_different_row_counts():
    with pytest.raises(ShapeError, match="60 and 59 rows"):
        mutual_knn(draw(60, 5), draw(59, 5))


@pytest.mark.parametrize("measure", [lambda x: mutual_knn(x, x, k=1), two_nn], ids=["mutual_knn", "two_nn"])
def test_refuses_what_no_neighbours_can_be_told_from(measure):
    with pytest.raises(BatchTooSmallError, match="3 samples; at least 4"):
        measure(draw(3, 5))
    with pytest.raises(DegenerateError, match="constant over its 20 samples"):
        measure(torch.full((20, 3), 0.1))
    for value in (float("nan"), float("inf")):
        x = draw(20, 5)
        x[2, 2] = value
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            measure(x)


def two_nn_by_scipy(x, discard=0.1):
    """Facco et al. 2017, step by step, with a k-d tree; samples at distance 0 from another are left out."""
    x = x.double().flatten(1).numpy()
    distances = cKDTree(x).query(x, k=3)[0]
    distances = distances[distances[:, 1] > 0]
    mu = np.sort(distances[:, 2] / distances[:, 1])
    share = np.arange(1, len(mu) + 1) / len(mu)
    kept = int(len(mu) * (1 - discard))
    a, b = np.log(mu[:kept]), -np.log(1 - share[:kept])
    return np.linalg.lstsq(a[:, None], b, rcond=None)[0].item()


def test_two_nn_of_points_on_a_line_worked_by_hand():
    """At 0 1 3 7 the ratios are 3/1, 2/1, 3/2 and 6/4; the largest of four goes; F = 1/4, 2/4, 3/4."""
    a, b = math.log(1.5), math.log(2)
    tail = [-math.log(3 / 4), -math.log(1 / 2), -math.log(1 / 4)]
    expected = (a * tail[0] + a * tail[1] + b * tail[2]) / (2 * a * a + b * b)
    assert two_nn(torch.tensor([0.0, 1, 3, 7])) == pytest.approx(expected)
    assert two_nn(torch.tensor([0.0, 1, 3, 7]), discard=0.0) == pytest.approx(expected)


@pytest.mark.parametrize("discard", [0.1, 0.5])
@pytest.mark.parametrize(("n", "p"), [(60, 3), (50, 5000), (1030, 6)])
def test_two_nn_equals_its_definition_by_scipy(n, p, discard):
    x = draw(n, min(n, 20)) @ draw(min(n, 20), p, seed=1)
    assert two_nn(x, discard=discard) == pytest.approx(two_nn_by_scipy(x, discard), rel=1e-9)


def test_two_nn_agrees_with_scikit_dimension():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        skdim = pytest.importorskip("skdim.id")
        x = draw(300, 5) @ draw(5, 12, seed=1)
        copies = torch.cat([x, x[:20]])
        expected = [skdim.TwoNN().fit(z.numpy()).dimension_ for z in (x, copies)]
    assert [two_nn(x), two_nn(copies)] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_two_nn_finds_the_dimension_of_a_flat_sheet(dimension):
    sheet = torch.rand(1000, dimension, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert two_nn(sheet @ draw(dimension, 30)) == pytest.approx(dimension, rel=0.15)


@pytest.mark.parametrize(
    "change", ["rotation", "isotropic scaling", "feature order", "far translation", "sample order"]
)
def test_two_nn_ignores(change):
    changes = {**CHANGES, "far translation": lambda x: x + 1e3, "sample order": lambda x: x.flip(0)}
    x, _ = related_pair()
    assert two_nn(changes[change](x)) == pytest.approx(two_nn(x), rel=1e-8)


@pytest.mark.parametrize("change", ["sample scaling", "invertible map"])
def test_two_nn_notices(change):
    x, _ = related_pair()
    assert abs(two_nn(CHANGES[change](x)) - two_nn(x)) > 0.05


def test_two_nn_of_float32_of_mean_100_gives_the_answer_of_float64():
    x, _ = related_pair(p=200)
    assert two_nn((x + 100).float()) == pytest.approx(two_nn(x), rel=1e-5)


def test_two_nn_tells_close_neighbours_from_copies():
    """Pairs 1e-9 apart, among samples 1 apart: products of the features can't see it."""
    x = draw(40, 4)
    pairs = torch.cat([x, x + 1e-9 * draw(40, 4, seed=1)])
    assert two_nn(pairs) == pytest.approx(two_nn_by_scipy(pairs), rel=1e-6)


@pytest.mark.parametrize("copies", [1, 5, 12])
def test_two_nn_leaves_out_samples_with_a_copy(copies):
    """Twelve copies of one sample are more than the candidates among which distances are recomputed."""
    x = draw(40, 4)
    several, many = torch.cat([x, x[:copies]]), torch.cat([x, x[:1].expand(copies, 4)])
    assert two_nn(several) == pytest.approx(two_nn_by_scipy(several), rel=1e-9)
    assert two_nn(many) == pytest.approx(two_nn_by_scipy(many), rel=1e-9)


def test_two_nn_refuses_a_batch_of_copies():
    x = draw(30, 4)
    with pytest.raises(DegenerateError, match="only 0 of 60 samples have no exact copy"):
        two_nn(x.repeat(2, 1))
    with pytest.raises(DegenerateError, match="only 3 of 57 samples"):
        two_nn(torch.cat([x, x[:27]]))


def test_two_nn_refuses_a_grid():
    with pytest.raises(DegenerateError, match="equally far"):
        two_nn(torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0)))


def test_two_nn_refuses_a_share_outside_its_range():
    for discard in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="from 0, below 1"):
            two_nn(draw(20, 3), discard=discard)
    with pytest.raises(ConfigError, match="leaves 1 of 10 samples"):
        two_nn(draw(10, 3), discard=0.9)
