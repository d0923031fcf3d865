"""Centred kernel alignment of all pairs of layers, streamed over batches, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerlens.analysis.hsic import HSIC, hsic_from_features, hsic_from_grams
from layerlens.analysis.kernels import (
    BURDEN,
    CONSTANT,
    KERNELS,
    as_rows,
    centred_gram,
    column_gram,
    rbf_from_gram,
    u_centre,
    u_centre_,
)
from layerlens.analysis.resampling import cka_error, cka_of, fisher_intervals, sample_quantile
from layerlens.analysis.results import Array, Flags, PermutationNull, SampleInfluence, SimilarityMatrix
from layerlens.errors import BatchTooSmallError, ConfigError, NonFiniteError, ShapeError, check_known
from layerlens.precision import full_precision

ESTIMATORS = ("minibatch", "debiased", "biased")
GROUPS = 64  # of batches or samples that a result keeps for resampling
STRONGEST = 5  # samples that a result names per entry
_POSITION_ROWS = 2048  # rows of a product in feature space
_SMALL = 4096  # features of layers that are taken in together
_CHECK_COLUMNS = 4096
_CHECK_ROWS = 32  # samples of the first batch that are computed again in float64


class StreamingCKA:
    """Minibatch CKA of L layers from batches of activations; memory is L·n², whatever the width of the layers.

    Args:
        layers: Their names.
        kernel: `linear` or `rbf`.
        rbf_factor: RBF width in units of the batch's median distance.
        level: Confidence of the intervals.
        errors: Whether to take the sums that the intervals rest on.
        influence: Whether to keep what each sample adds: n·L² numbers per batch.
        permutations: How often to pair the samples wrongly in each batch, for the null.
        positions: Whether rows are positions of maps, many per sample; batches then go through feature covariances.
        check: Whether to compute 32 samples of the first batch again in float64.
        seed: Of the permutations.

    Attributes:
        counts: For position-wise rows, how many each sample of the current batch has, shape (n,); None if one each.

    >>> rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    >>> cka = StreamingCKA(["a", "b"])
    >>> cka.update([rows, 2 * rows])
    >>> round(cka.compute().between("a", "b"), 6)
    1.0
    """

    estimator = "minibatch"

    def __init__(
        self,
        layers: Sequence[str],
        *,
        kernel: str = "linear",
        rbf_factor: float = 1.0,
        level: float = 0.95,
        errors: bool = True,
        influence: bool = False,
        permutations: int = 0,
        positions: bool = False,
        check: bool = False,
        seed: int = 0,
    ) -> None:
        check_known("kernel", kernel, KERNELS)
        if not 0 < level < 1:
            raise ConfigError(f"level={level}; allowed: between 0 and 1")
        if not 0 < rbf_factor < float("inf"):
            raise ConfigError(f"rbf_factor={rbf_factor}; allowed: above 0")
        if permutations < 0:
            raise ConfigError(f"permutations={permutations}; allowed: 0 or more")
        if positions and (kernel != "linear" or influence or permutations):
            raise ConfigError(
                "nodes or positions as samples allow the linear kernel only, without influence or permutations"
            )
        self.layers, self.kernel, self.rbf_factor, self.level = tuple(layers), kernel, rbf_factor, level
        self.errors, self.keep_each, self.permutations = errors, influence, permutations
        self.positions, self.check, self.seed = positions, check, seed
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._blocks: list[Tensor] = []
        self._spectra: list[Tensor] = []
        self._sizes: list[int] = []
        self._each: list[Tensor] = []
        self._shuffled: Tensor | None = None
        self._covariance: Tensor | None = None
        self._stack: Tensor | None = None
        self._spectrum: Tensor | None = None
        self._checked: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows: dict[int, Tensor] = {}
        self._taken: set[int] = set()
        self._images = 0
        self.counts: Tensor | None = None
        self._generator = torch.Generator().manual_seed(self.seed)

    def update(self, activations: Sequence[Tensor]) -> None:
        """Take one batch, an activation (n, …) for each layer in order."""
        if len(activations) != len(self.layers):
            raise ShapeError(f"{len(activations)} activations for {len(self.layers)} layers")
        rows = {len(a) for a in activations}
        if len(rows) != 1:
            raise ShapeError(f"the layers have different sample counts in one batch: {sorted(rows)}")
        if self._take_together(activations):
            self.end_batch()
            return
        for position, activation in enumerate(activations):
            self.take(position, activation)
        self.end_batch()

    def _take_together(self, activations: Sequence[Tensor]) -> bool:
        """Small layers on a CPU, whose centring would cost as much as the product; whether they were such.

        U-centring takes the mean out afterwards, in float64: nearly as exact, as long as the mean is not much larger
        than the variation. Layers where it is are centred first.
        """
        small = all(a.ndim == 2 and a.shape[1] <= _SMALL and a.dtype == torch.float32 for a in activations)
        if not small or activations[0].device.type != "cpu" or self.kernel != "linear" or self.positions or self.check:
            return False
        n = self._make_room(activations[0])
        assert self._stack is not None
        assert self._spectrum is not None
        half, gram = n // 2, torch.empty(n, n)
        with full_precision(gram.device):
            for x, place in zip(activations, self._stack, strict=True):
                torch.mm(x.detach()[:half], x.detach().T, out=gram[:half])
                torch.mm(x.detach()[half:], x.detach()[half:].T, out=gram[half:, half:])
                gram[half:, :half] = gram[:half, half:].T
                place.copy_(gram)
        mean = self._stack.sum((1, 2)) / n
        spread = self._stack.diagonal(dim1=1, dim2=2).sum(1) - mean
        self._spectrum[:, 2] = mean
        self._taken.update(range(len(activations)))
        for position in (~(mean <= BURDEN * spread)).nonzero().flatten().tolist():
            self.take(position, activations[position])
        return True

    def _make_room(self, activation: Tensor) -> int:
        """See that there is a place for each layer's Gram matrix; the number of samples."""
        n = len(activation)
        if n < 4:
            raise BatchTooSmallError(
                f"batch {len(self._sizes)} has {n} samples; unbiased HSIC needs at least 4: "
                "use a larger batch, or drop_last=True in the loader"
            )
        if not self.positions and (self._stack is None or self._stack.shape[1] != n):
            count, device = len(self.layers), activation.device
            self._stack = torch.empty(count, n, n, dtype=torch.float64, device=device)
            self._spectrum = torch.empty(count, 4, dtype=torch.float64, device=device)
        return n

    def take(self, position: int, activation: Tensor) -> None:
        """Reduce one layer's activation (n, …) of the current batch to its Gram matrix.

        Position-wise rows are kept until the end of the batch instead: there, features are fewer than rows.
        """
        self._make_room(activation)
        self._taken.add(position)
        if self.check and not self._sizes:
            self._check_precision(position, activation)
        if self.positions:
            self._rows[position] = as_rows(activation).clone()
            return
        assert self._stack is not None
        assert self._spectrum is not None
        if self.kernel == "linear":
            gram, offset = column_gram(activation)
            self._stack[position] = gram  # a model may be split over devices
            self._spectrum[position, 2] = offset
        else:  # small distances are differences of large numbers: float64
            gram, scale = centred_gram(activation.double())
            kernel = rbf_from_gram(gram, self.rbf_factor)
            self._spectrum[position] = torch.stack([gram.trace(), gram.square().sum(), scale, kernel.square().sum()])
            self._stack[position] = kernel

    def end_batch(self) -> None:
        """All pairs of the batch in one product.

        Raises:
            ShapeError: Some layer was not handed over.
        """
        absent = [name for position, name in enumerate(self.layers) if position not in self._taken]
        if absent:
            raise ShapeError(f"no activation was handed over for {', '.join(absent[:3])} in batch {len(self._sizes)}")
        self._taken.clear()
        if self.positions:
            found, spectrum = self._end_of_positions()
        else:
            assert self._stack is not None
            assert self._spectrum is not None
            spectrum = self._spectrum.clone()
            if self.kernel == "linear":
                spectrum = _linear_spectrum(self._stack, spectrum[:, 2])
            found = hsic_from_grams(u_centre_(self._stack), errors=self.errors, each=self.keep_each)
            if self.permutations:
                self._shuffle(self._stack)
        self._blocks.append(found.value)
        self._spectra.append(spectrum)
        self._sizes.append(found.samples)
        self._images += found.samples if self.counts is None else len(self.counts)
        weighted = found.covariance * found.samples**2
        self._covariance = weighted if self._covariance is None else self._covariance + weighted
        if found.each is not None:
            self._each.append(found.each)
        if found.value.device.type == "cpu":
            self._refuse_non_finite(len(self._sizes) - 1)

    def merge(self, other: StreamingCKA) -> None:
        """Take over the batches that another process or shard has seen.

        Raises:
            ShapeError: Another kind, other layers or another kernel.
        """
        if type(other) is not type(self):
            raise ShapeError(f"only a {type(self).__name__} can be merged into a {type(self).__name__}")
        mine, theirs = (
            (s.layers, s.kernel, s.rbf_factor, s.positions, s.permutations, s.errors, s.keep_each)
            for s in (self, other)
        )
        if mine != theirs:
            raise ShapeError(f"can't merge CKA of {theirs} into CKA of {mine}")
        self.load_state(other.state())

    def state(self) -> dict[str, Any]:
        """What was seen so far, as tensors on the CPU; `load_state` of another accumulator adds it."""
        batches = {"blocks": self._blocks, "spectra": self._spectra, "each": self._each}
        summed = {"covariance": self._covariance, "shuffled": self._shuffled}
        return {
            **{name: [t.cpu() for t in found] for name, found in batches.items()},
            **{name: None if t is None else t.cpu() for name, t in summed.items()},
            "sizes": list(self._sizes), "images": self._images,
            "checked": {k: (a.cpu(), b.cpu()) for k, (a, b) in self._checked.items()},
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Add what another accumulator of the same layers has seen."""
        device = self._blocks[0].device if self._blocks else torch.device("cpu")
        self._blocks += [t.to(device) for t in state["blocks"]]
        self._spectra += [t.to(device) for t in state["spectra"]]
        self._each += [t.to(device) for t in state["each"]]
        self._sizes += state["sizes"]
        self._images += state["images"]
        self._checked = self._checked or state["checked"]
        for name in ("covariance", "shuffled"):
            mine, theirs = getattr(self, f"_{name}"), state[name]
            if theirs is not None:
                setattr(self, f"_{name}", theirs.to(device) if mine is None else mine + theirs.to(device))

    def compute(self) -> SimilarityMatrix:
        """The similarity matrix of all batches so far.

        Raises:
            ShapeError: No batch yet.
            NonFiniteError: NaN or infinity in some layer and batch.
        """
        if not self._sizes:
            raise ShapeError("no batch was seen yet")
        blocks, spectra = (torch.stack(found).cpu().numpy() for found in (self._blocks, self._spectra))
        for batch in range(len(self._sizes)):
            self._refuse_non_finite(batch, blocks, spectra)
        weights = np.array(self._sizes, dtype=np.float64)
        dead, participation = self._directions(blocks, spectra, weights)
        blocks[:, dead, :] = 0.0
        blocks[:, :, dead] = 0.0
        hsic = np.average(blocks, axis=0, weights=weights)
        values = cka_of(hsic)
        np.fill_diagonal(values, np.where(dead, np.nan, 1.0))
        assert self._covariance is not None
        error = cka_error(values, hsic, self._covariance.cpu().numpy() / weights.sum() ** 2)
        grouped = _group(blocks, weights)
        return self._result(
            values, error, *grouped, participation, int(weights.sum()), self._null(values, dead, weights)
        )

    def influence(self) -> SampleInfluence:
        """How much leaving out each sample moves each entry, in closed form and exactly.

        Raises:
            ShapeError: The accumulator was made without `influence=True`, or saw no batch.
        """
        if not self._each:
            raise ShapeError("no influence was kept; make the accumulator with influence=True and give it batches")
        total, changes = sum(self._sizes), []
        weights = np.array(self._sizes, dtype=np.float64)
        blocks, spectra = (torch.stack(found).cpu().numpy() for found in (self._blocks, self._spectra))
        dead, _ = self._directions(blocks, spectra, weights)
        alive = ~(dead[:, None] | dead)
        hsic = (blocks * weights[:, None, None]).sum(0)
        whole = cka_of(hsic / total * alive)
        for each, block, n in zip(self._each, blocks, self._sizes, strict=True):
            less = hsic - block * n + without_each(each, n).cpu().numpy() * (n - 1)
            changes.append(cka_of(less / (total - 1) * alive) - whole)
        return influence_of(self.layers, np.concatenate(changes))

    def _result(
        self, values: Array, error: Array, blocks: Array, weights: Array, participation: Array, samples: int,
        null: PermutationNull | None,
    ) -> SimilarityMatrix:  # fmt: skip
        low, high = np.full(values.shape, np.nan), np.full(values.shape, np.nan)
        if self.errors:
            low, high = fisher_intervals(values, error, sample_quantile(self.level, self._images))
        alive = np.flatnonzero(~np.isnan(values.diagonal()))
        low[alive, alive] = high[alive, alive] = 1.0
        options: dict[str, Any] = {"kernel": self.kernel, "estimator": self.estimator}
        if self.kernel == "rbf":
            options["rbf_factor"] = self.rbf_factor
        return SimilarityMatrix(
            layers=self.layers, values=values, low=low, high=high, level=self.level, options=options,
            samples=samples, participation=participation, blocks=blocks, weights=weights, null=null,
            precision_error=self._precision_error(),
        )  # fmt: skip

    def _end_of_positions(self) -> tuple[HSIC, Tensor]:
        """By the smaller of the two kinds of matrices: all rows against each other, or all features."""
        n, features = len(self._rows[0]), sum(x.shape[1] for x in self._rows.values())
        return self._by_grams() if len(self._rows) * n**2 <= features**2 else self._by_features()

    def _by_grams(self) -> tuple[HSIC, Tensor]:
        stack, offsets = [], []
        for _, x in sorted(self._rows.items()):
            gram, offset = column_gram(x)
            stack.append(gram.double())
            offsets.append(offset)
        self._rows = {}
        grams = torch.stack(stack)
        spectrum = _linear_spectrum(grams, torch.stack(offsets))
        return hsic_from_grams(u_centre_(grams), counts=self.counts, errors=self.errors, each=self.keep_each), spectrum

    def _by_features(self) -> tuple[HSIC, Tensor]:
        rows, spectrum = [], []
        for _, x in sorted(self._rows.items()):
            mean = x.mean(0)
            x -= mean
            gram = (x.T @ x).double()
            spread = gram.trace()
            size = gram.square().sum()
            spectrum.append(torch.stack([spread, size, spread + len(x) * mean.double().square().sum(), size]))
            rows.append(x)
        self._rows = {}
        pieces = lambda: zip(*(x.split(_POSITION_ROWS) for x in rows), strict=True)  # noqa: E731
        found = hsic_from_features(
            pieces, [x.shape[1] for x in rows], counts=self.counts, errors=self.errors, each=self.keep_each
        )
        return found, torch.stack(spectrum)

    def _directions(self, blocks: Array, spectra: Array, weights: Array) -> tuple[Flags, Array]:
        """Which layers are constant, and how many directions carry the variance of each."""
        spread, square, scale, size = (spectra[..., k] for k in range(4))
        dead = spread.sum(0) <= CONSTANT**2 * scale.sum(0)
        if self.estimator != "biased":  # samples all equally far apart: nothing is left after U-centring
            n = weights[:, None]
            dead |= (blocks.diagonal(axis1=1, axis2=2) * n * (n - 3)).sum(0) <= CONSTANT**2 * size.sum(0)
        ratio = np.divide(spread**2, square, out=np.full(spread.shape, np.nan), where=(square > 0) & ~dead)
        return dead, np.average(ratio, axis=0, weights=weights)

    def _refuse_non_finite(self, batch: int, blocks: Any = None, spectra: Any = None) -> None:
        spectrum = np.asarray(self._spectra[batch] if spectra is None else spectra[batch])
        block = np.asarray(self._blocks[batch] if blocks is None else blocks[batch])
        bad = ~np.isfinite(spectrum[:, 0]) | ~np.isfinite(block.diagonal())
        if bad.any():
            names = [self.layers[i] for i in np.flatnonzero(bad)]
            more = f" (and in {len(names) - 1} layers behind it)" if len(names) > 1 else ""
            raise NonFiniteError(
                f"NaN or infinity in the activations of layer {names[0]!r}{more} in batch {batch}, or numbers above "
                "1e19; check the input and the weights"
            )

    def _shuffle(self, stack: Tensor) -> None:
        """Add the batch's HSIC with the samples of one side permuted, for each permutation."""
        n, flat = stack.shape[1], stack.flatten(1)
        sums = stack.new_empty(self.permutations, len(stack), len(stack))
        for draw in sums:
            order = torch.randperm(n, generator=self._generator).to(stack.device)
            for j, gram in enumerate(stack):
                draw[:, j] = flat @ gram[order][:, order].flatten()
        sums /= n - 3
        self._shuffled = sums if self._shuffled is None else self._shuffled + sums

    def _null(self, values: Array, dead: Flags, weights: Array) -> PermutationNull | None:
        if self._shuffled is None:
            return None
        own = np.diagonal(np.average(torch.stack(self._blocks).cpu().numpy(), axis=0, weights=weights))
        scale = np.sqrt(np.where((own > 0) & ~dead, own, np.nan))
        return null_of(values, self._shuffled.cpu().numpy() / weights.sum() / (scale[:, None] * scale), self.level)

    def _check_precision(self, position: int, activation: Tensor) -> None:
        """U-centred Gram matrices of a few samples, as they are computed here and in float64 throughout."""
        few = as_rows(activation[:_CHECK_ROWS])
        gram = few.new_zeros(len(few), len(few), dtype=torch.float64)
        for columns in few.split(_CHECK_COLUMNS, dim=1):
            centred = columns.double()
            centred = centred - centred.mean(0)
            gram.addmm_(centred, centred.T)
        used = column_gram(few)[0].double()
        if self.kernel == "rbf":
            used, gram = (rbf_from_gram(k, self.rbf_factor) for k in (centred_gram(few.double())[0], gram))
        self._checked[position] = (u_centre(used), u_centre(gram))

    def _precision_error(self) -> float:
        """Largest difference in a CKA entry between the two ways; NaN if it was not checked."""
        if len(self._checked) != len(self.layers):
            return float("nan")
        ways = []
        for way in (0, 1):
            flat = torch.stack([pair[way].cpu().flatten() for _, pair in sorted(self._checked.items())])
            ways.append(cka_of((flat @ flat.T).numpy()))
        apart = np.abs(ways[0] - ways[1])
        return float(np.nanmax(apart)) if np.isfinite(apart).any() else float("nan")


def null_of(values: Array, wrong: Array, level: float, *, higher_is_alike: bool = True) -> PermutationNull:
    """Summary of what wrong pairings score.

    Args:
        values: The scores, shape (R, C).
        wrong: Scores of wrong pairings, shape (P, R, C).
        level: Of the bound.
        higher_is_alike: The measure's direction.
    """
    if values.shape[0] == values.shape[1]:  # the two orders of a pair are one entry
        wrong = np.where(np.tri(len(values), dtype=bool).T, wrong, np.swapaxes(wrong, 1, 2))
    sign = 1.0 if higher_is_alike else -1.0
    reached = (sign * wrong >= sign * values).sum(0)
    bound = sign * np.quantile(sign * wrong, level, axis=0, method="higher")
    p_value = np.where(np.isnan(values), np.nan, (1 + reached) / (1 + len(wrong)))
    return PermutationNull(permutations=len(wrong), mean=wrong.mean(0), bound=bound, p_value=p_value, level=level)


def influence_of(layers: Sequence[str], changes: Array) -> SampleInfluence:
    """Summary of the changes, shape (n, L, L), that leaving out each sample makes."""
    size = np.abs(np.nan_to_num(changes))
    largest = size.max((1, 2))
    middle = np.median(largest)
    spread = 1.4826 * np.median(np.abs(largest - middle))
    order = np.argsort(-size, axis=0, kind="stable")[:STRONGEST]
    return SampleInfluence(
        layers=tuple(layers), samples=len(changes), largest=largest,
        z_score=(largest - middle) / max(spread, np.finfo(float).tiny), index=order.transpose(1, 2, 0).astype(np.int64),
        change=np.take_along_axis(np.nan_to_num(changes), order, 0).transpose(1, 2, 0),
    )  # fmt: skip


def _linear_spectrum(stack: Tensor, offset: Tensor) -> Tensor:
    """Per layer the trace and squared norm of the centred Gram matrix, the squared norm before centring, and again.

    Args:
        stack: Gram matrices of centred features, shape (L, n, n); what rounding left of the means goes here.
        offset: n·‖mean‖² of each layer.
    """
    n, rows = stack.shape[1], stack.sum(-1)
    whole = rows.sum(-1)
    spread = stack.diagonal(dim1=1, dim2=2).sum(-1) - whole / n
    square = torch.linalg.vector_norm(stack.flatten(1), dim=1).square()
    square = square - 2 / n * rows.square().sum(-1) + (whole / n) ** 2
    return torch.stack([spread, square, spread + offset, square], dim=1)


def without_each(each: Tensor, n: int) -> Tensor:
    """Unbiased HSIC of a batch without each of its samples, shape (n, L, L), from what each sample adds."""
    if n < 5:
        raise BatchTooSmallError(f"a batch has {n} samples; the influence of a sample needs at least 5")
    m, total = n - 1, each.sum(0)
    return (total - each * (2 + 2 / (m - 2))) * ((n - 3) / (m * (m - 3)))


def _group(blocks: Array, weights: Array) -> tuple[Array, Array]:
    """Average neighbouring batches into at most 64 groups, so that a result stays small."""
    if len(weights) <= GROUPS:
        return blocks, weights
    parts = np.array_split(np.arange(len(weights)), GROUPS)
    means = [np.average(blocks[part], axis=0, weights=weights[part]) for part in parts]
    return np.stack(means), np.array([weights[part].sum() for part in parts])
