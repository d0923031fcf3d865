"""What the nearest neighbours of the samples tell: mutual k-NN of two layers, intrinsic dimension of one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from layerlens.analysis.column_chunks import LEAST, centred_columns, checked, flat_pair, float64_columns, squared_norms
from layerlens.errors import ConfigError, DegenerateError

_ROWS = 1024
_GRID = 2.0**40  # cosines closer than 1 / _GRID are ties
_INDEX = 2**22  # places for a sample's index below the cosine in one 64-bit integer
_CANDIDATES = 8


@dataclass(frozen=True, kw_only=True)
class MutualKNN:
    """Share of nearest neighbours that two layers have in common, see `mutual_knn`.

    Attributes:
        k: Neighbours of each sample, from 1 to n - 1.
    """

    k: int = 10

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ConfigError(f"k={self.k!r}; allowed: a whole number from 1")

    def prepare(self, rows: Tensor) -> Tensor:
        """Indices of each sample's neighbours, the nearest first, int64, shape (n, k)."""
        rows = checked(rows)
        n = len(rows)
        if self.k >= n:
            raise ConfigError(f"k={self.k} with {n} samples; allowed: 1 to {n - 1}")
        if n > _INDEX:
            raise ConfigError(f"{n} samples; allowed: at most {_INDEX}")
        lengths = squared_norms(float64_columns(rows), rows).sqrt()
        if not bool((lengths > 0).all()):
            raise DegenerateError(f"{int((lengths == 0).sum())} of {n} samples are zero and have no direction")
        return torch.cat([self._nearest(rows, lengths, start) for start in range(0, n, _ROWS)])

    def compare(self, a: Tensor, b: Tensor) -> float:
        """Mean over the samples."""
        return float(self.scores(a, b).mean())

    def permute(self, prepared: Tensor, order: Tensor) -> Tensor:
        """The layer with its samples in another order, order[i] being the sample at place i."""
        order = order.to(prepared.device)
        return order.argsort()[prepared[order]]

    def scores(self, a: Tensor, b: Tensor) -> Tensor:
        """Share of common neighbours of each sample, float64, shape (n,)."""
        both = torch.cat([a, b], dim=1).sort(dim=1).values
        return (both[:, 1:] == both[:, :-1]).sum(1).double() / self.k

    def _nearest(self, rows: Tensor, lengths: Tensor, start: int) -> Tensor:
        """Neighbours of one block of samples: cosine and index in one integer, so that ties go to the lower index."""
        block = slice(start, start + _ROWS)
        cosines = _products(float64_columns(rows), rows, block) / lengths[block, None] / lengths
        _leave_out_self(cosines, start, -2.0)
        index = torch.arange(len(rows), device=rows.device)
        keys = (cosines * _GRID).round_().long() * _INDEX + (_INDEX - 1 - index)
        return keys.topk(self.k, dim=1).indices


def mutual_knn(x: Tensor, y: Tensor, *, k: int = 10) -> float:
    """Mean share of the k nearest neighbours by cosine that the samples have in common in two layers.

    Args:
        x: Activations, shape (n, …); row i is sample i.
        y: Activations, shape (n, …), same row order.
        k: Neighbours of each sample, less than n.

    Returns:
        Similarity in [0, 1]; higher is more alike; unrelated layers come to k/(n - 1). Unchanged by rotation, by the
        order of the features and by a positive factor for each sample; not by translation: the features are not
        centred. Equal cosines (to 1e-12) go to the lower index.

    Raises:
        ConfigError: k outside 1 to n - 1.
        ShapeError: Row counts differ; BatchTooSmallError below 4 rows.
        DegenerateError: A layer is constant, or samples are zero and have no direction.
        NonFiniteError: NaN or infinity.

    Source:
        Huh et al. 2024, arXiv:2405.07987; without its clipping of large activations.

    >>> x = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    >>> mutual_knn(x, x.flip(1), k=1)
    1.0
    """
    x, y = flat_pair(x, y)
    measure = MutualKNN(k=k)
    return measure.compare(measure.prepare(x), measure.prepare(y))


def two_nn(x: Tensor, *, discard: float = 0.1) -> float:
    """Intrinsic dimension from the ratio μ of the distances to the second and the first neighbour.

    If the density is even over that range, log μ is exponential with the dimension as its rate: the slope, through
    the origin, of -log(1 - F(μ)) against log μ.

    Args:
        x: Activations, shape (n, …).
        discard: Share of the largest μ that is left out of the fit, 0.1 in the paper; at least one is, where F = 1.

    Returns:
        Dimension, above 0. Samples that have an exact copy (distance 0) are dropped first. Unchanged by rotation,
        isotropic scaling and translation.

    Raises:
        ConfigError: A share outside [0, 1), or one that leaves fewer than two samples.
        BatchTooSmallError: Fewer than 4 rows.
        DegenerateError: A constant layer, fewer than 4 samples without a copy, or all ratios 1, as on a grid.
        NonFiniteError: NaN or infinity.

    Source:
        Facco et al. 2017, doi:10.1038/s41598-017-11873-y

    >>> line = torch.rand(500, 1, generator=torch.Generator().manual_seed(0))
    >>> round(two_nn(line * torch.ones(3)))
    1
    """
    if not 0 <= discard < 1:
        raise ConfigError(f"discard={discard}; allowed: from 0, below 1")
    squares = _two_nearest(checked(x))
    squares = squares[squares[:, 0] > 0]
    n = len(squares)
    if n < LEAST:
        raise DegenerateError(f"only {n} of {len(x)} samples have no exact copy; at least {LEAST} are needed")
    kept = min(int(n * (1 - discard) + 1e-9), n - 1)
    if kept < 2:
        raise ConfigError(f"discard={discard} leaves {kept} of {n} samples; at least 2 are needed")
    log_mu = (squares[:, 1] / squares[:, 0]).log().div(2).sort().values[:kept]
    tail = -torch.log1p(-torch.arange(1, kept + 1, dtype=torch.float64, device=log_mu.device) / n)
    if not bool(log_mu[-1] > 0):
        raise DegenerateError("the two nearest neighbours are equally far for all samples, as on a grid")
    return float((log_mu @ tail) / (log_mu @ log_mu))


def _two_nearest(rows: Tensor) -> Tensor:
    """Squared distances to the two nearest other samples, ascending, float64, shape (n, 2).

    Products find a few candidates; their distances are then sums of squared differences, since a distance from
    products can't tell a close neighbour from a copy.
    """
    norms = squared_norms(centred_columns(rows), rows)
    found = []
    for start in range(0, len(rows), _ROWS):
        block = slice(start, start + _ROWS)
        apart = norms[block, None] + norms - 2 * _products(centred_columns(rows), rows, block)
        _leave_out_self(apart, start, float("inf"))
        near = apart.topk(min(_CANDIDATES, len(rows) - 1), dim=1, largest=False).indices
        found.append(_squared_distances(rows, block, near).sort(dim=1).values[:, :2])
    return torch.cat(found)


def _squared_distances(rows: Tensor, block: slice, near: Tensor) -> Tensor:
    """Squared distances of a block's samples to the samples whose indices are given, shape (b, c)."""
    total = torch.zeros_like(near, dtype=torch.float64)
    for columns in float64_columns(rows):
        for place, index in enumerate(near.unbind(1)):
            total[:, place] += (columns[block] - columns[index]).square().sum(1)
    return total


def _products(columns: Iterable[Tensor], rows: Tensor, block: slice) -> Tensor:
    """Inner products of a block of samples with all, from chunks of the columns, shape (b, n)."""
    total = rows.new_zeros(len(rows[block]), len(rows), dtype=torch.float64)
    for chunk in columns:
        total.addmm_(chunk[block], chunk.T)
    return total


def _leave_out_self(values: Tensor, start: int, far: float) -> None:
    values.diagonal(start).fill_(far)
