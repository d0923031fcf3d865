"""Products in full precision, whatever the surrounding training loop has chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch off autocast, and TF32 or bfloat16 inside float32 products, for a block."""
    chosen = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False):
        if chosen == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(chosen)
