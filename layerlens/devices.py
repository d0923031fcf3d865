"""Which device a name means."""

from __future__ import annotations

import torch
from torch import nn

from layerlens.errors import ConfigError, closest

DEVICES = ("auto", "cpu", "cuda")


def pick_device(name: str) -> torch.device:
    """The device behind `auto` (CUDA where there is one), `cpu` or `cuda`.

    Raises:
        ConfigError: An unknown name, or CUDA asked for where there is none.
    """
    if name not in DEVICES:
        raise ConfigError(f"unknown device {name!r}; {closest(name, DEVICES)} (allowed: {', '.join(DEVICES)})")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' is not available here; use cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter; the CPU for a model without parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
