"""Similarity of the directions that two layers span: CCA, SVCCA, PWCCA and orthogonal Procrustes.

A layer of n samples enters as at most n - 1 orthonormal directions in sample space, never as a matrix of features by
features. Any layer of n - 1 independent directions (as a rule one of p >= n - 1 features) contains every other one,
so that the three CCA measures are 1 for it whatever it is compared with: they need many more samples than
directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layerlens.analysis.column_chunks import (
    centred_columns,
    checked,
    flat_pair,
    float64_columns,
    gram,
    squared_norms,
    unrounded,
)
from layerlens.errors import ConfigError

_NOISE = 4.0  # a layer computed in float32 carries up to about twice the rounding of its last digit
_NEAR = 1e-4  # arccos loses half of the digits close to 1


@dataclass(frozen=True, kw_only=True)
class MeanCCA:
    """Mean canonical correlation, see `mean_cca`."""

    def prepare(self, rows: Tensor) -> Tensor:
        """Orthonormal directions of the centred layer, float64, shape (n, r)."""
        return _significant(checked(rows))[0]

    def compare(self, a: Tensor, b: Tensor) -> float:
        """Mean over the min(r_a, r_b) canonical correlations."""
        return float(unrounded(torch.linalg.svdvals(a.T @ b), 0.0, 1.0).mean())

    def permute(self, prepared: Tensor, order: Tensor) -> Tensor:
        """The layer with its samples in another order, order[i] being the sample at place i."""
        return prepared[order.to(prepared.device)]

    def rank(self, prepared: Tensor) -> int:
        """Directions that are compared."""
        return prepared.shape[1]


@dataclass(frozen=True, kw_only=True)
class SVCCA:
    """Mean canonical correlation of the leading singular directions, see `svcca`.

    Attributes:
        variance: Share of the variance that the kept directions explain, in (0, 1].
    """

    variance: float = 0.99

    def __post_init__(self) -> None:
        if not 0 < self.variance <= 1:
            raise ConfigError(f"variance={self.variance}; allowed: above 0, at most 1")

    def prepare(self, rows: Tensor) -> Tensor:
        """The fewest leading directions that explain the variance, float64, shape (n, k)."""
        directions, singular = _significant(checked(rows))
        explained = singular.square().cumsum(0)
        kept = 1 + int((explained[:-1] < self.variance * explained[-1]).sum())
        return directions[:, :kept].clone()

    def compare(self, a: Tensor, b: Tensor) -> float:
        """Mean over the min(k_a, k_b) canonical correlations."""
        return MeanCCA().compare(a, b)

    permute, rank = MeanCCA.permute, MeanCCA.rank


@dataclass(frozen=True, kw_only=True)
class _Neurons:
    """What PWCCA keeps of a layer: its directions (n, r), and its neurons in their coordinates (r, p)."""

    directions: Tensor
    coordinates: Tensor

    def weights(self, variates: Tensor) -> Tensor:
        """Σ_j |⟨h_i, x_j⟩| of the canonical variates h, given in the directions' coordinates (r, k)."""
        weights = variates.new_zeros(variates.shape[1])
        for columns in float64_columns(self.coordinates):
            weights += (variates.T @ columns).abs().sum(1)
        return weights


@dataclass(frozen=True, kw_only=True)
class PWCCA:
    """Projection-weighted canonical correlation, see `pwcca`."""

    def prepare(self, rows: Tensor) -> _Neurons:
        """Directions and neurons; the neurons keep the type of the rows, at least float32."""
        rows = checked(rows)
        directions = _significant(rows)[0]
        kept = torch.promote_types(rows.dtype, torch.float32)
        coordinates = torch.cat([(directions.T @ columns).to(kept) for columns in centred_columns(rows)], dim=1)
        return _Neurons(directions=directions, coordinates=coordinates)

    def compare(self, a: _Neurons, b: _Neurons) -> float:
        """Weighted by the side with fewer directions; the mean of both weightings if they have equally many."""
        left, correlations, right = torch.linalg.svd(a.directions.T @ b.directions, full_matrices=False)
        correlations, scores = unrounded(correlations, 0.0, 1.0), []
        if len(left) <= right.shape[1]:
            scores.append(_weighted_mean(correlations, a.weights(left)))
        if len(left) >= right.shape[1]:
            scores.append(_weighted_mean(correlations, b.weights(right.T)))
        return sum(scores) / len(scores)

    def permute(self, prepared: _Neurons, order: Tensor) -> _Neurons:
        """The layer with its samples in another order, order[i] being the sample at place i."""
        return replace(prepared, directions=prepared.directions[order.to(prepared.directions.device)])

    def rank(self, prepared: _Neurons) -> int:
        """Directions that are compared."""
        return prepared.directions.shape[1]


@dataclass(frozen=True, kw_only=True)
class Procrustes:
    """Orthogonal Procrustes distance, see `procrustes`.

    Attributes:
        squared: The squared Euclidean distance after the best rotation in place of the angle.
    """

    squared: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.squared, bool):
            raise ConfigError(f"squared={self.squared!r}; allowed: True, False")

    def prepare(self, rows: Tensor) -> Tensor:
        """Coordinates of the centred layer on its principal axes, norm 1, float64, shape (n, r)."""
        directions, singular = _directions(checked(rows))
        return directions * (singular / singular.norm())

    def compare(self, a: Tensor, b: Tensor) -> float:
        """The angle, or the squared distance."""
        product = a.T @ b
        cosine = float(torch.linalg.svdvals(product).sum())
        if cosine > 1 - _NEAR:
            apart = _residual(a, b, product)
            return apart if self.squared else 2 * math.asin(math.sqrt(apart) / 2)
        return 2 - 2 * cosine if self.squared else math.acos(cosine)

    def permute(self, prepared: Tensor, order: Tensor) -> Tensor:
        """The layer with its samples in another order, order[i] being the sample at place i."""
        return prepared[order.to(prepared.device)]


def mean_cca(x: Tensor, y: Tensor) -> float:
    """Mean of the canonical correlations between two layers.

    Args:
        x: Activations, shape (n, …); row i is sample i.
        y: Activations, shape (n, …), same row order.

    Returns:
        Similarity in [0, 1]; higher is more alike. 1 for any layer of n - 1 independent directions. Any invertible
        linear map of the features, and any translation, leaves it as it is.

    Raises:
        ShapeError: Row counts differ; BatchTooSmallError below 4 rows.
        DegenerateError: A layer is constant.
        NonFiniteError: NaN or infinity.

    Source:
        Hotelling 1936; the mean as in Raghu et al. 2017, arXiv:1706.05806. Directions count down to the rounding of
        float64 (eigenvalues of n·ε of the largest) and of the type that the layer was computed in.

    >>> x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    >>> round(mean_cca(x, x @ torch.tensor([[1.0, 2, 0], [0, 1, 0], [0, 0, 5]])), 6)
    1.0
    """
    x, y = flat_pair(x, y)
    measure = MeanCCA()
    return measure.compare(measure.prepare(x), measure.prepare(y))


def svcca(x: Tensor, y: Tensor, *, variance: float = 0.99) -> float:
    """Mean canonical correlation of the leading singular directions of two layers.

    Args:
        x, y: As for `mean_cca`.
        variance: Share of each layer's variance (sum of squared singular values) that its kept directions explain.

    Returns:
        Similarity in [0, 1]; higher is more alike. Unchanged by rotation, isotropic scaling and translation; not by
        other linear maps, which change the directions that are kept.

    Raises:
        ConfigError: A share outside (0, 1].
        ShapeError, DegenerateError, NonFiniteError: As for `mean_cca`.

    Source:
        Raghu et al. 2017, arXiv:1706.05806

    >>> x = torch.tensor([[1.0, 0], [-1, 0], [0, 0.01], [0, -0.01]])
    >>> round(svcca(x, x[:, :1]), 6)
    1.0
    """
    x, y = flat_pair(x, y)
    measure = SVCCA(variance=variance)
    return measure.compare(measure.prepare(x), measure.prepare(y))


def pwcca(x: Tensor, y: Tensor) -> float:
    """Canonical correlations weighted by how much of a layer's neurons each canonical variate accounts for.

    The weights α_i = Σ_j |⟨h_i, x_j⟩| come from the side with fewer directions; if both have equally many, the result
    is the mean of both weightings, so that it is symmetric. Where canonical correlations coincide, their variates
    are not unique, nor is then the weight of that group, unless all of them coincide.

    Args:
        x, y: As for `mean_cca`.

    Returns:
        Similarity in [0, 1]; higher is more alike. Unchanged by isotropic scaling, translation and the order of
        the neurons; not by rotation, since the weights are sums over single neurons.

    Raises:
        ShapeError, DegenerateError, NonFiniteError: As for `mean_cca`.

    Source:
        Morcos et al. 2018, arXiv:1806.05759

    >>> x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    >>> round(pwcca(x, 2 * x + 1), 6)
    1.0
    """
    x, y = flat_pair(x, y)
    measure = PWCCA()
    return measure.compare(measure.prepare(x), measure.prepare(y))


def procrustes(x: Tensor, y: Tensor, *, squared: bool = False) -> float:
    """Distance of two layers after the best rotation, each centred and scaled to norm 1.

    Args:
        x, y: As for `mean_cca`; different widths are allowed, the narrower is padded with zeros.
        squared: Return 2 - 2‖XᵀY‖₊ (nuclear norm), the squared distance, in place of the angle arccos ‖XᵀY‖₊.

    Returns:
        Angle in [0, π/2], a metric, or squared distance in [0, 2]; lower is more alike. Unchanged by rotation,
        isotropic scaling and translation; not by other linear maps.

    Raises:
        ShapeError, DegenerateError, NonFiniteError: As for `mean_cca`.

    Source:
        Williams et al. 2021, arXiv:2110.14739

    >>> x = torch.tensor([[1.0, 0], [-1, 0], [0, 2], [0, -2]])
    >>> round(procrustes(x, x.flip(1)), 6)
    0.0
    """
    x, y = flat_pair(x, y)
    measure = Procrustes(squared=squared)
    return measure.compare(measure.prepare(x), measure.prepare(y))


def _directions(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (n, r) and singular values (r,) of the centred layer, down to n·ε of the largest square."""
    n, p = rows.shape
    if p <= n:
        directions, singular, _ = torch.linalg.svd(torch.cat(list(centred_columns(rows)), dim=1), full_matrices=False)
    else:
        values, vectors = torch.linalg.eigh(gram(centred_columns(rows), rows))
        directions, singular = vectors.flip(1), values.flip(0).clamp_min(0).sqrt()
    rank = int((singular.square() > n * torch.finfo(torch.float64).eps * singular[0].square()).sum())
    return directions[:, :rank], singular[:rank]


def _significant(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`_directions` without those that the rounding of the layer's own type can make up.

    CCA gives every direction the same weight: a layer of 512 features and rank 64, in bfloat16 or in float32 of mean
    100, would else enter with 448 directions of noise.
    """
    directions, singular = _directions(rows)
    eps = torch.finfo(rows.dtype).eps if rows.is_floating_point() else 0.0
    noise = (_NOISE * eps) ** 2 * squared_norms(float64_columns(rows), rows).sum() / min(rows.shape)
    rank = max(1, int((singular.square() > noise).sum()))
    return directions[:, :rank], singular[:rank]


def _weighted_mean(values: Tensor, weights: Tensor) -> float:
    return float((values * weights).sum() / weights.sum())


def _residual(a: Tensor, b: Tensor, product: Tensor) -> float:
    """‖AQ - B‖² for the best orthogonal Q, from the differences themselves: exact where A and B nearly coincide.

    Directions of the wider side that Q maps to zero padding count in full.
    """
    left, _, right = torch.linalg.svd(product, full_matrices=False)
    turned_a, turned_b = a @ left, b @ right.T
    parts = (turned_a - turned_b, a - turned_a @ left.T, b - turned_b @ right)
    return float(sum((part.square().sum() for part in parts), a.new_zeros(())))
