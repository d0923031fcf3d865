"""GraphCL: the two views of a graph attract, across the two sides of the batch all others repel."""

from __future__ import annotations

import torch
from torch import Tensor

from layerlens.errors import ShapeError
from layerlens.training.objectives.simclr import check_temperature, unit_rows
from layerlens.training.ranks import gather_rows, rank


def graph_cl(z: Tensor, *, temperature: float = 0.2, scale: float = 1.0) -> Tensor:
    """Each first view against all second views; the positive pair is not in the denominator.

    With several ranks every rank's second views are the others, as in `nt_xent`.

    Args:
        z: Projections, shape (2n, d); rows i and i + n are views of the same graph. Every rank needs the same n.
        temperature: T > 0.
        scale: Factor on the loss.

    Returns:
        Scalar, mean over the n anchors, in nats times `scale`; it can be below 0.

    Raises:
        ShapeError: An odd number of rows, or fewer than four.
        ConfigError: T not above 0.

    Source:
        You et al. 2020, arXiv:2010.13902, equation 3

    >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> graph_cl(z, temperature=1.0).item()  # -log(e / 1)
    -1.0
    """
    if z.ndim != 2 or z.shape[0] % 2 or z.shape[0] < 4:
        raise ShapeError(f"GraphCL needs 2n >= 4 rows of shape (2n, d); got {tuple(z.shape)}")
    check_temperature(temperature)
    first, second = unit_rows(z).chunk(2)
    logits = first @ gather_rows(second).T / temperature  # (n, world · n)
    place = rank() * len(first)
    own = logits[:, place : place + len(first)]
    positive = own.diagonal().clone()
    own.fill_diagonal_(float("-inf"))
    return scale * (torch.logsumexp(logits, 1) - positive).mean()
