"""A look at a model that leaves it as it was: modes, buffers, hooks' side effects and random states."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module, *, keep_buffers: bool = True) -> Iterator[nn.Module]:
    """Put back what a forward pass may change, also after an exception or Ctrl-C.

    Restores every module's train/eval flag, every buffer (batch-norm statistics too) and the random states of
    torch (CPU and the model's devices), NumPy and Python.

    Args:
        model: The model that the block will run.
        keep_buffers: False leaves the buffers as the block made them.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(b, b.detach().clone()) for b in model.buffers()] if keep_buffers else []
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield model
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            for module, training in modes.items():
                module.training = training
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
