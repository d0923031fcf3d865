"""Representational similarity analysis: how alike the distances between samples are in two layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerlens.analysis.column_chunks import (
    centred_columns,
    checked,
    flat_pair,
    float64_columns,
    gram,
    squared_norms,
    unrounded,
)
from layerlens.analysis.kernels import CONSTANT
from layerlens.errors import ConfigError, DegenerateError

CORRELATIONS = ("spearman", "pearson")
DISTANCES = ("correlation", "euclidean", "cosine")
_RESOLUTION = 64 * torch.finfo(torch.float64).eps  # dissimilarities this close, in units of their scale, are tied


@dataclass(frozen=True, kw_only=True)
class RSA:
    """Correlation of two layers' dissimilarity matrices, see `rsa`.

    Attributes:
        correlation: `spearman` or `pearson`.
        distance: `correlation` (1 - Pearson correlation of two samples over the features), `euclidean` (not
            squared) or `cosine` (1 - cosine).
    """

    correlation: str = "spearman"
    distance: str = "correlation"

    def __post_init__(self) -> None:
        if self.correlation not in CORRELATIONS:
            raise ConfigError(f"correlation={self.correlation!r}; allowed: {', '.join(CORRELATIONS)}")
        if self.distance not in DISTANCES:
            raise ConfigError(f"distance={self.distance!r}; allowed: {', '.join(DISTANCES)}")

    def prepare(self, rows: Tensor) -> Tensor:
        """Upper triangle of the dissimilarities, ranked for Spearman, centred, norm 1, float64, shape (n(n-1)/2,)."""
        squares, resolution = self._monotone(checked(rows))
        values = squares.sqrt() if self.distance == "euclidean" else squares
        centred = values - values.mean()
        least = max(CONSTANT * float(values.norm()), resolution * len(values) ** 0.5)
        if float(centred.norm()) <= least:
            raise DegenerateError(
                f"all {len(rows)} samples are equally far apart in {self.distance} distance: there is nothing to "
                "correlate"
            )
        if self.correlation == "spearman":
            centred = mean_ranks(squares, resolution) - (len(squares) + 1) / 2
        return centred / centred.norm()

    def compare(self, a: Tensor, b: Tensor) -> float:
        """The correlation."""
        return float(unrounded(a @ b, -1.0, 1.0))

    def permute(self, prepared: Tensor, order: Tensor) -> Tensor:
        """The layer with its samples in another order, order[i] being the sample at place i."""
        n = len(order)
        upper = torch.triu_indices(n, n, 1, device=prepared.device)
        whole = prepared.new_zeros(n, n)
        whole[upper[0], upper[1]] = prepared
        whole += whole.T.clone()
        order = order.to(prepared.device)
        return whole[order[upper[0]], order[upper[1]]]

    def _monotone(self, rows: Tensor) -> tuple[Tensor, float]:
        """The dissimilarities (squared if Euclidean), shape (n(n-1)/2,), and the difference that rounding can make."""
        if self.distance == "euclidean":
            products = gram(centred_columns(rows), rows)
            norms = products.diagonal()
            apart = norms[:, None] + norms[None, :] - 2 * products
            scale = float(norms.max())
        else:
            apart, scale = 1 - _cosines(rows, centred=self.distance == "correlation"), 1.0
        upper = torch.ones_like(apart, dtype=torch.bool).triu_(1)
        values, resolution = apart[upper], _RESOLUTION * scale
        return values.where(values > resolution, 0.0), resolution


def rsa(x: Tensor, y: Tensor, *, correlation: str = "spearman", distance: str = "correlation") -> float:
    """Correlation between the dissimilarities of all pairs of samples in two layers.

    Args:
        x: Activations, shape (n, …); row i is sample i.
        y: Activations, shape (n, …), same row order.
        correlation: `spearman` (mean ranks for ties) or `pearson`.
        distance: `correlation`, `euclidean` or `cosine`.

    Returns:
        Similarity in [-1, 1]; higher is more alike. Unchanged by isotropic scaling and the order of the features;
        by rotation if `euclidean` or `cosine`; by translation if `euclidean`; by an offset and a positive factor for
        each sample if `correlation`.

    Raises:
        ConfigError: Another correlation or distance.
        ShapeError: Row counts differ; BatchTooSmallError below 4 rows.
        DegenerateError: A layer is constant, or its samples all equally far apart; samples without variance over
            the features (`correlation`) or of norm zero (`cosine`), with their number.
        NonFiniteError: NaN or infinity.

    Source:
        Kriegeskorte, Mur & Bandettini 2008, doi:10.3389/neuro.06.004.2008

    >>> x, y = torch.tensor([[0.0], [1], [3], [7]]), torch.tensor([[7.0], [1], [3], [0]])
    >>> round(rsa(x, y, distance="euclidean"), 6)
    0.028571
    """
    x, y = flat_pair(x, y)
    measure = RSA(correlation=correlation, distance=distance)
    return measure.compare(measure.prepare(x), measure.prepare(y))


def mean_ranks(values: Tensor, resolution: float = 0.0) -> Tensor:
    """Ranks from 1, equal values sharing their mean rank; shape (m,), float64.

    Args:
        values: Shape (m,).
        resolution: Neighbours in order that differ by no more count as equal.

    >>> mean_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist()
    [3.5, 1.0, 3.5, 2.0]
    """
    ordered, order = values.sort()
    group = (ordered.diff() > resolution).cumsum(0)
    group = torch.cat([group.new_zeros(1), group])
    _, sizes = group.unique_consecutive(return_counts=True)
    ranks = sizes.cumsum(0) - (sizes.double() - 1) / 2
    return torch.empty_like(values, dtype=torch.float64).scatter_(0, order, ranks[group])


def _cosines(rows: Tensor, *, centred: bool) -> Tensor:
    """Cosines of all pairs of rows, each first centred over its own features if asked, shape (n, n)."""
    sizes = squared_norms(float64_columns(rows), rows)
    mean = sum(columns.sum(1, keepdim=True) for columns in float64_columns(rows)) / rows.shape[1] if centred else 0.0
    products = gram((columns - mean for columns in float64_columns(rows)), rows)
    squares = products.diagonal()
    dead = int((squares <= CONSTANT**2 * sizes).sum())
    if dead:
        what = "have no variance over their features" if centred else "have norm zero"
        raise DegenerateError(f"{dead} of {len(rows)} samples {what}: use distance='euclidean', or leave them out")
    lengths = squares.sqrt()
    return products / lengths[:, None] / lengths[None, :]
