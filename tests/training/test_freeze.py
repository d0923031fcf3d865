"""Freezing before or after a layer: what is held stays bit for bit, and everything else learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layerlens.augment.deep import DeepAugmentation
from layerlens.data import Dataset, dataset_from_arrays
from layerlens.errors import ConfigError, UnknownLayerError
from layerlens.training import loop
from layerlens.training.checkpoint import load_state
from layerlens.training.config import RunConfig, make_config
from layerlens.training.loop import Progress, resolve, train

MLP, RESNET = "mlp,width=8,depth=2", "resnet20-cifar"


def tiny() -> Dataset:
    rng = np.random.default_rng(0)
    y = np.arange(72) % 4
    patterns = np.random.default_rng(7).random((4, 1, 8, 8)) * 180
    x = (patterns[y] + rng.random((72, 1, 8, 8)) * 70).astype(np.uint8)
    return dataset_from_arrays("tiny", x[:64], y[:64], x[64:], y[64:])


def config(part: str | None, layer: str | None = None, **settings: Any) -> RunConfig:
    """Momentum and weight decay that would move whatever they can reach."""
    usual = {
        "model": MLP, "data": "tiny", "epochs": 2, "batch_size": 16, "learning_rate": 0.3, "warmup_epochs": 0,
        "momentum": 0.9, "weight_decay": 0.1, "projection": 8,
    }  # fmt: skip
    freeze = None if part is None else {"part": part, "layer": layer}
    return make_config({**usual, "freeze": freeze, **settings})


def weights(folder: Path, epoch: int) -> dict[str, Tensor]:
    return load_state(folder / "checkpoints" / f"epoch-{epoch:04d}.safetensors")[0]


def moved(folder: Path) -> dict[str, bool]:
    """Of each parameter and buffer, whether training changed a bit of it."""
    first, last = weights(folder, 0), weights(folder, 2)
    assert first.keys() == last.keys()
    return {name: not torch.equal(value, last[name]) for name, value in first.items()}


def begins(name: str, parts: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{part}.") for part in parts)


CUTS = [
    (MLP, "blocks.0", ("blocks.0",)),
    (MLP, "blocks.1.0", ("blocks.0", "blocks.1")),
    (MLP, "blocks.1", ("blocks.0", "blocks.1")),
    (RESNET, "relu", ("conv1", "bn1")),
    (RESNET, "layer2", ("conv1", "bn1", "layer1", "layer2")),
    (RESNET, "layer2.1", ("conv1", "bn1", "layer1", "layer2.0", "layer2.1")),
    (RESNET, "avgpool", ("conv1", "bn1", "layer1", "layer2", "layer3")),
]


@pytest.mark.parametrize("part", ["before", "after"])
@pytest.mark.parametrize(("model", "layer", "inside"), CUTS)
def test_what_is_frozen_stays_and_the_rest_moves(
    tmp_path: Path, model: str, layer: str, inside: tuple[str, ...], part: str
):
    train(config(part, layer, model=model), tmp_path, dataset=tiny(), device="cpu")
    changed = moved(tmp_path)
    assert {begins(name, inside) for name in changed} == {True, False}
    for name, moves in changed.items():
        assert moves == (begins(name, inside) != (part == "before")), name


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "supervised"},
        {"objective": "supcon"},
        {"objective": "moco", "moco": {"queue": 32, "bn_splits": 2}},
        {"optimizer": "lars"},
        {"nesterov": True},
        {"accumulate": 2},
        {"precision": "bf16-mixed"},
        {"objective": "supervised", "adalase": {"kinds": ["cutout"], "interval": 1}},
        {"dropout": {"kind": "forward", "rate": 0.2}},
    ],
    ids=["supervised", "supcon", "moco", "lars", "nesterov", "accumulate", "bf16", "adalase", "dropout"],
)
def test_it_stays_in_every_kind_of_run(tmp_path: Path, settings: dict[str, Any]):
    train(config("before", "layer2", model=RESNET, **settings), tmp_path, dataset=tiny(), device="cpu")
    inside = ("conv1", "bn1", "layer1", "layer2")
    assert all(moves != begins(name, inside) for name, moves in moved(tmp_path).items())


@pytest.mark.parametrize(("part", "layer"), [("before", "input"), ("after", "fc")])
def test_a_part_that_holds_nothing_is_refused(tmp_path: Path, part: str, layer: str):
    with pytest.raises(ConfigError, match=f"freeze. {part} '{layer}' holds nothing"):
        train(config(part, layer), tmp_path / "frozen", dataset=tiny(), device="cpu")
    assert not (tmp_path / "frozen").exists()


@pytest.mark.parametrize("part", ["before", "after"])
def test_what_is_frozen_are_the_weights_of_init(tmp_path: Path, part: str):
    train(config(None, model=RESNET), tmp_path / "first", dataset=tiny(), device="cpu")
    start = tmp_path / "first" / "checkpoints" / "epoch-0002.safetensors"
    chosen = config(part, "layer1", model=RESNET, init=str(start), seed=5)
    train(chosen, tmp_path / "second", dataset=tiny(), device="cpu")
    before, after = weights(tmp_path / "first", 2), weights(tmp_path / "second", 2)
    for name, value in before.items():
        held = begins(name, ("conv1", "bn1", "layer1")) == (part == "before")
        assert torch.equal(after[name], value) == held, name


def test_an_interrupted_frozen_run_ends_like_an_undisturbed_one(tmp_path: Path):
    chosen = config("before", "layer1", model=RESNET)

    def interrupt(progress: Progress) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    train(chosen, tmp_path / "whole", dataset=tiny(), device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(chosen, tmp_path / "run", dataset=tiny(), device="cpu", progress=interrupt)
    train(chosen, tmp_path / "run", dataset=tiny(), device="cpu")
    one, other = (weights(tmp_path / name, 2) for name in ("run", "whole"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# --- with Deep Augmentation ---


@pytest.mark.parametrize(("model", "layer"), [(MLP, "blocks.0"), (RESNET, "relu"), (RESNET, "layer2")])
@pytest.mark.parametrize("part", ["before", "after"])
def test_the_target_of_augment_is_the_cut_and_is_augmented_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, layer: str, part: str
):
    calls: list[bool] = []
    plain = DeepAugmentation.augment

    def note(self: DeepAugmentation, h: Tensor) -> Tensor:
        out = plain(self, h)
        if len(h) > 2:  # two rows are the trial before the run
            calls.append(not torch.equal(out, h))
        return out

    monkeypatch.setattr(DeepAugmentation, "augment", note)
    augment = {"layer": layer, "stop_gradient": True}
    train(config(part, model=model, augment=augment), tmp_path / "a", dataset=tiny(), device="cpu")
    assert calls == [True] * 6
    train(config(part, layer, model=model), tmp_path / "b", dataset=tiny(), device="cpu")
    one, other = moved(tmp_path / "a"), moved(tmp_path / "b")
    assert one == other, "the same is frozen"
    last = [weights(tmp_path / name, 2) for name in "ab"]
    differs = {name for name, value in last[0].items() if not torch.equal(value, last[1][name])}
    assert differs
    assert differs <= {name for name, moves in one.items() if moves}


def test_a_layer_of_freeze_of_its_own_goes_before_that_of_augment(tmp_path: Path):
    chosen = config("before", "layer1", model=RESNET, augment={"layer": "layer3"})
    train(chosen, tmp_path, dataset=tiny(), device="cpu")
    assert all(moves != begins(name, ("conv1", "bn1", "layer1")) for name, moves in moved(tmp_path).items())


# --- MoCo's key network ---


@pytest.mark.parametrize("part", ["before", "after"])
def test_the_key_network_is_frozen_alike(tmp_path: Path, part: str):
    chosen, data = (
        config(part, "layer1", model=RESNET, objective="moco", moco={"queue": 32, "key_momentum": 0.5}),
        tiny(),
    )
    trainer: Any = loop._Trainer(resolve(chosen, data), data, tmp_path, "cpu", None)
    keys = trainer.method.keys
    begin = {name: value.clone() for name, value in keys.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        trainer._set_modes()
        for rows in trainer.order.epoch(0)[:2, 0]:
            trainer._train_step(rows)
            trainer.step += 1
    for name, value in keys.state_dict().items():
        held = begins(name, ("conv1", "bn1", "layer1")) == (part == "before")
        assert torch.equal(value, begin[name]) == held, name
    norms = {name for name, m in keys.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.training}
    assert norms == {n for n, m in trainer.network.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.training}
    assert norms


# --- what can't be ---


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        (
            {"part": "after", "layer": "input"},
            ConfigError,
            r"nothing is left to train: \[freeze\] holds every parameter; freeze less",
        ),
        ({"part": "before", "layer": "linear"}, ConfigError, r"nothing is left to train"),
        ({"part": "before", "layer": "layer9"}, UnknownLayerError, r"no layer 'layer9' in CifarResNet; closest: layer"),
        (
            {"part": "before", "layer": "bn1"},
            ConfigError,
            r"\[freeze\] at 'bn1', a batch norm; choose the layer or block",
        ),
        (
            {"part": "before", "augment": {"layer": "layer1,layer2"}},
            ConfigError,
            r"\[freeze\] needs one layer to part the network at; got \['layer1', 'layer2'\]\. Set freeze\.layer",
        ),
        ({"part": "after", "augment": {"layer": "all"}}, ConfigError, r"needs one layer to part the network at"),
    ],
)
def test_what_can_not_be_frozen_is_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], match: str
):
    with pytest.raises(error, match=match):
        train(config(model=RESNET, **settings), tmp_path / "run", dataset=tiny(), device="cpu")
    assert not (tmp_path / "run").exists()


def test_after_a_batch_norm_may_be_frozen(tmp_path: Path):
    """The batch norm itself learns then, so its output can be augmented."""
    train(config("after", "bn1", model=RESNET), tmp_path, dataset=tiny(), device="cpu")
    assert all(moves == begins(name, ("conv1", "bn1")) for name, moves in moved(tmp_path).items())
