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
from layerlens.graphs import GraphDataset, Graphs
from layerlens.pipeline import Settings
from layerlens.training import loop
from layerlens.training.checkpoint import load_state
from layerlens.training.config import LATER, RunConfig, make_config
from layerlens.training.loop import Progress, train
from layerlens.training.objectives import graphcl
from layerlens.training.order import Order
from layerlens.training.run_folder import RunResult, read_metrics

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


def equation_3(anchors: Tensor, others: Tensor, place: int, temperature: float) -> float:
    """The mean over anchors; anchor i's partner is row `place` + i of the others; one number at a time."""
    total = 0.0
    for i, anchor in enumerate(anchors.double()):
        scores = [
            math.exp(float(anchor @ other / (anchor.norm() * other.norm())) / temperature) for other in others.double()
        ]
        total -= math.log(scores[place + i] / (sum(scores) - scores[place + i]))
    return total / len(anchors)


@pytest.mark.parametrize("temperature", [0.1, 0.2, 2.0])
@pytest.mark.parametrize("n", [2, 5, 16])
def test_the_loss_is_its_equation_at_any_size_temperature_and_scale(n: int, temperature: float):
    z = torch.randn(2 * n, 7, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    expected = equation_3(z[:n], z[n:], 0, temperature)
    assert ll.graph_cl(z, temperature=temperature).item() == pytest.approx(expected, rel=1e-10)
    assert ll.graph_cl(z.float(), temperature=temperature, scale=3.0).item() == pytest.approx(3 * expected, rel=1e-4)


def test_the_length_of_a_projection_does_not_count():
    z = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = torch.linspace(0.1, 9, 12, dtype=torch.float64)[:, None]
    assert ll.graph_cl(lengths * z).item() == pytest.approx(ll.graph_cl(z).item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype):
    z = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = ll.graph_cl(z)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(equation_3(z[:6], z[6:], 0, 0.2), rel=1e-5)


def test_the_second_views_of_all_ranks_are_the_others(monkeypatch: pytest.MonkeyPatch):
    """As on the second of two ranks: the others' second views come first, and no gradient goes to them."""
    draws = torch.Generator().manual_seed(0)
    mine, others = (torch.randn(count, 5, generator=draws, dtype=torch.float64) for count in (8, 4))
    mine.requires_grad_()
    theirs = torch.nn.functional.normalize(others, dim=1)
    monkeypatch.setattr(graphcl, "rank", lambda: 1)
    monkeypatch.setattr(graphcl, "gather_rows", lambda rows: torch.cat([theirs, rows]))
    expected = equation_3(mine[:4].detach(), torch.cat([others, mine[4:].detach()]), 4, 0.2)
    assert ll.graph_cl(mine).item() == pytest.approx(expected, rel=1e-10)
    assert torch.autograd.gradcheck(ll.graph_cl, mine)


@pytest.mark.parametrize("shape", [(8,), (4, 2, 3), (0, 3), (3, 3)])
def test_projections_that_are_no_pairs_of_rows_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ShapeError, match=r"GraphCL needs 2n >= 4 rows of shape \(2n, d\); got"):
        ll.graph_cl(torch.ones(shape))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_no_softmax_has_is_refused(temperature: float):
    with pytest.raises(ConfigError, match=rf"temperature={temperature}; allowed: above 0"):
        ll.graph_cl(torch.eye(4), temperature=temperature)


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


@pytest.mark.parametrize(("accumulate", "devices"), [(1, 1), (2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("graphs", [61, 188])
def test_no_graph_comes_twice_an_epoch_in_any_layout(graphs: int, accumulate: int, devices: int):
    layout = {"batch_size": 128, "accumulate": accumulate, "devices": devices}
    order = Order(make_config({**SMALL, **layout}), rings_and_stars(graphs))
    part = order.batch // (accumulate * devices)
    for epoch in range(3):
        rows = order.epoch(epoch)
        assert tuple(rows.shape) == (order.steps, devices, accumulate, part)
        assert len(rows.unique()) == rows.numel()
        assert graphs - rows.numel() < order.steps * accumulate * devices, "next to none are left out"


def test_188_graphs_in_batches_of_at_most_128_are_two_of_94_or_of_92_in_four_parts():
    one = Order(make_config({**SMALL, "batch_size": 128}), rings_and_stars(188))
    four = Order(make_config({**SMALL, "batch_size": 128, "accumulate": 2, "devices": 2}), rings_and_stars(188))
    assert (one.steps, one.batch, tuple(one.epoch(0).shape)) == (2, 94, (2, 1, 1, 94))
    assert (four.steps, four.batch, tuple(four.epoch(0).shape)) == (2, 92, (2, 2, 2, 23))


@pytest.mark.parametrize("graphs", [9, 17, 100])
def test_a_batch_that_the_graphs_fill_is_not_refused(graphs: int):
    """Eight graphs in four parts of two is the smallest batch that the settings allow."""
    order = Order(make_config({**SMALL, "batch_size": 8, "accumulate": 4}), rings_and_stars(graphs))
    assert order.batch == 8
    assert order.steps == graphs // 8


@pytest.mark.parametrize(("graphs", "accumulate"), [(1, 1), (6, 4)])
def test_too_few_graphs_for_a_batch_are_refused(graphs: int, accumulate: int):
    chosen = make_config({**SMALL, "batch_size": 8, "accumulate": accumulate})
    with pytest.raises(ConfigError, match=f"batch_size=8 but only {graphs} training graphs; use a smaller batch"):
        Order(chosen, rings_and_stars(graphs))


def test_a_data_set_without_graphs_is_refused():
    nothing = Graphs(
        x=torch.ones(0, 3), edge_index=torch.ones(2, 0).long(), node_ptr=torch.zeros(1).long(),
        edge_ptr=torch.zeros(1).long(),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="only 0 training graphs"):
        Order(make_config(SMALL), GraphDataset(name="nothing", graphs=nothing, y=None))


# --- rules ---


IDENTITIES = [  # made by the commit before graphs came, b6f3bf8
    ({}, "9bd7fa97d63b678f"),
    ({"objective": "simclr", "model": "mlp", "epochs": 3}, "ec2390a2e9e1a8a4"),
    ({"objective": "supcon", "labels": 0.5}, "8edb18f29b94f8f6"),
    ({"objective": "moco", "moco": {"queue": 512}}, "8437aa37a7c3cea2"),
    ({"objective": "supervised"}, "c6917b364b018484"),
    ({"objective": "simcse"}, "20bd1c6c66dbd93e"),
    ({"objective": "mlm"}, "abfb634df824e0da"),
    ({"augment": {"layer": "layer4", "stop_gradient": True}}, "9b5686312295d0de"),
]


@pytest.mark.parametrize(("settings", "identity"), IDENTITIES)
def test_runs_of_other_objectives_keep_the_identity_that_they_had(settings: dict[str, Any], identity: str):
    assert "graph" in LATER
    assert make_config(settings).identity() == identity
    assert make_config({**settings, "graph": None}).identity() == identity


@pytest.mark.parametrize("table", [{"ratio": 0.2}, {"keep": 0.3}, {"kinds": ["node-drop"]}])
def test_other_views_of_graphs_are_another_run(table: dict[str, Any]):
    assert make_config({**SMALL, "graph": table}).identity() != make_config(SMALL).identity()
    assert make_config({**SMALL, "graph": {}}).identity() == make_config(SMALL).identity()


def test_a_setting_that_is_none_is_the_default_of_graphs():
    given = {"learning_rate": None, "temperature": None, "graph": None, "labels": None}
    assert make_config({"objective": "graphcl", **given}) == make_config({"objective": "graphcl"})


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
        (
            {},
            "digits",
            "objective='graphcl' trains on graphs; digits has images. Use tu:NAME@ROOT or graphs-npz:PATH, or an",
        ),
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


def passes_of_first_step(folder: Path, **settings: Any) -> tuple[dict[str, Tensor], Tensor, float, Order]:
    """What goes into the network in a run of one step, what comes out, the loss that is logged, and the order."""
    chosen, data = make_config({**SMALL, "epochs": 1, "batch_size": 24, **settings}), rings_and_stars()
    trainer = loop._Trainer(loop.resolve(chosen, data), data, folder, "cpu", None)
    seen: list[tuple[dict[str, Tensor], Tensor]] = []

    def keep(_module: Any, _args: Any, inputs: dict[str, Tensor], output: Tensor) -> None:
        seen.append(({name: value.clone() for name, value in inputs.items()}, output.detach().clone()))

    trainer.network.register_forward_hook(keep, with_kwargs=True)
    trainer.run()
    ((inputs, output),) = seen
    (row,) = read_metrics(folder)
    return inputs, output, row["loss"], trainer.order


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5, "loss_scale": 3.0}, {"graph": {"kinds": ["subgraph"]}}])
def test_the_logged_loss_is_the_equation_of_the_networks_outputs(tmp_path: Path, settings: dict[str, Any]):
    _, output, loss, _ = passes_of_first_step(tmp_path, **settings)
    assert output.shape == (48, 8)
    expected = equation_3(output[:24], output[24:], 0, settings.get("temperature", 0.2))
    assert loss == pytest.approx(settings.get("loss_scale", 1.0) * expected, rel=1e-4)


def test_without_views_the_network_sees_each_graph_twice_as_it_is(tmp_path: Path):
    augment = {"layer": "pool", "fraction": 0.0}
    inputs, output, _, order = passes_of_first_step(tmp_path, graph={"kinds": []}, augment=augment)
    plain = rings_and_stars().graphs.pick(order.epoch(0).flatten())
    nodes, edges = len(plain["x"]), plain["edge_index"].shape[1]
    assert torch.equal(inputs["x"], plain["x"].repeat(2, 1))
    assert torch.equal(inputs["batch"], torch.cat([plain["batch"], plain["batch"] + 24]))
    assert torch.equal(inputs["edge_index"][:, :edges], plain["edge_index"])
    assert torch.equal(inputs["edge_index"][:, edges:], plain["edge_index"] + nodes)
    torch.testing.assert_close(output[:24], output[24:])


def test_the_two_views_of_a_graph_are_drawn_anew(tmp_path: Path):
    inputs, _, _, order = passes_of_first_step(tmp_path, graph={"kinds": ["node-drop"], "ratio": 0.3})
    whole = rings_and_stars().graphs.pick(order.epoch(0).flatten())
    sizes = torch.bincount(inputs["batch"]).view(2, 24)
    expected = torch.bincount(whole["batch"])
    assert torch.equal(sizes[0], sizes[1])
    assert torch.equal(sizes[0], expected - (expected * 0.3 + 1e-9).floor().long())
    first, second = inputs["x"].chunk(2)
    assert not torch.equal(first, second)


def test_another_seed_is_another_run(tmp_path: Path):
    for seed in (0, 1):
        run(tmp_path / str(seed), seed=seed, epochs=1)
    first, second = (weights(tmp_path / str(seed), 1) for seed in (0, 1))
    assert not first["head.0.weight"].equal(second["head.0.weight"])


def test_an_interrupted_run_with_everything_on_ends_with_the_same_weights_metrics_and_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rich = {
        "augment": {"layer": "layer2", "stop_gradient": True, "pairs": "one"}, "holdout": 0.25, "keep_every": 1,
        "batch_size": 6, "graph": {"kinds": ["node-drop", "edge-perturb", "feature-mask", "subgraph"], "ratio": 0.2},
    }  # fmt: skip
    run(tmp_path / "calm", **rich)
    for save_every in (-1.0, 60.0):
        folder = tmp_path / f"cut {save_every}"
        monkeypatch.setattr(loop, "SAVE_EVERY_S", save_every)
        for stop in (2, 4, 6):

            def interrupt(progress: Progress, stop: int = stop) -> None:
                if progress.step == stop:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                train(make_config({**SMALL, **rich}), folder, dataset=rings_and_stars(), device="cpu",
                      progress=interrupt)  # fmt: skip
        result = run(folder, **rich)
        for epoch in (0, 1, 2):
            calm, cut = weights(tmp_path / "calm", epoch), weights(folder, epoch)
            assert all(value.equal(cut[name]) for name, value in calm.items()), epoch
        rows = [
            [{k: v for k, v in row.items() if k != "wall_s"} for row in read_metrics(place)]
            for place in (tmp_path / "calm", folder)
        ]
        assert rows[0] == rows[1]
        assert len(result.checkpoints) == 3
        assert not (folder / "resume.pt").exists()


def test_no_hook_is_left_on_the_network(tmp_path: Path):
    chosen, data = make_config({**SMALL, "augment": {"layer": "1,pool"}}), rings_and_stars()
    trainer = loop._Trainer(loop.resolve(chosen, data), data, tmp_path, "cpu", None)
    trainer.run()
    modules = list(trainer.network.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


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
