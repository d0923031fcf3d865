"""Graph networks against dense matrices in float64, their layers and weights, and what load_network believes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import rings_and_stars
from torch import Tensor, nn

import layerlens as ll
from layerlens.activations import capture
from layerlens.data import Dataset, dataset_from_arrays
from layerlens.errors import (
    CheckpointError,
    ConfigError,
    ExtraMissingError,
    LayerlensError,
    UnknownLayerError,
    UnknownNameError,
)
from layerlens.graph_models import GRAPH_MODELS, POOLINGS, GraphEncoder, build_graph_encoder, reads_graphs
from layerlens.graphs import GraphDataset
from layerlens.layers import discover, select
from layerlens.models import ProjectionHead, build_model, default_input_shape, head_name, reinitialized
from layerlens.training.checkpoint import save_checkpoint
from layerlens.training.config import make_config
from layerlens.training.network import build_start, load_network

SMALL = {"layers": 3, "width": 6}
# A path 0-1-2, an edge 3 -> 4 with no way back beside the lonely node 5, and the lonely node 6.
GRAPHS = {
    "x": torch.randn(7, 4, generator=torch.Generator().manual_seed(0)),
    "edge_index": torch.tensor([[0, 1, 1, 2, 3], [1, 0, 2, 1, 4]]),
    "batch": torch.tensor([0, 0, 0, 1, 1, 1, 2]),
}


def encoder(kind: str = "gin", *, out: int = 0, seed: int = 0, features: int = 4, **options: Any) -> GraphEncoder:
    """In eval mode, with statistics and affine numbers of batch norm that make a difference."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {**SMALL, **options}
        width = sizes["layers"] * sizes["width"]
        made = GraphEncoder(kind, features, **sizes, head=ProjectionHead(width, out) if out else None)
        for module in made.modules():
            if isinstance(module, nn.BatchNorm1d):
                for value, low in ((module.running_mean, -1), (module.running_var, 0.5), (module.bias, -1)):
                    nn.init.uniform_(value, low, low + 2)
                nn.init.uniform_(module.weight, 0.5, 2)
    return made.eval()


def parameters_are_random(model: nn.Module) -> None:
    """Biases too, so that one left out of the computation shows."""
    with torch.no_grad():
        for k, (name, parameter) in enumerate(model.named_parameters()):
            if "norm" not in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)))


def run(model: nn.Module, graphs: dict[str, Tensor] = GRAPHS) -> Tensor:
    with torch.no_grad():
        return model(**graphs)


def states(model: nn.Module, graphs: dict[str, Tensor], layer: str) -> Tensor:
    found: list[Tensor] = []
    with capture(model, [layer], lambda _position, out: found.append(out.clone())):
        run(model, graphs)
    return found[0]


# --- the networks, by dense matrices -------------------------------------------------------------------------------


def adjacency(graphs: dict[str, Tensor]) -> Tensor:
    """Entry (i, j) is 1 where an edge leads from j to i."""
    dense = torch.zeros(len(graphs["x"]), len(graphs["x"]), dtype=torch.float64)
    for source, target in graphs["edge_index"].T.tolist():
        dense[target, source] += 1
    return dense


def gin_step(p: dict[str, Tensor], h: Tensor, a: Tensor) -> Tensor:
    h = (a + torch.eye(len(a))) @ h
    return (h @ p["conv.nn.0.weight"].T + p["conv.nn.0.bias"]).relu() @ p["conv.nn.2.weight"].T + p["conv.nn.2.bias"]


def gcn_step(p: dict[str, Tensor], h: Tensor, a: Tensor) -> Tensor:
    a = a + torch.eye(len(a))
    root = a.sum(1).rsqrt()
    return root[:, None] * a * root @ h @ p["conv.lin.weight"].T + p["conv.bias"]


def graphsage_step(p: dict[str, Tensor], h: Tensor, a: Tensor) -> Tensor:
    mean = a @ h / a.sum(1, keepdim=True).clamp_min(1)
    return mean @ p["conv.lin_l.weight"].T + p["conv.lin_l.bias"] + h @ p["conv.lin_r.weight"].T


STEPS: dict[str, Callable[..., Tensor]] = {"gin": gin_step, "gcn": gcn_step, "graphsage": graphsage_step}
POOL = {"sum": lambda rows: rows.sum(0), "mean": lambda rows: rows.mean(0), "max": lambda rows: rows.max(0).values}


def dense_network(
    model: GraphEncoder, graphs: dict[str, Tensor], *, kind: str, layers: int = 3, pooling: str = "sum"
) -> Tensor:
    """The same network from nothing but its weights, in float64."""
    weights = {name: value.double() for name, value in model.state_dict().items() if value.is_floating_point()}
    h, a, pooled = graphs["x"].double(), adjacency(graphs), []
    for k in range(1, layers + 1):
        p = {n.removeprefix(f"layer{k}."): w for n, w in weights.items() if n.startswith(f"layer{k}.")}
        h = STEPS[kind](p, h, a).relu()
        h = (h - p["norm.running_mean"]) / (p["norm.running_var"] + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"]
        count = int(graphs["batch"].max()) + 1
        pooled.append(torch.stack([POOL[pooling](h[graphs["batch"] == g]) for g in range(count)]))
    out = torch.cat(pooled, 1)
    if "head.0.weight" in weights:
        out = (out @ weights["head.0.weight"].T + weights["head.0.bias"]).relu()
        out = out @ weights["head.2.weight"].T + weights["head.2.bias"]
    return out


@pytest.mark.parametrize("out", [0, 5], ids=["embedding", "head"])
@pytest.mark.parametrize("kind", STEPS)
def test_a_network_is_its_definition_by_dense_matrices(kind: str, out: int):
    model = encoder(kind, out=out)
    parameters_are_random(model)
    expected = dense_network(model, GRAPHS, kind=kind)
    assert expected.std() > 0.1
    torch.testing.assert_close(run(model).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_readout_pools_each_layer_over_the_nodes_of_each_graph(pooling: str):
    model = encoder(pooling=pooling)
    expected = dense_network(model, GRAPHS, kind="gin", pooling=pooling)
    torch.testing.assert_close(run(model).double(), expected, rtol=1e-5, atol=1e-5)


def test_poolings_of_one_network_differ():
    """Otherwise the claim about poolings would show nothing."""
    found = [run(encoder(pooling=pooling)) for pooling in POOLINGS]
    assert len({tuple(out.flatten().tolist()) for out in found}) == 3


def test_one_gin_layer_worked_by_hand():
    """Nodes 1, 2, 4 on a path, an MLP that doubles: 2·(1+2), 2·(2+1+4), 2·(4+2), and a sum of 32."""
    model = GraphEncoder("gin", 1, layers=1, width=1).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "nn.0.weight" in name or "nn.2.weight" in name:
                parameter.fill_(2.0 if "nn.0" in name else 1.0)
        model.layer1.norm.running_var.fill_(1 - 1e-5)
    path = {
        "x": torch.tensor([[1.0], [2], [4]]), "edge_index": torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]),
        "batch": torch.zeros(3).long(),
    }  # fmt: skip
    assert states(model, path, "layer1").flatten().tolist() == pytest.approx([6, 14, 12])
    assert run(model, path).item() == pytest.approx(32)


@pytest.mark.parametrize("kind", STEPS)
def test_permuting_the_nodes_of_each_graph_permutes_their_states_and_keeps_the_outputs(kind: str):
    model, order = encoder(kind, out=5), torch.tensor([2, 0, 1, 4, 5, 3, 6])  # the new node k is the old order[k]
    place = order.argsort()
    other = {"x": GRAPHS["x"][order], "edge_index": place[GRAPHS["edge_index"]], "batch": GRAPHS["batch"]}
    assert not torch.equal(other["x"], GRAPHS["x"])
    torch.testing.assert_close(run(model, other), run(model))
    torch.testing.assert_close(states(model, other, "layer2"), states(model, GRAPHS, "layer2")[order])


@pytest.mark.parametrize("kind", STEPS)
def test_permuting_the_graphs_of_a_batch_permutes_the_outputs(kind: str):
    model, data, order = encoder(kind, out=5, features=3), rings_and_stars(6).graphs, torch.tensor([3, 0, 5, 1, 4, 2])
    found, expected = run(model, data.pick(order)), run(model, data.pick(torch.arange(6)))
    torch.testing.assert_close(found, expected[order])
    assert (found - expected).abs().max() > 0.01


@pytest.mark.parametrize("kind", STEPS)
def test_a_graph_is_embedded_alike_in_any_company(kind: str):
    model, data = encoder(kind, out=5, features=3), rings_and_stars(6).graphs
    alone = torch.cat([run(model, data.pick(torch.tensor([i]))) for i in range(6)])
    torch.testing.assert_close(run(model, data.pick(torch.arange(6))), alone)


# --- sizes and layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GRAPH_MODELS)
def test_layers_are_numbered_input_nodes_pool_head(kind: str):
    model = encoder(kind, out=5, layers=4)
    numbered = {layer.index: layer for layer in discover(model, GRAPHS) if layer.index is not None}
    assert [(i, layer.name) for i, layer in sorted(numbered.items())] == [
        (-1, "input"), (0, "layer1"), (1, "layer2"), (2, "layer3"), (3, "layer4"), (4, "pool"), (5, "head"),
    ]  # fmt: skip
    assert [layer.shape for _, layer in sorted(numbered.items())] == [(4,), *[(6,)] * 4, (24,), (5,)]
    assert model.layer_names == ("layer1", "layer2", "layer3", "layer4", "pool", "head")
    assert model.node_layers == model.layer_names[:4]


def test_without_a_head_the_pool_is_the_last_layer():
    model = encoder()
    assert model.layer_names == ("layer1", "layer2", "layer3", "pool")
    assert [layer.name for layer in select(model, discover(model, GRAPHS))] == list(model.layer_names)
    assert (model.head_layer, head_name(model, GRAPHS)) == ("", "")


def test_the_head_layer_is_what_the_embedding_goes_into():
    model = encoder(out=5)
    assert model.head_layer == head_name(model, GRAPHS) == "head"
    embedding = ll.features(model, [GRAPHS])
    torch.testing.assert_close(embedding, states(model, GRAPHS, "pool"))


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        ("auto", ["layer1", "layer2", "layer3", "pool", "head"]),
        ("0,3,4", ["layer1", "pool", "head"]),
        ("-1", ["input"]),
        ("layer*.norm", ["layer1.norm", "layer2.norm", "layer3.norm"]),
    ],
)
def test_layers_are_selected_by_number_name_and_glob(selection: str, names: list[str]):
    model = encoder(out=5)
    assert [layer.name for layer in select(model, discover(model, GRAPHS), selection)] == names


def test_a_number_that_no_layer_has_says_which_there_are():
    model = encoder(out=5)
    with pytest.raises(UnknownLayerError, match="no layer number 9 in GraphEncoder; allowed: -1 to 4"):
        select(model, discover(model, GRAPHS), "9")


@pytest.mark.parametrize(
    ("spec", "layers", "width", "pooling", "features"),
    [
        ("gin", 5, 32, "sum", 1),
        ("gcn,layers=2", 2, 32, "sum", 1),
        ("graphsage,width=7,pooling=max,features=9", 5, 7, "max", 9),
        ("gin,layers=1,width=3,pooling=mean", 1, 3, "mean", 1),
    ],
)
def test_options_set_the_sizes(spec: str, layers: int, width: int, pooling: str, features: int):
    model = build_graph_encoder(spec)
    assert model.node_layers == tuple(f"layer{k}" for k in range(1, layers + 1))
    assert (model.features, model.width, model.pool.pooling) == (features, layers * width, pooling)
    assert [model.get_submodule(name).norm.num_features for name in model.node_layers] == [width] * layers
    assert model(**model.example()).shape == (2, layers * width)


def test_features_of_the_data_and_of_the_specification_must_agree():
    assert build_graph_encoder("gin,features=7", features=7).features == 7
    with pytest.raises(ConfigError, match=r"'gin,features=3' takes features=3; the data have 7 per node"):
        build_graph_encoder("gin,features=3", features=7)


@pytest.mark.parametrize("kind", GRAPH_MODELS)
def test_build_model_takes_the_features_as_the_input_shape(kind: str):
    model = build_model(kind, input_shape=(7,))
    assert isinstance(model, GraphEncoder)
    assert (model.kind, model.features) == (kind, 7)
    assert build_model(kind).features == 1
    assert default_input_shape(f"{kind},features=4") == (4,)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("gin", True), ("gcn,width=8", True), ("graphsage", True), ("mlp", False), ("resnet18-cifar", False),
     ("torchvision:resnet18", False), ("my.graphs:gin", False), ("hf:gin", False)],
)  # fmt: skip
def test_reads_graphs_knows_graph_networks_by_their_specification(spec: str, expected: bool):
    assert reads_graphs(spec) is expected


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        ("gin,depth=3", ConfigError, r"'gin,depth=3' has no option 'depth'; closest: width"),
        ("gin,layers=0", ConfigError, r"gin with layers=0; allowed: a whole number from 1"),
        ("gcn,width=-4", ConfigError, r"gcn with width=-4; allowed: a whole number from 1"),
        ("gin,width=2.5", ConfigError, r"gin with width=2\.5; allowed: a whole number from 1"),
        ("gin,layers=true", ConfigError, r"gin with layers=True; allowed: a whole number from 1"),
        ("gin,features=0", ConfigError, r"gin with features=0; allowed: a whole number from 1"),
        ("gin,pooling=summ", UnknownNameError, r"unknown pooling 'summ'; closest: sum \(allowed: sum, mean, max\)"),
        ("gin,pooling=1", LayerlensError, r"pooling"),
    ],
)
def test_a_network_that_can_not_be_is_refused(spec: str, error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        build_graph_encoder(spec)


def test_an_unknown_kind_is_refused():
    with pytest.raises(UnknownNameError, match=r"unknown graph network 'gim'; closest: gin"):
        GraphEncoder("gim", 3)


@pytest.mark.parametrize("kind", GRAPH_MODELS)
def test_without_torch_geometric_the_extra_is_named(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("layerlens.graph_batches.find_spec", lambda name: None)
    with pytest.raises(ExtraMissingError, match=r"pip install 'layerlens-torch\[graph\]'"):
        build_model(kind)


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GRAPH_MODELS)
def test_weights_are_drawn_after_glorot_and_biases_are_0(kind: str):
    """Uniform within √(6 / (in + out)): nothing beyond, and of so many numbers the largest is near the bound."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GraphEncoder(kind, 24, layers=2, width=32, head=ProjectionHead(64, 16))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            continue
        if parameter.ndim == 1:
            assert not parameter.any(), name
            continue
        bound = (6 / sum(parameter.shape)) ** 0.5
        largest, deviation = float(parameter.detach().abs().max()), float(parameter.detach().std())
        assert 0.97 * bound < largest <= bound, name
        assert deviation == pytest.approx(bound / 3**0.5, rel=0.06), name


@pytest.mark.parametrize("kind", GRAPH_MODELS)
def test_the_untrained_twin_has_other_weights_by_its_seed_and_fresh_statistics(kind: str):
    model = encoder(kind, out=5, seed=7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    twins = [reinitialized(model, seed=seed).state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, value in twins[0].items():
        assert torch.equal(value, twins[1][name]), name
        if name.endswith("weight") and "norm" not in name:
            assert not torch.equal(value, before[name]), name
            assert not torch.equal(value, twins[2][name]), name
        if name.endswith("norm.running_mean"):
            assert not value.any(), name


# --- what load_network believes ------------------------------------------------------------------------------------

SPEC = "gin,layers=2,width=4"
METADATA = {"model": SPEC, "features": 3, "head": {"kind": "projection", "out": 5}, "epoch": 7}


def images() -> Dataset:
    x = np.zeros((12, 1, 8, 8), np.uint8)
    return dataset_from_arrays("tiny", x, np.arange(12) % 3, x, np.arange(12) % 3)


def written(folder: Path, **changes: Any) -> Path:
    """A checkpoint of a graph network, with other metadata."""
    model = encoder(out=5, layers=2, width=4, features=3)
    save_checkpoint(folder / "graphs.safetensors", model, {**METADATA, **changes})
    return folder / "graphs.safetensors"


def test_what_a_run_writes_is_what_load_network_builds(tmp_path: Path):
    data = rings_and_stars(8)
    chosen = make_config({"objective": "graphcl", "model": SPEC, "projection": 5, "seed": 3})
    start = build_start(chosen, data)
    assert (start.metadata["features"], start.metadata["head"]) == (3, {"kind": "projection", "out": 5})
    save_checkpoint(tmp_path / "m.safetensors", start.network, start.metadata)
    for dataset in (data, None):
        network, metadata = load_network(tmp_path / "m.safetensors", dataset=dataset)
        assert metadata == start.metadata
        assert all(torch.equal(v, network.state_dict()[n]) for n, v in start.network.state_dict().items())
    assert isinstance(network.head, ProjectionHead)


def test_an_untrained_network_is_seeded_and_of_the_same_shape(tmp_path: Path):
    path = written(tmp_path)
    trained = load_network(path)[0].state_dict()
    fresh = [load_network(path, untrained=True, seed=seed)[0].state_dict() for seed in (0, 0, 1)]
    name = "layer1.conv.nn.0.weight"
    assert {n: v.shape for n, v in fresh[0].items()} == {n: v.shape for n, v in trained.items()}
    assert torch.equal(fresh[0][name], fresh[1][name])
    assert not torch.equal(fresh[0][name], fresh[2][name])
    assert not torch.equal(fresh[0][name], trained[name])


def test_a_model_without_a_checkpoint_takes_the_features_of_the_data():
    network, metadata = load_network(None, model=SPEC, dataset=rings_and_stars(4, features=6))
    assert (network.features, network.head, metadata) == (6, None, {})


def test_a_graph_checkpoint_reads_no_images(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"graphs\.safetensors' reads graphs; tiny holds none\. Give tu:NAME@ROOT"):
        load_network(written(tmp_path), dataset=images())


def test_a_graph_model_by_name_reads_no_images():
    with pytest.raises(ConfigError, match=r"'gin' reads graphs; tiny holds none"):
        load_network(None, model="gin", dataset=images())


@pytest.mark.parametrize("model", [None, "mlp,width=4,depth=1"])
def test_an_image_checkpoint_reads_no_graphs(model: str | None, tmp_path: Path):
    network = build_model("mlp,width=4,depth=1", input_shape=(1, 8, 8), classes=3)
    path = tmp_path / "images.safetensors"
    save_checkpoint(path, network, {"model": "mlp,width=4,depth=1", "input_shape": [1, 8, 8], "head": None})
    with pytest.raises(ConfigError, match=r"reads no graphs, which is what rings and stars holds; give --model gin"):
        load_network(path, model=model, dataset=rings_and_stars(4))


def test_an_image_checkpoint_is_no_graph_network_even_if_the_user_says_so(tmp_path: Path):
    network = build_model("mlp,width=4,depth=1", input_shape=(1, 8, 8), classes=3)
    path = tmp_path / "images.safetensors"
    save_checkpoint(path, network, {"model": "mlp,width=4,depth=1", "input_shape": [1, 8, 8], "head": None})
    with pytest.raises(CheckpointError, match="another architecture"):
        load_network(path, model=SPEC, dataset=rings_and_stars(4))


@pytest.mark.parametrize("features", [-3, 0, 10**6, 2.5, "3", True, [3]])
def test_damaged_features_in_the_metadata_are_refused(features: Any, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"the checkpoint's metadata is damaged: features="):
        load_network(written(tmp_path, features=features))


def test_a_network_far_larger_than_its_file_is_refused_before_it_is_made(tmp_path: Path):
    path = written(tmp_path, features=999_999, model="gin,layers=1,width=100000")  # 400 GB
    with pytest.raises(CheckpointError, match=r"is damaged or of another architecture: it holds \d+ numbers, 'gin,"):
        load_network(path)


@pytest.mark.parametrize("head", [{"kind": "other", "out": 5}, {"kind": "projection", "out": -1}, "projection", [5]])
def test_a_damaged_head_in_the_metadata_is_refused(head: Any, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"the checkpoint's metadata is damaged: head="):
        load_network(written(tmp_path, head=head))


@pytest.mark.parametrize("model", ["mlp", "torchvision:resnet18", "os:getcwd", None, 3])
def test_a_graph_checkpoint_that_names_another_model_is_refused(model: Any, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"holds a graph network, but names the model"):
        load_network(written(tmp_path, model=model))


@pytest.mark.parametrize(
    "changes",
    [{"model": "gin,layers=3,width=4"}, {"model": "gcn,layers=2,width=4"}, {"head": None}, {"features": 4}],
)
def test_weights_of_another_architecture_are_refused(changes: dict[str, Any], tmp_path: Path):
    with pytest.raises(CheckpointError, match="another architecture"):
        load_network(written(tmp_path, **changes))


def test_a_data_set_with_another_number_of_features_is_refused(tmp_path: Path):
    data: GraphDataset = rings_and_stars(4, features=4)
    with pytest.raises(CheckpointError, match="was trained on nodes with 3 features; rings and stars has 4"):
        load_network(written(tmp_path), dataset=data)
