"""Whole-set CKA: exact over all samples at once, within a bound on the memory.

Two ways lead to the same sums, and the cheaper one is taken: Gram matrices of the samples, all at once or in tiles,
or, where all features together are fewer than the samples, their covariances.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg.blas import dsyrk, ssyrk
from threadpoolctl import threadpool_limits
from torch import Tensor

from layerlens.analysis.cka import GROUPS, StreamingCKA, influence_of, null_of, without_each
from layerlens.analysis.hsic import HSIC, hsic_from_features, hsic_from_grams, hsic_from_parts
from layerlens.analysis.kernels import BURDEN, CONSTANT, h_centre, rbf, rbf_from_gram, u_centre, u_centre_
from layerlens.analysis.resampling import cka_error, cka_of
from layerlens.analysis.results import Array, Flags, SampleInfluence, SimilarityMatrix
from layerlens.analysis.rows import MIB, RowStore
from layerlens.errors import BatchTooSmallError, ConfigError, DegenerateError, NonFiniteError, ShapeError, check_known
from layerlens.precision import full_precision

_PIECE = 2048  # rows of a product in feature space
_LEAST_TILE = 64
_FEW = 512  # samples for the second-order part of the errors
_BLOCK = 1 << 20  # numbers in a temporary copy
_BINS = 4096  # of a histogram of distances
_FEW_VALUES = 1 << 18  # distances that are sorted to find the median
_SPARE = 24 * MIB  # column blocks and temporary sums


class WholeSetCKA(StreamingCKA):
    """CKA over all samples at once, debiased (unbiased HSIC) or biased; batches of any size.

    Args:
        layers, kernel, rbf_factor, level, errors, influence, permutations, positions, check, seed: As for
            `StreamingCKA`, but all samples must fit in one Gram matrix for permutations.
        estimator: `debiased` or `biased`. The intervals of both have the width of the debiased one's.
        memory_mib: Bound on the memory for rows, tiles and sums, above that of the forward pass. Rows beyond half of
            it go to temporary files.
    """

    def __init__(
        self, layers: Sequence[str], *, estimator: str = "debiased", memory_mib: float = 2048, **options: Any
    ) -> None:
        check_known("estimator", estimator, ("debiased", "biased"))
        self.memory_mib = memory_mib
        super().__init__(layers, **options)
        self.estimator = estimator

    def reset(self) -> None:
        """Forget all batches."""
        super().reset()
        self._store = RowStore(self.layers, self.memory_mib)
        self._counts: list[Tensor] = []
        self._seen, self._copies = 0, True

    def take(self, position: int, activation: Tensor) -> None:
        """Keep a copy of one layer's rows of the current batch."""
        if self.check and not self._seen and len(activation) >= 4:
            self._check_precision(position, activation)
        self._store.append(position, activation, copy=self._copies)

    def update(self, activations: Sequence[Tensor], *, copy: bool = True) -> None:
        """Take one batch, an activation (n, …) for each layer in order.

        Args:
            activations: Of the layers.
            copy: False keeps the tensors themselves, which then must stay as they are.
        """
        self._copies = copy
        super().update(activations)
        self._copies = True

    def _take_together(self, activations: Sequence[Tensor]) -> bool:
        return False

    def end_batch(self) -> None:
        """All layers of the batch have been handed over."""
        if self.counts is not None:
            self._counts.append(self.counts.cpu())
            self._images += len(self.counts)
        self._seen += 1

    def state(self) -> dict[str, Any]:
        """All rows seen so far, on the CPU."""
        rows = [self._store.read(i).cpu() for i in range(len(self.layers))] if self._seen else []
        _refuse_non_finite(self._store, np.array([float(r.norm(dtype=torch.float64)) for r in rows]))
        return {
            "rows": rows,
            "counts": list(self._counts),
            "seen": self._seen,
            "checked": {k: (a.cpu(), b.cpu()) for k, (a, b) in self._checked.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Add the rows that another accumulator of the same layers has seen."""
        for position, rows in enumerate(state["rows"]):
            self._store.append(position, rows)
        self._counts += state["counts"]
        self._images += sum(len(counts) for counts in state["counts"])
        self._seen += state["seen"]
        self._checked = self._checked or state["checked"]

    def compute(self) -> SimilarityMatrix:
        """The similarity matrix of all samples so far.

        Raises:
            ShapeError: No batch yet, or layers with different sample counts.
            BatchTooSmallError: Fewer than 4 rows.
            NonFiniteError: NaN or infinity in some layer.
            ConfigError: Not even one tile fits in the memory; the message says the least that works.
        """
        found = self._sums()
        if not self._counts:
            self._images = found.hsic.samples
        hsic, biased = found.hsic.value.cpu().numpy(), found.biased
        n, dead = found.hsic.samples, self._constant(found)
        clean = _without(hsic, dead)
        values = cka_of(clean if self.estimator == "debiased" else _without(biased, dead))
        np.fill_diagonal(values, np.where(dead, np.nan, 1.0))
        error = cka_error(cka_of(clean), clean, found.hsic.covariance.cpu().numpy())
        participation = np.divide(found.spread**2, found.square, out=np.full(len(dead), np.nan), where=~dead)
        blocks, weights = _sample_groups(found.hsic, dead)
        null = None
        if found.wrong is not None:
            which = biased if self.estimator == "biased" else hsic
            own = np.sqrt(np.where(dead, np.nan, np.diagonal(which)))
            wrong = found.wrong[self.estimator == "biased"].cpu().numpy()
            null = null_of(cka_of(_without(which, dead)), wrong / (own[:, None] * own), self.level)
        return self._result(values, error, blocks, weights, participation, n, null)

    def close(self) -> None:
        """Let go of all rows and their temporary files."""
        self._store.close()

    def _plan(self) -> Plan:
        """The cheapest way that fits; rows in memory make room by going to disk."""
        store = self._store
        more: dict[str, Any] = {"kernel": self.kernel, "whole": bool(self.permutations)}
        if not store.on_disk:
            try:
                return plan_whole_set(store.samples, store.widths, bytes_free=store.memory - store.bytes, **more)
            except ConfigError:
                store.spill()
        return plan_whole_set(store.samples, store.widths, bytes_free=store.memory, on_disk=True, **more)

    def _constant(self, found: _Sums) -> Flags:
        """Layers that do not vary, or (debiased) of which U-centring leaves nothing."""
        dead: Flags = found.spread <= CONSTANT**2 * found.scale
        if self.estimator == "debiased":
            n, own = found.hsic.samples, np.diagonal(found.hsic.value.cpu().numpy())
            dead = dead | (own * n * (n - 3) <= CONSTANT**2 * np.diagonal(found.biased))
        return dead

    def influence(self) -> SampleInfluence:
        """How much leaving out each sample moves each entry of debiased CKA, in closed form and exactly."""
        found = self._sums()
        hsic, dead = found.hsic, self._constant(found)
        if hsic.each is None:
            raise ShapeError("no influence was kept; make the accumulator with influence=True")
        if self.positions:
            raise ShapeError("influence is of single samples; it is not defined for positions")
        less = _without(without_each(hsic.each, hsic.samples).cpu().numpy(), dead)
        return influence_of(self.layers, cka_of(less) - cka_of(_without(hsic.value.cpu().numpy(), dead)))

    def _sums(self) -> _Sums:
        store = self._store
        if store.samples < 4:
            if not store.samples:
                raise ShapeError("no batch was seen yet")
            raise BatchTooSmallError(f"{store.samples} samples in all; unbiased HSIC needs at least 4")
        plan = self._plan()
        generator = torch.Generator().manual_seed(self.seed)
        counts = torch.cat(self._counts) if self._counts else None
        with threadpool_limits(torch.get_num_threads(), user_api="blas"):
            if plan.way == "features":
                return _by_features(store, counts)
            factor = self.rbf_factor if self.kernel == "rbf" else None
            if plan.tile >= store.samples:
                return _by_one_gram(store, factor, counts, self.errors or self.keep_each, self.permutations, generator)
            return _by_tiles(store, plan.tile, factor, counts)


def cka(x: Tensor, y: Tensor, *, kernel: str = "linear", rbf_factor: float = 1.0, estimator: str = "debiased") -> float:
    """CKA between two representations of the same n samples.

    Args:
        x: Activations, shape (n, …); row i is sample i.
        y: Activations, shape (n, …), same row order.
        kernel: `linear` or `rbf`.
        rbf_factor: RBF width in units of the median distance.
        estimator: `debiased` (unbiased HSIC; can be slightly negative) or `biased` (in [0, 1], too high for
            few samples and many features).

    Returns:
        Similarity, no unit, at most 1; higher is more alike.

    Raises:
        ShapeError: Row counts differ; BatchTooSmallError below 4 rows.
        DegenerateError: One side is constant, or (debiased) its samples all equally far apart: CKA is 0/0.
        NonFiniteError: NaN or infinity.

    Source:
        Kornblith et al. 2019, arXiv:1905.00414; Song et al. 2012 for the unbiased HSIC

    >>> x = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    >>> round(cka(x, 2 * x), 6)
    1.0
    """
    whole = WholeSetCKA(["x", "y"], kernel=kernel, rbf_factor=rbf_factor, estimator=estimator)
    whole.update([x, y])
    result = whole.compute()
    if result.missing:
        what = f"{' and '.join(result.missing)} constant over the {len(x)} samples, or these all equally far apart"
        raise DegenerateError(f"{what}; CKA is 0/0")
    return result.between("x", "y")


@dataclass(frozen=True)
class Plan:
    """How whole-set sums are taken.

    Attributes:
        way: `grams` or `features`.
        tile: Samples along a tile's edge; 0 for features.
        bytes: Memory above the rows that lie in memory.
        operations: Multiplications and additions, one in double precision counted twice.
    """

    way: str
    tile: int
    bytes: int
    operations: float


def plan_whole_set(
    samples: int, widths: Sequence[int], *, kernel: str, bytes_free: int, on_disk: bool = False, whole: bool = False
) -> Plan:
    """The cheapest way that fits.

    Args:
        samples: n.
        widths: Features of each layer.
        kernel: `rbf` needs Gram matrices.
        bytes_free: Memory that may be used.
        on_disk: Whether rows must be read into memory for each tile.
        whole: Whether one Gram matrix of all samples is needed.

    Raises:
        ConfigError: Nothing fits; the message says the least that works.
    """
    n, count, total = samples, len(widths), sum(widths)
    kept = n * count * (count + 2) * 8 + _SPARE
    spare = 3 if kernel == "linear" else 10  # distances, their copies and the indices of pairs
    tiles = [n]
    while tiles[-1] > _LEAST_TILE and not whole:
        tiles.append(max(_LEAST_TILE, -(-tiles[-1] // 2)))
    few = min(n, _FEW) * max(widths) * 8 + count * min(n, _FEW) ** 2 * 16
    row = 16 * max(widths) if on_disk else 0  # of two tiles' rows, read and centred
    passes = {True: 1, False: 1 if kernel == "linear" else 4}
    plans = [
        Plan(
            "grams", t,
            kept + (count + spare) * t * t * 8 + (few if t < n else 0) + t * row,
            passes[t == n] * n * n * total * (1.0 if t == n else 1.2) + 4.0 * n * n * count**2,
        )
        for t in tiles
    ]  # fmt: skip
    if kernel == "linear" and not whole:
        size = kept + total**2 * 20 + 4 * min(n, _PIECE) * total * 4 + count * min(n, _FEW) ** 2 * 16
        plans.append(Plan("features", 0, size, 6.0 * n * total**2))
    fitting = [plan for plan in plans if plan.bytes <= bytes_free]
    if not fitting:
        least = min(plan.bytes for plan in plans) - min(bytes_free, 0)
        raise ConfigError(
            f"{max(bytes_free, 0) // MIB} MiB are left for {count} layers of {n} samples, and one tile needs "
            f"{-(-least // MIB)} MiB; raise memory_mib by {-(-(least - bytes_free) // MIB)}, pool the maps, or take "
            "estimator='minibatch'"
        )
    return min(fitting, key=lambda plan: plan.operations)


@dataclass(frozen=True)
class _Sums:
    """HSIC of all pairs, and per layer trace, squared norm and squared norm before centring of its rows."""

    hsic: HSIC
    diagonals: Tensor  # (n, L), of the centred kernel matrices
    spread: Array
    square: Array
    scale: Array
    wrong: tuple[Tensor, Tensor] | None = None  # of wrongly paired samples, unbiased and biased: (permutations, L, L)

    @property
    def biased(self) -> Array:
        """⟨HKH, HLH⟩ of all pairs, shape (L, L)."""
        return _biased(self.hsic, self.diagonals)


def _biased(hsic: HSIC, diagonals: Tensor) -> Array:
    """What U-centring took away is a function of the diagonals alone."""
    return _with_diagonals(hsic.samples, hsic.value, diagonals, diagonals).cpu().numpy()


def _with_diagonals(n: int, hsic: Tensor, mine: Tensor, theirs: Tensor) -> Tensor:
    """⟨HKH, HLH⟩ from unbiased HSIC and the diagonals of HKH and HLH, shape (n, L) each."""
    sums = mine.sum(0)[:, None] * theirs.sum(0) / ((n - 1) * (n - 2))
    return hsic * (n * (n - 3)) - sums + mine.T @ theirs * (n / (n - 2))


def _assemble(store: RowStore, hsic: HSIC, diagonals: Tensor, *, scale: Array | None = None, **linear: Any) -> _Sums:
    """The kernel's own trace and squared norm are those of the rows, unless `linear` gives them."""
    found = {"spread": diagonals.sum(0).cpu().numpy(), "square": np.diagonal(_biased(hsic, diagonals)), **linear}
    if scale is None:
        scale = found["spread"] + np.array([store.offset(i) for i in range(len(store.layers))])
    _refuse_non_finite(store, scale)
    return _Sums(hsic=hsic, diagonals=diagonals, scale=scale, **found)


def _refuse_non_finite(store: RowStore, sizes: Array) -> None:
    """See that every layer's squared norm is a number; the first that is not gets named."""
    if not np.isfinite(sizes).all():
        name = store.layers[int(np.flatnonzero(~np.isfinite(sizes))[0])]
        raise NonFiniteError(
            f"NaN or infinity in the activations of layer {name!r}, or numbers above 1e19; check the input and the "
            "weights"
        )


def _by_features(store: RowStore, counts: Tensor | None) -> _Sums:
    def pieces() -> Iterator[list[Tensor]]:
        return store.pieces(_PIECE)

    hsic = hsic_from_features(pieces, store.widths, counts=counts, each=True)
    return _assemble(store, hsic, _norms(store))


def _by_one_gram(
    store: RowStore, factor: float | None, counts: Tensor | None, errors: bool, permutations: int,
    generator: torch.Generator,
) -> _Sums:  # fmt: skip
    """All Gram matrices side by side in memory."""
    n, count = store.samples, len(store.layers)
    exact = factor is not None or torch.float64 in {store.dtype(i) for i in range(count)}
    stack = torch.empty(count, n, n, dtype=torch.float64 if exact else torch.float32, device=store.device(0))
    diagonals, scales = list[Tensor](), np.zeros(count)
    linear: dict[str, Any] = {"spread": np.zeros(count), "square": np.zeros(count)}
    for i, place in enumerate(stack):
        if factor is None:
            diagonal, scales[i] = _u_centred_gram(store, i, place)
        else:
            gram = _gram(store, i, slice(0, n), slice(0, n), exact=True)
            linear["spread"][i], linear["square"][i] = float(gram.trace()), float(gram.square().sum())
            centred = h_centre(rbf_from_gram(gram, factor))
            place.copy_(u_centre(centred))
            diagonal, scales[i] = centred.diagonal(), linear["spread"][i] + store.offset(i)
        diagonals.append(diagonal.to(stack.device))
    hsic = hsic_from_grams(stack, counts=counts, errors=errors, each=errors)
    wrong = _wrong_pairings(stack, torch.stack(diagonals, 1), permutations, generator) if permutations else None
    given = linear if factor is not None else {}
    return _assemble(store, hsic, torch.stack(diagonals, 1), scale=scales, wrong=wrong, **given)


def _u_centred_gram(store: RowStore, position: int, place: Tensor) -> tuple[Tensor, float]:
    """Put a layer's U-centred Gram matrix in its place; its diagonal when centred, and its trace before centring.

    Where the mean is not much larger than the variation, U-centring takes it out nearly as exactly as centring the
    rows would, and BLAS can have the rows as they are.
    """
    n, raw, shift = store.samples, store.uncentred(position), torch.zeros(())
    if raw is not None:
        gram = torch.from_numpy(raw.numpy() @ raw.numpy().T)  # NumPy takes the symmetric product
        rows = gram.sum(1, dtype=torch.float64)
        diagonal = gram.diagonal().double() - 2 * rows / n + rows.sum() / n**2
        scale = float(gram.diagonal().sum(dtype=torch.float64))
        shift = rows / n - rows.sum() / (2 * n**2)
        if not rows.sum() / n <= BURDEN * diagonal.sum():  # what some columns did not show
            raw, shift = None, torch.zeros(())
    if raw is None:
        gram = _gram(store, position, slice(0, n), slice(0, n))
        diagonal = gram.diagonal().to(torch.float64, copy=True)
        scale = float(diagonal.sum()) + store.offset(position)
    u = (diagonal / (n - 2) - diagonal.sum() / (2 * (n - 1) * (n - 2)) - shift).to(gram.dtype)
    place.copy_(gram.add_(u[:, None]).add_(u).fill_diagonal_(0.0))
    return diagonal, scale


def _by_tiles(store: RowStore, tile: int, factor: float | None, counts: Tensor | None) -> _Sums:
    """Gram matrices in tiles of the upper triangle, none of them ever whole."""
    n, count = store.samples, len(store.layers)
    norms = _norms(store)
    _refuse_non_finite(store, norms.sum(0).cpu().numpy())
    kernel = _TiledKernel(store, tile, norms, factor)
    diagonals, linear = kernel.diagonals()
    u = diagonals / (n - 2) - diagonals.sum(0) / (2 * (n - 1) * (n - 2))
    parts = norms.new_zeros(n, count, count)
    for rows, columns in kernel.places:
        stack = norms.new_empty(count, rows.stop - rows.start, columns.stop - columns.start)
        for i, place in enumerate(stack):
            place.copy_(kernel.tile(i, rows, columns)).add_(u[rows, i, None]).add_(u[columns, i])
        if rows == columns:
            stack.diagonal(dim1=1, dim2=2).zero_()
        parts[rows] += _row_sums(stack)
        if rows != columns:
            parts[columns] += _row_sums(stack.transpose(1, 2))
    hsic = hsic_from_parts(parts.sum(0), parts, kernel.few(), counts=counts, each=True)
    return _assemble(store, hsic, diagonals, **linear)


class _TiledKernel:
    """Centred kernel matrices, tile by tile."""

    def __init__(self, store: RowStore, tile: int, norms: Tensor, factor: float | None) -> None:
        self.store, self.norms, self.factor = store, norms, factor
        starts = range(0, store.samples, tile)
        cuts = [slice(a, min(a + tile, store.samples)) for a in starts]
        self.places = [(rows, columns) for k, rows in enumerate(cuts) for columns in cuts[k:]]
        layers = range(len(store.layers))
        self.widths = [0.0 if factor is None else factor**2 * self._median(i) for i in layers]
        self.sums = None if factor is None else self._row_sums()

    def tile(self, position: int, rows: slice, columns: slice) -> Tensor:
        """A tile of the centred kernel matrix, float64."""
        if self.sums is None:
            return _gram(self.store, position, rows, columns).double()
        n, sums = self.store.samples, self.sums[:, position]
        return self._raw(position, rows, columns) - sums[rows, None] / n - sums[columns] / n + sums.sum() / n**2

    def diagonals(self) -> tuple[Tensor, dict[str, Any]]:
        """Of the centred kernel matrices, shape (n, L); and trace and squared norm of the linear ones, if others."""
        if self.sums is None:
            return self.norms, {}
        n, square = self.store.samples, np.zeros(len(self.store.layers))
        for rows, columns in self.places:
            for i in range(len(square)):
                gram = _gram(self.store, i, rows, columns)
                square[i] += (1 + (rows != columns)) * float(gram.square().sum(dtype=torch.float64))
        return 1 - 2 * self.sums / n + self.sums.sum(0) / n**2, {
            "spread": self.norms.sum(0).cpu().numpy(), "square": square,
        }  # fmt: skip

    def few(self) -> Tensor:
        """U-centred kernel matrices of at most 512 samples spread over all, shape (L, m, m)."""
        n = self.store.samples
        index = torch.arange(0, n, -(-n // _FEW))
        found = []
        for i, width in enumerate(self.widths):
            kind = torch.float64 if self.factor is not None else self.store.dtype(i)
            rows = torch.empty(len(index), self.store.widths[i], dtype=kind, device=self.store.device(i))
            for place, k in zip(rows, index.tolist(), strict=True):
                place.copy_(self.store.centred(i, k, k + 1)[0])
            gram = (rows @ rows.T).double()
            norms = gram.diagonal()
            found.append(u_centre_(gram if self.factor is None else rbf(_distances(gram, norms, norms), width)))
        return torch.stack(found)

    def _raw(self, position: int, rows: slice, columns: slice) -> Tensor:
        return rbf(self._squared(position, rows, columns), self.widths[position])

    def _squared(self, position: int, rows: slice, columns: slice) -> Tensor:
        gram = _gram(self.store, position, rows, columns, exact=True)
        squared = _distances(gram, self.norms[rows, position], self.norms[columns, position])
        return squared.fill_diagonal_(0.0) if rows == columns else squared

    def _row_sums(self) -> Tensor:
        sums = torch.zeros_like(self.norms)
        for rows, columns in self.places:
            for i in range(sums.shape[1]):
                kernel = self._raw(i, rows, columns)
                sums[rows, i] += kernel.sum(1)
                if rows != columns:
                    sums[columns, i] += kernel.sum(0)
        return sums

    def _median(self, position: int) -> float:
        """The lower median of all squared distances, exactly: bins are narrowed until few enough lie in one."""
        n = self.store.samples
        wanted, low, high = (n * (n - 1) // 2 - 1) // 2, 0.0, float("inf")
        high = 4 * float(self.norms[:, position].max()) * (1 + 1e-9) + 1e-300
        while True:
            edges = torch.linspace(low, high, _BINS + 1, dtype=torch.float64)
            counts, below = torch.zeros(_BINS, dtype=torch.int64), 0
            for found in self._pairs(position):
                below += int((found < low).sum())
                counts += torch.histc(found[(found >= low) & (found <= high)], _BINS, low, high).long().cpu()
            before = below + counts.cumsum(0)
            place = int((before <= wanted).sum())
            low, high = float(edges[place]), float(edges[place + 1])
            margin = (high - low) * 1e-6
            if counts[place] <= _FEW_VALUES or high - low <= 1e-12 * high:
                return self._select(position, low - margin, high + margin, wanted)

    def _select(self, position: int, low: float, high: float, wanted: int) -> float:
        below, inside = 0, []
        for found in self._pairs(position):
            below += int((found < low).sum())
            inside.append(found[(found >= low) & (found <= high)])
        return float(torch.cat(inside).sort().values[wanted - below])

    def _pairs(self, position: int) -> Iterator[Tensor]:
        for rows, columns in self.places:
            squared = self._squared(position, rows, columns)
            if rows == columns:
                upper = torch.triu_indices(len(squared), len(squared), 1, device=squared.device)
                yield squared[upper[0], upper[1]]
            else:
                yield squared.flatten()


def _gram(store: RowStore, position: int, rows: slice, columns: slice, *, exact: bool = False) -> Tensor:
    """A block of a layer's Gram matrix of centred rows, in the rows' type, or float64 if `exact`."""
    kind = torch.float64 if exact else store.dtype(position)
    device = store.device(position)
    left = store.centred_columns(position, rows.start, rows.stop)
    if rows == columns and device.type == "cpu":
        return _syrk(left, rows.stop - rows.start, kind)
    gram = torch.zeros(rows.stop - rows.start, columns.stop - columns.start, dtype=kind, device=device)
    right = left if rows == columns else store.centred_columns(position, columns.start, columns.stop)
    with full_precision(device):
        if rows == columns:
            for x in left:
                gram.addmm_(x.to(kind), x.to(kind).T)
        else:
            for x, y in zip(left, right, strict=True):
                gram.addmm_(x.to(kind), y.to(kind).T)
    return gram


def _syrk(pieces: Iterator[Tensor], size: int, kind: torch.dtype) -> Tensor:
    """Σ X Xᵀ over column pieces by BLAS's symmetric product: half the work of a general one."""
    product = ssyrk if kind == torch.float32 else dsyrk
    gram = np.zeros((size, size), dtype=str(kind).removeprefix("torch."), order="F")
    for x in pieces:
        gram = product(1.0, x.to(kind).numpy().T, beta=1.0, c=gram, trans=1, overwrite_c=1)
    upper = torch.from_numpy(gram.T)  # lower triangle in torch's order
    return upper + upper.tril(-1).T


def _distances(gram: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return (rows[:, None] + columns[None, :] - 2 * gram).clamp_min(0)


def _norms(store: RowStore) -> Tensor:
    """Squared norms of all centred rows, float64, shape (n, L)."""
    found = []
    for i in range(len(store.layers)):
        step = max(1, _BLOCK // max(store.widths[i], 1))
        pieces = (store.centred(i, start, start + step) for start in range(0, store.samples, step))
        found.append(torch.cat([x.double().square().sum(1) for x in pieces]).to(store.device(0)))
    return torch.stack(found, 1)


def _row_sums(stack: Tensor) -> Tensor:
    """Σ_t A_st B_st of all pairs of layers, shape (s, L, L), from tiles (L, s, t)."""
    blocks = stack.transpose(0, 1).split(max(1, _BLOCK // (len(stack) * stack.shape[2])))
    return torch.cat([block @ block.transpose(1, 2) for block in blocks])


def _wrong_pairings(
    stack: Tensor, diagonals: Tensor, permutations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Unbiased HSIC and ⟨HKH, HLH⟩ with the samples of one side in random order, shape (permutations, L, L) each."""
    n, flat = stack.shape[1], stack.flatten(1).double()
    unbiased = flat.new_empty(permutations, len(stack), len(stack))
    biased = torch.empty_like(unbiased)
    for draw, both in zip(unbiased, biased, strict=True):
        order = torch.randperm(n, generator=generator).to(stack.device)
        for j, gram in enumerate(stack):
            draw[:, j] = flat @ gram[order][:, order].flatten().double()
        draw /= n * (n - 3)
        both.copy_(_with_diagonals(n, draw, diagonals, diagonals[order]))
    return unbiased, biased


def _sample_groups(hsic: HSIC, dead: Flags) -> tuple[Array, Array]:
    """HSIC as the mean over up to 64 interleaved groups of samples whose variation is that of single samples.

    What a sample adds moves HSIC, a mean over pairs, twice: hence the factor.
    """
    whole = hsic.value.cpu().numpy()
    if hsic.each is None:
        return _without(whole, dead)[None], np.array([float(hsic.samples)])
    each = hsic.each.cpu().numpy()
    groups = min(GROUPS, len(each) // 4)
    if groups < 2:
        return _without(whole, dead)[None], np.array([float(len(each))])
    blocks = np.stack([2 * each[g::groups].mean(0) - whole for g in range(groups)])
    weights = np.array([len(each[g::groups]) for g in range(groups)], dtype=np.float64)
    blocks += whole - np.average(blocks, axis=0, weights=weights)
    return np.stack([_without(block, dead) for block in blocks]), weights


def _without(hsic: Array, dead: Flags) -> Array:
    return np.where(dead[:, None] | dead[None, :], 0.0, hsic)
