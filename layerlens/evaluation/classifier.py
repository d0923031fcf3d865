"""Accuracy of a network's own classifier."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from layerlens.activations import OUTPUT, features
from layerlens.errors import ShapeError


def classifier_accuracy(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor | None]], labels: Tensor) -> float:
    """Share of samples whose largest output is their class; the network runs in eval mode and is left as it was.

    Args:
        network: Outputs logits, shape (n, classes).
        batches: As `run_batch` takes them.
        labels: Class indices, shape (n,), in the batches' order.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ShapeError: Fewer outputs than classes, or another number of samples.
    """
    logits = features(network, batches, OUTPUT)
    if len(logits) != len(labels) or logits.shape[1] <= int(labels.max()):
        raise ShapeError(f"logits {tuple(logits.shape)} do not fit {len(labels)} labels up to {int(labels.max())}")
    return float((logits.argmax(1) == labels).float().mean(dtype=torch.float64))
