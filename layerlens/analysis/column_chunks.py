"""The rows of one layer: what every measure of them asks, and float64 sums over chunks of their columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from layerlens.analysis.kernels import CONSTANT
from layerlens.errors import BatchTooSmallError, DegenerateError, NonFiniteError, ShapeError

LEAST = 4  # samples
_CHUNK = 4096  # columns that are in float64 at one time
_ROUNDING = 1e-9


def flat(x: Tensor) -> Tensor:
    """Activations (n, …) as rows (n, p), without a copy where the memory allows.

    Raises:
        ShapeError: A single number, which has no samples.
    """
    if not x.ndim:
        raise ShapeError("activations need a first dimension of samples; got a single number")
    return x.detach().reshape(len(x), x[:1].numel() if len(x) else 0)


def flat_pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two layers' activations (n, …) as rows (n, p) and (n, q).

    Raises:
        ShapeError: Row counts differ.
    """
    x, y = flat(x), flat(y)
    if len(x) != len(y):
        raise ShapeError(f"both layers need the same samples in the same order; got {len(x)} and {len(y)} rows")
    return x, y


def checked(x: Tensor) -> Tensor:
    """Activations (n, …) as rows (n, p) that vary and are finite.

    Raises:
        BatchTooSmallError: Fewer than 4 samples.
        NonFiniteError: NaN or infinity.
        DegenerateError: The layer is constant.
    """
    rows = flat(x)
    if len(rows) < LEAST:
        raise BatchTooSmallError(f"{len(rows)} samples; at least {LEAST} are needed: use a larger batch")
    size, spread = float(squared_norms(float64_columns(rows), rows).sum()), 0.0
    for columns in centred_columns(rows):
        spread += float(columns.square().sum())
    if not size < float("inf"):
        raise NonFiniteError(
            "NaN or infinity in the activations, or numbers above 1e150; check the input and the weights"
        )
    if spread <= CONSTANT**2 * size:
        raise DegenerateError(f"the layer is constant over its {len(rows)} samples: there is no variation to measure")
    return rows


def float64_columns(rows: Tensor) -> Iterator[Tensor]:
    """The rows in float64, 4096 columns at a time, each chunk (n, c)."""
    for columns in rows.split(_CHUNK, dim=1):
        yield columns.double()


def centred_columns(rows: Tensor) -> Iterator[Tensor]:
    """`float64_columns` with each feature centred over the samples."""
    for columns in float64_columns(rows):
        yield columns - columns.mean(0)


def gram(columns: Iterable[Tensor], rows: Tensor) -> Tensor:
    """X Xᵀ from chunks of the columns of X, float64, shape (n, n)."""
    total = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for chunk in columns:
        total.addmm_(chunk, chunk.T)
    return total


def squared_norms(columns: Iterable[Tensor], rows: Tensor) -> Tensor:
    """Squared length of each row from chunks of the columns, float64, shape (n,)."""
    total = rows.new_zeros(len(rows), dtype=torch.float64)
    for chunk in columns:
        total += chunk.square().sum(1)
    return total


def unrounded(values: Tensor, low: float, high: float) -> Tensor:
    """Clip what rounding carried outside [low, high]; what lies further out than 1e-9 stays visible."""
    inside = values.clamp(low, high)
    return torch.where((values - inside).abs() <= _ROUNDING, inside, values)
