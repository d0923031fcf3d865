"""Cross-validated SVM and logistic regression on embeddings of graphs."""

from __future__ import annotations

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
