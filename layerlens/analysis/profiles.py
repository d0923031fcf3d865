"""measure_layers(): a measure of single layers, with intervals, for every layer of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from layerlens.activations import Consumer, Look, sweep_models
from layerlens.analysis.kernels import as_rows
from layerlens.analysis.measures import Measure, parse_measure
from layerlens.analysis.resampling import jackknife_intervals
from layerlens.analysis.results import Array, Caution, LayerProfile
from layerlens.analysis.rows import RowStore, owners
from layerlens.errors import ConfigError, DegenerateError, LayerlensError, check_known
from layerlens.graph_batches import holds_graphs
from layerlens.layers import Batch, Forward, Layer, main_tensor, replace_main_tensor
from layerlens.reduction import Reduction, make_reduction

_RANKS = {"effective_rank": 1, "participation_ratio": 1, "rankme": 0}  # directions that centring takes away
Views = Callable[[Any], Any]  # of a tensor of inputs, or of a batch of graphs


def measure_layers(
    model: nn.Module,
    loader: Iterable[Batch],
    layers: str | Sequence[str] = "auto",
    *,
    measure: str = "effective_rank",
    estimator: str | None = None,
    reduce: str | Reduction = "flatten",
    views: Views | None = None,
    level: float = 0.95,
    groups: int = 10,
    memory_mib: float = 2048,
    forward: Forward | None = None,
) -> LayerProfile:
    """A measure of each layer with a confidence interval, in one pass over the data; the model is left as it was.

    Args:
        model, loader, layers, reduce, forward: As for `similarity.similarity_matrix`.
        measure: A name of `measures.MEASURES` over layers or views, with options: `rankme`,
            `intrinsic_dimension,discard=0.05`, `alignment`, `diversity,views=4`.
        estimator: `minibatch`: the mean over batches; a batch of n samples can't show a rank above n - 1, so compare
            only equal batch sizes. `whole-set`: of all samples at once. By default the first that the measure has.
        views: Makes a random view of each sample of a batch's input tensor, or of a whole batch of graphs; alignment,
            invariance and diversity need it.
        level: Confidence of the intervals: over batches, or from a jackknife over groups of samples.
        groups: Of that jackknife; 0 for no intervals.
        memory_mib: For whole-set measures: half of it is for rows in memory, the others go to temporary files.

    Returns:
        A value per layer; NaN, with a caution, where a layer is constant or has samples without a direction.

    Raises:
        UnknownNameError: No such measure. ConfigError: An estimator that it lacks, or no `views`.
        NonFiniteError: NaN or infinity; the message names the layer.
    """
    found, options = parse_measure(measure, over=("layers", "views"))
    way = estimator or found.estimators[0]
    check_known(f"estimator of {found.name}", way, found.estimators)
    if groups < 0 or groups == 1:
        raise ConfigError(f"groups={groups}; allowed: 0 for no intervals, or 2 or more")
    if not 0 < level < 1:
        raise ConfigError(f"level={level}; allowed: between 0 and 1")
    reduction = make_reduction(reduce)
    if found.over == "views" and reduction.kind == "nodes":
        raise ConfigError(f"{found.name} with reduce='nodes': views of a graph have other nodes; use reduce='graphs'")
    looks = _looks(found, options, Look(model, layers, forward), views)
    options = {name: value for name, value in options.items() if name != "views"}
    state: list[_Batchwise | _WholeSet] = []

    def begin(chosen: list[list[Layer]]) -> Consumer:
        names = [layer.name for layer in chosen[0]]
        if way == "minibatch":
            state.append(_Batchwise(names, found, options))
        else:
            state.append(_WholeSet(names, found, options, len(chosen), memory_mib, groups))
        return state[0]

    try:
        sweep_models(looks, loader, begin, reduce=reduction)
        return state[0].profile(level)
    finally:
        for part in state:
            if isinstance(part, _WholeSet):
                part.store.close()


def _looks(measure: Measure, options: dict[str, Any], look: Look, views: Views | None) -> list[Look]:
    """The model on the batch itself, on views of it, or both, as the measure asks."""
    if measure.over == "layers":
        return [look]
    if views is None:
        raise ConfigError(f"{measure.name} needs views=: a function that makes a random view of a batch of inputs")
    count = int(options.get("views", 2))
    if count < (1 if measure.name == "invariance" else 2):
        raise ConfigError(f"views={count}; {measure.name} needs {1 if measure.name == 'invariance' else 2} or more")

    def view(batch: Batch) -> Batch:
        inputs = main_tensor(batch)
        assert inputs is not None
        return views(batch) if holds_graphs(batch) else replace_main_tensor(batch, views(inputs))

    viewed = replace(look, view=view)
    return [*([look] if measure.name == "invariance" else []), *[viewed] * count]


def _value(measure: Measure, options: dict[str, Any], rows: Sequence[Tensor]) -> float:
    """The measure of one layer; `rows` has one entry per look."""
    work, flat = measure.load(), [r.reshape(len(r), -1) for r in rows]
    if measure.name == "invariance":
        return float(work(flat[0], torch.stack(flat[1:], 1), **options))
    if measure.name == "diversity":
        return float(work(torch.stack(flat, 1), **options))
    return float(work(*flat, **options))


class _Batchwise:
    """The measure of each batch; the profile is their mean."""

    def __init__(self, layers: list[str], measure: Measure, options: dict[str, Any]) -> None:
        self.layers, self.measure, self.options = layers, measure, options
        self.values: list[list[float]] = []
        self.sizes: list[int] = []
        self.current = [float("nan")] * len(layers)
        self.rows = 0

    def take(self, position: int, activation: Tensor) -> None:
        try:
            self.current[position] = _value(self.measure, self.options, [activation])
        except DegenerateError:
            self.current[position] = float("nan")
        except LayerlensError as error:
            where = f"layer {self.layers[position]!r}, batch {len(self.sizes)}"
            raise type(error)(f"{where}: {error}") from error
        self.rows = len(activation)

    def end_batch(self) -> None:
        self.values.append(self.current.copy())
        self.sizes.append(self.rows)

    def profile(self, level: float) -> LayerProfile:
        found, count = np.array(self.values), len(self.values)
        mean = found.mean(0)
        reach = np.full(mean.shape, np.nan)
        if count > 1:
            reach = stats.t.ppf((1 + level) / 2, count - 1) * found.std(0, ddof=1) / count**0.5
        return _profile(self.measure, self.layers, mean, mean - reach, mean + reach, max(self.sizes), sum(self.sizes))


class _WholeSet:
    """All rows under each look, and the measure of them."""

    def __init__(
        self, layers: list[str], measure: Measure, options: dict[str, Any], looks: int, memory_mib: float, groups: int
    ) -> None:
        self.layers, self.measure, self.options, self.looks, self.groups = layers, measure, options, looks, groups
        self.store = RowStore(layers * looks, memory_mib)
        self.counts: Tensor | None = None
        self._counts: list[Tensor] = []

    def take(self, position: int, activation: Tensor) -> None:
        self.store.append(position, as_rows(activation))

    def end_batch(self) -> None:
        if self.counts is not None:
            self._counts.append(self.counts.cpu())

    def profile(self, level: float) -> LayerProfile:
        n = self.store.samples
        values = self._values(None)
        low, high = np.full(values.shape, np.nan), np.full(values.shape, np.nan)
        if self.groups and n >= 4 * self.groups:
            group = owners(self._counts, n) % self.groups
            weights = torch.bincount(group).double().numpy()
            without = np.stack([self._values((group != g).nonzero().flatten()) for g in range(self.groups)])
            low, high = jackknife_intervals(values, without, weights, level, bounded=False, unbias=False)
        return _profile(self.measure, self.layers, values, low, high, n, n)

    def _values(self, keep: Tensor | None) -> Array:
        found = np.full(len(self.layers), np.nan)
        for i, name in enumerate(self.layers):
            rows = [self.store.read(look * len(self.layers) + i) for look in range(self.looks)]
            try:
                cut = rows if keep is None else [r[keep.to(r.device)] for r in rows]
                found[i] = _value(self.measure, self.options, cut)
            except DegenerateError:
                continue
            except LayerlensError as error:
                raise type(error)(f"layer {name!r}: {error}") from error
        return found


def _profile(
    measure: Measure, layers: Sequence[str], values: Array, low: Array, high: Array, most: int, samples: int
) -> LayerProfile:
    missing = tuple(name for name, value in zip(layers, values, strict=True) if np.isnan(value))
    cautions = []
    if missing:
        text = f"no {measure.name}: {', '.join(missing)} is constant, or has samples of norm zero, over the samples"
        cautions.append(Caution(code="LL006", text=text, layers=missing))
    return LayerProfile(
        measure=measure.name, layers=tuple(layers), values=tuple(values.tolist()), low=tuple(low.tolist()),
        high=tuple(high.tolist()), samples=samples, cautions=tuple(cautions),
        ceiling=float(most - _RANKS[measure.name]) if measure.name in _RANKS else float("nan"),
    )  # fmt: skip
