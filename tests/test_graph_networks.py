"""Graph networks, what their layers are like, and Deep Augmentation of whole graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import rings_and_stars
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader

import layerlens as ll
from layerlens.activations import capture
from layerlens.augment.graph_views import GraphViews
from layerlens.augment.transforms import gaussian_noise, remove_principal_components
from layerlens.errors import (
    CheckpointError,
    ConfigError,
    ExtraMissingError,
    ShapeError,
    UnknownLayerError,
    UnknownNameError,
)
from layerlens.graph_models import build_graph_encoder, reads_graphs
from layerlens.layers import discover, select
from layerlens.models import ProjectionHead
from layerlens.pipeline import Settings, measure_network
from layerlens.reduction import make_reduction, pool_nodes

Graphs = dict[str, Tensor]


def batch_of(count: int = 6, seed: int = 0) -> Graphs:
    return rings_and_stars(count, seed=seed).graphs.pick(torch.arange(count))


def encoder(spec: str = "gin,layers=3,width=8", *, head: bool = True, seed: int = 0) -> ll.GraphEncoder:
    torch.manual_seed(seed)
    made = build_graph_encoder(spec, features=3)
    if head:
        made.head = ProjectionHead(made.width, 5)
        made.reset_parameters()
    for module in made.modules():  # statistics as after some training
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return made.eval()


def objects(count: int) -> list[Any]:
    g = rings_and_stars(count).graphs
    return [
        Data(x=g.x[g.node_ptr[i] : g.node_ptr[i + 1]], edge_index=g.edge_index[:, g.edge_ptr[i] : g.edge_ptr[i + 1]])
        for i in range(count)
    ]


def adjacency(graphs: Graphs) -> Tensor:
    """Entry (i, j) is 1 where an edge leads from j to i."""
    count = len(graphs["x"])
    dense = torch.zeros(count, count)
    dense[graphs["edge_index"][1], graphs["edge_index"][0]] = 1
    return dense


# --- the networks ---


def gin(layer: Any, h: Tensor, a: Tensor) -> Tensor:
    return layer.conv.nn(h + a @ h)


def gcn(layer: Any, h: Tensor, a: Tensor) -> Tensor:
    a = a + torch.eye(len(a))
    scale = a.sum(1).rsqrt()
    return scale[:, None] * a * scale @ layer.conv.lin(h) + layer.conv.bias


def graphsage(layer: Any, h: Tensor, a: Tensor) -> Tensor:
    return layer.conv.lin_l(a @ h / a.sum(1, keepdim=True).clamp_min(1)) + layer.conv.lin_r(h)


@pytest.mark.parametrize("convolve", [gin, gcn, graphsage])
@torch.no_grad()
def test_the_network_is_that_of_dense_matrices(convolve: Callable[..., Tensor]):
    network, graphs = encoder(f"{convolve.__name__},layers=3,width=8"), batch_of()
    a, h, states = adjacency(graphs), graphs["x"], []
    for name in network.node_layers:
        layer = network.get_submodule(name)
        h = layer.norm(convolve(layer, h, a).relu())
        states.append(torch.stack([h[graphs["batch"] == k].sum(0) for k in range(6)]))
    assert network.head is not None
    torch.testing.assert_close(network(**graphs), network.head(torch.cat(states, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", ["sum", "mean", "max"])
@torch.no_grad()
def test_poolings_are_over_the_nodes_of_each_graph(pooling: str):
    network, graphs = encoder(f"gin,layers=1,width=8,pooling={pooling}", head=False), batch_of(2)
    states = network.layer1(graphs["x"], graphs["edge_index"])
    parts = [states[graphs["batch"] == k] for k in range(2)]
    expected = {"sum": [p.sum(0) for p in parts], "mean": [p.mean(0) for p in parts], "max": [p.amax(0) for p in parts]}
    torch.testing.assert_close(network(**graphs), torch.stack(expected[pooling]))


@torch.no_grad()
def test_the_order_of_nodes_and_graphs_makes_no_difference():
    dataset, network = rings_and_stars(5), encoder()
    there, back = (network(**dataset.graphs.pick(torch.tensor(rows))) for rows in ([0, 1, 2, 3], [3, 2, 1, 0]))
    torch.testing.assert_close(there, back.flip(0))


def test_layers_have_the_papers_numbers():
    found = discover(encoder(), batch_of(2))
    numbered = [(layer.index, layer.name, layer.shape) for layer in found if layer.index is not None]
    assert numbered == [
        (-1, "input", (3,)), (0, "layer1", (8,)), (1, "layer2", (8,)), (2, "layer3", (8,)), (3, "pool", (24,)),
        (4, "head", (5,)),
    ]  # fmt: skip
    assert [layer.name for layer in select(encoder(), found, "3")] == ["pool"]
    with pytest.raises(UnknownLayerError, match="no layer number 9 in GraphEncoder; allowed: -1 to 4"):
        select(encoder(), found, "9")


def test_weights_are_drawn_after_glorot_and_the_twin_has_others():
    network = encoder()
    for module in network.modules():
        if isinstance(module, nn.Linear):
            assert float(module.weight.detach().abs().max()) <= (6 / sum(module.weight.shape)) ** 0.5
            assert not module.bias.any()
    twin, again = ll.reinitialized(network, seed=1), ll.reinitialized(network, seed=1)
    assert not twin.layer1.conv.nn[0].weight.equal(network.layer1.conv.nn[0].weight)
    assert all(value.equal(again.state_dict()[name]) for name, value in twin.state_dict().items())


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        ("gin,depth=3", ConfigError, "has no option 'depth'"),
        ("gin,width=0", ConfigError, "width=0; allowed: a whole number from 1"),
        ("gin,layers=true", ConfigError, "layers=True; allowed: a whole number from 1"),
        ("gin,pooling=min", UnknownNameError, "unknown pooling 'min'"),
        ("gin,features=4", ConfigError, "takes features=4; the data have 3 per node"),
    ],
)
def test_a_network_that_can_not_be_is_refused(spec: str, error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        build_graph_encoder(spec, features=3)


def test_without_the_extra_its_name_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("layerlens.graph_batches.find_spec", lambda name: None)
    with pytest.raises(ExtraMissingError, match=r"pip install 'layerlens-torch\[graph\]'"):
        ll.build_model("gin")
    assert reads_graphs("gcn,width=4")


# --- their layers' similarity ---


def centred_gram(x: np.ndarray) -> np.ndarray:
    """The U-centred Gram matrix, as Song et al. 2012 define it, in float64."""
    k, n = x @ x.T, len(x)
    np.fill_diagonal(k, 0)
    row = k.sum(1, keepdims=True) / (n - 2)
    u = k - row - row.T + k.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(u, 0)
    return u


def cka_by_definition(batches: list[list[np.ndarray]]) -> np.ndarray:
    """HSIC averaged over batches of nearly equal size, then the ratio; layers by layers."""
    total = 0.0
    for rows in batches:
        grams = np.stack([centred_gram(x.astype(np.float64)).ravel() for x in rows])
        n = len(rows[0])
        total = total + n * (grams @ grams.T) / (n * (n - 3))
    scale = np.sqrt(np.diag(total))
    return total / np.outer(scale, scale)


def states_of(network: nn.Module, graphs: Graphs, layers: list[str]) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    with torch.no_grad(), capture(network, layers, lambda k, h: found.__setitem__(k, h.clone())):
        network(**graphs)
    return [found[k] for k in range(len(layers))]


@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_cka_of_graphs_is_the_definition_on_pooled_states(pool: str):
    network, names = encoder(), ["layer1", "layer2", "layer3", "pool", "head"]
    loader = list(rings_and_stars(40).batches(batch_size=10))
    expected = []
    for graphs in loader:
        owner, states = graphs["batch"], states_of(network, graphs, names)
        parts = [torch.stack([h[owner == k].sum(0) for k in range(10)]) for h in states[:3]]
        sizes = torch.bincount(owner)[:, None]
        parts = [part / sizes for part in parts] if pool == "mean" else parts
        expected.append([part.numpy() for part in (*parts, *states[3:])])
    reduce = "graphs" if pool == "sum" else "graphs,pool=mean"
    found = ll.similarity_matrix(network, loader, reduce=reduce)
    assert (found.layers, found.samples, found.reduce) == (tuple(names), 40, reduce)
    np.testing.assert_allclose(found.values, cka_by_definition(expected), atol=1e-5)
    assert np.isfinite(found.low).all()


def test_cka_of_nodes_is_the_definition_on_their_states():
    network, names = encoder(), ["layer1", "layer2", "layer3"]
    loader = [batch_of(8, seed=k) for k in range(3)]
    whole = [[h.numpy() for h in states_of(network, graphs, names)] for graphs in loader]
    found = ll.similarity_matrix(network, loader, names, reduce="nodes", check=False)
    assert found.layers == tuple(names)
    assert found.samples == sum(len(rows[0]) for rows in whole)
    np.testing.assert_allclose(found.values, cka_by_definition(whole), atol=2e-3)  # batches weigh by their rows


class Plain(nn.Module):
    """What a user of torch_geometric writes; `whole` takes the batch object itself."""

    def __init__(self, inner: ll.GraphEncoder) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.inner(x, edge_index, batch)


class Whole(nn.Module):
    def __init__(self, inner: ll.GraphEncoder) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, data: Any) -> Tensor:
        return self.inner(data.x, data.edge_index, data.batch)


@pytest.mark.parametrize("wrap", [Plain, Whole])
@pytest.mark.parametrize("reduce", ["graphs", "nodes"])
def test_a_loader_of_torch_geometric_gives_the_same_numbers_and_stays_as_it_was(wrap: type[nn.Module], reduce: str):
    network = encoder()
    layers = [f"inner.{name}" for name in network.node_layers]
    loader = list(DataLoader(objects(20), batch_size=5))
    before = [batch.clone() for batch in loader]
    model = wrap(network).train()
    found = ll.similarity_matrix(model, loader, layers, reduce=reduce)
    own = rings_and_stars(20)
    ours = [own.graphs.pick(torch.arange(k, k + 5)) for k in range(0, 20, 5)]
    expected = ll.similarity_matrix(network, ours, list(network.node_layers), reduce=reduce)
    np.testing.assert_allclose(found.values, expected.values, atol=1e-6)
    assert model.training
    assert all(a.x.equal(b.x) and a.edge_index.equal(b.edge_index) for a, b in zip(loader, before, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("layers", "reduce", "error", "match"),
    [
        (
            "auto",
            "flatten",
            ConfigError,
            r"layer 'layer1': reduce='flatten' on a batch of graphs; allowed: 'graphs'.*'nodes'",
        ),
        ("auto", "positions", ConfigError, "reduce='positions' on a batch of graphs"),
        ("auto", "nodes", ShapeError, "layer 'pool': a row per graph, which has no nodes; leave this layer out"),
        ("auto", "graphs,pool=max", UnknownNameError, "unknown pool 'max'"),
        ("auto", "nodes,pool=mean", ConfigError, "allowed: graphs,pool=mean"),
    ],
)
def test_what_is_a_sample_must_be_said(layers: str, reduce: str, error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        ll.similarity_matrix(encoder(), [batch_of()], layers, reduce=reduce)


def test_images_have_neither_nodes_nor_graphs():
    with pytest.raises(ConfigError, match="reduce='nodes' is for batches of graphs; allowed here: flatten, pool"):
        make_reduction("nodes")(torch.ones(4, 3))
    with pytest.raises(ConfigError, match="nodes or positions as samples allow the linear kernel only"):
        ll.similarity_matrix(encoder(), [batch_of()], reduce="nodes", permutations=10)
    assert pool_nodes(torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([0, 0, 1]), 2).tolist() == [[3.0], [6.0]]


def test_features_are_the_embedding_or_the_sums_of_a_layer():
    network, graphs = encoder(), batch_of()
    states, pooled = states_of(network, graphs, ["layer2", "pool"])
    assert ll.features(network, [graphs]).equal(pooled)
    expected = torch.stack([states[graphs["batch"] == k].sum(0) for k in range(6)])
    torch.testing.assert_close(ll.features(network, [graphs], "layer2"), expected)


@pytest.mark.parametrize("measure", ["effective_rank", "alignment", "diversity,views=2"])
def test_layers_have_profiles_also_under_views_that_drop_nodes(measure: str):
    draws = torch.Generator().manual_seed(0)
    views = GraphViews(kinds=("node-drop",), ratio=0.3)
    loader = rings_and_stars(24).batches(batch_size=8)
    found = ll.measure_layers(
        encoder(), loader, measure=measure, reduce="graphs", groups=3, views=lambda graphs: views(graphs, draws)
    )
    assert found.layers == ("layer1", "layer2", "layer3", "pool", "head")
    assert np.isfinite(found.values).all()


def test_settings_say_graphs_where_images_are_flattened():
    dataset, network = rings_and_stars(40), encoder()
    assert Settings().on(dataset, network).reduce == "graphs"
    nodes = Settings(reduce="nodes").on(dataset, network)
    assert (nodes.reduce, nodes.layers) == ("nodes", "layer1,layer2,layer3")
    assert Settings(reduce="graphs,pool=mean").on(dataset, network).reduce == "graphs,pool=mean"
    found = ll.analyze(network, dataset, settings=Settings(samples=40, batch_size=8))
    assert (found.cka.reduce, found.cka.samples, found.geometry.samples) == ("graphs", 40, 40)
    assert np.isfinite(found.geometry.alignment)
    assert isinstance(ll.recommend(found.cka), ll.Recommendation)
    twice = [measure_network(network, dataset, "alignment", settings=Settings(samples=40, batch_size=8)) for _ in "ab"]
    np.testing.assert_array_equal(twice[0].values, twice[1].values)


# --- Deep Augmentation ---


def by_position(model: nn.Module, graphs: Graphs) -> Any:
    return model(graphs["x"], graphs["edge_index"], graphs["batch"])


def by_name(model: nn.Module, graphs: Graphs) -> Any:
    return model(**graphs)


def by_object(model: nn.Module, graphs: Graphs) -> Any:
    return Whole(model)(Batch(**graphs)) if not isinstance(model, Whole) else model(Batch(**graphs))


def zeroed_graphs(operator: ll.DeepAugmentation, layer: str, call: Callable[..., Any], graphs: Graphs) -> list[bool]:
    """Which graphs' states are 0 after a rate of 1; every graph is whole or gone."""
    network = encoder()
    model: nn.Module = Whole(network) if call is by_object else network
    name = f"inner.{layer}" if call is by_object else layer
    operator.layers = [name]
    seen: list[Tensor] = []
    with operator.attached(model), capture(model, [name], lambda _k, h: seen.append(h)):
        model.train()
        call(model, graphs)
    rows = seen[0].flatten(1).abs().sum(1) == 0
    owner = graphs["batch"] if len(rows) == len(graphs["batch"]) else torch.arange(len(rows))
    parts = [rows[owner == k] for k in range(int(owner[-1]) + 1)]
    assert all(bool(part.all()) or not bool(part.any()) for part in parts), "a graph is transformed in part"
    return [bool(part.all()) for part in parts]


@pytest.mark.parametrize("call", [by_position, by_name, by_object])
@pytest.mark.parametrize("layer", ["layer1", "layer3", "pool", "head"])
def test_whole_graphs_are_transformed(layer: str, call: Callable[..., Any]):
    hit = []
    for seed in range(30):
        draws = torch.Generator().manual_seed(seed)
        operator = ll.DeepAugmentation(layer, rate=1.0, fraction=0.25, generator=draws)
        hit += zeroed_graphs(operator, layer, call, batch_of(10))
    assert 0.17 < sum(hit) / len(hit) < 0.33


def test_the_input_is_a_layer_whose_samples_are_graphs():
    seen: list[Tensor] = []
    network, graphs = encoder().train(), batch_of(20)
    network.layer1.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with ll.DeepAugmentation("input", rate=1.0, generator=torch.Generator().manual_seed(0)).attached(network):
        network(**graphs)
    parts = [(seen[0][graphs["batch"] == k], graphs["x"][graphs["batch"] == k]) for k in range(20)]
    gone, kept = [not part.any() for part, _ in parts], [part.equal(own) for part, own in parts]
    assert all(a != b for a, b in zip(gone, kept, strict=True))
    assert 4 <= sum(gone) <= 16


def test_stop_gradient_blocks_exactly_the_transformed_graphs():
    graphs = batch_of(10)
    h = torch.randn(len(graphs["x"]), 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    operator = ll.DeepAugmentation("x", rate=0.5, stop_gradient=True, generator=torch.Generator().manual_seed(1))
    out = operator.augment(h, owner=graphs["batch"])
    out.sum().backward()
    changed = torch.tensor([not out[graphs["batch"] == k].equal(h[graphs["batch"] == k]) for k in range(10)])
    assert 0 < int(changed.sum()) < 10
    assert h.grad is not None
    assert (h.grad.sum(1) == 0).equal(changed[graphs["batch"]])


def test_one_view_of_each_pair_is_transformed_the_same_at_every_layer():
    network, graphs = encoder().train(), batch_of(12)
    operator = ll.DeepAugmentation(
        ["layer1", "pool"], rate=1.0, pairs="one", generator=torch.Generator().manual_seed(0)
    )
    seen: list[Tensor] = []
    with operator.attached(network), capture(network, ["layer1", "pool"], lambda _k, h: seen.append(h)):
        network(**graphs)
    nodes = torch.stack([(seen[0][graphs["batch"] == k] == 0).all() for k in range(12)])
    assert nodes.equal((seen[1] == 0).all(1))
    assert (nodes[:6] ^ nodes[6:]).all()


def test_channels_go_at_all_nodes_of_a_graph_and_positions_are_nodes():
    graphs = batch_of(6)
    h, owner = torch.rand(len(graphs["x"]), 16, generator=torch.Generator().manual_seed(0)) + 1, graphs["batch"]
    made = {
        kind: ll.DeepAugmentation(
            "x", transform=kind, rate=0.5, fraction=1.0, generator=torch.Generator().manual_seed(0)
        ).augment(h, owner=owner)
        for kind in ("channel-dropout", "position-dropout")
    }
    channels = [(made["channel-dropout"][owner == k] == 0) for k in range(6)]
    assert all((gone == gone[0]).all() for gone in channels)
    assert len({tuple(gone[0].tolist()) for gone in channels}) > 1
    nodes = made["position-dropout"] == 0
    assert (nodes.all(1) == nodes.any(1)).all()
    assert 0 < int(nodes.all(1).sum()) < len(h)
    kept = made["position-dropout"][~nodes.all(1)]
    torch.testing.assert_close(kept, 2 * h[~nodes.all(1)])


def test_noise_is_relative_to_the_graphs_own_deviation():
    owner = torch.tensor([0, 0, 1, 1, 2, 2])
    h = torch.tensor([[1.0, 3.0], [5.0, 7.0], [10.0, 30.0], [50.0, 70.0], [4.0, 4.0], [4.0, 4.0]])
    noise = gaussian_noise(h, 0.5, generator=torch.Generator().manual_seed(0), owner=owner) - h
    drawn = torch.randn(h.shape, generator=torch.Generator().manual_seed(0))
    spread = torch.tensor([[5**0.5], [5**0.5], [500**0.5], [500**0.5], [0.0], [0.0]])
    torch.testing.assert_close(noise, 0.5 * spread * drawn)


def test_pca_is_over_nodes():
    graphs = batch_of(6)
    h = torch.randn(len(graphs["x"]), 4, generator=torch.Generator().manual_seed(0))
    for per_token in (False, True):
        operator = ll.DeepAugmentation("x", transform="pca", fraction=1.0, per_token=per_token)
        torch.testing.assert_close(operator.augment(h, owner=graphs["batch"]), remove_principal_components(h, 1))


def test_evaluation_changes_nothing_hooks_leave_and_adalase_knows_no_graphs():
    network, graphs = encoder(), batch_of()
    before = network(**graphs)
    with ll.DeepAugmentation("layer1", rate=1.0).attached(network):
        assert network(**graphs).equal(before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    adalase = ll.AdaLASE(["layer1"], kinds=["noise"])
    adalase.active = 0
    with adalase.attached(network), pytest.raises(ConfigError, match="AdaLASE knows no graphs; 'layer1' has a row per"):
        network.train()(**graphs)


# --- checkpoints ---


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"features": -3}, "metadata is damaged: features=-3"),
        ({"features": "3"}, "metadata is damaged: features='3'"),
        ({"model": "mlp"}, "holds a graph network, but names the model 'mlp'"),
        ({"features": 4}, "was trained on nodes with 4 features; rings and stars has 3"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, metadata: dict[str, Any], match: str):
    from layerlens.training.checkpoint import save_checkpoint

    network = encoder("gin,layers=2,width=8")
    good = {"model": "gin,layers=2,width=8", "features": 3, "head": {"kind": "projection", "out": 5}}
    save_checkpoint(tmp_path / "good.safetensors", network, good)
    loaded, _ = ll.load_network(tmp_path / "good.safetensors", dataset=rings_and_stars())
    assert loaded.eval()(**batch_of()).equal(network(**batch_of()))
    save_checkpoint(tmp_path / "bad.safetensors", network, {**good, **metadata})
    with pytest.raises(CheckpointError, match=match):
        ll.load_network(tmp_path / "bad.safetensors", dataset=rings_and_stars())
