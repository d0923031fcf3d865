"""The learning rate over a run."""

from __future__ import annotations

import math

from layerlens.training.config import RunConfig


def learning_rate(config: RunConfig, epochs: float, steps: int) -> float:
    """Linear warm-up, then half a cosine or a line down to 0, or no decay; per step.

    Args:
        config: Gives `learning_rate` (the peak), `warmup_epochs` (at most a tenth of the run), `warmup_from` and the
            `schedule` afterwards.
        epochs: Epochs done, with their fraction.
        steps: Steps per epoch: the first step of a warm-up from 0 is not lost.
    """
    peak, start = config.learning_rate or 0.0, config.warmup_from
    warm = min(config.warmup_epochs, config.epochs / 10)
    if epochs < warm:
        return start + (peak - start) * (epochs + 1 / steps) / (warm + 1 / steps)
    done = (epochs - warm) / (config.epochs - warm)
    return peak * {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[config.schedule]
