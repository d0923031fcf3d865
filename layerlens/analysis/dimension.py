"""How many directions a layer uses: effective rank, RankMe and the participation ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from layerlens.analysis.column_chunks import centred_columns, checked, float64_columns, gram
from layerlens.analysis.kernels import CONSTANT, as_rows, centred_gram
from layerlens.errors import NonFiniteError


def effective_rank(x: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of the centred features.

    Args:
        x: Activations, shape (n, …); features are flattened.

    Returns:
        In [1, min(n - 1, d)]; NaN for a constant layer.

    Raises:
        NonFiniteError: NaN or infinity.

    Source:
        Roy & Vetterli 2007; RankMe (Garrido et al. 2022, arXiv:2210.02885) is the same without centring.

    >>> round(effective_rank(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])), 6)
    2.0
    """
    rows = as_rows(x).double()
    if rows.shape[1] <= len(rows):  # features are fewer than rows, as for nodes or positions
        products, scale = _feature_products(rows), rows.square().sum()
    else:
        products, scale = centred_gram(rows)
    if not bool(products.isfinite().all()):
        raise NonFiniteError("NaN or infinity in the activations; check the input and the weights")
    if products.trace() <= CONSTANT**2 * scale:
        return float("nan")
    return _exp_entropy(torch.linalg.eigvalsh(products))


def rankme(x: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of the features, not centred.

    Args:
        x: Activations, shape (n, …); features are flattened.

    Returns:
        In [1, min(n, p)]; higher uses more directions. Unchanged by rotation and isotropic scaling; not by
        translation: the mean counts as a direction.

    Raises:
        BatchTooSmallError: Fewer than 4 rows.
        DegenerateError: A constant layer.
        NonFiniteError: NaN or infinity.

    Source:
        Garrido et al. 2022, arXiv:2210.02885; the exact entropy, without the 1e-7 that the paper adds to each share.

    >>> round(rankme(torch.eye(4)), 6)
    4.0
    """
    rows = checked(x)
    n, p = rows.shape
    if p <= n:
        return _exp_entropy(torch.linalg.svdvals(rows.double()).flip(0).square())
    return _exp_entropy(torch.linalg.eigvalsh(gram(float64_columns(rows), rows)))


def participation_ratio(x: Tensor) -> float:
    """Square of the sum over the sum of squares of the covariance eigenvalues: (Σλ)² / Σλ².

    Args:
        x: Activations, shape (n, …); features are flattened.

    Returns:
        In [1, min(n - 1, p)]; higher spreads the variance over more directions. Unchanged by rotation, isotropic
        scaling and translation.

    Raises:
        BatchTooSmallError: Fewer than 4 rows.
        DegenerateError: A constant layer.
        NonFiniteError: NaN or infinity.

    Source:
        Gao et al. 2017, doi:10.1101/214262

    >>> round(participation_ratio(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])), 6)
    2.0
    """
    rows = checked(x)
    n, p = rows.shape
    products = _feature_products(rows) if p <= n else gram(centred_columns(rows), rows)
    return float(products.trace().square() / products.square().sum())


def _feature_products(rows: Tensor) -> Tensor:
    """Inner products of the centred features, float64, shape (p, p); the eigenvalues of the rows' but for zeros."""
    centred = torch.cat(list(centred_columns(rows)), dim=1)
    return centred.T @ centred


def _exp_entropy(values: Tensor) -> float:
    """exp of the entropy of the roots of ascending eigenvalues, without those that are rounding."""
    noise = values[-1] * len(values) * torch.finfo(values.dtype).eps
    singular = torch.where(values > noise, values, 0.0).sqrt()
    p = singular / singular.sum()
    return float(torch.exp(torch.special.entr(p).sum()))
