"""Centred kernel alignment of all pairs of layers: streaming and whole-set, with confidence intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from layerlens.activations import sweep
from layerlens.analysis.resampling import cka_of, entry_intervals
from layerlens.analysis.results import Array, SimilarityMatrix
from layerlens.errors import (
    BatchTooSmallError,
    ConfigError,
    DegenerateError,
    NonFiniteError,
    ShapeError,
    check_known,
)
from layerlens.layers import Batch, Forward, Layer
from layerlens.precision import full_precision

ESTIMATORS = ("minibatch", "debiased", "biased")
KERNELS = ("linear", "rbf")
_GROUPS = 64
_CHUNK = 4096  # columns whose centred copy stays in a CPU's cache
CONSTANT = 32 * torch.finfo(torch.float32).eps  # variation below this share of the size is rounding


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
    """CKA between all chosen layers of a model, in one pass over the data; the model is left as it was.

    Args:
        model: Any module, on any device; it runs in eval mode.
        loader: Batches of at least 4 samples: tensors, tuples whose first entry is the input, or mappings of
            arguments. Read once.
        layers: `auto`, `blocks`, `all`, or names and globs, see `layers.select`.
        kernel: `linear`, or `rbf` with width `rbf_factor` × median distance.
        estimator: `minibatch`: HSIC₁ averaged over batches (by their sizes), then one ratio; memory does not grow
            with the data. `debiased`, `biased`: over all samples at once; keeps every activation.
        level: Confidence of the intervals; they come from the variation between batches.
        forward: How to run one batch, if not as `layers.run_batch` does.

    Raises:
        UnknownLayerError: A name that matches no layer.
        BatchTooSmallError: A batch of fewer than 4 samples.
        NonFiniteError: NaN or infinity; the message names layer and batch.
        ShapeError: A layer whose first dimension is not the samples.

    Source:
        Kornblith et al. 2019, arXiv:1905.00414; Nguyen et al. 2021, arXiv:2010.15327
    """
    check_known("estimator", estimator, ESTIMATORS)
    state: list[StreamingCKA] = []

    def begin(chosen: list[Layer]) -> StreamingCKA:
        names = [layer.name for layer in chosen]
        if estimator == "minibatch":
            state.append(StreamingCKA(names, kernel=kernel, rbf_factor=rbf_factor, level=level))
        else:
            whole = WholeSetCKA(names, kernel=kernel, rbf_factor=rbf_factor, level=level, estimator=estimator)
            state.append(whole)
        return state[0]

    sweep(model, loader, layers, begin, forward=forward)
    return state[0].compute()


class StreamingCKA:
    """Minibatch CKA of L layers from batches of activations; memory is L·n², whatever the width of the layers.

    Args:
        layers: Their names.
        kernel: `linear` or `rbf`.
        rbf_factor: RBF width in units of the batch's median distance.
        level: Confidence of the intervals.

    >>> rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    >>> cka = StreamingCKA(["a", "b"])
    >>> cka.update([rows, 2 * rows])
    >>> round(cka.compute().between("a", "b"), 6)
    1.0
    """

    estimator = "minibatch"

    def __init__(
        self, layers: Sequence[str], *, kernel: str = "linear", rbf_factor: float = 1.0, level: float = 0.95
    ) -> None:
        check_known("kernel", kernel, KERNELS)
        if not 0 < level < 1:
            raise ConfigError(f"level={level}; allowed: between 0 and 1")
        if not 0 < rbf_factor < float("inf"):
            raise ConfigError(f"rbf_factor={rbf_factor}; allowed: above 0")
        self.layers, self.kernel, self.rbf_factor, self.level = tuple(layers), kernel, rbf_factor, level
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._blocks: list[Tensor] = []
        self._spectra: list[Tensor] = []
        self._sizes: list[int] = []
        self._stack: Tensor | None = None
        self._spectrum: Tensor | None = None

    def update(self, activations: Sequence[Tensor]) -> None:
        """Take one batch, an activation (n, …) for each layer in order."""
        if len(activations) != len(self.layers):
            raise ShapeError(f"{len(activations)} activations for {len(self.layers)} layers")
        rows = {len(a) for a in activations}
        if len(rows) != 1:
            raise ShapeError(f"the layers have different sample counts in one batch: {sorted(rows)}")
        for position, activation in enumerate(activations):
            self.take(position, activation)
        self.end_batch()

    def take(self, position: int, activation: Tensor) -> None:
        """Reduce one layer's activation (n, …) of the current batch to its U-centred Gram matrix."""
        n = len(activation)
        if n < 4:
            raise BatchTooSmallError(
                f"batch {len(self._sizes)} has {n} samples; unbiased HSIC needs at least 4: "
                "use a larger batch, or drop_last=True in the loader"
            )
        if self._stack is None or self._stack.shape[1] != n * n:
            count, device = len(self.layers), activation.device
            self._stack = torch.empty(count, n * n, dtype=torch.float64, device=device)
            self._spectrum = torch.empty(count, 4, dtype=torch.float64, device=device)
        assert self._spectrum is not None
        gram, scale, kernel = self._grams(activation)
        numbers = torch.stack([gram.trace(), gram.square().sum(), scale, kernel.square().sum()])
        self._spectrum[position] = numbers.to(self._stack.device)  # a model may be split over devices
        self._stack[position] = u_centre(kernel).flatten()

    def _grams(self, activation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The linear Gram matrix, the squared norm before centring, and the kernel's Gram matrix."""
        if self.kernel == "linear":
            gram, scale = centred_gram(activation)
            return gram, scale, gram
        gram, scale = centred_gram(activation.double())  # small distances are differences of large numbers
        return gram, scale, rbf_from_gram(gram, self.rbf_factor)

    def end_batch(self) -> None:
        """All pairs of the batch in one product."""
        if self._stack is None or self._spectrum is None:
            raise ShapeError("no activation was handed over in this batch")
        n = round(self._stack.shape[1] ** 0.5)
        self._blocks.append(_all_pairs(self._stack) / (n * (n - 3)))
        self._spectra.append(self._spectrum.clone())
        self._sizes.append(n)
        if self._stack.device.type == "cpu":
            self._refuse_non_finite(len(self._sizes) - 1)

    def merge(self, other: StreamingCKA) -> None:
        """Take over the batches that another process or shard has seen.

        Raises:
            ShapeError: Other layers or another kernel.
        """
        mine, theirs = ((s.layers, s.kernel, s.rbf_factor) for s in (self, other))
        if mine != theirs:
            raise ShapeError(f"can't merge CKA of {theirs} into CKA of {mine}")
        self._blocks += other._blocks
        self._spectra += other._spectra
        self._sizes += other._sizes

    def compute(self) -> SimilarityMatrix:
        """The similarity matrix of all batches so far.

        Raises:
            ShapeError: No batch yet.
            NonFiniteError: NaN or infinity in some layer and batch.
        """
        if not self._sizes:
            raise ShapeError("no batch was seen yet")
        for batch in range(len(self._sizes)):
            self._refuse_non_finite(batch)
        weights = np.array(self._sizes, dtype=np.float64)
        blocks = torch.stack([b.cpu() for b in self._blocks]).numpy()
        spectra = torch.stack([s.cpu() for s in self._spectra]).numpy()
        spread, square, scale, size = np.moveaxis(spectra, -1, 0)
        dead = spread.sum(0) <= CONSTANT**2 * scale.sum(0)
        if self.estimator != "biased":  # samples all equally far apart: nothing is left after U-centring
            n = weights[:, None]
            dead |= (blocks.diagonal(axis1=1, axis2=2) * n * (n - 3)).sum(0) <= CONSTANT**2 * size.sum(0)
        blocks[:, dead, :] = 0.0
        blocks[:, :, dead] = 0.0
        ratio = np.divide(spread**2, square, out=np.full(spread.shape, np.nan), where=(square > 0) & ~dead)
        blocks, grouped = _group(blocks, weights)
        values = self._values(cka_of(np.average(blocks, axis=0, weights=grouped)), dead)
        low, high = entry_intervals(values, blocks, grouped, self.level)
        return SimilarityMatrix(
            layers=self.layers, values=values, low=low, high=high, level=self.level, kernel=self.kernel,
            estimator=self.estimator, samples=int(weights.sum()),
            participation=np.average(ratio, axis=0, weights=weights), blocks=blocks, weights=grouped,
        )  # fmt: skip

    def _values(self, minibatch: Array, dead: np.ndarray) -> Array:
        np.fill_diagonal(minibatch, np.where(dead, np.nan, 1.0))
        return minibatch

    def _refuse_non_finite(self, batch: int) -> None:
        bad = ~self._spectra[batch][:, 0].isfinite() | ~self._blocks[batch].diagonal().isfinite()
        if bool(bad.any()):
            names = [self.layers[i] for i in bad.nonzero().flatten().tolist()]
            more = f" (and in {len(names) - 1} layers behind it)" if len(names) > 1 else ""
            raise NonFiniteError(
                f"NaN or infinity in the activations of layer {names[0]!r}{more} in batch {batch}, or numbers above "
                "1e19; check the input and the weights"
            )


class WholeSetCKA(StreamingCKA):
    """CKA over all samples at once, debiased (unbiased HSIC) or biased; keeps every activation on the CPU.

    The batches also go through the streaming estimator: the variation between them gives the intervals, which are
    conservative here, since a batch's estimate varies more than its share of the whole.

    Args:
        layers, kernel, rbf_factor, level: As for `StreamingCKA`.
        estimator: `debiased` or `biased`.
    """

    def __init__(
        self,
        layers: Sequence[str],
        *,
        kernel: str = "linear",
        rbf_factor: float = 1.0,
        level: float = 0.95,
        estimator: str = "debiased",
    ) -> None:
        check_known("estimator", estimator, ESTIMATORS[1:])
        super().__init__(layers, kernel=kernel, rbf_factor=rbf_factor, level=level)
        self.estimator = estimator

    def reset(self) -> None:
        """Forget all batches."""
        super().reset()
        self._rows: list[list[Tensor]] = [[] for _ in self.layers]

    def take(self, position: int, activation: Tensor) -> None:
        """As for streaming, and keep a copy."""
        super().take(position, activation)
        kept = activation.detach().reshape(len(activation), -1)
        self._rows[position].append(kept.to("cpu", torch.promote_types(kept.dtype, torch.float32), copy=True))

    def merge(self, other: StreamingCKA) -> None:
        """Take over the batches of another whole-set accumulator."""
        if not isinstance(other, WholeSetCKA):
            raise ShapeError("only a WholeSetCKA can be merged into a WholeSetCKA")
        super().merge(other)
        for mine, theirs in zip(self._rows, other._rows, strict=True):
            mine += theirs

    def _values(self, minibatch: Array, dead: np.ndarray) -> Array:
        n = sum(self._sizes)
        stack = torch.empty(len(self.layers), n * n, dtype=torch.float64)
        for position, rows in enumerate(self._rows):
            gram = self._grams(torch.cat(rows))[2]
            stack[position] = (h_centre(gram) if self.estimator == "biased" else u_centre(gram)).flatten()
        values = cka_of(np.where(dead[:, None] | dead[None, :], 0.0, _all_pairs(stack).numpy()))
        return super()._values(values, dead)


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


def centred_gram(activation: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix of the features, each centred over the samples before the product.

    Centring works on columns that fit in the cache, and the product leaves out a quarter that symmetry gives.

    Args:
        activation: Shape (n, …), any floating type; anything below float32 is computed in float32.

    Returns:
        X Xᵀ of the centred features, float64, shape (n, n), and the squared norm before centring.
    """
    x = activation.detach()
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    x = x.flatten(1) if x.ndim > 1 else x.unsqueeze(1)
    with full_precision(x.device):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        half = len(x) // 2
        top, corner = x.new_zeros(half, len(x)), x.new_zeros(len(x) - half, len(x) - half)
        offset = x.new_zeros((), dtype=torch.float64)
        for columns in x.split(_CHUNK if x.device.type == "cpu" else x.shape[1], dim=1):
            mean = columns.mean(0)
            centred = columns - mean
            top.addmm_(centred[:half], centred.T)
            corner.addmm_(centred[half:], centred[half:].T)
            offset += mean.double().square().sum()
        lower = torch.cat([top[:, half:].T, corner], dim=1)
        gram = h_centre(torch.cat([top, lower]).double())
        return gram, gram.trace() + len(x) * offset


def u_centre(gram: Tensor) -> Tensor:
    """U-centring (Székely & Rizzo): zero diagonal, rows and columns that sum to zero; shape (n, n), n >= 4."""
    n = len(gram)
    k = gram - torch.diag(gram.diagonal())
    rows = k.sum(0) / (n - 2)
    k = k - rows[:, None] - rows[None, :] + rows.sum() / (n - 1)
    return k.fill_diagonal_(0.0)


def h_centre(gram: Tensor) -> Tensor:
    """HKH: rows and columns that sum to zero, diagonal included; shape (n, n)."""
    rows = gram.mean(0)
    return gram - rows[:, None] - rows[None, :] + rows.mean()


def rbf_from_gram(gram: Tensor, factor: float = 1.0) -> Tensor:
    """RBF kernel exp(-d² / 2σ²), σ = factor × median distance of distinct samples; shape (n, n)."""
    norms = gram.diagonal()
    squared = (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0).fill_diagonal_(0.0)
    upper = torch.triu_indices(len(gram), len(gram), 1)
    pairs = squared[upper[0], upper[1]]
    width = factor**2 * pairs.sqrt().median().square()
    return torch.exp(-squared / (2 * width.clamp_min(torch.finfo(torch.float64).tiny)))


def _all_pairs(stack: Tensor) -> Tensor:
    """Inner products of all pairs of rows, float64, shape (L, L)."""
    return stack @ stack.T


def _group(blocks: Array, weights: Array) -> tuple[Array, Array]:
    """Average neighbouring batches into at most 64 groups, so that a result stays small."""
    if len(weights) <= _GROUPS:
        return blocks, weights
    parts = np.array_split(np.arange(len(weights)), _GROUPS)
    means = [np.average(blocks[part], axis=0, weights=weights[part]) for part in parts]
    return np.stack(means), np.array([weights[part].sum() for part in parts])
