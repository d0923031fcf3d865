"""Weighted k-NN against hand-made votes and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from layerlens.errors import ConfigError, NonFiniteError, ShapeError
from layerlens.evaluation.knn import knn_accuracy


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def at(*degrees: float) -> Tensor:
    """Unit vectors at these angles."""
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees])


def random_case(seed: int, m: int = 60, n: int = 40, d: int = 5, classes: int = 4):
    generator = seeded(seed)
    labels = torch.randint(classes, (m + n,), generator=generator)
    centres = torch.randn(classes, d, generator=generator)
    x = centres[labels] + torch.randn(m + n, d, generator=generator)
    return x[:m], labels[:m], x[m:], labels[m:]


def test_weights_decide_against_the_majority():
    """One neighbour at 0 degrees outvotes two at 60: exp(1 / .1) > 2 exp(.5 / .1); at T = 10 the two win."""
    bank, labels, query = at(0, 60, -60), torch.tensor([0, 1, 1]), at(0)
    for temperature, winner in ((0.1, 0), (10.0, 1)):
        scores = [
            knn_accuracy(bank, labels, query, torch.tensor([truth]), k=3, temperature=temperature) for truth in (0, 1)
        ]
        assert scores == [1.0 - winner, float(winner)]


def test_only_the_k_nearest_vote():
    """At k = 1 the row at 10 degrees decides, at k = 3 the two at 20."""
    bank, labels, query = at(10, 20, -20), torch.tensor([0, 1, 1]), at(0)
    assert knn_accuracy(bank, labels, query, torch.tensor([0]), k=1) == 1.0
    assert knn_accuracy(bank, labels, query, torch.tensor([1]), k=3) == 1.0


def test_accuracy_is_the_share_of_right_queries():
    bank, labels = at(0, 90), torch.tensor([0, 1])
    assert knn_accuracy(bank, labels, at(5, 10, 80, 85), torch.tensor([0, 1, 1, 1]), k=1) == 0.75


def test_a_class_that_the_bank_does_not_know_is_never_right():
    assert knn_accuracy(at(0, 90), torch.tensor([0, 1]), at(5, 85), torch.tensor([5, 1]), k=1) == 0.5


@pytest.mark.parametrize("k", [1, 5, 20, 60])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_knn_agrees_with_sklearn_on_every_query(k: int, temperature: float):
    bank, bank_labels, queries, labels = random_case(k)
    oracle = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(bank.double().numpy(), bank_labels.numpy())
    expected = oracle.predict(queries.double().numpy()) == labels.numpy()
    assert 0.2 < expected.mean() < 1, "the case must hold both hits and misses"
    single = [
        knn_accuracy(bank, bank_labels, q[None], y[None], k=k, temperature=temperature)
        for q, y in zip(queries, labels, strict=True)
    ]
    assert single == expected.astype(float).tolist()
    together = knn_accuracy(bank, bank_labels, queries, labels, k=k, temperature=temperature)
    assert together == pytest.approx(expected.mean(), abs=1e-12)


def test_queries_in_several_chunks_count_like_one():
    bank, bank_labels, queries, labels = random_case(3, n=2500)
    parts = [knn_accuracy(bank, bank_labels, q, y, k=7) for q, y in zip(queries.split(500), labels.split(500))]  # noqa: B905
    assert knn_accuracy(bank, bank_labels, queries, labels, k=7) == pytest.approx(sum(parts) / 5, abs=1e-12)


def test_k_beyond_the_bank_means_the_whole_bank():
    case = random_case(1)
    assert knn_accuracy(*case, k=10_000) == knn_accuracy(*case, k=60)


def test_knn_ignores_the_length_of_a_row():
    bank, bank_labels, queries, labels = random_case(2)
    stretch = torch.rand(60, 1, generator=seeded(8)) * 9 + 0.5
    assert knn_accuracy(bank * stretch, bank_labels, queries * 3, labels, k=9) == knn_accuracy(
        bank, bank_labels, queries, labels, k=9
    )


def test_knn_does_not_overflow_at_a_low_temperature():
    bank, labels = at(0, 90), torch.tensor([1, 0])
    assert knn_accuracy(bank, labels, at(5, 85), torch.tensor([1, 0]), temperature=1e-4) == 1.0


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_1_is_refused(k: int):
    with pytest.raises(ConfigError, match=rf"k={k}; allowed: 1 or more"):
        knn_accuracy(*random_case(0), k=k)


@pytest.mark.parametrize(
    ("bank", "bank_labels", "queries", "labels"),
    [
        (torch.ones(4, 2), torch.zeros(3).long(), torch.ones(2, 2), torch.zeros(2).long()),
        (torch.ones(4, 2), torch.zeros(4).long(), torch.ones(2, 2), torch.zeros(3).long()),
        (torch.ones(4, 2), torch.zeros(4).long(), torch.ones(2, 3), torch.zeros(2).long()),
        (torch.ones(4, 2, 1), torch.zeros(4).long(), torch.ones(2, 2), torch.zeros(2).long()),
        (torch.ones(4, 2), torch.zeros(4).long(), torch.ones(0, 2), torch.zeros(0).long()),
        (torch.ones(0, 2), torch.zeros(0).long(), torch.ones(2, 2), torch.zeros(2).long()),
    ],
    ids=["bank labels", "query labels", "widths", "not flat", "no queries", "no bank"],
)
def test_shapes_that_do_not_fit_are_refused(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor):
    with pytest.raises(ShapeError, match="do not fit"):
        knn_accuracy(bank, bank_labels, queries, labels)


@pytest.mark.parametrize("side", ["bank", "queries"])
def test_features_that_are_not_finite_get_no_score(side: str):
    bank, bank_labels, queries, labels = random_case(0)
    (bank if side == "bank" else queries)[3, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN"):
        knn_accuracy(bank, bank_labels, queries, labels)
