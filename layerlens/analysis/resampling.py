"""Uncertainty of ratio estimates by resampling batches: jackknife intervals and bootstrap matrices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

from layerlens.analysis.results import Array, SimilarityMatrix

_EDGE = 1 - 1e-12


def cka_of(hsic: Array) -> Array:
    """CKA from HSIC: each entry over the root of its two diagonal entries; NaN where a diagonal is 0.

    Args:
        hsic: Shape (…, L, L).
    """
    scale = np.sqrt(np.maximum(np.diagonal(hsic, axis1=-2, axis2=-1), 0.0))
    product = scale[..., :, None] * scale[..., None, :]
    return np.divide(hsic, product, out=np.full(np.shape(hsic), np.nan), where=product > 0)


def leave_one_out(blocks: Array, weights: Array) -> Array:
    """CKA without each group of batches in turn, shape (B, L, L); needs B >= 2."""
    weighted = blocks * weights[:, None, None]
    return cka_of((weighted.sum(0) - weighted) / (weights.sum() - weights)[:, None, None])


def bootstrap(matrix: SimilarityMatrix, count: int = 200, *, seed: int = 0) -> Array:
    """Matrices with the batches drawn again with replacement, shape (count, L, L).

    For whole-set estimators the change that resampling makes in the minibatch estimate is added to the values.
    """
    generator = np.random.default_rng(seed)
    groups = len(matrix.weights)
    draws = generator.multinomial(groups, np.full(groups, 1 / groups), size=count) * matrix.weights
    drawn = cka_of(np.einsum("rb,bij->rij", draws, matrix.blocks) / draws.sum(1)[:, None, None])
    return matrix.values + drawn - cka_of(np.average(matrix.blocks, axis=0, weights=matrix.weights))


def jackknife_error(statistic: Callable[[Array], Array], matrix: SimilarityMatrix) -> Array:
    """Standard error of a statistic of the matrix, by leaving out one group of batches at a time.

    Args:
        statistic: From matrices of shape (…, L, L) to anything elementwise over the leading dimensions.
        matrix: With at least two groups.

    Source:
        Busing, Meijer, van der Leeden 1999 (delete-m jackknife for groups of unequal size).
    """
    whole = statistic(cka_of(np.average(matrix.blocks, axis=0, weights=matrix.weights)))
    return _busing(whole, statistic(leave_one_out(matrix.blocks, matrix.weights)), matrix.weights)


def entry_intervals(values: Array, blocks: Array, weights: Array, level: float) -> tuple[Array, Array]:
    """Confidence interval of each CKA entry: jackknife over batches with t quantiles, on Fisher's z scale.

    Returns:
        low, high, shape (L, L); NaN with fewer than two groups or where the entry is NaN.
    """
    if len(weights) < 2:
        empty = np.full(values.shape, np.nan)
        return empty, empty.copy()
    whole = _fisher(cka_of(np.average(blocks, axis=0, weights=weights)))
    error = _busing(whole, _fisher(leave_one_out(blocks, weights)), weights)
    reach = t_quantile(level, len(weights)) * error
    z = _fisher(values)
    low, high = np.tanh(z - reach), np.tanh(z + reach)
    alive = ~np.isnan(np.diagonal(values))
    index = np.flatnonzero(alive)
    low[index, index] = high[index, index] = 1.0
    return low, high


def t_quantile(level: float, groups: int) -> float:
    """Two-sided Student quantile with `groups` - 1 degrees of freedom."""
    return float(stats.t.ppf((1 + level) / 2, groups - 1))


def _fisher(values: Array) -> Array:
    return np.arctanh(np.clip(values, -_EDGE, _EDGE))


def _busing(whole: Array, without: Array, weights: Array) -> Array:
    groups, share = len(weights), weights / weights.sum()
    shape = (-1, *[1] * (without.ndim - 1))
    h, share = (1 / share).reshape(shape), share.reshape(shape)
    pseudo = h * whole - (h - 1) * without
    centre = groups * whole - ((1 - share) * without).sum(0)
    return np.sqrt((((pseudo - centre) ** 2) / (h - 1)).mean(0))
