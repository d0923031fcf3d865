"""SimCSE: a sentence meets itself under another dropout mask, or its partner, among the others of the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from layerlens.errors import ShapeError
from layerlens.training.objectives.simclr import check_temperature, unit_rows
from layerlens.training.ranks import gather_rows, rank


def simcse(z: Tensor, *, columns: int = 2, temperature: float = 0.05, scale: float = 1.0) -> Tensor:
    """Cross-entropy of finding each sentence's partner among those of the batch, by cosine.

    The first n rows are the anchors, the second n their partners; a third n are hard negatives, which every anchor
    has to tell from its partner too. Unlike in NT-Xent, anchors do not repel each other and partners are no anchors.
    With several ranks the partners and negatives are those of all of them.

    Args:
        z: Sentence vectors, shape (columns · n, d); every rank needs the same n.
        columns: 2, or 3 with hard negatives.
        temperature: T > 0.
        scale: Factor on the loss.

    Returns:
        Scalar, mean over the n anchors, in nats times `scale`; float64 for float64 rows, else float32.

    Raises:
        ShapeError: Rows that are no multiple of `columns`, or fewer than two anchors.
        ConfigError: T not above 0.

    Source:
        Gao, Yao, Chen 2021, arXiv:2104.08821, equations 1 and 5

    >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(simcse(z, temperature=1.0).item(), 4)  # -log(e / (e + 1))
    0.3133
    """
    if columns not in (2, 3) or z.ndim != 2 or len(z) % columns or len(z) < 2 * columns:
        raise ShapeError(f"SimCSE needs {columns}n rows of shape ({columns}n, d) with n >= 2; got {tuple(z.shape)}")
    check_temperature(temperature)
    anchors, *others = unit_rows(z).chunk(columns)
    candidates = torch.cat([gather_rows(part) for part in others])
    partner = torch.arange(len(anchors), device=z.device) + rank() * len(anchors)
    return scale * F.cross_entropy(anchors @ candidates.T / temperature, partner)
