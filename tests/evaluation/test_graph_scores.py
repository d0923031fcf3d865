"""Cross-validated SVM and logistic regression on embeddings of graphs."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from graphs import rings_and_stars
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor

import layerlens as ll
from layerlens.errors import ConfigError, NonFiniteError, ShapeError
from layerlens.evaluation import graphs
from layerlens.evaluation.graphs import PENALTIES


def clouds(count: int = 60, *, apart: float = 1.5, classes: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    return torch.randn(count, 6, generator=draws) + apart * y[:, None], y


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (2, 1), (3, 2)])
def test_scores_are_those_of_scikit_learns_plain_loop(classes: int, seed: int):
    x, y = clouds(classes=classes, apart=0.7)
    svm, probe = [], []
    for train, test in StratifiedKFold(10, shuffle=True, random_state=seed).split(x, y):
        a, b = x[train].double().numpy(), x[test].double().numpy()
        gamma = 1 / (a.shape[1] * a.var())
        search = GridSearchCV(SVC(gamma=gamma), {"C": list(PENALTIES)}, cv=5).fit(a, y[train].numpy())
        svm.append(search.score(b, y[test].numpy()))
        plain = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(a, y[train].numpy())
        probe.append(plain.score(b, y[test].numpy()))
    found = ll.graph_scores(x, y, seed=seed)
    assert found["svm"] == pytest.approx(np.mean(svm))
    assert found["probe"] == pytest.approx(np.mean(probe))


def test_apart_is_1_and_labels_without_meaning_are_chance():
    x, y = clouds(apart=20)
    assert ll.graph_scores(x, y) == {"svm": 1.0, "probe": 1.0}
    meaningless = y[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    found = ll.graph_scores(clouds(apart=0)[0], meaningless)
    assert all(0.3 < value < 0.7 for value in found.values())


def test_constant_embeddings_score_the_larger_class():
    y = torch.tensor([0] * 40 + [1] * 20)
    assert ll.graph_scores(torch.ones(60, 3), y)["svm"] == pytest.approx(2 / 3)


def test_several_splits_are_those_of_the_following_seeds():
    x, y = clouds(apart=0.5)
    each = [ll.graph_scores(x, y, seed=seed) for seed in (4, 5, 6)]
    found = ll.graph_scores(x, y, splits=3, seed=4)
    for name in ("svm", "probe"):
        values = [scores[name] for scores in each]
        assert found[name] == pytest.approx(np.mean(values))
        assert found[f"{name}_std"] == pytest.approx(np.std(values, ddof=1))
    assert len({scores["svm"] for scores in each}) > 1


def test_threads_change_nothing_and_the_folds_are_watched():
    x, y = clouds(apart=0.5)
    threads, seen = torch.get_num_threads(), []

    def watch(items: Any, title: str) -> Any:
        seen.append((title, len(items)))
        return items

    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(ll.graph_scores(x, y, folds=4, splits=2, watch=watch))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]
    assert seen == [("folds", 8)] * 2


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"folds": 61}, ConfigError, "folds=61 of 60 graphs; allowed: 2 to the number of graphs"),
        ({"folds": 1}, ConfigError, "folds=1 of 60 graphs"),
        ({"folds": 31}, ConfigError, "folds=31, but class 0 has only 30 graphs; allowed: at most 30 folds"),
        ({"splits": 0}, ConfigError, "splits=0; allowed: 1 or more"),
        ({"labels": torch.zeros(60).long()}, ConfigError, "at least two classes of graphs"),
        ({"labels": torch.zeros(59).long()}, ShapeError, r"embeddings \(60, 6\) with 59 labels do not fit"),
        ({"embeddings": torch.full((60, 6), torch.nan)}, NonFiniteError, "NaN or infinity in the embeddings"),
    ],
)
def test_what_can_not_be_scored_says_so(change: dict[str, Any], error: type[Exception], match: str):
    x, y = clouds()
    with pytest.raises(error, match=match):
        ll.graph_scores(**{"embeddings": x, "labels": y, **change})


def test_evaluate_scores_the_embedding_or_a_layer_and_nothing_without_classes():
    dataset, network = rings_and_stars(40), ll.build_graph_encoder("gin,layers=2,width=8", features=3)
    whole, first = (ll.evaluate(network, dataset, layer=layer, folds=4) for layer in (None, "layer1"))
    assert set(whole) == set(first) == {"svm", "probe"}
    expected = ll.graph_scores(ll.features(network, dataset.in_order(), "layer1"), dataset.y_train, folds=4)
    assert first == expected
    with pytest.raises(ConfigError, match="rings and stars has no classes; SVM and logistic regression need one"):
        ll.evaluate(network, replace(dataset, y=None))
    with pytest.raises(ConfigError, match="protocol='moco' is for images; graphs are scored by cross-validation"):
        ll.evaluate(network, dataset, protocol="moco")


@pytest.mark.parametrize("folds", [2, 3, 7])
def test_any_number_of_folds_gives_scikit_learns_loop(folds: int):
    x, y = clouds(81, classes=3, apart=0.7, seed=3)
    svm = []
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=5).split(x, y):
        a, b = x[train].double().numpy(), x[test].double().numpy()
        gamma = 1 / (a.shape[1] * a.var())
        search = GridSearchCV(SVC(gamma=gamma), {"C": list(PENALTIES)}, cv=5).fit(a, y[train].numpy())
        svm.append(search.score(b, y[test].numpy()))
    assert ll.graph_scores(x, y, folds=folds, seed=5)["svm"] == pytest.approx(np.mean(svm))


def test_labels_without_meaning_give_nearly_the_share_of_the_larger_class():
    x, y = clouds(100, apart=0)[0], torch.tensor([0] * 75 + [1] * 25)
    y = y[torch.randperm(100, generator=torch.Generator().manual_seed(1))]
    found = ll.graph_scores(x, y)
    assert found["svm"] == pytest.approx(0.75, abs=0.1)
    assert found["probe"] == pytest.approx(0.75, abs=0.15)


def test_the_seed_alone_decides_and_the_data_stay_as_they_were():
    x, y = clouds(apart=0.5)
    copies = x.clone(), y.clone()
    first = ll.graph_scores(x, y, folds=5, seed=3)
    assert set(first) == {"svm", "probe"}, "one split has no deviation"
    numbers = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        np.random.seed(4)
        assert ll.graph_scores(x, y, folds=5, seed=3) == first
    np.random.set_state(numbers)
    assert any(ll.graph_scores(x, y, folds=5, seed=seed) != first for seed in (4, 5))
    assert torch.equal(x, copies[0])
    assert torch.equal(y, copies[1])


def test_neither_the_scale_of_the_embeddings_nor_the_numbers_of_the_classes_count():
    x, y = clouds(apart=0.7, classes=3)
    expected = ll.graph_scores(x, y, folds=5)
    assert ll.graph_scores(1024 * x, y, folds=5) == expected
    assert ll.graph_scores(x, torch.tensor([2, 5, 9])[y], folds=5) == expected


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_one_number_that_is_not_finite_is_refused(value: float):
    x, y = clouds()
    x[3, 1] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity in the embeddings"):
        ll.graph_scores(x, y)


@pytest.mark.parametrize("shape", [(60,), (60, 2, 3), (0, 6)])
def test_embeddings_that_are_no_table_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ShapeError, match="with 60 labels do not fit"):
        ll.graph_scores(torch.ones(shape), torch.arange(60) % 2)


@pytest.mark.parametrize(("rare", "folds"), [(2, 2), (3, 2), (3, 3), (5, 5)])
def test_as_many_folds_as_a_class_has_graphs_are_scored(rare: int, folds: int):
    """The message for more folds says that so many are allowed; within a training part a graph may be alone."""
    x, _ = clouds(30)
    y = torch.tensor([0] * (30 - rare) + [1] * rare)
    found = ll.graph_scores(x, y, folds=folds)
    assert all(0 <= value <= 1 for value in found.values())


def test_scoring_draws_from_no_global_generator():
    x, y = clouds()
    before, numbers = torch.get_rng_state(), np.random.get_state()
    ll.graph_scores(x, y, folds=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[2] == numbers[2], "draws so far of NumPy's generator"


def test_folds_run_in_as_many_threads_as_pytorch_has(monkeypatch: pytest.MonkeyPatch):
    """Each of two folds waits until another one runs beside it."""
    meeting = threading.Barrier(2, timeout=5)
    monkeypatch.setattr(graphs, "_svm", lambda *_: float(meeting.wait() >= 0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert ll.graph_scores(*clouds(), folds=4)["svm"] == 1.0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_folds_in_threads_leave_the_warning_filters_as_they_were(monkeypatch: pytest.MonkeyPatch):
    """`warnings.catch_warnings` is not made for threads; without the SVM's time between, fits of probes overlap."""
    monkeypatch.setattr(graphs, "_svm", lambda *_: 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    x, y = torch.randn(300, 100, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 3
    before = list(warnings.filters)
    for _ in range(3):
        ll.graph_scores(x, y, splits=2)
    assert [entry for entry in warnings.filters if entry not in before] == []
