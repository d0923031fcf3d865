"""Kernel matrices of one layer's samples: linear and RBF, centred the ways that HSIC needs."""

from __future__ import annotations

import torch
from torch import Tensor

from layerlens.precision import full_precision

KERNELS = ("linear", "rbf")
_CHUNK = 4096  # columns whose centred copy stays in a CPU's cache
BURDEN = 4.0  # squared mean over variance up to which float32 Gram matrices may be centred after the product
CONSTANT = 32 * torch.finfo(torch.float32).eps  # variation below this share of the size is rounding


def as_rows(activation: Tensor) -> Tensor:
    """An activation (n, …) as rows (n, p), at least float32; maps in channels-last memory keep their order there."""
    x = activation.detach()
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    x = x.flatten(1) if x.ndim > 1 else x.unsqueeze(1)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def column_gram(activation: Tensor) -> tuple[Tensor, Tensor]:
    """X Xᵀ of the features, each centred over the samples before the product, and n·‖mean‖².

    Centring works on columns that fit in the cache, and the product leaves out a quarter that symmetry gives. What
    rounding leaves of the mean is the caller's to centre away.

    Args:
        activation: Shape (n, …), any floating type; anything below float32 is computed in float32.

    Returns:
        The Gram matrix, shape (n, n), in the type of the rows, and a float64 scalar.
    """
    with full_precision(activation.device):
        x = as_rows(activation)
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
        return torch.cat([top, lower]), len(x) * offset


def centred_gram(activation: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix of the centred features, float64, shape (n, n), and the squared norm before centring.

    Args:
        activation: As for `column_gram`.
    """
    gram, offset = column_gram(activation)
    gram = h_centre(gram.double())
    return gram, gram.trace() + offset


def u_centre(gram: Tensor) -> Tensor:
    """U-centring (Székely & Rizzo): zero diagonal, rows and columns that sum to zero; shape (…, n, n), n >= 4."""
    return u_centre_(gram.clone())


def u_centre_(gram: Tensor) -> Tensor:
    """`u_centre` in place."""
    n = gram.shape[-1]
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    rows = gram.sum(-1) / (n - 2)
    gram.sub_(rows.unsqueeze(-1)).sub_((rows - rows.sum(-1, keepdim=True) / (n - 1)).unsqueeze(-2))
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    return gram


def h_centre(gram: Tensor) -> Tensor:
    """HKH: rows and columns that sum to zero, diagonal included; shape (n, n)."""
    rows = gram.mean(0)
    return gram - rows[:, None] - rows[None, :] + rows.mean()


def squared_distances(gram: Tensor) -> Tensor:
    """Squared Euclidean distances of samples from their Gram matrix, shape (n, n)."""
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0).fill_diagonal_(0.0)


def rbf_from_gram(gram: Tensor, factor: float = 1.0) -> Tensor:
    """RBF kernel exp(-d² / 2σ²), σ = factor × median distance of distinct samples; shape (n, n)."""
    squared = squared_distances(gram)
    upper = torch.triu_indices(len(gram), len(gram), 1, device=gram.device)
    width = squared[upper[0], upper[1]].sqrt().median().square()
    return rbf(squared, factor**2 * width)


def rbf(squared: Tensor, width: Tensor | float) -> Tensor:
    """exp(-d² / 2w) of squared distances and a squared width w."""
    return torch.exp(-squared / (2 * torch.as_tensor(width).clamp_min(torch.finfo(torch.float64).tiny)))
