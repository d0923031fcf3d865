"""A look at a model that leaves it as it was: modes, buffers, hooks' side effects and random states."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerlens.errors import LayerlensError, ShapeError

_Held = tuple[nn.Module, str, Tensor, Tensor]


@contextmanager
def untouched(model: nn.Module, *, keep_buffers: bool = True) -> Iterator[nn.Module]:
    """Put back what a forward pass may change, also after an exception or Ctrl-C.

    Restores every module's train/eval flag, every buffer (batch-norm statistics too) and the random states of
    torch (CPU and the model's devices), NumPy and Python. PyTorch's fused transformer path, in which the inner
    layers never run and outputs can be nested tensors, is off inside the block.

    Args:
        model: The model that the block will run.
        keep_buffers: False leaves the buffers as the block made them.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = _buffers(model) if keep_buffers else []
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    numpy_state, python_state = np.random.get_state(), random.getstate()
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield model
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            for module, training in modes.items():
                module.training = training
            _put_back(buffers)


def _buffers(model: nn.Module) -> list[_Held]:
    return [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]


def _put_back(buffers: list[_Held]) -> None:
    """The same tensors with the same values, also where the pass put another tensor in a buffer's place."""
    with torch.no_grad():
        for module, name, buffer, value in buffers:
            if getattr(module, name, None) is not buffer:
                setattr(module, name, buffer)
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed the generators that work on a device draws from: the CPU's, and the device's own; no other device's."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def observed(model: nn.Module, note: Callable[[str, nn.Module, Any], None]) -> Iterator[None]:
    """While the block runs the model, call `note(name, module, output)` as each submodule finishes.

    In eval mode and without gradients; the model is left as it was.
    """
    with untouched(model), torch.no_grad():
        model.eval()
        handles = [
            module.register_forward_hook(lambda m, _i, out, name=name: note(name, m, out))
            for name, module in model.named_modules()
            if name
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def trial_run(batch: Any) -> Iterator[None]:
    """Turn what a model raises on its first small batch into one clear line."""
    try:
        yield
    except LayerlensError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        shape = f"of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"of type {type(batch).__name__}"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ShapeError(f"the model can't run a batch {shape}: {reason}") from error
