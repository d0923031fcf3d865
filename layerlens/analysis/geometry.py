"""Where embeddings lie on the unit sphere: alignment, uniformity, invariance, diversity."""

from __future__ import annotations

import math

import torch  # noqa: F401  (the doctests use it)
from torch import Tensor

from layerlens.errors import ConfigError, DegenerateError, NonFiniteError, ShapeError

_ROWS = 512  # of a tile, which stays in a CPU's cache


def alignment(x: Tensor, y: Tensor, *, alpha: float = 2.0) -> float:
    """Mean distance of positive pairs on the unit sphere, to the power alpha.

    Args:
        x, y: Embeddings, shape (n, d); row i of both is a positive pair. Rows are normalised here.
        alpha: Power, 2 in the paper.

    Returns:
        In [0, 2^alpha]; 0 if each pair coincides. Lower is better.

    Raises:
        ShapeError: The shapes differ.
        DegenerateError: A row of zeros, which has no direction.
        NonFiniteError: NaN or infinity.

    Source:
        Wang & Isola 2020, arXiv:2005.10242

    >>> round(alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])), 6)
    2.0
    """
    if x.shape != y.shape or x.ndim != 2 or not len(x):
        raise ShapeError(f"alignment needs two equal shapes (n, d); got {tuple(x.shape)} and {tuple(y.shape)}")
    if not alpha > 0:
        raise ConfigError(f"alpha={alpha}; allowed: above 0")
    distance = (_on_sphere(x) - _on_sphere(y)).norm(dim=1)
    return float(distance.pow(alpha).mean())


def uniformity(x: Tensor, *, t: float = 2.0) -> float:
    """Log of the mean Gaussian potential exp(-t‖a - b‖²) over all pairs of distinct rows, exactly.

    Args:
        x: Embeddings, shape (n, d), n >= 2. Rows are normalised here. Memory is O(n).
        t: Sharpness, 2 in the paper.

    Returns:
        In [-4t, 0]; 0 if all rows coincide. Lower is better.

    Raises:
        ShapeError: Fewer than two rows.
        DegenerateError: A row of zeros.

    Source:
        Wang & Isola 2020, arXiv:2005.10242

    >>> round(uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])), 6)
    -8.0
    """
    if x.ndim != 2 or len(x) < 2:
        raise ShapeError(f"uniformity needs at least two rows of shape (n, d); got {tuple(x.shape)}")
    if not t > 0:
        raise ConfigError(f"t={t}; allowed: above 0")
    x, n = _on_sphere(x), len(x)
    total = x.new_zeros(())
    for start in range(0, n, _ROWS):
        rows = x[start : start + _ROWS]
        for other in range(start, n, _ROWS):
            potential = (rows @ x[other : other + _ROWS].T).sub_(1.0).mul_(2 * t).exp_()
            total += (potential.triu_(1) if other == start else potential).sum()
    return math.log(float(total) / (n * (n - 1) / 2))


def invariance(x: Tensor, views: Tensor) -> float:
    """Mean cosine of each sample with its augmented views.

    Args:
        x: Embeddings of the samples, shape (n, d).
        views: Embeddings of their views, shape (n, a, d).

    Returns:
        In [-1, 1]; higher is more invariant.

    Source:
        Formula derived from the wording of arXiv:2310.18850
    """
    if views.ndim != 3 or x.ndim != 2 or views.shape[::2] != x.shape or 0 in views.shape:
        raise ShapeError(f"invariance needs (n, d) and (n, a, d); got {tuple(x.shape)} and {tuple(views.shape)}")
    return float((_on_sphere(x).unsqueeze(1) * _on_sphere(views)).sum(-1).mean())


def diversity(views: Tensor) -> float:
    """Mean cosine of two different views of one sample.

    Args:
        views: Shape (n, a, d), a >= 2.

    Returns:
        In [-1, 1]; lower is more diverse.

    Source:
        Formula derived from the wording of arXiv:2310.18850
    """
    if views.ndim != 3 or views.shape[1] < 2 or 0 in views.shape:
        raise ShapeError(f"diversity needs at least two views, shape (n, a >= 2, d); got {tuple(views.shape)}")
    v, count = _on_sphere(views), views.shape[1]
    cosines = v @ v.transpose(1, 2)
    return float((cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)).mean() / (count * (count - 1)))


def _on_sphere(x: Tensor) -> Tensor:
    x = x.double()
    if not bool(x.isfinite().all()):
        raise NonFiniteError("NaN or infinity in the embeddings; check the input and the weights")
    norms = x.norm(dim=-1, keepdim=True)
    if not bool((norms > 0).all()):
        raise DegenerateError(f"{int((norms == 0).sum())} of {norms.numel()} embeddings are zero and have no direction")
    return x / norms
