"""Uncertainty of ratio estimates by resampling batches: jackknife intervals and bootstrap matrices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats

from layerlens.analysis.results import Array, CrossSimilarity, Difference, SimilarityMatrix
from layerlens.errors import ConfigError, ShapeError

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


def cka_error(values: Array, hsic: Array, covariance: Array) -> Array:
    """Standard error of CKA entries from the sampling covariance of HSIC, by linearisation.

    The jackknife counts the second-order part twice, which is too much for related layers; without the surplus the
    estimate is too noisy for unrelated ones, whose first-order part is nothing. What is taken off, and the floor,
    were chosen so that intervals cover in both cases; `tests/benchmarks/interval_coverage.py` shows how well.

    Args:
        values: CKA, shape (L, L).
        hsic: HSIC of all pairs, shape (L, L).
        covariance: As in `hsic.HSIC`, shape (2, 3, L, L).

    Returns:
        Shape (L, L); NaN where HSIC of a layer with itself is 0.
    """
    jackknife, second = (np.maximum(_ratio_variance(values, hsic, part), 0.0) for part in covariance)
    share = np.divide(second, jackknife, out=np.zeros_like(second), where=jackknife > 0)
    return np.sqrt(np.maximum(jackknife - (0.4 + 1.2 * share) * second, 0.75 * second))


def _ratio_variance(values: Array, hsic: Array, covariance: Array) -> Array:
    own = np.where(np.diagonal(hsic) > 0, np.diagonal(hsic), np.nan)
    both = np.sqrt(own[:, None] * own[None, :])
    cross, mixed, apart = covariance
    relative = np.diagonal(apart) / own**2
    return (
        cross / both**2
        + values**2 / 4 * (relative[:, None] + relative[None, :])
        + values**2 / 2 * apart / both**2
        - values / both * (mixed / own[:, None] + mixed.T / own[None, :])
    )


def fisher_intervals(values: Array, error: Array, quantile: float) -> tuple[Array, Array]:
    """Intervals of similarities whose value for identical layers is 1, symmetric on Fisher's z scale.

    Args:
        values: Shape (…), at most 1.
        error: Standard errors, on the scale of the values.
        quantile: How many of them to each side.
    """
    z = _fisher(values)
    reach = quantile * error / np.maximum(1 - values**2, 1e-7)
    reach = np.where(values > 1 - 1e-9, 0.0, reach)  # identical layers: what error there is comes from rounding
    return np.tanh(z - reach), np.tanh(z + reach)


def sample_quantile(level: float, samples: int) -> float:
    """Two-sided Student quantile for errors that n samples tell, with n / 8 degrees of freedom for their tails."""
    return float(stats.t.ppf((1 + level) / 2, max(samples / 8, 2.0)))


def jackknife_intervals(
    values: Array, replicates: Array, weights: Array, level: float, *, bounded: bool, unbias: bool
) -> tuple[Array, Array]:
    """Intervals of any statistic from its values without each group of samples.

    Args:
        values: Shape (…).
        replicates: Shape (G, …), G >= 2.
        weights: Samples in each group, shape (G,).
        level: Confidence.
        bounded: Whether 1 is the value of identical layers, so that Fisher's scale fits.
        unbias: Whether to centre the interval on the value less the bias that falls with 1/n. The correction is
            itself uncertain: half its square adds to the variance (chosen by simulation, see
            `tests/benchmarks/interval_coverage.py`).
    """
    there, back = (_fisher, np.tanh) if bounded else (np.asarray, np.asarray)
    whole, without = there(values), there(replicates)
    error = _busing(whole, without, weights)
    share = (1 - weights / weights.sum()).reshape(-1, *[1] * values.ndim)
    centre = len(weights) * whole - (share * without).sum(0) if unbias else whole
    reach = t_quantile(level, len(weights)) * np.hypot(error, (centre - whole) / 2**0.5)
    return back(centre - reach), back(centre + reach)


def replicate_error(replicates: Array, weights: Array, whole: Array) -> Array:
    """Standard error of a statistic from its values without each group of samples (delete-m jackknife).

    Args:
        replicates: Shape (G, …), G >= 2.
        weights: Samples in each group, shape (G,).
        whole: The statistic of all samples, shape (…).
    """
    return _busing(whole, replicates, weights)


def difference(
    first: SimilarityMatrix | CrossSimilarity, second: SimilarityMatrix | CrossSimilarity, *, level: float = 0.95
) -> Difference:
    """Test of whether the entries of two matrices over the same layers differ, such as those of two checkpoints.

    Matrices of the same samples, in the same order and groups, are compared group by group, so that what the
    samples share cancels; others as independent.

    Args:
        first, second: Results of the same measure over layers of the same names.
        level: Confidence of the intervals.

    Raises:
        ShapeError: Other layers, another measure, or nothing to resample.

    Source:
        Delete-m jackknife, Busing et al. 1999; Holm 1979.
    """
    if (first.rows, first.columns) != (second.rows, second.columns):
        raise ShapeError(f"the matrices have other layers: {first.rows} and {second.rows}; choose the same layers")
    if (first.measure, first.options) != (second.measure, second.options):
        raise ShapeError(f"the matrices hold other measures: {first.measure} {first.options} and {second.measure}")
    one, two = _replicates(first), _replicates(second)
    paired = bool(first.sample_id) and first.sample_id == second.sample_id
    paired = paired and first.weights.shape == second.weights.shape and bool((first.weights == second.weights).all())
    change = second.values - first.values
    if paired:
        error = _busing(change, two - one, first.weights)
    else:
        error = np.hypot(*(_busing(m.values, r, m.weights) for m, r in ((first, one), (second, two))))
    return _tested(
        change, error, min(len(first.weights), len(second.weights)), level,
        rows=first.rows, columns=first.columns, paired=paired, symmetric=isinstance(first, SimilarityMatrix),
    )  # fmt: skip


def entry_difference(
    matrix: SimilarityMatrix | CrossSimilarity, first: tuple[str, str], second: tuple[str, str], *, level: float = 0.95
) -> Difference:
    """Test of whether two entries of one matrix differ, each given by its two layers.

    Args:
        matrix: With at least two groups of samples.
        first, second: Row and column of each entry.
        level: Confidence of the interval.

    Raises:
        UnknownLayerError: No such layer; ShapeError: nothing to resample.
    """
    one, two = matrix.place(*first), matrix.place(*second)
    replicates = _replicates(matrix)
    change = np.array([[matrix.values[two] - matrix.values[one]]])
    error = _busing(change, (replicates[:, two[0], two[1]] - replicates[:, one[0], one[1]])[:, None, None],
                    matrix.weights)  # fmt: skip
    names = ("–".join(first), "–".join(second))
    return _tested(
        change, error, len(matrix.weights), level, rows=names[:1], columns=names[1:], paired=True, symmetric=False
    )


def _replicates(matrix: SimilarityMatrix | CrossSimilarity) -> Array:
    found = recentred_replicates(matrix)
    if len(found) < 2:
        raise ShapeError("a test needs at least two groups of samples; give more batches, or groups=16")
    return found


def recentred_replicates(matrix: SimilarityMatrix | CrossSimilarity) -> Array:
    """The values without each group of samples, shape (G, R, C).

    For CKA they come from HSIC blocks, whose own value differs from a biased estimator's: the change that leaving a
    group out makes is then added to the matrix's values.
    """
    replicates = matrix.leave_out()
    if isinstance(matrix, SimilarityMatrix) and len(matrix.blocks) > 1:
        return replicates + matrix.values - cka_of(np.average(matrix.blocks, axis=0, weights=matrix.weights))
    return replicates


def _tested(
    change: Array, error: Array, groups: int, level: float, *,
    rows: tuple[str, ...], columns: tuple[str, ...], paired: bool, symmetric: bool,
) -> Difference:  # fmt: skip
    if not 0 < level < 1:
        raise ConfigError(f"level={level}; allowed: between 0 and 1")
    error = np.where(np.abs(change) + error < 1e-12, np.nan, error)  # a diagonal is 1 on both sides: nothing to test
    reach = t_quantile(level, groups) * error
    score = np.divide(np.abs(change), error, out=np.full(change.shape, np.inf), where=error > 0)
    p_value = np.where(np.isnan(error), np.nan, 2 * stats.t.sf(score, groups - 1))
    return Difference(
        rows=rows, columns=columns, values=change, low=change - reach, high=change + reach, p_value=p_value,
        adjusted=_holm(p_value, symmetric), paired=paired, level=level,
    )  # fmt: skip


def _holm(p_value: Array, symmetric: bool) -> Array:
    """Holm's adjusted p values over the distinct entries."""
    distinct = np.triu(np.ones(p_value.shape, dtype=bool), 1) if symmetric else np.ones(p_value.shape, dtype=bool)
    distinct &= ~np.isnan(p_value)
    flat, adjusted = p_value[distinct], np.full(p_value.shape, np.nan)
    order = np.argsort(flat)
    stepped = np.maximum.accumulate(flat[order] * (len(flat) - np.arange(len(flat))))
    ordered = np.empty_like(flat)
    ordered[order] = np.minimum(stepped, 1.0)
    adjusted[distinct] = ordered
    return np.where(np.isnan(adjusted), adjusted.T, adjusted) if symmetric else adjusted


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
