"""SimCLR: two views of an image attract, all others in the batch repel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from layerlens.errors import ConfigError, ShapeError


def nt_xent(z: Tensor, *, temperature: float = 0.5, scale: float = 1.0) -> Tensor:
    """Normalised-temperature cross-entropy over a batch of view pairs.

    Args:
        z: Projections, shape (2n, d); rows i and i + n are views of the same image.
        temperature: T > 0.
        scale: Factor on the loss, 1 for plain NT-Xent; T / 0.07 in the supervised-contrastive code base.

    Returns:
        Scalar, mean over the 2n anchors, in nats times `scale`.

    Raises:
        ShapeError: An odd number of rows, or fewer than four.
        ConfigError: T not above 0.

    Source:
        Chen et al. 2020, arXiv:2002.05709, equation 1

    >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(nt_xent(z, temperature=1.0).item(), 4)  # -log(e / (e + 2))
    0.5514
    """
    if z.ndim != 2 or z.shape[0] % 2 or z.shape[0] < 4:
        raise ShapeError(f"NT-Xent needs 2n >= 4 rows of shape (2n, d); got {tuple(z.shape)}")
    if temperature <= 0:
        raise ConfigError(f"temperature={temperature}; allowed: above 0")
    z = F.normalize(z.float(), dim=1)
    logits = z @ z.T / temperature
    logits.fill_diagonal_(float("-inf"))
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return scale * F.cross_entropy(logits, partner)
