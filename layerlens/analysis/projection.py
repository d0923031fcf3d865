"""A seeded random projection for layers so wide that their rows are the burden."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layerlens.analysis.kernels import as_rows
from layerlens.errors import ConfigError


class Projection:
    """Folds wide rows into `width` numbers: random signs, a random order, and sums over equal parts (CountSketch).

    Inner products of samples keep their mean, with variance at most (‖x‖²‖y‖² + (x·y)²) / width. Each layer is folded
    in its own way, the same for all samples; narrower rows stay as they are.

    Args:
        width: Numbers that are left of a row.
        seed: Of signs and order.

    Source:
        Charikar et al. 2002; Weinberger et al. 2009, arXiv:0902.2206
    """

    def __init__(self, width: int, seed: int = 0) -> None:
        if isinstance(width, bool) or not isinstance(width, int) or width < 16:
            raise ConfigError(f"projection={width!r}; allowed: a whole number from 16, or 0 for none")
        self.width, self.seed = width, seed
        self._drawn: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, position: int, activation: Tensor) -> Tensor:
        """Rows (n, p) of the layer at a position as (n, min(p, width))."""
        rows = as_rows(activation)
        if rows.shape[1] <= self.width:
            return rows
        order, signs = self._draw(position, rows)
        folds = -(-rows.shape[1] // self.width)
        folded = rows.new_zeros(len(rows), self.width)
        for k in range(folds):
            part = slice(k * self.width, (k + 1) * self.width)
            columns = rows[:, order[part]] * signs[part]
            folded[:, : columns.shape[1]] += columns
        return folded

    def error_bound(self, participation: float) -> float:
        """Bound on the root mean square error of a biased CKA entry, relative to the entry.

        Each of the three HSICs in CKA is a trace estimate with `width` probes from either side, of relative standard
        deviation at most √(8 / width); that of a layer with itself is too high by (participation + 1) / width.

        Args:
            participation: Of the layer with more directions, see `participation_ratio`.
        """
        return 2 * math.sqrt(8 / self.width) + (participation + 1) / self.width

    def _draw(self, position: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        if position not in self._drawn:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + position)
            order = torch.randperm(rows.shape[1], generator=generator)
            signs = torch.randint(0, 2, (rows.shape[1],), generator=generator) * 2 - 1
            self._drawn[position] = order.to(rows.device), signs.to(rows.device, rows.dtype)
        return self._drawn[position]
