"""Transforms of one layer's activations, shape (n, …); row i is sample i."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from layerlens.errors import ConfigError, ShapeError
from layerlens.graph_batches import count_graphs
from layerlens.precision import full_precision
from layerlens.reduction import pool_nodes


def dropout(h: Tensor, rate: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Inverted dropout: each number is zeroed with probability `rate`, the rest scaled by 1 / (1 - rate).

    Args:
        h: Activations, any shape.
        rate: Probability in [0, 1].
        generator: Where the draw comes from; the global generator by default.

    >>> dropout(torch.ones(2, 2), rate=0.0).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    if generator is None:
        return torch.nn.functional.dropout(h, rate, training=True)
    keep = torch.rand(h.shape, generator=generator, device=generator.device).to(h.device) >= rate
    return h * keep / (1 - rate) if rate < 1 else torch.zeros_like(h)


def dropout_channels(h: Tensor, rate: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Inverted dropout of whole channels: (n, c, h, w) loses maps, (n, t, d) features of all positions, (n, d) numbers.

    Args:
        h: Activations; 3 dimensions are (n, positions, features), 4 are (n, channels, height, width).
        rate: Probability in [0, 1] that a channel of a sample is zeroed; the others are scaled by 1 / (1 - rate).
        generator: Where the draw comes from; the global generator by default.

    Raises:
        ShapeError: Not 2, 3 or 4 dimensions.

    Source:
        Tompson et al. 2015, arXiv:1411.4280
    """
    shapes = {2: h.shape, 3: (h.shape[0], 1, h.shape[-1]), 4: (*h.shape[:2], 1, 1)}
    return h * _mask(h, shapes, "channels", rate, generator)


def dropout_positions(h: Tensor, rate: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Inverted dropout of whole positions: all channels of a place in a map, or all features of a token.

    Args:
        h: Activations (n, positions, features) or (n, channels, height, width).
        rate: Probability in [0, 1] that a position of a sample is zeroed; the others are scaled by 1 / (1 - rate).
        generator: Where the draw comes from; the global generator by default.

    Raises:
        ShapeError: Activations without positions.
    """
    shapes = {3: (*h.shape[:2], 1), 4: (h.shape[0], 1, *h.shape[2:])}
    return h * _mask(h, shapes, "positions", rate, generator)


def dropout_channels_of_graphs(
    h: Tensor, owner: Tensor, rate: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """Inverted dropout of features: all nodes of a graph lose the same ones.

    Args:
        h: States of nodes, shape (nodes, features).
        owner: The graph of each node, shape (nodes,).
        rate: Probability in [0, 1] that a feature of a graph is zeroed; the others are scaled by 1 / (1 - rate).
        generator: Where the draw comes from; the global generator by default.
    """
    return h * dropout(h.new_ones(count_graphs(owner), *h.shape[1:]), rate, generator=generator)[owner]


def dropout_nodes(h: Tensor, owner: Tensor, rate: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Inverted dropout of whole nodes: all features of a node.

    Args:
        h: States of nodes, shape (nodes, features).
        owner: Not used: nodes are dropped each by itself.
        rate: Probability in [0, 1] that a node is zeroed; the others are scaled by 1 / (1 - rate).
        generator: Where the draw comes from; the global generator by default.
    """
    return h * dropout(h.new_ones(len(h), *[1] * (h.ndim - 1)), rate, generator=generator)


def gaussian_noise(
    h: Tensor,
    rate: float,
    *,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    owner: Tensor | None = None,
) -> Tensor:
    """Add normal noise whose standard deviation is `rate` times that of the sample's own activations.

    Args:
        h: Activations, shape (n, …).
        rate: Noise over signal, from 0; no unit, so that it means the same at every layer.
        generator: Where the draw comes from; the global generator by default.
        mask: Shape (n, t) of activations (n, t, d): nonzero marks a token, zero padding, which is neither measured
            nor changed.
        owner: The graph of each node, shape (n,), where the rows are nodes: a sample is then a graph.

    Raises:
        ShapeError: A mask that does not fit the activations.
    """
    real = real_positions(h, mask)
    if generator is None:
        noise = torch.randn_like(h)
    else:
        noise = torch.randn(h.shape, generator=generator, device=generator.device).to(h)
    if real is not None and owner is None:
        return torch.where(real, h + rate * _spread_of_tokens(h.detach().float(), real).to(h.dtype) * noise, h)
    rows = h.detach().float().reshape(len(h), -1)
    spread = rows.std(1, unbiased=False) if owner is None else _spread_of_graphs(rows, owner)[owner]
    return h + rate * spread.to(h.dtype).view(-1, *[1] * (h.ndim - 1)) * noise


def remove_principal_components(
    h: Tensor, components: int = 1, *, kept: int = 6, per_token: bool = False, mask: Tensor | None = None
) -> Tensor:
    """PCA anti-projection: mu + (I - C Cᵀ)(h - mu), with C from the principal directions of the whole batch.

    With a mask, padding enters neither mu nor C, whatever it holds and however much of it there is: per token, only
    tokens are rows; per sample, each position's mean is that of the samples with a token there, and a sample without
    one counts as that mean.

    Args:
        h: Activations, shape (n, …), flattened to (n, d); with `per_token`, (n, t, d) as (n·t, d), and maps
            (n, c, h, w) as (n·h·w, c).
        components: K >= 1 removes the first K directions; K <= -1 the last |K| of the `kept` ones.
        kept: How many directions count; the batch's rank limits it.
        per_token: Treat each position as a sample.
        mask: Shape (n, t) of activations (n, t, d): nonzero marks a token, zero padding, which comes back as it was.

    Returns:
        The shape of `h`. The basis is a constant: no gradient flows through the decomposition.

    Raises:
        ConfigError: K = 0, or |K| above `kept`.
        ShapeError: `per_token` on activations without positions, or a mask that does not fit them.

    Source:
        Deep Augmentation, arXiv:2303.14537, and the authors' code (6 kept, K = 1 or -1).
    """
    if not 1 <= abs(components) <= kept:
        raise ConfigError(f"components={components}; allowed: 1 to {kept} (first ones) or -{kept} to -1 (last ones)")
    if (real := real_positions(h, mask)) is not None:
        return _without_components_of_tokens(h, real, components, kept, per_token)
    if per_token and h.ndim == 4:
        tokens = remove_principal_components(h.flatten(2).mT, components, kept=kept, per_token=True)
        return tokens.mT.reshape(h.shape)
    if per_token and h.ndim != 3:
        raise ShapeError(f"per-token PCA needs activations (n, tokens, d) or (n, c, h, w); got {tuple(h.shape)}")
    rows = h.reshape(-1, h.shape[-1]) if per_token else h.reshape(h.shape[0], prod(h.shape[1:]))
    with torch.no_grad(), full_precision(h.device):
        mean = rows.mean(0)
        basis = _principal_directions(rows - mean, min(kept, len(rows) - 1, rows.shape[1]))
        basis = basis[:, :components] if components > 0 else basis[:, components:]
    centred = rows - mean
    return (mean + centred - (centred @ basis) @ basis.T).reshape(h.shape)


def real_positions(h: Tensor, mask: Tensor | None) -> Tensor | None:
    """Where activations (n, t, d) hold tokens, bool, shape (n, t, 1), by a mask (n, t); None without a mask.

    Raises:
        ShapeError: They do not fit.
    """
    if mask is None:
        return None
    if h.ndim != 3 or mask.shape != h.shape[:2]:
        raise ShapeError(f"a mask (n, t) goes with activations (n, t, d); got {tuple(mask.shape)} and {tuple(h.shape)}")
    return mask.to(h.device).bool().unsqueeze(-1)


def _without_components_of_tokens(h: Tensor, real: Tensor, components: int, kept: int, per_token: bool) -> Tensor:
    """Padding is 0 after centring. How many directions there are stays on the device, so that nothing waits for it."""
    flat = (0, 1) if per_token else (1, 2)
    rows, is_real = h.flatten(*flat), real.expand_as(h).flatten(*flat)
    with torch.no_grad(), full_precision(h.device):
        mean = _mean_of_real(rows, is_real)
        most = min(kept, len(rows) - 1, rows.shape[1])
        basis = _principal_directions(torch.where(is_real, rows - mean, 0.0), most)
        there = torch.minimum(is_real.any(1).sum() - 1, is_real.any(0).sum()).clamp(0, most)
        place = torch.arange(most, device=h.device)
        wanted = place < components if components > 0 else place >= there + components
        basis = torch.where(wanted & (place < there), basis, 0.0)
    centred = torch.where(is_real, rows - mean, 0.0)
    changed = mean + centred - (centred @ basis) @ basis.T
    return torch.where(is_real, changed, rows).reshape(h.shape)


def _mean_of_real(rows: Tensor, is_real: Tensor) -> Tensor:
    """Each column's mean over its real entries, or 0; no narrower than float32 on the way."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = torch.where(is_real, rows, 0.0).sum(0, dtype=wide)
    return (total / is_real.sum(0).clamp_min(1)).to(rows.dtype)


def _spread_of_tokens(h: Tensor, real: Tensor) -> Tensor:
    """Standard deviation of each sample's tokens, shape (n, 1, 1)."""
    count = (real.sum((1, 2), keepdim=True) * h.shape[-1]).clamp_min(1)
    mean = torch.where(real, h, 0.0).sum((1, 2), keepdim=True) / count
    return (torch.where(real, h - mean, 0.0).square().sum((1, 2), keepdim=True) / count).sqrt()


def _spread_of_graphs(h: Tensor, owner: Tensor) -> Tensor:
    """Standard deviation of each graph's nodes, over nodes and features, shape (graphs, 1)."""
    count = count_graphs(owner)
    mean = pool_nodes(h, owner, count, "mean").mean(1, keepdim=True)
    return pool_nodes((h - mean[owner]).square(), owner, count, "mean").mean(1, keepdim=True).sqrt()


def _mask(
    h: Tensor,
    shapes: dict[int, tuple[int, ...]],
    what: str,
    rate: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Zeros and 1 / (1 - rate), broadcast over what is dropped together."""
    if h.ndim not in shapes:
        raise ShapeError(f"dropout of {what} needs activations with {sorted(shapes)} dimensions; got {tuple(h.shape)}")
    place = h.device if generator is None else generator.device
    draw = torch.rand(shapes[h.ndim], generator=generator, device=place).to(h.device)
    return ((draw >= rate) / (1 - rate) if rate < 1 else torch.zeros_like(draw)).to(h.dtype)


def _principal_directions(rows: Tensor, kept: int) -> Tensor:
    """The top right singular vectors of centred rows, shape (d, k), by the smaller of the two Gram matrices."""
    centred = _finite(rows.float())  # what is not shows in the loss; the decomposition would raise
    n, d = centred.shape
    if d <= n:
        _, vectors = torch.linalg.eigh(_finite(centred.T @ centred))
        return vectors.flip(1)[:, :kept].to(rows.dtype)
    values, vectors = torch.linalg.eigh(_finite(centred @ centred.T))
    values, vectors = values.flip(0)[:kept], vectors.flip(1)[:, :kept]
    alive = values > values[0].clamp_min(1e-30) * 1e-6
    scale = torch.where(alive, values.clamp_min(1e-30).rsqrt(), 0.0)
    return (centred.T @ (vectors * scale)).to(rows.dtype)


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
