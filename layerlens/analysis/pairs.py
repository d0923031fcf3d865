"""Any pair measure other than CKA, over all samples at once, with jackknife intervals and a permutation null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerlens.analysis.cka import null_of
from layerlens.analysis.measures import Measure, make_pair_measure
from layerlens.analysis.resampling import jackknife_intervals
from layerlens.analysis.results import Array, Caution, SimilarityMatrix
from layerlens.analysis.rows import MIB, RowStore, owners
from layerlens.errors import (
    BatchTooSmallError,
    ConfigError,
    DegenerateError,
    LayerlensError,
    NonFiniteError,
    ShapeError,
)

_LEAST = 4
_BLOCK_ROWS = 1024  # of samples whose neighbours are found together
Pair = tuple[int, int]


class PairAccumulator:
    """Rows of L layers, and the measure of all their pairs once all are there.

    Args:
        layers: Their names.
        measure, options: From `measures.parse_measure`.
        split: Number of layers of a first model; only pairs across the two models are then compared. 0 for one.
        level: Confidence of the intervals.
        groups: Of samples for the jackknife, each of which costs another evaluation; 0 for no intervals.
        permutations: For the null; each costs another evaluation of the pairs.
        memory_mib: Bound on rows and what is made of them.
        seed: Of the permutations.
    """

    def __init__(
        self, layers: Sequence[str], measure: Measure, options: Mapping[str, Any], *, split: int = 0,
        level: float = 0.95, groups: int = 10, permutations: int = 0, memory_mib: float = 2048, seed: int = 0,
    ) -> None:  # fmt: skip
        if not 0 < level < 1:
            raise ConfigError(f"level={level}; allowed: between 0 and 1")
        if groups < 0 or groups == 1:
            raise ConfigError(f"groups={groups}; allowed: 0 for no intervals, or 2 or more")
        if permutations < 0:
            raise ConfigError(f"permutations={permutations}; allowed: 0 or more")
        self.layers, self.measure, self.options, self.split = tuple(layers), measure, dict(options), split
        self.level, self.groups, self.permutations, self.seed = level, groups, permutations, seed
        self.worker = make_pair_measure(measure, options)
        self.store = RowStore(self.layers, memory_mib)
        self.counts: Tensor | None = None
        self._counts: list[Tensor] = []
        self._reasons: dict[str, str] = {}  # why a layer has no value

    def take(self, position: int, activation: Tensor) -> None:
        """Keep one layer's rows of the current batch."""
        self.store.append(position, activation)

    def end_batch(self) -> None:
        """All layers of the batch have been handed over."""
        if self.counts is not None:
            self._counts.append(self.counts.cpu())

    def state(self) -> dict[str, Any]:
        """All rows seen so far, on the CPU."""
        rows = [self.store.read(i).cpu() for i in range(len(self.layers))] if self.store.samples else []
        for name, found in zip(self.layers, rows, strict=False):
            if not bool(found.norm(dtype=torch.float64).isfinite()):
                raise NonFiniteError(f"NaN or infinity in the activations of layer {name!r}; check input and weights")
        return {"rows": rows, "counts": list(self._counts)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Add the rows that another accumulator of the same layers has seen."""
        for position, rows in enumerate(state["rows"]):
            self.store.append(position, rows)
        self._counts += state["counts"]

    def close(self) -> None:
        """Let go of all rows and their temporary files."""
        self.store.close()

    def compute(self) -> SimilarityMatrix:
        """The measure of all pairs, with intervals and null.

        Raises:
            ShapeError: Layers with different sample counts, or no batch.
            BatchTooSmallError: Fewer than 4 samples, or too few for the groups.
            NonFiniteError: NaN or infinity in a layer.
            ConfigError: Too little memory; the message says the least that works.
        """
        n = self.store.samples
        if not n:
            raise ShapeError("no batch was seen yet")
        if n < _LEAST:
            raise BatchTooSmallError(f"{n} samples in all; {self.measure.name} needs at least {_LEAST}")
        self._fit_in_memory(n)
        everything = self._prepare(None)
        values = self._compare(everything, everything)
        low, high, replicates, weights = self._intervals(values, n)
        return SimilarityMatrix(
            layers=self.layers, values=values, low=low, high=high, level=self.level, measure=self.measure.name,
            options={**self.options, "estimator": "whole-set"}, samples=n, weights=weights, replicates=replicates,
            participation=np.full(len(self.layers), np.nan), null=self._null(values, everything, n),
            cautions=tuple(self._cautions(everything, n)),
        )  # fmt: skip

    def _prepare(self, keep: Tensor | None) -> list[Any]:
        """Each layer made ready, over all samples or some; None for a layer that is constant over them."""
        ready: list[Any] = []
        for position, name in enumerate(self.layers):
            rows = self.store.read(position)
            rows = rows if keep is None else rows[keep.to(rows.device)]
            try:
                ready.append(self.worker.prepare(rows.to(self.store.given(position))))
            except DegenerateError as error:
                ready.append(None)
                self._reasons.setdefault(name, str(error))
            except LayerlensError as error:
                raise type(error)(f"layer {name!r}: {error}") from error
        return ready

    def _compare(self, first: list[Any], second: list[Any]) -> Array:
        """All pairs of interest; NaN elsewhere and for constant layers."""
        count, measure = len(self.layers), self.measure
        values = np.full((count, count), np.nan)
        for i, j in self._pairs():
            if first[i] is not None and second[j] is not None:
                values[i, j] = values[j, i] = self.worker.compare(first[i], _on(second[j], first[i]))
        for i in range(count):
            if first[i] is not None:
                values[i, i] = measure.high if measure.higher_is_alike else measure.low
        return values

    def _pairs(self) -> list[Pair]:
        count = len(self.layers)
        if self.split:
            return [(i, j) for i in range(self.split) for j in range(self.split, count)]
        return [(i, j) for i in range(count) for j in range(i + 1, count)]

    def _intervals(self, values: Array, n: int) -> tuple[Array, Array, Array, Array]:
        owner = owners(self._counts, n)
        samples = int(owner[-1]) + 1
        if not self.groups:
            empty = np.full(values.shape, np.nan)
            return empty, empty.copy(), np.zeros((0, *values.shape)), np.zeros(0)
        if samples < 2 * self.groups:
            raise BatchTooSmallError(f"{samples} samples for {self.groups} groups; give more samples, or fewer groups")
        group = owner % self.groups
        weights = torch.bincount(group, minlength=self.groups).double().numpy()
        replicates = np.stack([self._compare(r, r) for r in (self._prepare((group != g).nonzero().flatten())
                                                            for g in range(self.groups))])  # fmt: skip
        low, high = jackknife_intervals(
            values, replicates, weights, self.level, bounded=self.measure.high == 1, unbias=self.measure.unbias
        )
        alive = np.flatnonzero(~np.isnan(values.diagonal()))
        low[alive, alive] = high[alive, alive] = values[alive, alive]
        return low, high, replicates, weights

    def _null(self, values: Array, ready: list[Any], n: int) -> Any:
        if not self.permutations:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        wrong = []
        for _ in range(self.permutations):
            order = torch.randperm(n, generator=generator)
            moved = [None if r is None else self.worker.permute(r, order) for r in ready]
            found = self._compare(ready, moved)
            for i, r in enumerate(ready):
                if r is not None:
                    found[i, i] = self.worker.compare(r, moved[i])
            wrong.append(found)
        return null_of(values, np.stack(wrong), self.level, higher_is_alike=self.measure.higher_is_alike)

    def _cautions(self, ready: list[Any], n: int) -> list[Caution]:
        made = []
        for name, found in zip(self.layers, ready, strict=True):
            if found is None:
                why = self._reasons[name]
                text = f"no {self.measure.name} for layer {name}: {why}"
                if "is constant" in why:
                    text = f"dead or constant layer: {name} does not vary over the samples and has no value"
                made.append(Caution(code="LL006", text=text, layers=(name,)))
        ranks = {name: self.worker.rank(r) for name, r in zip(self.layers, ready, strict=True) if r is not None
                 and hasattr(self.worker, "rank")}  # fmt: skip
        wide = tuple(name for name, rank in ranks.items() if 2 * rank > n - 1)
        if wide:
            most = max(ranks[name] for name in wide)
            made.append(
                Caution(
                    code="LL010",
                    text=f"too few samples for {self.measure.name}: {n} for up to {most} directions of "
                    f"{', '.join(wide)}, so that unrelated layers score high as well; take several times as many "
                    "samples as directions, pool the maps, or compare with the null",
                    layers=wide,
                )
            )
        return made

    def _fit_in_memory(self, n: int) -> None:
        widest, name = max(self.store.widths), self.measure.name
        rank = min(n, widest)
        if name.startswith("rsa"):
            each, work = n * n / 2, 5 * n * n
        elif name == "mutual_knn":
            each, work = n * self.options["k"], 3 * _BLOCK_ROWS * n
        else:
            each = n * rank + (rank * widest / 2 if name == "pwcca" else 0)
            work = 5 * rank * rank + 3 * n * rank
        twice = 2 if self.groups or self.permutations else 1
        least = 8 * (twice * len(self.layers) * each + work) + 8 * n * widest
        have = self.store.memory - (0 if self.store.on_disk else self.store.bytes)
        if least > have and not self.store.on_disk:
            self.store.spill()
            have = self.store.memory
        if least > have:
            short = -int(-(least - have) // MIB)
            raise ConfigError(
                f"{self.measure.name} of {len(self.layers)} layers of {n} samples needs {int(least // MIB) + 1} MiB "
                f"beside its rows; raise memory_mib by {short}, or give fewer samples or layers"
            )


def _on(prepared: Any, like: Any) -> Any:
    """Moved to the device of another layer, where a model is split over devices."""
    if isinstance(prepared, Tensor) and isinstance(like, Tensor) and prepared.device != like.device:
        return prepared.to(like.device)
    return prepared
