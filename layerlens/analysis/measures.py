"""Measures of single layers: effective rank, streamed over batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from layerlens.activations import sweep
from layerlens.analysis.kernels import CONSTANT, centred_gram
from layerlens.analysis.results import LayerProfile
from layerlens.errors import NonFiniteError
from layerlens.layers import Batch, Forward, Layer


def effective_rank(x: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of the centred features.

    Args:
        x: Activations, shape (n, …); features are flattened.

    Returns:
        In [1, min(n - 1, d)]; NaN for a constant layer.

    Raises:
        NonFiniteError: NaN or infinity.

    Source:
        Roy & Vetterli 2007; RankMe (Garrido et al. 2022, arXiv:2210.02885) is the same without centring.

    >>> round(effective_rank(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])), 6)
    2.0
    """
    gram, scale = centred_gram(x.double())
    if not bool(gram.isfinite().all()):
        raise NonFiniteError("NaN or infinity in the activations; check the input and the weights")
    if gram.trace() <= CONSTANT**2 * scale:
        return float("nan")
    values = torch.linalg.eigvalsh(gram)
    noise = values[-1] * len(values) * torch.finfo(values.dtype).eps
    singular = torch.where(values > noise, values, 0.0).sqrt()
    p = singular / singular.sum()
    return float(torch.exp(torch.special.entr(p).sum()))


def effective_rank_profile(
    model: nn.Module,
    loader: Iterable[Batch],
    layers: str | Sequence[str] = "auto",
    *,
    level: float = 0.95,
    forward: Forward | None = None,
) -> LayerProfile:
    """Effective rank of each layer within batches, with a confidence interval over batches.

    A batch of n samples can't show a rank above n - 1: compare only values of equal batch size.

    Args:
        model, loader, layers, forward: As for `cka_matrix`.
        level: Confidence of the intervals.
    """
    state: list[_Ranks] = []

    def begin(chosen: list[Layer]) -> _Ranks:
        state.append(_Ranks([layer.name for layer in chosen]))
        return state[0]

    sweep(model, loader, layers, begin, forward=forward)
    return state[0].profile(level)


class _Ranks:
    def __init__(self, layers: list[str]) -> None:
        self.layers, self.batches, self.sizes = layers, list[list[float]](), list[int]()
        self.current = [float("nan")] * len(layers)

    def take(self, position: int, activation: Tensor) -> None:
        try:
            self.current[position] = effective_rank(activation)
        except NonFiniteError as error:
            raise NonFiniteError(f"layer {self.layers[position]!r}, batch {len(self.sizes)}: {error}") from error
        self.size = len(activation)

    def end_batch(self) -> None:
        self.batches.append(self.current.copy())
        self.sizes.append(self.size)

    def profile(self, level: float) -> LayerProfile:
        ranks, count = np.array(self.batches), len(self.batches)
        mean = ranks.mean(0)
        reach = np.full(mean.shape, np.nan)
        if count > 1:
            reach = stats.t.ppf((1 + level) / 2, count - 1) * ranks.std(0, ddof=1) / count**0.5
        return LayerProfile(
            measure="effective_rank", layers=tuple(self.layers), values=tuple(mean.tolist()),
            low=tuple((mean - reach).tolist()), high=tuple((mean + reach).tolist()),
            ceiling=float(max(self.sizes) - 1), samples=sum(self.sizes),
        )  # fmt: skip
