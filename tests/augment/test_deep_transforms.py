"""Deep Augmentation's further transforms, its pairs, and its company: configuration, autocast, compilation."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layerlens.augment.deep import RANDOM, TRANSFORMS, DeepAugmentation
from layerlens.augment.transforms import (
    dropout_channels,
    dropout_positions,
    gaussian_noise,
    remove_principal_components,
)
from layerlens.data import Dataset, dataset_from_arrays
from layerlens.errors import ConfigError, ShapeError, UnknownLayerError, UnknownNameError
from layerlens.training import loop
from layerlens.training.config import make_config
from layerlens.training.loop import train
from layerlens.training.network import augmented_layers, build_start


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


@pytest.fixture
def global_seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def source(own: bool) -> torch.Generator | None:
    return seeded(5) if own else None


# --- channels and positions ---

DROPS: list[Any] = [
    # what is dropped together has one number along these axes
    pytest.param(dropout_channels, (60, 50, 4, 3), (2, 3), id="maps"),
    pytest.param(dropout_channels, (60, 5, 50), (1,), id="features of tokens"),
    pytest.param(dropout_channels, (60, 50), (), id="numbers"),
    pytest.param(dropout_positions, (60, 3, 7, 8), (1,), id="places of maps"),
    pytest.param(dropout_positions, (60, 50, 4), (2,), id="tokens"),
]


@pytest.mark.usefixtures("global_seed")
@pytest.mark.parametrize("own", [True, False], ids=["generator", "global"])
@pytest.mark.parametrize("rate", [0.2, 0.7])
@pytest.mark.parametrize(("drop", "shape", "axes"), DROPS)
def test_what_is_dropped_together_is_dropped_whole(drop, shape: tuple[int, ...], axes, rate: float, own: bool):
    factor = drop(torch.ones(shape), rate, generator=source(own))
    first = factor
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    assert torch.equal(factor, first.expand_as(factor)), "a group is dropped or kept as a whole"
    kept = first != 0
    torch.testing.assert_close(first[kept], torch.full_like(first[kept], 1 / (1 - rate)))
    n = kept.numel()
    share = 1 - kept.double().mean().item()
    assert share == pytest.approx(rate, abs=4 * (rate * (1 - rate) / n) ** 0.5)
    assert factor.double().mean().item() == pytest.approx(1, abs=4 * (rate / (1 - rate) / n) ** 0.5), "expectation"


@pytest.mark.parametrize(("drop", "shape", "axes"), DROPS)
def test_groups_and_samples_are_drawn_apart(drop, shape: tuple[int, ...], axes):
    factor = drop(torch.ones(shape), 0.5, generator=seeded(2))
    for axis in axes:
        factor = factor.narrow(axis, 0, 1)
    rows = factor.reshape(shape[0], -1)
    assert not (rows == rows[:1]).all(), "each sample has its own draw"
    assert not (rows == rows[:, :1]).all(), "each group has its own draw"


@pytest.mark.parametrize("drop", [dropout_channels, dropout_positions])
@pytest.mark.parametrize(("rate", "factor"), [(0.0, 1.0), (1.0, 0.0)])
def test_drops_at_their_ends(drop, rate: float, factor: float):
    h = drawn(6, 5, 4, 4)
    assert torch.equal(drop(h, rate, generator=seeded()), factor * h)


@pytest.mark.parametrize(
    ("drop", "shape", "match"),
    [
        (dropout_positions, (4, 3), r"dropout of positions needs activations with \[3, 4\] dimensions; got \(4, 3\)"),
        (dropout_channels, (4,), r"dropout of channels needs activations with \[2, 3, 4\] dimensions; got \(4,\)"),
        (dropout_channels, (4, 3, 2, 2, 2), r"got \(4, 3, 2, 2, 2\)"),
    ],
)
def test_activations_without_channels_or_positions_are_refused(drop, shape: tuple[int, ...], match: str):
    with pytest.raises(ShapeError, match=match):
        drop(torch.ones(shape), 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", RANDOM)
def test_a_random_transform_keeps_the_dtype(name: str, own: bool, dtype: torch.dtype):
    h = drawn(4, 3, 2, 2).to(dtype)
    out = RANDOM[name](h, 0.5, generator=source(own))
    assert out.dtype == dtype
    assert out.isfinite().all()


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_transform_is_a_function_of_its_generator(name: str):
    h, before = drawn(8, 6, 4), torch.get_rng_state()
    outs = [RANDOM[name](h, 0.5, generator=seeded(s)) for s in (0, 0, 1)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", [n for n in RANDOM if n != "noise"])
def test_a_drop_passes_the_gradient_of_what_it_keeps(name: str):
    h = torch.ones(40, 5, 6, requires_grad=True)
    out = RANDOM[name](h, 0.5, generator=seeded())
    out.sum().backward()
    assert torch.equal(h.grad, out.detach())


# --- noise ---


@pytest.mark.usefixtures("global_seed")
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("shape", [(6, 20_000), (6, 200, 100), (6, 20, 20, 50)])
def test_noise_is_as_strong_as_its_rate_times_the_samples_own_deviation(shape: tuple[int, ...], own: bool):
    scale = torch.tensor([0.0, 0.01, 1.0, 3.0, 10.0, 1000.0]).view(-1, *[1] * (len(shape) - 1))
    h = 7 + scale * drawn(*shape)
    noise = (gaussian_noise(h, 0.3, generator=source(own)) - h).flatten(1)
    expected = 0.3 * h.flatten(1).numpy().std(1, dtype=np.float64)
    np.testing.assert_allclose(noise.numpy().std(1, dtype=np.float64), expected, rtol=0.03, atol=1e-6)
    assert (noise.mean(1).abs().numpy() <= 5 * expected / 20_000**0.5 + 1e-6).all()


def test_noise_of_rate_0_is_none_and_its_strength_is_a_constant():
    h = drawn(5, 30)
    assert torch.equal(gaussian_noise(h, 0.0), h)
    h.requires_grad_()
    gaussian_noise(h, 0.5, generator=seeded()).sum().backward()
    assert torch.equal(h.grad, torch.ones(5, 30))


def test_noise_takes_one_number_per_sample():
    """`Activations, shape (n, …)`, as the other elementwise transform does; one number has no deviation of its own."""
    assert gaussian_noise(torch.ones(4), 0.5).shape == (4,)


# --- PCA per position ---


def by_definition(rows: np.ndarray, components: int, kept: int = 6) -> np.ndarray:
    """mu + (I − C Cᵀ)(h − mu), C columns of the right singular vectors."""
    mean = rows.mean(0)
    kept = min(kept, len(rows) - 1, rows.shape[1])
    basis = np.linalg.svd(rows - mean, full_matrices=False)[2][:kept].T
    chosen = basis[:, :components] if components > 0 else basis[:, components:]
    return rows - (rows - mean) @ chosen @ chosen.T


def spread(*shape: int) -> Tensor:
    """Float64, with directions of clearly different size along the last axis."""
    rows = torch.randn(*shape, generator=seeded(8), dtype=torch.float64)
    mixed = torch.linalg.qr(torch.randn(shape[-1], shape[-1], generator=seeded(9), dtype=torch.float64))[0]
    return rows * 0.6 ** torch.arange(shape[-1]) @ mixed + 2


@pytest.mark.parametrize("components", [1, 2, 6, -1, -3])
@pytest.mark.parametrize("shape", [(6, 5, 9), (3, 2, 12)], ids=["many tokens", "few tokens"])
def test_pca_per_token_agrees_with_numpy(shape: tuple[int, ...], components: int):
    h = spread(*shape)
    expected = by_definition(h.reshape(-1, shape[-1]).numpy(), components).reshape(shape)
    out = DeepAugmentation("0", transform="pca", fraction=1.0, components=components, per_token=True).augment(h)
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-4)
    assert np.abs(expected - h.numpy()).max() > 0.01


@pytest.mark.parametrize("components", [1, 2, -1, -2])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_pca_per_place_of_a_map_agrees_with_numpy(components: int, memory: torch.memory_format):
    h = spread(4, 3, 5, 7).permute(0, 3, 1, 2).contiguous(memory_format=memory)  # (n, c, h, w)
    rows = h.permute(0, 2, 3, 1).reshape(-1, 7).numpy()
    expected = by_definition(rows, components).reshape(4, 3, 5, 7).transpose(0, 3, 1, 2)
    out = remove_principal_components(h, components, per_token=True)
    assert out.shape == h.shape
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-4)
    assert not torch.allclose(out, remove_principal_components(h, components), atol=1e-2)


def test_pca_of_both_ends_meet_where_all_directions_are_named():
    h = spread(30, 6)
    torch.testing.assert_close(remove_principal_components(h, 6), remove_principal_components(h, -6))
    torch.testing.assert_close(remove_principal_components(h, 6), h.mean(0).expand(30, 6), atol=1e-4, rtol=0)


# --- one view of each pair ---


def changed(out: Tensor) -> Tensor:
    """Rows that were zeroed, of ones; each whole or not at all."""
    rows = out.reshape(len(out), -1)
    assert ((rows == 0).all(1) | (rows == 1).all(1)).all()
    return rows[:, 0] == 0


def one_of(layers: str | list[str], **options: Any) -> DeepAugmentation:
    return DeepAugmentation(layers, transform=torch.zeros_like, pairs="one", generator=seeded(4), **options)


@pytest.mark.parametrize("shape", [(40,), (40, 3), (40, 5, 3), (40, 2, 4, 4)])
def test_exactly_one_view_of_each_pair_is_transformed(shape: tuple[int, ...]):
    first, second = changed(one_of("0").augment(torch.ones(shape))).view(2, -1)
    assert torch.equal(first, ~second)
    assert first.any()
    assert second.any()


def test_the_coin_is_fair_and_thrown_for_each_pair():
    n = 20_000
    first = changed(one_of("0").augment(torch.ones(2 * n, 1)))[:n]
    assert first.double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / n**0.5)
    runs = (first[1:] != first[:-1]).double().mean().item()
    assert runs == pytest.approx(0.5, abs=4 * 0.5 / n**0.5), "neighbours have coins of their own"


class Watched(nn.Sequential):
    """Three identities; `seen` keeps which rows of ones each layer and the output got as zeros."""

    def __init__(self) -> None:
        super().__init__(Ones(), Ones(), Ones())


class Ones(nn.Module):
    """Keeps which rows came in as zeros, and hands on ones."""

    def forward(self, x: Tensor) -> Tensor:
        self.came = x.reshape(len(x), -1)[:, 0] == 0
        return torch.ones_like(x)


PAIRED: list[Any] = [
    ["0", "1"],
    ["1", "0"],
    ["1", "0", "input"],
    pytest.param(["1", "input", "0"]),
    pytest.param(["input", "0", "1"]),
]


@pytest.mark.parametrize("layers", PAIRED, ids=str)
def test_the_coins_are_the_same_at_all_layers_of_a_pass_and_fresh_in_the_next(layers: list[str]):
    model, passes = Watched(), []
    with one_of(layers).attached(model):
        for _ in range(3):
            model(torch.ones(32, 4))
            places = [m.came for m in model] if "input" in layers else [m.came for m in model][1:]
            assert all(torch.equal(place, places[0]) for place in places)
            assert torch.equal(places[0][:16], ~places[0][16:])
            passes.append(places[0])
    assert not torch.equal(passes[0], passes[1])
    assert not torch.equal(passes[1], passes[2])


def test_the_pairs_of_a_pass_that_failed_are_forgotten():
    model, operator = Watched(), one_of("0")
    with operator.attached(model):
        model(torch.ones(32, 4))
        before = model[1].came
        handle = model[2].register_forward_pre_hook(lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            model(torch.ones(32, 4))
        handle.remove()
        failed = model[1].came
        model(torch.ones(32, 4))
    assert not torch.equal(before, failed)
    assert not torch.equal(failed, model[1].came)


def test_an_odd_batch_has_no_pairs():
    model = Watched()
    match = r"pairs='one' needs 2n rows, i and i \+ n views of one image; got 7"
    with pytest.raises(ShapeError, match=match), one_of("0").attached(model):
        model(torch.ones(7, 4))
    with one_of("0").attached(model):
        model.eval()(torch.ones(7, 4))  # nothing is augmented


def test_pairs_know_their_words():
    with pytest.raises(ConfigError, match=r"pairs='one' with fraction=0\.3; .*leave it at 0\.5"):
        DeepAugmentation("0", pairs="one", fraction=0.3)
    with pytest.raises(UnknownNameError, match="unknown pairs 'on'; closest: one"):
        DeepAugmentation("0", pairs="on")


# --- stop-gradient with each transform ---


@pytest.mark.usefixtures("global_seed")
@pytest.mark.parametrize("pairs", ["independent", "one"])
@pytest.mark.parametrize("transform", [*TRANSFORMS, "callable"])
def test_stop_gradient_blocks_the_transformed_samples_alone(transform: str, pairs: str):
    h = spread(64, 6, 5).float().requires_grad_()
    chosen: Any = torch.sin if transform == "callable" else transform
    operator = DeepAugmentation("0", transform=chosen, stop_gradient=True, pairs=pairs, generator=seeded(3))
    out = operator.augment(h)
    out.sum().backward()
    masked = (out != h).flatten(1).any(1)
    assert 10 < masked.sum() < 54
    assert not h.grad[masked].any()
    assert torch.equal(h.grad[~masked], torch.ones_like(h.grad[~masked]))
    passing = DeepAugmentation("0", transform=chosen, pairs=pairs, generator=seeded(3))
    g = h.detach().clone().requires_grad_()
    again = passing.augment(g)
    assert torch.equal(again, out), "the value is the same"
    weights = drawn(64, 6, 5)
    (again * weights).sum().backward()
    assert g.grad[masked].any()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("stop", [True, False])
def test_every_transform_trains_a_net_under_autocast(transform: str, stop: bool):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    operator = DeepAugmentation(
        ["input", "1", "2"], transform=transform, stop_gradient=stop, per_token=True, generator=seeded()
    )
    with operator.attached(model), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(drawn(16, 3, 6, 6)).float().square().mean()
    loss.backward()
    assert loss.isfinite()
    for p in model.parameters():
        assert p.dtype == p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()


def test_under_autocast_a_layer_gets_what_it_got():
    """The operator changes values, not precision."""
    model, seen = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 2)), []
    model[1].register_forward_pre_hook(lambda _m, args: seen.append(args[0].dtype))
    for transform in TRANSFORMS:
        if transform != "position-dropout":  # no positions here
            operator = DeepAugmentation("0", transform=transform)
            with operator.attached(model), torch.autocast("cpu", dtype=torch.bfloat16):
                model(drawn(8, 4))
    assert set(seen) == {torch.bfloat16}


# --- by configuration ---


def tiny() -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (72, 1, 8, 8), dtype=np.uint8)
    return dataset_from_arrays("tiny", x[:64], np.arange(64) % 4, x[64:], np.arange(8) % 4)


def layers_of(model: str, selection: str) -> list[str]:
    config = make_config({"model": model, "augment": {"layer": selection}})
    start = build_start(config, tiny())
    return augmented_layers(config, start.network, start.example)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("all", ["relu", "layer1", "layer2", "layer3", "avgpool", "linear"]),
        ("layer2", ["layer2"]),
        ("layer3,input,layer1", ["input", "layer1", "layer3"]),
        ("layer?", ["layer1", "layer2", "layer3"]),
        ("input", ["input"]),
    ],
)
def test_a_selection_means_layers_in_execution_order(selection: str, expected: list[str]):
    assert layers_of("resnet20-cifar", selection) == expected


def test_a_selection_that_matches_nothing_is_refused():
    with pytest.raises(UnknownLayerError, match=r"no layer 'layer9'"):
        layers_of("resnet20-cifar", "layer1,layer9")


@pytest.mark.parametrize("pairs", ["independent", "one"])
@pytest.mark.parametrize("selection", ["all", "relu,layer2", "layer?"])
def test_several_layers_train_by_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, selection: str, pairs: str
):
    calls: list[tuple[int, ...]] = []
    plain = DeepAugmentation.augment
    monkeypatch.setattr(DeepAugmentation, "augment", lambda self, h: calls.append(tuple(h.shape)) or plain(self, h))
    config = make_config(
        {
            "model": "resnet20-cifar", "data": "tiny", "epochs": 1, "batch_size": 16,
            "augment": {"layer": selection, "transform": "channel-dropout", "pairs": pairs, "stop_gradient": True},
        }
    )  # fmt: skip
    train(config, tmp_path / "run", dataset=tiny(), device="cpu")
    per_step = {"all": 6, "relu,layer2": 2, "layer?": 3}[selection]
    assert {shape[0] for shape in calls[:per_step]} == {2}, "the trial before the run"
    calls = calls[per_step:]
    assert len(calls) == 3 * per_step, "three steps; the k-NN runs in eval mode"
    assert {shape[0] for shape in calls} == {32}


def test_each_setting_reaches_the_operator(tmp_path: Path):
    settings = {
        "layer": "layer?", "transform": "pca", "rate": 0.25, "fraction": 0.75, "stop_gradient": True,
        "components": -2, "per_token": True,
    }  # fmt: skip
    config = make_config({"model": "resnet20-cifar", "batch_size": 16, "augment": settings})
    (operator,) = loop._Trainer(loop.resolve(config, tiny()), tiny(), tmp_path, "cpu", None).operators
    assert operator.layers == ["layer1", "layer2", "layer3"]
    for name, value in settings.items():
        if name != "layer":
            assert getattr(operator, name) == value


# --- compiled ---


def zero(h: Tensor) -> Tensor:
    return h * 0


def small(kind: str) -> tuple[nn.Module, Tensor, str]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "mlp":
            return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), drawn(256, 6), "1"
        conv = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))
        return conv, drawn(256, 2, 6, 6), "1"


def compiled(model: nn.Module, backend: str) -> Any:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.fixture(params=["aot_eager", "inductor"])
def backend(request: pytest.FixtureRequest):
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about the compiler's insides
        torch.manual_seed(1)
        yield request.param
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "transform"),
    [(kind, name) for kind in ("mlp", "conv") for name in RANDOM if (kind, name) != ("mlp", "position-dropout")],
)
def test_compiled_at_rate_0_is_the_plain_model(kind: str, transform: str, backend: str):
    model, x, layer = small(kind)
    expected = model(x)
    with DeepAugmentation(layer, transform=transform, rate=0.0).attached(model):
        out = compiled(model, backend)(x)
    torch.testing.assert_close(out, expected)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_compiled_gradients_are_those_of_eager(kind: str, fraction: float, stop: bool, backend: str):
    """Zeros tell which samples were transformed; the same mask is then applied by hand, uncompiled."""
    model, x, layer = small(kind)
    seen: list[Tensor] = []
    operator = DeepAugmentation(layer, transform=zero, fraction=fraction, stop_gradient=stop)
    with operator.attached(model):
        runs = compiled(model, backend)
        for _ in range(2):  # the second run has compiled code behind it
            model.zero_grad()
            out = runs(x)
            out.square().mean().backward()
            seen.append(out.detach())
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    blank = model[2:](torch.zeros_like(model[:2](x[:1]))).detach()
    mask = torch.isclose(seen[1], blank, atol=1e-6).all(1)
    if fraction == 1:
        assert mask.all()
    else:
        assert mask.double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 16)
        assert not torch.equal(seen[0], seen[1]), "each pass draws anew"
    h = model[:2](x)
    h = torch.where(mask.view(-1, *[1] * (h.ndim - 1)), zero(h.detach() if stop else h), h)
    model[2:](h).square().mean().backward()
    for own, p in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(own, p.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_compiled_pairs_hold_at_several_layers(kind: str, backend: str):
    model, x, _ = small(kind)
    with DeepAugmentation(["0", "1"], transform=zero, pairs="one").attached(model):
        runs = compiled(model, backend)
        outs = [runs(x).detach() for _ in range(2)]
    blank = model[2:](torch.zeros_like(model[:2](x[:1]))).detach()
    masks = [torch.isclose(out, blank, atol=1e-6).all(1) for out in outs]
    for mask in masks:
        assert torch.equal(mask[:128], ~mask[128:])
    assert not torch.equal(masks[0], masks[1])
