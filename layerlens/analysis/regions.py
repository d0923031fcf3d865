"""Co-adaptation regions: contiguous runs of layers that are more alike than what lies across their edges.

The criterion in one line: fit the similarity of each pair of layers, by least squares, with one level inside runs
and one level across them; the best segmentation into runs is found exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from layerlens.analysis.resampling import bootstrap, jackknife_error
from layerlens.analysis.results import Array, Caution, Result, SimilarityMatrix, restore_cautions
from layerlens.errors import ConfigError, ShapeError, check_known

CRITERIA = ("two-level", "modularity")
MIN_GROUPS = 4
CHANCE = 0.01  # that any run at all passes as distinct where there is none
Index = npt.NDArray[np.int64]
Run = tuple[int, int]  # first layer, one past the last


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Region:
    """A run of at least two layers.

    Attributes:
        layers: Their names, first to last.
        within: Mean similarity of its pairs of layers.
        outside: Mean similarity of its layers to the layers just outside.
        contrast: within - outside.
        twin: The same run's contrast in the untrained twin; None without one.
        gain: contrast - twin contrast; None without a twin.
        start_confidence, end_confidence: Share of resampled matrices with a boundary there, in [0, 1]; 1 at the
            network's own ends.
        distinct: The contrast is above 0 at the 1 % level, allowing for the choice among all runs.
        trained: The gain is above 0; None without a twin.
    """

    layers: tuple[str, ...]
    within: float
    outside: float
    contrast: Estimate
    twin: Estimate | None
    gain: Estimate | None
    start_confidence: float
    end_confidence: float
    distinct: bool
    trained: bool | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        for name in ("contrast", "twin", "gain"):
            value = getattr(self, name)
            if isinstance(value, dict):
                numbers = {key: float("nan") if number is None else number for key, number in value.items()}
                object.__setattr__(self, name, Estimate(**numbers))

    @property
    def supported(self) -> bool:
        """Distinct, and, where a twin tells, made by training."""
        return self.distinct and self.trained is not False


@dataclass(frozen=True, kw_only=True)
class RegionSet(Result):
    """The segmentation of a network into runs.

    Attributes:
        layers: All layers of the matrix.
        runs: The segmentation, runs of one layer included; constant layers belong to none.
        regions: The runs of two layers or more, first to last; empty if the whole network is one run.
        criterion: `two-level` or `modularity`.
        resamples: Resampled matrices behind the confidences; 0 with fewer than two batches.
        cautions: What to know about them.
    """

    layers: tuple[str, ...]
    runs: tuple[tuple[str, ...], ...]
    regions: tuple[Region, ...]
    criterion: str
    resamples: int
    cautions: tuple[Caution, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "runs", tuple(tuple(run) for run in self.runs))
        object.__setattr__(self, "regions", tuple(Region(**r) if isinstance(r, dict) else r for r in self.regions))
        object.__setattr__(self, "cautions", restore_cautions(self.cautions))

    def to_frame(self) -> object:
        """One row per region: start, end, within, outside, contrast, gain and confidences (a pandas DataFrame)."""
        import pandas as pd

        rows = [
            {
                "start": r.layers[0], "end": r.layers[-1], "within": r.within, "outside": r.outside,
                "contrast": r.contrast.value, "twin": r.twin.value if r.twin else None,
                "gain": r.gain.value if r.gain else None, "start_confidence": r.start_confidence,
                "end_confidence": r.end_confidence, "supported": r.supported,
            }
            for r in self.regions
        ]  # fmt: skip
        return pd.DataFrame(rows)


def find_regions(
    matrix: SimilarityMatrix,
    baseline: SimilarityMatrix | None = None,
    *,
    criterion: str = "two-level",
    level: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> RegionSet:
    """Segment a network into co-adapted runs and compare each with the same run in an untrained twin.

    Args:
        matrix: Of the trained network.
        baseline: Of the freshly initialised twin, over the same layers.
        criterion: `two-level`, or `modularity`: the sum over runs of similarity minus its mean.
        level: Of the intervals, and the confidence at which a gain counts as above 0.
        resamples: Bootstrap matrices for the boundaries.
        seed: Of the bootstrap.

    Raises:
        ShapeError: The two matrices have different layers.
        UnknownNameError: An unknown criterion.
    """
    for given in (matrix, baseline):
        if given is not None and given.measure != "cka":
            raise ShapeError(f"regions are defined on CKA, whose batches can be resampled; got {given.measure}")
    check_criterion(criterion)
    if resamples < 1:
        raise ConfigError(f"resamples={resamples}; allowed: 1 or more")
    if baseline is not None and baseline.layers != matrix.layers:
        raise ShapeError(f"the baseline has layers {list(baseline.layers)}, the matrix {list(matrix.layers)}")
    alive = np.flatnonzero(~np.isnan(matrix.values.diagonal()))
    runs = segment(_part(matrix.values, alive), criterion=criterion)
    cuts = _boundary_shares(matrix, alive, runs, criterion, resamples, seed)
    regions = [(a, b) for a, b in runs if b - a >= 2 and b - a < len(alive)]
    found = [_describe(matrix, baseline, alive, run, cuts, len(regions), level) for run in regions]
    names = [matrix.layers[i] for i in alive]
    return RegionSet(
        layers=matrix.layers, runs=tuple(tuple(names[a:b]) for a, b in runs), regions=tuple(found), criterion=criterion,
        resamples=resamples if len(matrix.weights) > 1 else 0, cautions=tuple(_cautions(matrix, baseline, found)),
    )  # fmt: skip


def check_criterion(criterion: str) -> None:
    """Refuse a criterion that does not exist."""
    check_known("criterion", criterion, CRITERIA)


def segment(values: Array, *, criterion: str = "two-level") -> list[Run]:
    """The best segmentation of L layers into contiguous runs, exactly.

    `two-level` maximises the variance of the off-diagonal similarities that the split into pairs within runs and
    pairs across runs explains. That score is quasi-convex in (pairs within, their sum), so its maximum is one of the
    segmentations that maximise Σ within (S - θ) for some θ; each of those is found by dynamic programming.
    `modularity` is the single case θ = mean.

    Args:
        values: Similarities, shape (L, L), finite, symmetric.

    Returns:
        (first, one past last) of each run.

    >>> s = np.array([[1, 0.9, 0.1], [0.9, 1, 0.2], [0.1, 0.2, 1]])
    >>> segment(s)
    [(0, 2), (2, 3)]
    """
    count = len(values)
    if count < 2:
        return [(0, count)] if count else []
    pairs = values[np.triu_indices(count, 1)]
    mean = float(pairs.mean())
    if criterion == "modularity":
        return _best_runs(values, mean)
    tallies = {tuple(runs): _tally(values, runs) for runs in _hull(values, float(pairs.min()), float(pairs.max()))}

    def explained(runs: tuple[Run, ...]) -> float:
        inside, total = tallies[runs]
        across = len(pairs) - inside
        return (total - inside * mean) ** 2 / (inside * across) if inside and across and total > inside * mean else 0.0

    best = max(tallies, key=lambda runs: (explained(runs), -len(runs)))
    return list(best) if explained(best) > 0 else [(0, count)]


def contrast(values: Array, first: int, stop: int) -> Array:
    """Mean similarity within a run minus that to the layers just outside, over the leading dimensions."""
    within, outside = contrast_parts(values, first, stop)
    return within - outside


def contrast_parts(values: Array, first: int, stop: int) -> tuple[Array, Array]:
    """Mean similarity within layers first..stop-1, and of them to the neighbours of the run."""
    rows, columns = np.triu_indices(stop - first, 1)
    within = values[..., first + rows, first + columns].mean(-1)
    neighbours = [k for k in (first - 1, stop) if 0 <= k < values.shape[-1]]
    outside = values[..., first:stop, :][..., neighbours].mean((-2, -1))
    return within, outside


def _hull(values: Array, low: float, high: float) -> list[list[Run]]:
    """Every segmentation on the upper hull of (pairs within, sum within), by halving intervals of θ."""
    ends = [_best_runs(values, theta) for theta in (high + 1e-9, low - 1e-9)]
    found, open_ = list(ends), [(ends[0], ends[1])]
    while open_:
        fewer, more = open_.pop()
        (n0, w0), (n1, w1) = _tally(values, fewer), _tally(values, more)
        if n1 <= n0:
            continue
        theta = (w1 - w0) / (n1 - n0)
        middle = _best_runs(values, theta)
        n, w = _tally(values, middle)
        if n0 < n < n1 and w - theta * n > w0 - theta * n0 + 1e-9:
            found.append(middle)
            open_ += [(fewer, middle), (middle, more)]
    return found


def _best_runs(values: Array, theta: float) -> list[Run]:
    """Contiguous runs that maximise the sum of (similarity - theta) over pairs within, by dynamic programming."""
    count = len(values)
    sums = np.zeros((count + 1, count + 1))
    sums[1:, 1:] = np.triu(values - theta, 1).cumsum(0).cumsum(1)
    corner = sums.diagonal()
    best, start = np.zeros(count + 1), np.zeros(count + 1, dtype=int)
    for stop in range(1, count + 1):
        a = np.arange(stop)
        gains = best[:stop] + corner[stop] - sums[a, stop] - sums[stop, a] + corner[a]
        start[stop] = len(gains) - 1 - int(np.argmax(gains[::-1]))
        best[stop] = gains[start[stop]]
    runs, stop = [], count
    while stop:
        runs.append((int(start[stop]), stop))
        stop = int(start[stop])
    return runs[::-1]


def _tally(values: Array, runs: Sequence[Run]) -> tuple[int, float]:
    """Pairs within runs, and the sum of their similarities."""
    return (
        sum((b - a) * (b - a - 1) // 2 for a, b in runs),
        float(sum(np.triu(values[a:b, a:b], 1).sum() for a, b in runs)),
    )


def _boundary_shares(
    matrix: SimilarityMatrix, alive: Index, runs: list[Run], criterion: str, resamples: int, seed: int
) -> dict[int, float]:
    """Share of resampled matrices with a cut in front of each of the segmentation's runs."""
    if len(matrix.weights) < 2:
        return {}
    drawn = [
        {a for a, _ in segment(_part(values, alive), criterion=criterion)}
        for values in bootstrap(matrix, resamples, seed=seed)
        if np.isfinite(_part(values, alive)).all()
    ]
    shares = {a: float(np.mean([a in cuts for cuts in drawn])) if drawn else 0.0 for a, _ in runs}
    return {**shares, 0: 1.0, len(alive): 1.0}


def _describe(
    matrix: SimilarityMatrix, baseline: SimilarityMatrix | None, alive: Index, run: Run, cuts: dict[int, float],
    regions: int, level: float,
) -> Region:  # fmt: skip
    count = len(alive)
    within, outside = contrast_parts(_part(matrix.values, alive), *run)
    own, error = _contrast(matrix, alive, run, level)
    candidates = max(count * (count - 1) // 2 - 1, 1)
    twin = gain = None
    if baseline is not None and np.isfinite(_part(baseline.values, alive)).all():
        twin, twin_error = _contrast(baseline, alive, run, level)
        groups = min(len(matrix.weights), len(baseline.weights))
        gain_error = float(np.hypot(error, twin_error))
        gain = _estimate(own.value - twin.value, gain_error, groups, level)
        trained = _above_zero(gain.value, gain_error, groups, (1 - level) / regions)
    return Region(
        layers=tuple(matrix.layers[i] for i in alive[run[0] : run[1]]),
        within=float(within), outside=float(outside), contrast=own, twin=twin, gain=gain,
        start_confidence=cuts.get(run[0], 0.0), end_confidence=cuts.get(run[1], 0.0),
        distinct=_above_zero(own.value, error, len(matrix.weights), CHANCE / candidates),
        trained=None if gain is None else trained,
    )  # fmt: skip


def _contrast(matrix: SimilarityMatrix, alive: Index, run: Run, level: float) -> tuple[Estimate, float]:
    value = float(contrast(_part(matrix.values, alive), *run))
    if len(matrix.weights) < 2:
        return Estimate(value=value, low=float("nan"), high=float("nan")), float("nan")
    error = float(jackknife_error(lambda s: contrast(_part(s, alive), *run), matrix))
    return _estimate(value, error, len(matrix.weights), level), error


def _estimate(value: float, error: float, groups: int, level: float) -> Estimate:
    reach = float(stats.t.ppf((1 + level) / 2, groups - 1)) * error if groups > 1 else float("nan")
    return Estimate(value=value, low=value - reach, high=value + reach)


def _above_zero(value: float, error: float, groups: int, alpha: float) -> bool:
    """One-sided test with Student's t over groups of batches; never passed with fewer than four."""
    return groups >= MIN_GROUPS and bool(value > stats.t.ppf(1 - alpha, groups - 1) * error)


def _part(values: Array, alive: Index) -> Array:
    return values[..., alive[:, None], alive[None, :]]


def _cautions(matrix: SimilarityMatrix, baseline: SimilarityMatrix | None, regions: Sequence[Region]) -> list[Caution]:
    made = []
    if baseline is not None and (unknown := tuple(n for n in baseline.missing if n not in matrix.missing)):
        text = f"the untrained twin could not be compared: {', '.join(unknown)} does not vary in it over the samples"
        made.append(Caution(code="LL007", text=text, layers=unknown))
    if len(matrix.weights) < MIN_GROUPS or matrix.samples < 128:
        made.append(
            Caution(
                code="LL003",
                text=f"too few samples: {matrix.samples} in {len(matrix.weights)} batches; "
                f"a region needs at least {MIN_GROUPS} batches (smaller ones are more) to be told from chance, and 128 "
                "samples to be trusted",
            )
        )
    for region in regions:
        edges = {region.layers[0]: region.start_confidence, region.layers[-1]: region.end_confidence}
        shaky = [f"{name} ({share:.0%})" for name, share in edges.items() if share < 0.8]
        if region.supported and shaky:
            text = f"unstable boundary: it recurs in fewer than 80 % of resampled matrices at {', '.join(shaky)}"
            made.append(Caution(code="LL004", text=text, layers=tuple(n for n in edges if edges[n] < 0.8)))
        if region.trained is False and region.distinct:
            made.append(
                Caution(
                    code="LL002",
                    text=f"architectural only: {region.layers[0]} to {region.layers[-1]} stands out by "
                    f"{region.contrast.value:.2f}, but so it does untrained ({region.twin.value:.2f})",  # type: ignore[union-attr]
                    layers=region.layers,
                )
            )
    if matrix.missing:
        text = (
            f"dead or constant layer: {', '.join(matrix.missing)} does not vary over the samples and has no similarity"
        )
        made.append(Caution(code="LL006", text=text, layers=matrix.missing))
    return made
