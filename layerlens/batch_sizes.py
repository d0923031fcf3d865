"""How samples are shared out among batches."""

from __future__ import annotations

import torch
from torch import Tensor

from layerlens.errors import ConfigError


def even_batches(samples: int, batch_size: int) -> int:
    """How many batches of nearly equal size, none too short for a statistic.

    >>> even_batches(1000, 100), even_batches(101, 100)
    (10, 2)
    """
    fewest = min(4, batch_size)  # what an unbiased HSIC needs, unless still less was asked for
    return min(-(-samples // batch_size), max(samples // fewest, 1))


def fixed_choice(total: int, samples: int | None, seed: int) -> Tensor:
    """Random numbers of `samples` out of `total` samples, the same for a seed; all of them if there are fewer.

    Raises:
        ConfigError: `samples` is below 1.

    >>> fixed_choice(5, 3, seed=0).tolist()
    [4, 0, 1]
    """
    if samples is not None and samples < 1:
        raise ConfigError(f"samples={samples}; allowed: a whole number from 1, or None for all")
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:samples]
