"""How well the class of a graph can be read off its frozen embedding: cross-validated SVM and logistic regression."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from layerlens.errors import ConfigError, NonFiniteError, ShapeError
from layerlens.evaluation.probe import probe_accuracy

PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # C of the SVM, of which an inner cross-validation chooses
INNER_FOLDS = 5
Array = np.ndarray[Any, Any]


def graph_scores(
    embeddings: Tensor,
    labels: Tensor,
    *,
    folds: int = 10,
    splits: int = 1,
    seed: int = 0,
    watch: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _title: items,
) -> dict[str, float]:
    """Accuracy of an RBF SVM and of logistic regression on frozen embeddings, by stratified cross-validation.

    As GraphCL and InfoGraph score TU data sets: in each fold the SVM's C is chosen from 0.001 to 1,000 by a 5-fold
    cross-validation within its training part, γ is 1 / (d · variance). Their inner folds each have a γ of their own;
    here it is that of the outer training part, so that one Gram matrix serves all. Logistic regression is
    `probe_accuracy`.

    Args:
        embeddings: Shape (graphs, d).
        labels: Class indices, shape (graphs,).
        folds: Of the cross-validation, each once the test part.
        splits: How often all graphs are shared out anew.
        seed: Of the first split; the next have the next numbers.
        watch: Wraps the folds with a title, for a progress bar.

    Returns:
        `svm` and `probe`: mean accuracy over folds and splits, in [0, 1]. With several splits also `svm_std` and
        `probe_std`, the standard deviation of the splits' means (n − 1), in the same unit. Folds run in as many
        threads as PyTorch has; their number changes nothing.

    Raises:
        ConfigError: A class with fewer graphs than folds, fewer than 2 folds or classes, or no split.
        ShapeError: Rows and labels do not fit.
        NonFiniteError: NaN or infinity in the embeddings.

    Source:
        You et al. 2020, arXiv:2010.13902; Sun et al. 2020, arXiv:1908.01000
    """
    _check(embeddings, labels, folds, splits)
    x, y = embeddings.double().numpy(), labels.numpy()
    jobs = [part for split in range(splits) for part in _folds(x, y, folds, seed + split)]
    distances = _squared_distances(x)

    def probe(train: Array, test: Array) -> float:
        rows = torch.from_numpy(x[train]), labels[train], torch.from_numpy(x[test]), labels[test]
        return probe_accuracy(*rows, solver="newton-cholesky")

    threads = torch.get_num_threads()  # before the limit, which PyTorch has too
    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        scored = [pool.submit(_svm, distances, x, y, *job) for job in jobs]
        svm = [score.result() for score in watch(scored, "folds")]
        found = np.array([svm, [probe(*job) for job in jobs]])  # here, as warnings are not caught thread by thread
    means = found.reshape(2, splits, folds).mean(2).T  # (splits, 2)
    scores = {"svm": float(means[:, 0].mean()), "probe": float(means[:, 1].mean())}
    if splits > 1:
        scores |= {f"{name}_std": float(means[:, k].std(ddof=1)) for k, name in enumerate(("svm", "probe"))}
    return scores


def _check(embeddings: Tensor, labels: Tensor, folds: int, splits: int) -> None:
    if embeddings.ndim != 2 or len(embeddings) != len(labels):
        raise ShapeError(f"embeddings {tuple(embeddings.shape)} with {len(labels)} labels do not fit")
    if splits < 1:
        raise ConfigError(f"splits={splits}; allowed: 1 or more")
    if not 2 <= folds <= len(labels):
        raise ConfigError(f"folds={folds} of {len(labels)} graphs; allowed: 2 to the number of graphs")
    sizes = torch.bincount(labels)
    if len(sizes) < 2 or int((sizes > 0).sum()) < 2:
        raise ConfigError("cross-validation needs at least two classes of graphs")
    least = int(sizes[sizes > 0].min())
    if least < folds:
        raise ConfigError(
            f"folds={folds}, but class {int((sizes == least).nonzero()[0])} has only {least} graphs; allowed: at most "
            f"{least} folds"
        )
    if not bool(embeddings.isfinite().all()):
        raise NonFiniteError("NaN or infinity in the embeddings; check the checkpoint's weights and the input")


def _folds(x: Array, y: Array, folds: int, seed: int) -> Iterator[tuple[Array, Array]]:
    from sklearn.model_selection import StratifiedKFold

    yield from StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, y)


def _squared_distances(x: Array) -> Array:
    """Between all rows, shape (n, n)."""
    from sklearn.metrics.pairwise import euclidean_distances

    return euclidean_distances(x, squared=True)


def _svm(distances: Array, x: Array, y: Array, train: Array, test: Array) -> float:
    """Test accuracy of the SVM whose C did best within the training part, of equal ones the smallest.

    A class with a single sample there leaves nothing to choose by: C is then 1.
    """
    from sklearn.model_selection import StratifiedKFold
    from sklearn.svm import SVC

    variance = float(x[train].var())
    gamma = 1.0 / (x.shape[1] * variance) if variance else 1.0  # scikit-learn's gamma="scale"
    gram, labels = np.exp(-gamma * distances[np.ix_(train, train)]), y[train]
    most = min(INNER_FOLDS, _least(labels))
    inner = list(StratifiedKFold(most).split(gram, labels)) if most > 1 else []
    blocks = [(gram[np.ix_(a, a)], gram[np.ix_(b, a)], labels[a], labels[b]) for a, b in inner]

    def within(c: float) -> float:
        fits = (
            SVC(C=c, kernel="precomputed", random_state=0).fit(k, known).score(q, asked)
            for k, q, known, asked in blocks
        )
        return float(np.mean(list(fits)))

    best = max(PENALTIES, key=within) if inner else 1.0  # the first of equals
    machine = SVC(C=best, kernel="precomputed", random_state=0).fit(gram, labels)
    return float(machine.score(np.exp(-gamma * distances[np.ix_(test, train)]), y[test]))


def _least(labels: Array) -> int:
    """Samples of the rarest class."""
    return int(np.unique(labels, return_counts=True)[1].min())
