"""Graph contrastive learning: its loss, its batches, its rules, and whole runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import rings_and_stars
from torch import Tensor

import layerlens as ll
from layerlens.errors import ConfigError, ShapeError
from layerlens.pipeline import Settings
from layerlens.training.checkpoint import load_state
from layerlens.training.config import LATER, RunConfig, make_config
from layerlens.training.loop import Progress, train
from layerlens.training.order import Order
from layerlens.training.run_folder import RunResult, read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "objective": "graphcl", "model": "gin,layers=3,width=8", "data": "rings and stars", "epochs": 2, "batch_size": 12,
    "projection": 8,
}  # fmt: skip


def run(folder: Path, **settings: Any) -> RunResult:
    return train(make_config({**SMALL, **settings}), folder, dataset=rings_and_stars(), device="cpu")


def weights(folder: Path, epoch: int = 2) -> dict[str, Tensor]:
    return load_state(folder / "checkpoints" / f"epoch-{epoch:04d}.safetensors")[0]


# --- the loss ---


def test_the_loss_by_hand():
    """Anchors (1, 0) and (0, 1), second views (1, 0) and (1, 0): -log(e / e) and -log(1 / 1)."""
    z = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0], [5.0, 0.0]])
    assert ll.graph_cl(z, temperature=1.0).item() == pytest.approx(0.0)
    aligned = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert ll.graph_cl(aligned, temperature=0.5, scale=2.0).item() == pytest.approx(-4.0)


def test_the_loss_is_equation_3():
    z = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = z[:6], z[6:]
    total = 0.0
    for i in range(6):
        cos = [float(first[i] @ other / (first[i].norm() * other.norm())) for other in second]
        others = sum(math.exp(c / 0.2) for j, c in enumerate(cos) if j != i)
        total += -math.log(math.exp(cos[i] / 0.2) / others)
    assert ll.graph_cl(z).item() == pytest.approx(total / 6)
    assert ll.graph_cl(torch.cat([second, first])).item() != pytest.approx(total / 6)
    assert torch.autograd.gradcheck(ll.graph_cl, z.requires_grad_())


@pytest.mark.parametrize("rows", [2, 5])
def test_the_loss_needs_pairs(rows: int):
    with pytest.raises(ShapeError, match=r"GraphCL needs 2n >= 4 rows of shape \(2n, d\)"):
        ll.graph_cl(torch.ones(rows, 3))
    with pytest.raises(ConfigError, match="temperature=0; allowed: above 0"):
        ll.graph_cl(torch.eye(4), temperature=0)


# --- batches ---


@pytest.mark.parametrize(
    ("graphs", "batch", "steps", "size"), [(188, 128, 2, 94), (24, 12, 2, 12), (24, 100, 1, 24), (25, 12, 3, 8)]
)
def test_batches_are_equally_large_and_hold_all_but_a_few(graphs: int, batch: int, steps: int, size: int):
    order = Order(make_config({**SMALL, "batch_size": batch}), rings_and_stars(graphs))
    rows = order.epoch(0)
    assert tuple(rows.shape) == (steps, 1, 1, size)
    assert len(rows.unique()) == steps * size
    assert not rows.equal(order.epoch(1))


def test_parts_and_ranks_share_a_batch():
    order = Order(make_config({**SMALL, "batch_size": 16, "accumulate": 2, "devices": 2}), rings_and_stars(30))
    assert tuple(order.epoch(0).shape) == (2, 2, 2, 3)
    with pytest.raises(ConfigError, match="batch_size=64 but only 24 training graphs; use a smaller batch"):
        Order(make_config({**SMALL, "batch_size": 64, "accumulate": 16}), rings_and_stars(24))


# --- rules ---


def test_the_defaults_are_graphcls():
    config = RunConfig(objective="graphcl")
    assert (config.model, config.optimizer, config.schedule, config.weight_decay) == ("gin", "adamw", "constant", 0)
    assert (config.epochs, config.batch_size, config.learning_rate, config.temperature) == (20, 128, 0.01, 0.2)
    assert (config.holdout, config.projection, config.samples) == (0, 160, "graphs")
    assert config.graph is not None
    assert (config.graph.kinds, config.graph.ratio, config.graph.keep) == (("node-drop", "subgraph"), 0.1, 0.2)
    assert LATER["graph"] is None
    assert make_config({}).graph is None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"graph": {"kinds": []}}, r"graph.kinds=\[\] without \[augment\]: both views of a graph are the same"),
        ({"graph": {"kinds": ["nodes"]}}, "'nodes' is unknown; closest: node-drop"),
        ({"graph": {"ratio": 1}}, "graph.ratio=1: input should be less than 1"),
        ({"views": {}}, r"\[views\] with objective='graphcl'; it is for images: leave it out"),
        ({"adalase": {}}, r"\[adalase\] with objective='graphcl'"),
        ({"text": {}}, r"\[text\] with objective='graphcl'"),
        ({"moco": {}}, r"\[moco\] with objective='graphcl'"),
        ({"channels_last": True}, "channels_last=true with objective='graphcl'"),
        ({"compile": True}, "compile=true with graphs"),
        ({"input_augment": "cutout"}, "input_augment='cutout' with objective='graphcl'"),
        ({"labels": 0.5}, "labels=0.5 with objective='graphcl', which sees no labels"),
        ({"objective": "simclr", "graph": {}}, r"\[graph\] with objective='simclr'; leave it out or use graphcl"),
    ],
)
def test_what_does_not_go_with_graphs_is_refused(settings: dict[str, Any], match: str):
    with pytest.raises(ConfigError, match=match):
        make_config({"objective": "graphcl", **settings})


@pytest.mark.parametrize(
    ("settings", "data", "match"),
    [
        ({}, "digits", "objective='graphcl' trains on graphs; digits has images. Use an objective for images"),
        ({"objective": "simclr", "projection": 8}, None, "trains on images; rings and stars has graphs. Use graphcl"),
        ({"model": "mlp"}, None, "model='mlp' reads no graphs, which graphcl trains on; allowed: gin, gcn, graphsage"),
        ({"objective": "supervised", "model": "gin"}, "digits", "model='gin' reads graphs; digits holds images"),
        ({"model": "gin,features=9"}, None, "takes features=9; the data have 3 per node"),
    ],
)
def test_data_models_and_objectives_must_fit(tmp_path: Path, settings: dict[str, Any], data: str | None, match: str):
    fields = {"batch_size": 12, "epochs": 1, **(SMALL if "objective" not in settings else {}), **settings}
    dataset = ll.load_data(data) if data else rings_and_stars()
    with pytest.raises(ConfigError, match=match):
        train(make_config(fields), tmp_path / "run", dataset=dataset, device="cpu")
    assert not (tmp_path / "run").exists()


# --- runs ---


def test_training_lowers_the_loss_and_a_second_run_is_the_same(tmp_path: Path):
    for name in ("one", "two"):
        run(tmp_path / name, epochs=12, learning_rate=0.02, graph={"kinds": ["node-drop"]})
    losses = [row["loss"] for row in read_metrics(tmp_path / "one")]
    assert np.mean(losses[-3:]) < losses[0] - 0.1
    first, second = (weights(tmp_path / name, 12) for name in ("one", "two"))
    assert all(value.equal(second[name]) for name, value in first.items())
    assert not weights(tmp_path / "one", 0)["layer1.conv.nn.0.weight"].equal(first["layer1.conv.nn.0.weight"])


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("layerlens.training.loop.SAVE_EVERY_S", -1.0)  # after each step
    run(tmp_path / "calm")

    def interrupt(progress: Progress) -> None:
        if progress.step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_config(SMALL), tmp_path / "cut", dataset=rings_and_stars(), device="cpu", progress=interrupt)
    run(tmp_path / "cut")
    calm, cut = (weights(tmp_path / name) for name in ("calm", "cut"))
    assert all(value.equal(cut[name]) for name, value in calm.items())


@pytest.mark.parametrize("layer", ["input", "layer2", "pool", "head", "all", "1,pool"])
@pytest.mark.parametrize("stop", [True, False])
def test_deep_augmentation_trains_at_any_layer(tmp_path: Path, layer: str, stop: bool):
    run(tmp_path / "plain")
    run(tmp_path / "deep", augment={"layer": layer, "stop_gradient": stop})
    plain, deep = (weights(tmp_path / name)["layer1.conv.nn.0.weight"] for name in ("plain", "deep"))
    assert deep.isfinite().all()
    assert not deep.equal(plain)


def test_stop_gradient_at_the_input_changes_nothing(tmp_path: Path):
    for stop in (True, False):
        run(tmp_path / str(stop), augment={"layer": "input", "stop_gradient": stop})
    first, second = (weights(tmp_path / str(stop)) for stop in (True, False))
    assert all(value.equal(second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"graph": {"kinds": []}, "augment": {"layer": "layer2"}},
        {"graph": {"kinds": ["edge-perturb", "feature-mask"], "ratio": 0.3}},
        {"augment": {"layer": "layer2", "pairs": "one"}},
        {"augment": {"layer": "layer2", "transform": "pca", "components": -1}},
        {"augment": {"layer": "layer2", "transform": "noise"}},
        {"augment": {"layer": "layer2", "transform": "channel-dropout"}},
        {"augment": {"layer": "layer2", "transform": "position-dropout"}},
        {"dropout": {"kind": "backward", "rate": 0.2}},
        {"accumulate": 2},
        {"precision": "bf16-mixed"},
        {"model": "gcn,layers=2,width=8"},
        {"model": "graphsage,layers=2,width=8,pooling=mean"},
    ],
    ids=lambda settings: " ".join(map(str, settings)),
)
def test_a_run_with(tmp_path: Path, settings: dict[str, Any]):
    result = run(tmp_path / "run", **settings)
    assert np.isfinite(result.loss)


@pytest.mark.parametrize(("part", "held"), [("before", ["layer1", "layer2"]), ("after", ["layer3", "head"])])
def test_freezing_holds_one_side(tmp_path: Path, part: str, held: list[str]):
    run(tmp_path / "run", freeze={"part": part, "layer": "layer2"})
    before, after = weights(tmp_path / "run", 0), weights(tmp_path / "run")
    moved = {name.partition(".")[0] for name, value in before.items() if not value.equal(after[name])}
    assert moved == {"layer1", "layer2", "layer3", "head"} - set(held)


def test_a_run_can_start_from_another(tmp_path: Path):
    run(tmp_path / "first")
    init = tmp_path / "first" / "checkpoints" / "epoch-0002.safetensors"
    run(tmp_path / "second", init=str(init))
    assert all(
        value.equal(weights(tmp_path / "first")[name]) for name, value in weights(tmp_path / "second", 0).items()
    )


def test_held_out_graphs_are_never_trained_on_and_judge_by_k_nn(tmp_path: Path):
    result = run(tmp_path / "run", holdout=0.25)
    assert result.knn is not None
    assert 0 <= result.knn <= 1
    order = Order(make_config({**SMALL, "holdout": 0.25}), rings_and_stars())
    assert not set(order.held_out.tolist()) & set(order.epoch(0).flatten().tolist())
    assert run(tmp_path / "none").knn is None


def test_a_finished_run_is_analysed_filmed_and_scored(tmp_path: Path):
    dataset = rings_and_stars(40)
    train(make_config({**SMALL, "keep_every": 1}), tmp_path / "run", dataset=dataset, device="cpu")
    look = Settings(samples=40, batch_size=8)
    found = ll.analyze_run(tmp_path / "run", dataset=dataset, settings=look)
    assert [g.epoch for g in found.trajectory] == [0, 1, 2]
    assert set(found.scores["epoch-0002"]) == {"svm", "probe"}
    assert found.after.cka.reduce == "graphs"
    strip = ll.film_strip(tmp_path / "run", dataset=dataset, settings=replace(look, reduce="nodes"))
    assert strip.frames[-1].layers == ("layer1", "layer2", "layer3")
    scored = ll.evaluate_run(tmp_path / "run", dataset=dataset, settings=look)
    assert [row["epoch"] for row in scored.rows] == [0, 1, 2]
    (last,) = ll.evaluate_run(tmp_path / "run", dataset=dataset, settings=look, last=True).rows
    assert last == scored.rows[-1]


@pytest.mark.gpu
def test_a_run_on_a_gpu_learns_as_on_the_cpu(tmp_path: Path):
    config = make_config({**SMALL, "epochs": 12, "learning_rate": 0.02, "graph": {"kinds": ["node-drop"]}})
    losses = []
    for device in ("cpu", "cuda"):
        train(config, tmp_path / device, dataset=rings_and_stars(), device=device)
        losses.append([row["loss"] for row in read_metrics(tmp_path / device)])
    assert losses[1][-1] < losses[1][0] - 0.1
    assert losses[1][-1] == pytest.approx(losses[0][-1], abs=0.5)  # other views: each device draws its own
