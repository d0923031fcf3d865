"""Weighted k-nearest-neighbour accuracy of frozen features."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from layerlens.errors import ConfigError, NonFiniteError, ShapeError


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, k: int = 200, temperature: float = 0.1
) -> float:
    """Share of queries whose class the k nearest bank rows vote for, by cosine similarity.

    Args:
        bank, queries: Features, shapes (m, d) and (n, d).
        bank_labels, labels: Class indices, shapes (m,) and (n,).
        k: Neighbours; the whole bank where it is smaller.
        temperature: T in the vote's weight exp(similarity / T).

    Returns:
        Accuracy in [0, 1].

    Raises:
        ShapeError: Rows and labels, or the two widths, do not fit.
        ConfigError: k below 1.
        NonFiniteError: NaN or infinity in the features.

    Source:
        Wu et al. 2018, arXiv:1805.01978

    >>> import torch
    >>> bank, labels = torch.eye(2), torch.tensor([0, 1])
    >>> knn_accuracy(bank, labels, torch.tensor([[0.9, 0.1]]), torch.tensor([0]), k=1)
    1.0
    """
    if k < 1:
        raise ConfigError(f"k={k}; allowed: 1 or more")
    fits = bank.ndim == queries.ndim == 2 and bank.shape[1] == queries.shape[1]
    if not fits or len(bank) != len(bank_labels) or len(queries) != len(labels) or not len(queries) or not len(bank):
        raise ShapeError(
            f"bank {tuple(bank.shape)} with {len(bank_labels)} labels and queries {tuple(queries.shape)} with "
            f"{len(labels)} labels do not fit"
        )
    if not bool(bank.isfinite().all() and queries.isfinite().all()):
        raise NonFiniteError("NaN or infinity in the features; check the checkpoint's weights and the input")
    bank, k = F.normalize(bank.float(), dim=1), min(k, len(bank))
    classes = int(max(bank_labels.max(), labels.max())) + 1
    correct = 0
    for rows, truth in zip(queries.split(1024), labels.split(1024), strict=True):
        similarity, neighbours = (F.normalize(rows.float(), dim=1) @ bank.T).topk(k, dim=1)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(rows), classes).scatter_add_(1, bank_labels[neighbours], weights)
        correct += int((votes.argmax(1) == truth).sum())
    return correct / len(queries)
