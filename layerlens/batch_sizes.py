"""How samples are shared out among batches."""

from __future__ import annotations


def even_batches(samples: int, batch_size: int) -> int:
    """How many batches of nearly equal size, none too short for a statistic.

    >>> even_batches(1000, 100), even_batches(101, 100)
    (10, 2)
    """
    fewest = min(4, batch_size)  # what an unbiased HSIC needs, unless still less was asked for
    return min(-(-samples // batch_size), max(samples // fewest, 1))
