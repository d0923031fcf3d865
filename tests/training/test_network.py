"""The network of a run, and what load_network believes of a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layerlens.data import Dataset, dataset_from_arrays
from layerlens.errors import CheckpointError, ConfigError
from layerlens.models import ProjectionHead
from layerlens.training.checkpoint import save_checkpoint
from layerlens.training.config import RunConfig, make_config
from layerlens.training.network import build_network, head_of, load_network

MODEL = "mlp,width=6,depth=1"


def data(channels: int = 1, size: int = 4, labels: bool = True) -> Dataset:
    images = np.zeros((12, channels, size, size), np.uint8)
    y = np.arange(12) % 3 if labels else None
    return dataset_from_arrays("tiny", images, y, images, y)


def config(**settings: Any) -> RunConfig:
    return make_config({"model": MODEL, "projection": 5, **settings})


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A checkpoint as `train` writes it, and the network in it."""
    chosen, dataset = config(), data()
    network = build_network(chosen, dataset)
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, network, metadata())
    return path, network


def metadata(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "input_shape": [1, 4, 4], "head": {"kind": "projection", "out": 5}, "epoch": 7, **changes}


def rewritten(path: Path, network: nn.Module, **changes: Any) -> Path:
    save_checkpoint(path, network, metadata(**changes))
    return path


# --- building ---


def test_a_contrastive_run_ends_in_a_projection_head():
    network = build_network(config(), data())
    assert isinstance(network.fc, ProjectionHead)
    assert network(torch.zeros(2, 1, 4, 4)).shape == (2, 5)
    assert head_of(config(), data()) == {"kind": "projection", "out": 5}


def test_a_supervised_run_ends_in_a_classifier():
    network = build_network(config(objective="supervised"), data())
    assert isinstance(network.fc, nn.Linear)
    assert network(torch.zeros(2, 1, 4, 4)).shape == (2, 3)
    assert head_of(config(objective="supervised"), data()) == {"kind": "linear", "out": 3}


def test_supervised_training_needs_labels():
    with pytest.raises(ConfigError, match=r"needs labels; tiny has none\. Use --objective simclr"):
        build_network(config(objective="supervised"), data(labels=False))


def test_fresh_weights_depend_on_the_seed_alone():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        state = torch.get_rng_state()
        first = build_network(config(seed=1), data())
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(6)
        assert same(build_network(config(seed=1), data()), first)
        assert not same(build_network(config(seed=2), data()), first)


# --- loading ---


def test_a_checkpoint_of_ours_tells_everything(saved: tuple[Path, nn.Module]):
    path, network = saved
    for dataset in (None, data()):
        found, told = load_network(path, dataset=dataset)
        assert same(found, network)
        assert told == metadata()


def test_the_untrained_twin_has_fresh_weights(saved: tuple[Path, nn.Module]):
    path, network = saved
    twin, told = load_network(path, untrained=True, seed=4)
    assert told["epoch"] == 7
    assert [(k, v.shape) for k, v in twin.state_dict().items()] == [
        (k, v.shape) for k, v in network.state_dict().items()
    ]
    assert not same(twin, network)
    assert same(load_network(path, untrained=True, seed=4)[0], twin)
    assert not same(load_network(path, untrained=True, seed=5)[0], twin)


def test_loading_leaves_the_global_generator_alone(saved: tuple[Path, nn.Module]):
    state = torch.get_rng_state()
    load_network(saved[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_checkpoint_the_model_gets_the_datas_classes():
    network, told = load_network(None, model="resnet20-cifar", dataset=data(size=8))
    assert told == {}
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_other_peoples_checkpoint_needs_the_models_name(tmp_path: Path, saved: tuple[Path, nn.Module]):
    path = tmp_path / "m.pt"
    fresh = load_network(None, model=MODEL + ",classes=3", dataset=data())[0]
    torch.save(fresh.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"m\.pt' does not say which model it holds; name it with --model"):
        load_network(path)
    assert same(load_network(path, model=MODEL + ",classes=3", dataset=data())[0], fresh)


def test_images_of_another_shape_are_refused(saved: tuple[Path, nn.Module]):
    with pytest.raises(CheckpointError, match=r"trained on images \(1, 4, 4\); tiny has \(3, 4, 4\)"):
        load_network(saved[0], dataset=data(channels=3))


def test_another_model_than_the_files_is_refused(saved: tuple[Path, nn.Module]):
    with pytest.raises(CheckpointError, match="another architecture"):
        load_network(saved[0], model="mlp,width=7,depth=1")


# --- what a file may not do ---


def test_a_factory_that_a_file_names_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = tmp_path / "made"
    source = f"import pathlib\nfrom torch import nn\npathlib.Path({str(made)!r}).touch()\n"
    source += "def make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5))\n"
    (tmp_path / "layerlens_test_trap.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    network = nn.Sequential(nn.Flatten(), ProjectionHead(16, 5))
    path = tmp_path / "m.safetensors"
    rewritten(path, network, model="layerlens_test_trap:make")
    try:
        with pytest.raises(CheckpointError, match=r"imports nothing that a file names; .* --model layerlens_test_trap"):
            load_network(path)
        assert not made.exists()
        assert "layerlens_test_trap" not in sys.modules
        found, _ = load_network(path, model="layerlens_test_trap:make")  # the user typed it: now it runs
        assert made.exists()
        assert same(found, network)
    finally:
        sys.modules.pop("layerlens_test_trap", None)


@pytest.mark.parametrize("model", ["os:getcwd", "a.b:c,x=1", "no-such-model"])
def test_only_layerlens_own_models_are_taken_from_a_file(saved: tuple[Path, nn.Module], model: str):
    path, network = saved
    with pytest.raises(CheckpointError, match="imports nothing that a file names"):
        load_network(rewritten(path, network, model=model))


@pytest.mark.parametrize("model", [None, 3, ["mlp"], {}])
def test_a_model_that_is_no_name_is_refused(saved: tuple[Path, nn.Module], model: Any):
    path, network = saved
    with pytest.raises(CheckpointError, match="does not say which model it holds"):
        load_network(rewritten(path, network, model=model))


@pytest.mark.parametrize("shape", ["1x4x4", [1, 4], [1, 4, 4.0], [1, 4, 0], [1, -4, 4], [1, 4, 10**9], 3, {}])
def test_a_damaged_input_shape_is_refused(saved: tuple[Path, nn.Module], shape: Any):
    path, network = saved
    with pytest.raises(CheckpointError, match=r"metadata is damaged: input_shape="):
        load_network(rewritten(path, network, input_shape=shape))


@pytest.mark.parametrize(
    "head",
    [
        "projection",
        [],
        {},
        {"kind": "other", "out": 5},
        {"kind": "linear"},
        {"kind": "linear", "out": "5"},
        {"kind": "linear", "out": 0},
        {"kind": "linear", "out": -5},
        {"kind": "linear", "out": 10**12},
        {"kind": ["linear"], "out": 5},
    ],
)
def test_a_damaged_head_is_refused(saved: tuple[Path, nn.Module], head: Any):
    path, network = saved
    with pytest.raises(CheckpointError, match=r"metadata is damaged: head="):
        load_network(rewritten(path, network, head=head))


def test_a_head_of_another_size_than_the_weights_is_refused(saved: tuple[Path, nn.Module]):
    path, network = saved
    with pytest.raises(CheckpointError, match=r"another architecture: fc\.2\.weight is \(5, 6\) in the file, \(9, 6\)"):
        load_network(rewritten(path, network, head={"kind": "projection", "out": 9}))


@pytest.mark.parametrize("model", ["mlp,width=many", "mlp,width=-3", "mlp,depth=0.5,width=x"])
def test_damaged_model_options_are_an_error_of_ours(saved: tuple[Path, nn.Module], model: str):
    path, network = saved
    with pytest.raises((CheckpointError, ConfigError), match="mlp"):
        load_network(rewritten(path, network, model=model))


def test_evaluation_of_a_loaded_network_equals_that_of_the_saved_one(saved: tuple[Path, nn.Module]):
    path, network = saved
    x: Tensor = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_network(path)[0].eval()(x), network.eval()(x))
