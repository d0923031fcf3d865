"""Random views of images, a whole batch at once, wherever the batch lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class Views:
    """SimCLR's random views: crop, flip, colour jitter, grey.

    Attributes:
        scale: Smallest share of the image's area that a crop keeps, in (0, 1]; 1 switches cropping off.
        ratio: Largest aspect ratio of a crop; its inverse is the smallest.
        flip: Probability of a horizontal flip.
        jitter: Strengths of brightness, contrast, saturation and hue; a jitter is applied with `jitter_p`.
        jitter_p: Probability that a sample is jittered.
        grey: Probability that a sample loses its colour.

    Source:
        Chen et al. 2020, arXiv:2002.05709; CIFAR settings as in methods.md, section 1.
    """

    scale: float = 0.2
    ratio: float = 4 / 3
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_p: float = 0.8
    grey: float = 0.2

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """One random view of each image.

        Args:
            images: Shape (n, c, h, w), float in [0, 1].
            generator: Draws everything, on the CPU, so that all devices see the same views.

        Returns:
            The same shape and range.
        """
        out = self.crop(images, generator)
        if any(self.jitter) and self.jitter_p:
            out = self.recolour(out, generator)
        if self.grey and images.shape[1] == 3:
            chosen = _chance(len(out), self.grey, generator, out.device)
            out = torch.where(chosen, luma(out), out)
        return out

    def crop(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Random resized crop and flip in one bilinear sampling; a crop stays inside the image."""
        n, _, height, width = images.shape
        area = torch.empty(n).uniform_(self.scale, 1.0, generator=generator)
        spread = torch.log(torch.tensor(self.ratio)).item()
        aspect = torch.empty(n).uniform_(-spread, spread, generator=generator).exp()
        wide = torch.minimum(torch.maximum((area * aspect * height / width).sqrt(), area), torch.ones(n))
        high = area / wide  # shares of the image's sides: a crop keeps its area even where its aspect does not fit
        x = (torch.rand(n, generator=generator) * 2 - 1) * (1 - wide)
        y = (torch.rand(n, generator=generator) * 2 - 1) * (1 - high)
        flipped = torch.rand(n, generator=generator) < self.flip
        theta = torch.zeros(n, 2, 3)
        theta[:, 0, 0], theta[:, 0, 2] = torch.where(flipped, -wide, wide), x
        theta[:, 1, 1], theta[:, 1, 2] = high, y
        grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    def recolour(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Brightness, contrast, saturation and hue, in an order drawn once per batch."""
        n, colour = len(images), images.shape[1] == 3
        chosen = _chance(n, self.jitter_p, generator, images.device)
        strengths = zip((_brightness, _contrast, _saturation, _hue), self.jitter, strict=True)
        steps = [step for step in strengths if step[1] and (colour or step[0] not in (_saturation, _hue))]
        out = images
        for k in torch.randperm(len(steps), generator=generator).tolist():
            change, strength = steps[k]
            amount = torch.empty(n, 1, 1, 1).uniform_(-strength, strength, generator=generator)
            out = change(out, amount.to(images.device)).clamp(0, 1)
        return torch.where(chosen, out, images)


def usual_views(*, flip: bool = True) -> Views:
    """SimCLR's views; for images that must not be mirrored, such as digits, milder crops and no colour loss."""
    return Views() if flip else Views(scale=0.4, flip=0.0, grey=0.0)


def luma(images: Tensor) -> Tensor:
    """Grey value of each pixel (ITU-R 601), shape (n, 1, h, w)."""
    if images.shape[1] == 1:
        return images
    weights = images.new_tensor(_GREY).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def _chance(n: int, p: float, generator: torch.Generator, device: torch.device) -> Tensor:
    return (torch.rand(n, generator=generator) < p).view(-1, 1, 1, 1).to(device)


def _brightness(x: Tensor, amount: Tensor) -> Tensor:
    return x * (1 + amount)


def _contrast(x: Tensor, amount: Tensor) -> Tensor:
    return torch.lerp(luma(x).mean((2, 3), keepdim=True), x, 1 + amount)


def _saturation(x: Tensor, amount: Tensor) -> Tensor:
    return torch.lerp(luma(x), x, 1 + amount)


def _hue(x: Tensor, amount: Tensor) -> Tensor:
    """Shift the hue of HSV by `amount` turns."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = high - low
    safe = torch.where(chroma > 0, chroma, 1.0)
    r, g, b = x.unbind(1)
    hr, hg, hb = (((a - c).unsqueeze(1) / safe) for a, c in ((g, b), (b, r), (r, g)))
    hue = torch.where(high == r.unsqueeze(1), hr, torch.where(high == g.unsqueeze(1), hg + 2, hb + 4)) / 6 + amount
    offsets = x.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)
    k = (offsets + hue * 6) % 6
    return high - chroma * torch.minimum(k, 4 - k).clamp(0, 1)
