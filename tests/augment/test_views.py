"""SimCLR's random views: geometry read off coordinate ramps, colours against torchvision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as tv

from layerlens.augment.views import Views, _brightness, _contrast, _hue, _saturation, luma, usual_views

STILL = {"scale": 1.0, "flip": 0.0, "jitter": (0.0, 0.0, 0.0, 0.0), "grey": 0.0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int = 6, channels: int = 3, height: int = 8, width: int = 8) -> Tensor:
    return torch.rand(n, channels, height, width, generator=seeded(99))


def ramps(n: int, size: int = 64) -> Tensor:
    """Channel 0 is x, channel 1 is y, both from 0 to 1; channel 2 is 0."""
    line = torch.linspace(0, 1, size)
    image = torch.stack([line.expand(size, size), line[:, None].expand(size, size), torch.zeros(size, size)])
    return image.expand(n, 3, size, size).contiguous()


def kept_share(views: Views, n: int = 400) -> Tensor:
    """Share of the area that each crop keeps, from the ramps' slopes in the middle of the crop."""
    out = views.crop(ramps(n), seeded())
    wide = (out[:, 0, 32, 33] - out[:, 0, 32, 32]).abs() * 63
    high = (out[:, 1, 33, 32] - out[:, 1, 32, 32]).abs() * 63
    return wide * high


@pytest.mark.parametrize("channels", [1, 3])
def test_views_keep_shape_and_range(channels: int):
    images = noise(64, channels)
    out = Views()(images, seeded())
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert out.min() >= -1e-6
    assert out.max() <= 1 + 1e-6
    assert not torch.allclose(out, images, atol=0.1)


def test_views_do_not_write_into_the_images():
    images = noise()
    before = images.clone()
    Views()(images, seeded())
    assert torch.equal(images, before)


def test_the_generator_decides_everything():
    images, state = noise(), torch.get_rng_state()
    one, same, other = (Views()(images, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_two_copies_of_an_image_get_two_views():
    images = noise(1).expand(2, 3, 8, 8).contiguous()
    one, other = Views()(images, seeded())
    assert not torch.allclose(one, other, atol=1e-2)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 16), (12, 7)])
def test_views_with_everything_off_change_nothing(height: int, width: int):
    images = noise(5, 3, height, width)
    torch.testing.assert_close(Views(**STILL)(images, seeded()), images, atol=1e-5, rtol=0)


def test_flip_probability_1_mirrors_every_image():
    images = noise()
    torch.testing.assert_close(Views(**{**STILL, "flip": 1.0})(images, seeded()), images.flip(3), atol=1e-5, rtol=0)


def test_flip_is_a_probability():
    out = Views(**{**STILL, "flip": 0.25})(ramps(4000, 4), seeded())
    mirrored = out[:, 0, 0, 0] > out[:, 0, 0, -1]
    assert mirrored.double().mean().item() == pytest.approx(0.25, abs=0.03)


def test_crops_stay_inside_the_image():
    """Outside the image, reflection would turn the ramps around."""
    out = Views(flip=0.0).crop(ramps(400), seeded())
    assert out[:, 0].diff(dim=2).min() >= -1e-5
    assert out[:, 1].diff(dim=1).min() >= -1e-5
    assert out[:, 0].amin() < 0.02, "some crop reaches each edge"
    assert out[:, 0].amax() > 0.98


@pytest.mark.parametrize("scale", [0.2, 0.5, 0.9])
def test_a_crop_keeps_at_least_its_scale(scale: float):
    shares = kept_share(Views(scale=scale))
    assert shares.min() >= scale - 1e-3
    assert shares.max() <= 1 + 1e-3
    assert shares.std() > 0.01


def test_crops_have_the_aspect_ratios_asked_for():
    out = Views(scale=0.2, ratio=2.0, flip=0.0).crop(ramps(400), seeded())
    wide = out[:, 0, 32, 33] - out[:, 0, 32, 32]
    high = out[:, 1, 33, 32] - out[:, 1, 32, 32]
    aspect = wide / high
    assert 0.5 - 1e-3 <= aspect.min() < 0.6
    assert 1.7 < aspect.max() <= 2 + 1e-3


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.0, 1.4])
@pytest.mark.parametrize(
    ("ours", "theirs", "atol"),
    [
        (_brightness, tv.adjust_brightness, 1e-5),
        (_contrast, tv.adjust_contrast, 1e-4),  # torchvision rounds the weight of red to 0.2989
        (_saturation, tv.adjust_saturation, 1e-4),
    ],
    ids=["brightness", "contrast", "saturation"],
)
def test_colours_agree_with_torchvision(ours, theirs, atol: float, factor: float):
    images = noise(16)
    amount = torch.full((16, 1, 1, 1), factor - 1)
    torch.testing.assert_close(ours(images, amount).clamp(0, 1), theirs(images, factor), atol=atol, rtol=0)


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.0, 0.03, 0.1, 0.5])
def test_hue_agrees_with_torchvision(turns: float):
    images = noise(16)
    images[0] = 0.5  # grey: hue is undefined
    images[1, :, 0, 0] = torch.tensor([1.0, 1.0, 0.0])  # two channels tie for the maximum
    amount = torch.full((16, 1, 1, 1), turns)
    torch.testing.assert_close(_hue(images, amount).clamp(0, 1), tv.adjust_hue(images, turns), atol=1e-5, rtol=0)


def test_amounts_are_per_image():
    images = noise(2)
    amount = torch.tensor([-0.3, 0.2]).view(2, 1, 1, 1)
    for change in (_brightness, _contrast, _saturation, _hue):
        together = change(images, amount)
        for i in range(2):
            torch.testing.assert_close(together[i : i + 1], change(images[i : i + 1], amount[i : i + 1]))


def test_jitter_strength_bounds_the_change():
    images = torch.full((2000, 3, 2, 2), 0.5)
    out = Views(**{**STILL, "jitter": (0.4, 0, 0, 0), "jitter_p": 1.0})(images, seeded())
    factors = out[:, 0, 0, 0] / 0.5
    assert 0.6 - 1e-5 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4 + 1e-5


def test_jitter_reaches_a_share_of_the_images():
    images = torch.full((4000, 3, 2, 2), 0.5)
    out = Views(**{**STILL, "jitter": (0.4, 0, 0, 0), "jitter_p": 0.3})(images, seeded())
    assert (out != images).any(3).any(2).any(1).double().mean().item() == pytest.approx(0.3, abs=0.03)


def test_grey_makes_the_channels_equal_to_the_luma():
    images = noise()
    out = Views(**{**STILL, "grey": 1.0})(images, seeded())
    expected = 0.299 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]
    torch.testing.assert_close(out, expected.expand_as(out), atol=1e-5, rtol=0)
    torch.testing.assert_close(luma(images), expected)


def test_grey_is_a_probability():
    out = Views(**{**STILL, "grey": 0.2})(noise(4000, 3, 2, 2), seeded())
    colourless = (out.amax(1) - out.amin(1)).amax((1, 2)) < 1e-6
    assert colourless.double().mean().item() == pytest.approx(0.2, abs=0.025)


def test_images_with_one_channel_skip_what_needs_colour():
    images = noise(8, 1)
    views = Views(**{**STILL, "jitter": (0, 0, 0.9, 0.5), "jitter_p": 1.0, "grey": 1.0})
    torch.testing.assert_close(views(images, seeded()), images, atol=1e-5, rtol=0)


def test_images_with_one_channel_get_brightness_and_contrast():
    images = noise(8, 1)
    out = Views(**{**STILL, "jitter": (0.4, 0.4, 0, 0), "jitter_p": 1.0})(images, seeded())
    assert ((out - images).abs().amax((1, 2, 3)) > 0.01).all()


def test_usual_views_for_digits_neither_mirror_nor_lose_colour():
    assert usual_views() == Views()
    mild = usual_views(flip=False)
    assert (mild.flip, mild.grey, mild.scale) == (0.0, 0.0, 0.4)
