"""similarity_matrix(): any measure over all pairs of layers of one model or two, in one pass over the data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from layerlens.activations import Consumer, Look, sweep_models
from layerlens.analysis.cka import ESTIMATORS, StreamingCKA
from layerlens.analysis.kernels import as_rows
from layerlens.analysis.measures import parse_measure
from layerlens.analysis.pairs import PairAccumulator
from layerlens.analysis.projection import Projection
from layerlens.analysis.resampling import recentred_replicates
from layerlens.analysis.results import Caution, CrossSimilarity, PermutationNull, SampleInfluence, SimilarityMatrix
from layerlens.analysis.sharding import gather
from layerlens.analysis.whole_set import WholeSetCKA
from layerlens.errors import ConfigError, DataError, EmptyLoaderError, ShapeError, check_known
from layerlens.layers import Batch, Forward, Layer
from layerlens.reduction import Reduction, make_reduction

IMPRECISE = 1e-6  # what float32 may differ from float64 in an entry
SETTLE_BATCHES = 4  # before an early stop
Settle = Callable[[SimilarityMatrix], bool]


def similarity_matrix(
    model: nn.Module,
    loader: Iterable[Batch],
    layers: str | Sequence[str] = "auto",
    *,
    other: nn.Module | None = None,
    other_layers: str | Sequence[str] = "auto",
    measure: str = "cka",
    reduce: str | Reduction = "flatten",
    level: float = 0.95,
    groups: int = 10,
    permutations: int = 0,
    memory_mib: float = 2048,
    projection: int = 0,
    tolerance: float | None = None,
    settle: Settle | None = None,
    check: bool = True,
    sharded: bool = False,
    seed: int = 0,
    forward: Forward | None = None,
    other_forward: Forward | None = None,
    labels: tuple[str, str] = ("A", "B"),
) -> SimilarityMatrix | CrossSimilarity:
    """Similarity of all pairs of layers, in one pass over the data; models are left as they were.

    Args:
        model: Any module, on any device; it runs in eval mode.
        loader: Batches: tensors, tuples whose first entry is the input, mappings of arguments, or torch_geometric's
            batches of graphs. Read once.
        layers: `auto`, `blocks`, `all`, or names and globs, see `layers.select`.
        other: A second model; the result is then the rectangle of the first's layers by the second's.
        other_layers: Which of its layers.
        measure: A name of `measures.MEASURES` over pairs, with options: `cka`, `cka,kernel=rbf`,
            `cka,estimator=debiased`, `svcca,variance=0.9`, `mutual_knn,k=20`. CKA's `minibatch` estimator streams:
            HSIC₁ averaged over batches (by their sizes), then one ratio, with memory of L·n² for batches of n. All
            else is exact over all samples at once.
        reduce: How maps become rows: `flatten`, `pool` or `positions`, of graphs `graphs` or `nodes`, see
            `reduction.Reduction`.
        level: Confidence of the intervals. For CKA they come from its sampling error; for other measures from a
            jackknife over groups of samples, less the bias that falls with 1/n.
        groups: Of that jackknife, each of which costs another evaluation; 0 for no intervals.
        permutations: Wrong pairings of the samples that the null is drawn from; 0 for none.
        memory_mib: Bound on what whole-set measures hold above the forward pass.
        projection: Width that wider layers are folded to at random; 0 for none, which is exact.
        tolerance: Stop at the first batch after which every interval reaches at most this far to either side.
        settle: Stop at the first batch whose matrix satisfies this; see `recommendation.settled`.
        check: Whether to compute a part of the first batch again in float64 (CKA).
        sharded: Whether each process of the default `torch.distributed` group has its own part of the batches; all
            get the result of all.
        seed: Of permutations and projection.
        forward, other_forward: How to run one batch, if not as `layers.run_batch` does.
        labels: What the two models are called.

    Returns:
        `SimilarityMatrix`, or `CrossSimilarity` with `other`.

    Raises:
        UnknownNameError: No such measure. UnknownLayerError: A name that matches no layer.
        BatchTooSmallError: Fewer than 4 samples, for minibatch CKA in one batch.
        NonFiniteError: NaN or infinity; the message names the layer.
        ShapeError: Layers with different sample counts, or ranks with different layers.
        ConfigError: A setting out of range, or too little memory; the message says the least that works.

    Source:
        Of each measure: `measures.MEASURES`
    """
    found, options = parse_measure(measure, over=("pairs",))
    reduction, fold = make_reduction(reduce), Projection(projection, seed) if projection else None
    _check_settings(found.name, options, tolerance=tolerance, settle=settle, sharded=sharded, labels=labels)
    if permutations and reduction.many:
        raise ConfigError(
            "nodes or positions as samples allow the linear kernel only, and no permutations: they belong together by "
            "sample"
        )
    looks = [Look(model, layers, forward, "" if other is None else f"{labels[0]}:")]
    if other is not None:
        looks.append(Look(other, other_layers, other_forward, f"{labels[1]}:"))
    runs: list[_Run] = []

    def make(parts: list[list[str]]) -> _Run:
        names = parts[0] if len(parts) == 1 else [f"{n}:{x}" for n, p in zip(labels, parts, strict=True) for x in p]
        if found.name == "cka":
            inner = _cka_accumulator(
                names, options, level=level, permutations=permutations, memory_mib=memory_mib, check=check,
                positions=reduction.many, seed=seed,
            )  # fmt: skip
        else:
            split = len(parts[0]) if len(parts) == 2 else 0
            inner = PairAccumulator(
                names, found, options, split=split, level=level, groups=groups, permutations=permutations,
                memory_mib=memory_mib, seed=seed,
            )  # fmt: skip
        return _Run(inner, parts, labels, reduction, fold)

    def begin(chosen: list[list[Layer]]) -> Consumer:
        runs.append(make([[layer.name for layer in part] for part in chosen]))
        return runs[0]

    if sharded:
        return _merge(gather(lambda: _sweep_part(looks, loader, begin, reduction, runs)), make)
    stops = tolerance is not None or settle is not None
    enough = (lambda: runs[0].settled(tolerance, settle)) if stops else None
    try:
        seen = sweep_models(looks, loader, begin, reduce=reduction, enough=enough)
    except BaseException:
        for run in runs:
            run.close()
        raise
    return runs[0].result(seen.sample_id)


def cka_matrix(
    model: nn.Module,
    loader: Iterable[Batch],
    layers: str | Sequence[str] = "auto",
    *,
    kernel: str = "linear",
    rbf_factor: float = 1.0,
    estimator: str = "minibatch",
    level: float = 0.95,
    forward: Forward | None = None,
) -> SimilarityMatrix:
    """CKA between all chosen layers of a model: `similarity_matrix` with the options of CKA as arguments.

    Args:
        model, loader, layers, level, forward: As for `similarity_matrix`.
        kernel: `linear`, or `rbf` with width `rbf_factor` × median distance.
        rbf_factor: See `kernel`.
        estimator: `minibatch` (streaming), or `debiased` or `biased` over all samples at once.

    Source:
        Kornblith et al. 2019, arXiv:1905.00414; Nguyen et al. 2021, arXiv:2010.15327
    """
    check_known("estimator", estimator, ESTIMATORS)
    measure = f"cka,kernel={kernel},rbf_factor={rbf_factor},estimator={estimator}"
    found = similarity_matrix(model, loader, layers, measure=measure, level=level, forward=forward)
    assert isinstance(found, SimilarityMatrix)
    return found


def sample_influence(
    model: nn.Module,
    loader: Iterable[Batch],
    layers: str | Sequence[str] = "auto",
    *,
    kernel: str = "linear",
    estimator: str = "minibatch",
    reduce: str | Reduction = "flatten",
    memory_mib: float = 2048,
    forward: Forward | None = None,
) -> SampleInfluence:
    """How much leaving out each sample would move each entry of the CKA matrix: exactly, in the same one pass.

    Args:
        model, loader, layers, reduce, memory_mib, forward: As for `similarity_matrix`; batches of at least 5.
        kernel: `linear` or `rbf` (whose width is then not measured again without the sample).
        estimator: `minibatch` or `debiased`.

    Raises:
        UnknownNameError: Another kernel or estimator. BatchTooSmallError: Fewer than 5 samples in a batch.
        ConfigError: Position-wise rows, which are no single samples.
    """
    check_known("estimator", estimator, ESTIMATORS[:2])
    reduction = make_reduction(reduce)
    if reduction.many:
        raise ConfigError("influence is of single samples; use reduce='flatten' or 'pool', of graphs 'graphs'")
    options = {"kernel": kernel, "rbf_factor": 1.0, "estimator": estimator}
    state: list[StreamingCKA] = []

    def begin(chosen: list[list[Layer]]) -> Consumer:
        names = [layer.name for layer in chosen[0]]
        state.append(_cka_accumulator(names, options, memory_mib=memory_mib, influence=True))
        return state[0]

    sweep_models([Look(model, layers, forward)], loader, begin, reduce=reduction)
    try:
        return state[0].influence()
    finally:
        if isinstance(state[0], WholeSetCKA):
            state[0].close()


class _Run:
    """The consumer of one call: an accumulator, and how its result is presented."""

    def __init__(
        self, inner: Any, parts: Sequence[Sequence[str]], labels: tuple[str, str], reduction: Reduction,
        fold: Projection | None,
    ) -> None:  # fmt: skip
        self.inner, self.parts, self.labels = inner, [tuple(part) for part in parts], labels
        self.reduction, self.fold = reduction, fold
        self.counts: Tensor | None = None
        self.batches, self.folded = 0, False

    def take(self, position: int, activation: Tensor) -> None:
        """One layer's rows of the current batch."""
        self.folded |= self.fold is not None and as_rows(activation).shape[1] > self.fold.width
        self.inner.take(position, self.fold(position, activation) if self.fold else activation)

    def end_batch(self) -> None:
        """All layers of the batch have been handed over."""
        self.inner.counts = self.counts
        self.inner.end_batch()
        self.batches += 1

    def close(self) -> None:
        """Let go of rows and their temporary files."""
        if isinstance(self.inner, WholeSetCKA | PairAccumulator):
            self.inner.close()

    def settled(self, tolerance: float | None, settle: Settle | None) -> bool:
        """Whether the batches so far are enough."""
        if self.batches < SETTLE_BATCHES:
            return False
        matrix = self.inner.compute()
        reach = np.fmax(matrix.high - matrix.values, matrix.values - matrix.low)
        known = reach[np.isfinite(reach)]
        narrow = tolerance is None or bool(len(known) and known.max() <= tolerance)
        return narrow and (settle is None or settle(matrix))

    def result(self, sample_id: str) -> SimilarityMatrix | CrossSimilarity:
        """The matrix, or for two models its rectangle across them."""
        try:
            joint = self.inner.compute()
        finally:
            self.close()
        options = dict(joint.options)
        if self.fold:
            options["projection"] = self.fold.width
        cautions = (*joint.cautions, *_cautions(joint, self.fold if self.folded else None))
        whole = replace(joint, reduce=str(self.reduction), sample_id=sample_id, options=options, cautions=cautions)
        return whole if len(self.parts) == 1 else _across(whole, self.parts, self.labels)


def _check_settings(
    name: str, options: Mapping[str, Any], *, tolerance: float | None, settle: Settle | None, sharded: bool,
    labels: tuple[str, str],
) -> None:  # fmt: skip
    if tolerance is not None and not 0 < tolerance < 1:
        raise ConfigError(f"tolerance={tolerance}; allowed: between 0 and 1")
    stops = tolerance is not None or settle is not None
    if stops and (name != "cka" or options["estimator"] != "minibatch"):
        raise ConfigError("tolerance and settle need minibatch CKA: only that has intervals after each batch")
    if stops and sharded:
        raise ConfigError("tolerance and settle can't be combined with sharded=True: ranks would stop at other batches")
    if len(labels) != 2 or labels[0] == labels[1]:
        raise ConfigError(f"labels={labels}; two models need two different names")


def _cka_accumulator(names: Sequence[str], options: Mapping[str, Any], *, memory_mib: float, **more: Any) -> Any:
    check_known("estimator", options["estimator"], ESTIMATORS)
    kernel = {"kernel": options["kernel"], "rbf_factor": options["rbf_factor"]}
    if options["estimator"] == "minibatch":
        return StreamingCKA(names, **kernel, **more)
    return WholeSetCKA(names, estimator=options["estimator"], memory_mib=memory_mib, **kernel, **more)


def _sweep_part(
    looks: Sequence[Look], loader: Iterable[Batch], begin: Callable[[list[list[Layer]]], Consumer],
    reduction: Reduction, runs: list[_Run],
) -> dict[str, Any]:  # fmt: skip
    """One rank's batches; a rank may have none."""
    try:
        seen = sweep_models(looks, loader, begin, reduce=reduction)
    except EmptyLoaderError:
        return {"parts": None, "state": None, "sample_id": "", "folded": False}
    run = runs[0]
    return {"parts": run.parts, "state": run.inner.state(), "sample_id": seen.sample_id, "folded": run.folded}


def _merge(
    states: Sequence[dict[str, Any]], make: Callable[[list[list[str]]], _Run]
) -> SimilarityMatrix | CrossSimilarity:
    """The result of all ranks' batches.

    Raises:
        DataError: No rank had a batch. ShapeError: The ranks have different layers.
    """
    filled = [(rank, state) for rank, state in enumerate(states) if state["parts"] is not None]
    if not filled:
        raise DataError("the loaders of all ranks yielded no batch")
    first, parts = filled[0][0], filled[0][1]["parts"]
    for rank, state in filled:
        if state["parts"] != parts:
            raise ShapeError(
                f"ranks have different layers: rank {first} has {_names(parts)}, rank {rank} has "
                f"{_names(state['parts'])}; give all ranks the same model and selection"
            )
    merged = make([list(part) for part in parts])
    for _, state in filled:
        merged.inner.load_state(state["state"])
        merged.folded |= state["folded"]
    joined = " ".join(state["sample_id"] for _, state in filled)
    return merged.result(hashlib.sha256(joined.encode()).hexdigest()[:16])


def _names(parts: Sequence[Sequence[str]]) -> str:
    return "; ".join(f"{len(part)} ({', '.join(part[:3])}{', …' if len(part) > 3 else ''})" for part in parts)


def _across(joint: SimilarityMatrix, parts: Sequence[Sequence[str]], labels: tuple[str, str]) -> CrossSimilarity:
    split = len(parts[0])
    cut = (slice(None, split), slice(split, None))
    null = joint.null
    if null is not None:
        arrays = {name: getattr(null, name)[cut] for name in ("mean", "bound", "p_value")}
        null = PermutationNull(permutations=null.permutations, level=null.level, **arrays)
    replicates = recentred_replicates(joint)
    return CrossSimilarity(
        first=tuple(parts[0]), second=tuple(parts[1]), labels=labels, values=joint.values[cut], low=joint.low[cut],
        high=joint.high[cut], level=joint.level, measure=joint.measure, options=joint.options, reduce=joint.reduce,
        samples=joint.samples, sample_id=joint.sample_id, precision_error=joint.precision_error, null=null,
        weights=joint.weights, replicates=replicates[(slice(None), *cut)], cautions=joint.cautions,
    )  # fmt: skip


def _cautions(matrix: SimilarityMatrix, fold: Projection | None) -> list[Caution]:
    made = []
    if matrix.missing and matrix.measure == "cka":
        text = f"dead or constant layer: {', '.join(matrix.missing)} does not vary over the samples and has no value"
        made.append(Caution(code="LL006", text=text, layers=matrix.missing))
    if matrix.precision_error > IMPRECISE:
        text = f"float32 moves entries by up to {matrix.precision_error:.1e} here; run the model in float64 to be sure"
        made.append(Caution(code="LL011", text=text))
    if fold is not None:
        known = matrix.participation[np.isfinite(matrix.participation)]
        bound = fold.error_bound(float(known.max()) if len(known) else float(matrix.samples))
        text = f"wide layers were folded to {fold.width} numbers: an entry is off by up to {bound:.1%} of itself (rms)"
        if matrix.measure != "cka":
            text = f"wide layers were folded to {fold.width} numbers: entries are approximate"
        made.append(Caution(code="LL012", text=text))
    return made
