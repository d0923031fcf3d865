"""HSIC of all pairs of layers on one set of samples, and its sampling error.

With U-centred Gram matrices A and B, unbiased HSIC is the sum of A_st B_st over all pairs of samples, divided by
n(n - 3): a U-statistic. Its first-order part shows in the row sums c_s = Σ_t A_st B_st, one per sample; both come
from one batched product. For few features the same sums follow from covariances, without any n × n matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerlens.analysis.kernels import u_centre_
from layerlens.errors import BatchTooSmallError

_BLOCK = 1 << 20  # numbers in a temporary copy
_PAIR_ROWS = 512  # samples, at most, that the second-order part of the error is estimated from
Chunks = Callable[[], Iterable[Sequence[Tensor]]]


@dataclass(frozen=True)
class HSIC:
    """Unbiased HSIC of L layers.

    Attributes:
        samples: n, the rows compared.
        value: Shape (L, L), float64.
        covariance: Sampling covariance of the estimates for the pairs of statistics (xy, xy), (xy, xx), (xx, yy),
            shape (2, 3, L, L): first as the jackknife has it, then the second-order part, which the jackknife
            counts twice. Zero where it was not asked for.
        each: Shape (m, L, L): c_s / (n - 3), or its sum over the rows of a sample times m / n, so that the mean over
            the first axis is `value`; None where it was not asked for.
    """

    samples: int
    value: Tensor
    covariance: Tensor
    each: Tensor | None = None


def hsic_from_grams(stack: Tensor, *, counts: Tensor | None = None, errors: bool = True, each: bool = False) -> HSIC:
    """HSIC from U-centred Gram matrices.

    Args:
        stack: Float32 or float64, shape (L, n, n); products are in float64.
        counts: Rows of each sample, where a sample has several (positions of a map); the error is then that between
            samples, to first order.
        errors: Whether to take the sampling error.
        each: Whether to keep what each sample adds.
    """
    count, n, _ = stack.shape
    total = stack.new_zeros(count, count, dtype=torch.float64)
    if not errors and not each and counts is None:
        for block in stack.flatten(1).split(max(1, _BLOCK // count), dim=1):
            total += block.double() @ block.double().T
        return HSIC(n, total / (n * (n - 3)), total.new_zeros(2, 3, count, count))
    rows, kept = total.new_zeros(3, count, count), []
    for block in stack.transpose(0, 1).split(max(1, _BLOCK // (count * max(n, count)))):  # (s, L, n)
        wide = block.double()
        c = wide @ wide.transpose(1, 2)
        total += c.sum(0)
        rows += _row_products(c)
        if each or counts is not None:
            kept.append(c)
    if counts is not None:
        return hsic_from_parts(total, torch.cat(kept), stack, counts=counts, each=each)
    covariance = _u_statistic_covariance(n, total, rows, _pair_products(stack, n))
    return HSIC(n, total / (n * (n - 3)), covariance, torch.cat(kept) / (n - 3) if each else None)


def hsic_from_parts(
    total: Tensor, parts: Tensor, few: Tensor, *, counts: Tensor | None = None, each: bool = False
) -> HSIC:
    """HSIC with its error from c_s of all samples.

    Args:
        total: Σ_st A_st B_st, shape (L, L).
        parts: c_s, shape (n, L, L).
        few: U-centred Gram matrices of some of the samples, shape (L, m, m), for the second-order part.
        counts, each: As for `hsic_from_grams`.
    """
    n = len(parts)
    if counts is None:
        covariance = _u_statistic_covariance(n, total, _row_products(parts), _pair_products(few, n))
    else:
        places = torch.arange(len(counts), device=parts.device)
        owner = torch.repeat_interleave(places, counts.to(parts.device), output_size=n)
        parts = parts.new_zeros(len(counts), *parts.shape[1:]).index_add_(0, owner, parts)
        covariance = _between_samples(parts, total) / (n * (n - 3)) ** 2
    kept = parts * (len(parts) / (n * (n - 3))) if each else None
    return HSIC(n, total / (n * (n - 3)), covariance, kept)


def hsic_from_features(
    chunks: Chunks, widths: Sequence[int], *, counts: Tensor | None = None, errors: bool = True, each: bool = False
) -> HSIC:
    """The same for the linear kernel from P × P covariances, P the sum of all widths; any number of samples.

    Args:
        chunks: Gives, each time it is called, the same rows in pieces: for each layer (rows, width), centred over
            all samples.
        widths: Of the layers.
        counts, errors, each: As for `hsic_from_grams`.
    """
    sums = _feature_moments(chunks, widths)
    n, count = len(sums.norms), len(widths)
    d, own = sums.norms.sum(0), sums.norms.T @ sums.norms
    total = (
        sums.layers.T @ sums.covariance.square() @ sums.layers
        - own * n / (n - 2)
        + d[:, None] * d / ((n - 1) * (n - 2))
    )
    value = total / (n * (n - 3))
    if not errors and not each:
        return HSIC(n, value, value.new_zeros(2, 3, count, count))
    parts = torch.cat(list(_sample_sums(chunks, sums)))
    return hsic_from_parts(total, parts, few_grams(chunks(), n), counts=counts, each=each)


@dataclass(frozen=True)
class _Moments:
    """Of centred rows: XᵀX, Xᵀd for every layer's squared norms d, the norms themselves, and which column is whose."""

    covariance: Tensor  # (P, P)
    weighted: Tensor  # (P, L)
    norms: Tensor  # (n, L)
    layers: Tensor  # (P, L), 1 where the column is of the layer


def _feature_moments(chunks: Chunks, widths: Sequence[int]) -> _Moments:
    width, device = sum(widths), next(iter(chunks()))[0].device
    covariance = torch.zeros(width, width, dtype=torch.float64, device=device)
    weighted = torch.zeros(width, len(widths), dtype=torch.float64, device=device)
    owner = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths), output_size=width)
    layers = torch.nn.functional.one_hot(owner, len(widths)).to(device, torch.float64)
    norms = []
    for piece in chunks():
        x = torch.cat(list(piece), 1)
        wide = x.double()
        covariance += wide.T @ wide
        norms.append(wide.square() @ layers)
        weighted += wide.T @ norms[-1]
    return _Moments(covariance, weighted, torch.cat(norms), layers)


def _sample_sums(chunks: Chunks, sums: _Moments) -> Iterable[Tensor]:
    """c_s of all pairs, in the pieces of the rows; shape (rows, L, L) each.

    With centred rows, A_st = x_s·x_t + u_s + u_t off the diagonal, u = d/(n-2) - Σd/(2(n-1)(n-2)), and row sums of
    A are zero; the sum over t of A_st B_st then has only products with covariances in it.
    """
    n, count = len(sums.norms), sums.norms.shape[1]
    d_all = sums.norms.sum(0)
    u_all = sums.norms / (n - 2) - d_all / (2 * (n - 1) * (n - 2))
    u_sum, uv = u_all.sum(0), u_all.T @ u_all
    weighted = sums.weighted / (n - 2)  # Xᵀu of each layer; the constant part of u meets centred columns
    start = 0
    for piece in chunks():
        x = torch.cat(list(piece), 1)  # in the type of the rows: what rounding adds here moves errors, not values
        covariance, layers = sums.covariance.to(x.dtype), sums.layers.to(x.dtype)
        rows = slice(start, start + len(x))
        d, u = sums.norms[rows], u_all[rows]
        c = d.new_zeros(len(x), count, count)
        begin = 0
        for i, part in enumerate(piece):
            columns = slice(begin, begin + part.shape[1])
            moved = part.double() @ weighted[columns]
            c[:, i] += (((part @ covariance[columns]) * x) @ layers).double() + moved
            c[:, :, i] += moved
            begin = columns.stop
        c -= d[:, :, None] * d[:, None, :] + d[:, :, None] * u[:, None, :] + u[:, :, None] * d[:, None, :]
        c -= d[:, :, None] * u[:, None, :]
        c += uv + u[:, None, :] * (u_sum - u)[:, :, None] - u[:, :, None] * u[:, None, :]
        start += len(x)
        yield c


def few_grams(pieces: Iterable[Sequence[Tensor]], samples: int) -> Tensor:
    """U-centred linear Gram matrices of at most 512 samples spread over all, shape (L, m, m)."""
    step, seen, kept = -(-samples // _PAIR_ROWS), 0, []
    for piece in pieces:
        kept.append([p[(-seen) % step :: step].double() for p in piece])
        seen += len(piece[0])
    rows = [torch.cat(layer) for layer in zip(*kept, strict=True)]
    return u_centre_(torch.stack([r @ r.T for r in rows]))


def _row_products(c: Tensor) -> Tensor:
    """Σ_s of products of c, shape (s, L, L), for (xy, xy), (xy, xx), (xx, yy)."""
    own = c.diagonal(dim1=1, dim2=2)
    return torch.stack([c.square().sum(0), (c * own.unsqueeze(2)).sum(0), own.T @ own])


def _pair_products(stack: Tensor, samples: int) -> Tensor:
    """Σ_st of the same products over single pairs, from at most 512 samples and scaled up, shape (3, L, L).

    Only the part of the sampling error that falls with 1/n² rests on it.
    """
    count, n, _ = stack.shape
    step = -(-n // min(_PAIR_ROWS, max(64, n // 2)))
    few = stack[:, ::step, ::step]
    rows, products = few.shape[1], stack.new_zeros(2, count, count, dtype=torch.float64)
    for block in few.transpose(0, 1).split(max(1, _BLOCK // (count * rows))):
        flat = block.transpose(0, 1).flatten(1).float()  # (L, s·n); float32 is ample for a variance
        squares = flat.square()
        products[0] += squares @ squares.T
        products[1] += (squares * flat) @ flat.T
    products *= samples * (samples - 1) / (rows * (rows - 1))
    return torch.stack([products[0], products[1], products[0]])


def _u_statistic_covariance(n: int, total: Tensor, rows: Tensor, pairs: Tensor) -> Tensor:
    """Of a U-statistic of order two: 4(n - 2)ζ₁ + 4ζ₂ over n(n - 1), and 2ζ₂ over n(n - 1); shape (2, 3, L, L)."""
    own = total.diagonal()
    products = torch.stack([total * total, total * own[:, None], own[:, None] * own])
    count = n * (n - 1)
    apart = (products - 4 * rows + 2 * pairs) / (count * (n - 2) * (n - 3))
    first = (rows - pairs) / (count * (n - 2)) - apart
    second = pairs / count - apart
    scale = ((n - 1) / (n - 3)) ** 2 / count
    return torch.stack([4 * (n - 2) * first + 4 * second, 2 * second]) * scale


def _between_samples(parts: Tensor, total: Tensor) -> Tensor:
    """Covariance of the total when samples, each with several rows, are drawn, to first order; shape (2, 3, L, L).

    Raises:
        BatchTooSmallError: A single sample, which shows no variation.
    """
    if len(parts) < 2:
        raise BatchTooSmallError(
            "a batch of one sample with many rows shows no variation between samples; use batches of 2 or more"
        )
    own, m = total.diagonal(), len(parts)
    products = torch.stack([total * total, total * own[:, None], own[:, None] * own])
    first = 4 * m / (m - 1) * (_row_products(parts) - products / m)
    return torch.stack([first, torch.zeros_like(first)])
