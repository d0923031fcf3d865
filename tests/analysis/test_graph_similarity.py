"""CKA and other measures of graph networks: what a sample is, against definitions in float64 on states by hand."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from graphs import rings_and_stars
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader
from torch_geometric.transforms import ToSparseTensor

import layerlens as ll
from layerlens.activations import features
from layerlens.analysis.geometry import alignment
from layerlens.analysis.profiles import measure_layers
from layerlens.analysis.results import SimilarityMatrix
from layerlens.analysis.similarity import sample_influence, similarity_matrix
from layerlens.analysis.subspace import svcca
from layerlens.augment.graph_views import GraphViews
from layerlens.errors import BatchTooSmallError, ConfigError, LayerlensError, ShapeError, UnknownLayerError
from layerlens.graph_batches import first_graphs
from layerlens.graph_models import GraphEncoder
from layerlens.graphs import GraphDataset
from layerlens.models import ProjectionHead, build_model
from layerlens.pipeline import Settings, analyze, compare, measure_network
from layerlens.recommendation import recommend
from layerlens.reduction import Reduction, make_reduction, pool_nodes

COUNT, SIZE = 30, 10
DATA = rings_and_stars(COUNT)
NODE_LAYERS = ("layer1", "layer2", "layer3")
LAYERS = (*NODE_LAYERS, "pool", "head")


def encoder(kind: str = "gin", *, layers: int = 3, seed: int = 0) -> GraphEncoder:
    """In train mode, with statistics of batch norm that eval mode must use."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GraphEncoder(kind, 3, layers=layers, width=6, head=ProjectionHead(6 * layers, 5))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                nn.init.uniform_(module.running_mean, -1, 1)
                nn.init.uniform_(module.running_var, 0.5, 2)
    return model.train()


class Named(nn.Module):
    """A model whose forward names x, edge_index and batch; around an encoder."""

    def __init__(self, inner: GraphEncoder) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        return self.inner(x, edge_index, batch)


class Whole(nn.Module):
    """A model whose forward takes torch_geometric's batch itself."""

    def __init__(self, inner: GraphEncoder) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, data: Any) -> Tensor:
        return self.inner(data.x, data.edge_index, data.batch)


def batches() -> list[dict[str, Tensor]]:
    return [DATA.graphs.pick(rows) for rows in torch.arange(COUNT).split(SIZE)]


def objects(data: GraphDataset = DATA) -> list[Data]:
    g = data.graphs
    return [
        Data(x=g.x[g.node_ptr[i] : g.node_ptr[i + 1]], edge_index=g.edge_index[:, g.edge_ptr[i] : g.edge_ptr[i + 1]])
        for i in range(len(data))
    ]


def matrix(
    model: nn.Module | None = None, loader: Any = None, layers: Any = "auto", **options: Any
) -> SimilarityMatrix:
    found = similarity_matrix(model or encoder(), batches() if loader is None else loader, layers, **options)
    assert isinstance(found, SimilarityMatrix)
    return found


# --- the oracle ----------------------------------------------------------------------------------------------------


def states_by_hand(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each layer's output by a walk through the network, without a hook."""
    model, found, h = encoder().eval(), {"input": batch["x"]}, batch["x"]
    with torch.no_grad():
        for name in NODE_LAYERS:
            h = found[name] = model.get_submodule(name)(h, batch["edge_index"])
        found["pool"] = model.pool([found[name] for name in NODE_LAYERS], batch["batch"])
        found["head"] = model.head(found["pool"])
    return {name: out.double() for name, out in found.items()}


def as_graphs(out: Tensor, owner: Tensor, pool: str) -> Tensor:
    """A row per graph, one graph at a time."""
    graphs = int(owner.max()) + 1
    if len(out) == graphs:
        return out
    mine = [out[owner == graph] for graph in range(graphs)]
    return torch.stack([rows.sum(0) if pool == "sum" else rows.mean(0) for rows in mine])


def song_hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Unbiased HSIC₁, Song et al. 2012, term by term."""
    n, one = len(k), np.ones(len(k))
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    trace, sums, cross = np.trace(k @ l), (one @ k @ one) * (one @ l @ one), one @ k @ l @ one
    return float((trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3)))


def minibatch_cka(first: list[Tensor], second: list[Tensor]) -> float:
    """HSIC₁ averaged over batches by their rows, then one ratio."""
    sums = np.zeros(3)
    for a, b in zip(first, second, strict=True):
        k, l = (a @ a.T).numpy(), (b @ b.T).numpy()  # noqa: E741
        sums += len(a) * np.array([song_hsic(k, l), song_hsic(k, k), song_hsic(l, l)])
    return float(sums[0] / math.sqrt(sums[1] * sums[2]))


def rows_of(name: str, reduce: str) -> list[Tensor]:
    """The rows of a layer in each batch."""
    pool = "mean" if "mean" in reduce else "sum"
    found = [(states_by_hand(batch)[name], batch["batch"]) for batch in batches()]
    return [out if reduce == "nodes" else as_graphs(out, owner, pool) for out, owner in found]


KINDS = {
    "graphs": ("input", *LAYERS), "graphs,pool=mean": ("input", *LAYERS), "nodes": ("input", *NODE_LAYERS),
}  # fmt: skip


@pytest.mark.parametrize("reduce", KINDS)
def test_minibatch_cka_is_its_definition_on_the_rows(reduce: str):
    found = matrix(layers=KINDS[reduce], reduce=reduce)
    assert (found.layers, found.reduce) == (KINDS[reduce], reduce)
    beside = []
    for first in KINDS[reduce]:
        for second in KINDS[reduce]:
            expected = minibatch_cka(rows_of(first, reduce), rows_of(second, reduce))
            assert found.between(first, second) == pytest.approx(expected, abs=1e-6), (first, second)
            beside += [expected] if first != second else []
    assert 0 < min(beside) < 0.6, "the case is not a trivial one"
    assert max(beside) < 0.999


def test_the_three_kinds_give_three_answers():
    values = [matrix(layers=NODE_LAYERS, reduce=reduce).between("layer1", "layer3") for reduce in KINDS]
    assert np.abs(np.subtract.outer(values, values))[np.triu_indices(3, 1)].min() > 1e-3


@pytest.mark.parametrize("reduce", KINDS)
def test_debiased_cka_of_graphs_is_its_definition_over_the_whole_set(reduce: str):
    found = matrix(layers=NODE_LAYERS, reduce=reduce, measure="cka,estimator=debiased")
    first, third = (torch.cat(rows_of(name, reduce)) for name in ("layer1", "layer3"))
    assert found.between("layer1", "layer3") == pytest.approx(minibatch_cka([first], [third]), abs=1e-6)


@pytest.mark.parametrize("reduce", ["graphs", "nodes"])
def test_svcca_of_graphs_is_that_of_the_rows(reduce: str):
    layers = [name for name in KINDS[reduce] if name != "input"]
    found = matrix(layers=layers, reduce=reduce, measure="svcca")
    first, second = (torch.cat(rows_of(name, reduce)).float() for name in ("layer1", layers[-1]))
    assert found.between("layer1", layers[-1]) == pytest.approx(svcca(first, second), abs=1e-5)
    assert found.samples == (COUNT if reduce == "graphs" else len(DATA.graphs.x))


# --- rows ----------------------------------------------------------------------------------------------------------


def test_nodes_are_pooled_by_graph_worked_by_hand():
    h, owner = torch.tensor([[1.0, 10], [2, 20], [6, 60]]), torch.tensor([0, 0, 2])
    assert pool_nodes(h, owner, 3).tolist() == [[3, 30], [0, 0], [6, 60]]
    assert pool_nodes(h, owner, 3, "mean").tolist() == [[1.5, 15], [0, 0], [6, 60]]
    assert Reduction("nodes").of_graphs(h, owner, 2) is h
    assert Reduction("graphs").of_graphs(h[:2], owner, 2).tolist() == [[1, 10], [2, 20]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pooling_half_precision_sums_in_float32(dtype: torch.dtype):
    """299 ones and a 256: bfloat16 does not hold their sum, 555, nor float16 their mean."""
    h, owner = torch.ones(300, 1, dtype=dtype), torch.zeros(300).long()
    h[0] = 256
    assert pool_nodes(h, owner, 1).item() == 555
    assert pool_nodes(h, owner, 1, "mean").item() == pytest.approx(555 / 300, rel=1e-6)


@pytest.mark.parametrize("text", ["graphs", "graphs,pool=mean", "nodes"])
def test_a_kind_of_graphs_is_written_as_it_is_read(text: str):
    assert str(make_reduction(text)) == text


@pytest.mark.parametrize("text", ["nodes,pool=mean", "flatten,pool=mean", "graphs,channels=last", "nodes,grid=2"])
def test_options_that_a_kind_does_not_take_are_refused(text: str):
    with pytest.raises(ConfigError, match="allowed"):
        make_reduction(text)


# --- what may hold the graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [Named, Whole])
@pytest.mark.parametrize("reduce", ["graphs", "graphs,pool=mean", "nodes"])
def test_mappings_and_batches_of_torch_geometric_give_the_same_matrix(reduce: str, wrap: type[nn.Module]):
    layers = NODE_LAYERS if reduce == "nodes" else LAYERS
    expected = matrix(layers=layers, reduce=reduce)
    loader = DataLoader(objects(), batch_size=SIZE)
    found = matrix(wrap(encoder()), loader, [f"inner.{name}" for name in layers], reduce=reduce)
    np.testing.assert_allclose(found.values, expected.values, atol=1e-6)
    np.testing.assert_allclose(found.low, expected.low, atol=1e-6)
    assert (found.samples, found.sample_id) == (expected.samples, expected.sample_id)


def test_an_encoder_takes_batches_of_torch_geometric_itself():
    found = matrix(encoder(), DataLoader(objects(), batch_size=SIZE), reduce="graphs")
    np.testing.assert_allclose(found.values, matrix(reduce="graphs").values, atol=1e-6)
    assert found.layers == LAYERS


def test_the_input_is_a_layer_of_a_model_that_takes_the_whole_batch():
    found = matrix(Whole(encoder()), DataLoader(objects(), batch_size=SIZE), "input,inner.layer1", reduce="graphs")
    expected = minibatch_cka(rows_of("input", "graphs"), rows_of("layer1", "graphs"))
    assert found.between("input", "inner.layer1") == pytest.approx(expected, abs=1e-6)


def test_the_nodes_of_a_single_graph_are_plain_samples():
    """Without `batch` there is one graph, and its nodes are rows like any."""

    class OfNodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder()

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            for name in NODE_LAYERS:
                x = self.inner.get_submodule(name)(x, edge_index)
            return x

    batch = batches()[0]
    one = Data(x=batch["x"], edge_index=batch["edge_index"])
    found = matrix(OfNodes(), [one], [f"inner.{name}" for name in NODE_LAYERS])
    states = states_by_hand(batch)
    expected = minibatch_cka([states["layer1"]], [states["layer3"]])
    assert found.between("inner.layer1", "inner.layer3") == pytest.approx(expected, abs=1e-6)
    assert found.samples == len(batch["x"])


@pytest.mark.parametrize("reduce", ["graphs", "graphs,pool=mean", "nodes"])
def test_the_order_of_the_graphs_in_a_batch_makes_no_difference(reduce: str):
    layers = NODE_LAYERS if reduce == "nodes" else LAYERS
    draws = torch.Generator().manual_seed(4)
    shuffled = [rows[torch.randperm(SIZE, generator=draws)] for rows in torch.arange(COUNT).split(SIZE)]
    found = matrix(loader=[DATA.graphs.pick(rows) for rows in shuffled], layers=layers, reduce=reduce)
    expected = matrix(layers=layers, reduce=reduce)
    np.testing.assert_allclose(found.values, expected.values, atol=1e-6)
    assert found.sample_id != expected.sample_id


@pytest.mark.parametrize("reduce", ["graphs", "nodes"])
@pytest.mark.parametrize("size", [4, 13, COUNT])
def test_batches_do_not_change_a_measure_of_the_whole_set(size: int, reduce: str):
    measure, loader = "cka,estimator=debiased", [DATA.graphs.pick(rows) for rows in torch.arange(COUNT).split(size)]
    found = matrix(loader=loader, layers=NODE_LAYERS, reduce=reduce, measure=measure)
    expected = matrix(layers=NODE_LAYERS, reduce=reduce, measure=measure)
    np.testing.assert_allclose(found.values, expected.values, atol=1e-6)


# --- what stays as it was ------------------------------------------------------------------------------------------

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: value.tolist() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "hooks": [len(getattr(module, kind)) for module in model.modules() for kind in HOOKS],
        "gradients": [(p.requires_grad, p.grad) for p in model.parameters()],
        "random": torch.get_rng_state().tolist(),
    }


def content(batch: Any) -> dict[str, list[Any]]:
    parts = batch.to_dict() if isinstance(batch, Data) else batch
    return {name: value.tolist() for name, value in parts.items()}


def refused(model: nn.Module, loader: Any) -> None:
    with pytest.raises(ConfigError, match="on a batch of graphs"):
        matrix(model, loader)


LOOKS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "graphs": lambda model, loader: matrix(model, loader, reduce="graphs"),
    "nodes": lambda model, loader: matrix(model, loader, "*layer1,*layer3", reduce="nodes"),
    "svcca": lambda model, loader: matrix(model, loader, reduce="graphs", measure="svcca"),
    "two models": lambda model, loader: similarity_matrix(model, loader, other=model, reduce="graphs"),
    "features": features,
    "a refusal": lambda model, loader: refused(model, loader),
}


@pytest.mark.parametrize("kind", ["mapping", "torch_geometric", "whole"])
@pytest.mark.parametrize("look", LOOKS)
def test_model_and_batches_are_left_as_they_were(look: str, kind: str):
    loader = batches() if kind == "mapping" else list(DataLoader(objects(), batch_size=SIZE))
    model = Whole(encoder()) if kind == "whole" else encoder()
    before, held = state_of(model), [content(batch) for batch in loader]
    tensors = [batch["x"] for batch in loader]
    LOOKS[look](model, loader)
    assert state_of(model) == before
    assert [content(batch) for batch in loader] == held
    assert all(batch["x"] is x for batch, x in zip(loader, tensors, strict=True))


def test_a_model_that_fails_in_a_later_batch_keeps_no_hook():
    class Fails(Named):
        def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
            if torch.equal(x, batches()[1]["x"]):
                raise RuntimeError("this batch")
            return super().forward(x, edge_index, batch)

    model = Fails(encoder())
    before = state_of(model)
    with pytest.raises(RuntimeError, match="this batch"):
        matrix(model, reduce="graphs")
    assert state_of(model) == before


# --- what can't be compared ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["flatten", "pool", "positions", "positions,grid=2"])
def test_kinds_for_images_are_refused_on_graphs_and_those_for_graphs_named(reduce: str):
    match = rf"layer 'layer1': reduce='{reduce.partition(',')[0]}' on a batch of graphs; allowed: 'graphs' .*'nodes'"
    with pytest.raises(ConfigError, match=match):
        matrix(reduce=reduce)


@pytest.mark.parametrize("layer", ["pool", "head"])
def test_layers_of_graphs_have_no_nodes(layer: str):
    with pytest.raises(
        ShapeError, match=rf"layer '{layer}': a row per graph, which has no nodes; leave this layer out"
    ):
        matrix(layers=["layer1", layer], reduce="nodes")


@pytest.mark.parametrize("reduce", ["graphs", "graphs,pool=mean", "nodes"])
def test_images_have_neither_graphs_nor_nodes(reduce: str):
    model, kind = build_model("mlp,width=4,depth=1", input_shape=(1, 2, 2)), reduce.partition(",")[0]
    images = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    match = rf"reduce='{kind}' is for batches of graphs; allowed here: flatten, pool, positions"
    with pytest.raises(ConfigError, match=match):
        matrix(model, [images], reduce=reduce)


def test_a_layer_with_other_rows_is_refused():
    class Edges(nn.Module):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return x[edge_index[0]]

    class OfEdges(Named):
        def __init__(self) -> None:
            super().__init__(encoder())
            self.edges = Edges()

        def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
            self.edges(x, edge_index)
            return super().forward(x, edge_index, batch)

    with pytest.raises(ShapeError, match=r"layer 'edges': \d+ rows for \d+ nodes of 10 graphs"):
        matrix(OfEdges(), layers="edges,inner.layer1", reduce="graphs")


@pytest.mark.parametrize(
    ("owner", "match"),
    [
        (torch.tensor([0, 0, 1, 1, 0]), "must stand graph by graph"),
        (torch.tensor([0, 0, 1, 1]), "allowed: the graph of each of the 5 nodes"),
        (torch.tensor([0.0, 0, 1, 1, 1]), "float32; allowed: the graph of each of the 5 nodes, int64"),
    ],
)
def test_a_batch_that_does_not_fit_its_nodes_is_refused(owner: Tensor, match: str):
    batch = {**encoder().example(), "x": torch.ones(5, 3), "batch": owner}
    with pytest.raises(ShapeError, match=match):
        matrix(loader=[batch], reduce="graphs")


@pytest.mark.parametrize("options", [{"permutations": 5}, {"measure": "cka,kernel=rbf"}])
def test_nodes_allow_neither_permutations_nor_the_rbf_kernel(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"nodes or positions as samples allow the linear kernel only"):
        matrix(layers=NODE_LAYERS, reduce="nodes", **options)


def test_graphs_allow_permutations_and_influence_and_nodes_no_influence():
    found = matrix(reduce="graphs", permutations=20)
    assert found.null is not None
    assert found.null.permutations == 20
    assert sample_influence(encoder(), batches(), reduce="graphs").samples == COUNT
    with pytest.raises(ConfigError, match=r"influence is of single samples; .* of graphs 'graphs'"):
        sample_influence(encoder(), batches(), NODE_LAYERS, reduce="nodes")


def test_the_influence_of_a_graph_is_that_of_leaving_it_out():
    """One batch: the debiased matrix without the graph of most influence, computed anew."""
    whole = [DATA.graphs.pick(torch.arange(COUNT))]
    found = sample_influence(encoder(), whole, reduce="graphs")
    worst = int(found.index[0, 2, 0])
    rest = [DATA.graphs.pick(torch.tensor([i for i in range(COUNT) if i != worst]))]
    change = matrix(loader=rest, reduce="graphs").values - matrix(loader=whole, reduce="graphs").values
    assert found.change[0, 2, 0] == pytest.approx(change[0, 2], abs=1e-6)


# --- intervals and counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["cka", "cka,estimator=debiased", "procrustes"])
@pytest.mark.parametrize("reduce", ["graphs", "nodes"])
def test_intervals_are_finite_and_hold_the_value(reduce: str, measure: str):
    data = rings_and_stars(80)
    found = matrix(loader=data.batches(batch_size=20), layers=NODE_LAYERS, reduce=reduce, measure=measure)
    beside = ~np.eye(3, dtype=bool)
    assert np.isfinite(found.low[beside]).all()
    assert np.isfinite(found.high[beside]).all()
    assert (found.low[beside] < found.high[beside]).all()
    if measure.startswith("cka"):
        assert (found.low[beside] < found.values[beside]).all()
        assert (found.values[beside] < found.high[beside]).all()
    assert found.samples == (80 if reduce == "graphs" else len(data.graphs.x))


def test_the_nodes_of_one_graph_in_a_batch_are_too_few():
    """No interval can be told from them, as nodes belong together by graph."""
    batch = DATA.graphs.pick(torch.tensor([0]))
    with pytest.raises(BatchTooSmallError, match="a batch of one sample with many rows shows no variation"):
        matrix(loader=[batch], layers=NODE_LAYERS, reduce="nodes")


def test_intervals_of_nodes_rest_on_graphs_not_on_nodes():
    """Three copies of each node, side by side in its graph: thrice as many rows, and no more known."""

    def copied(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        places = torch.arange(len(batch["x"])) * 3
        ends = torch.cat([places[batch["edge_index"]] + k for k in range(3)], 1)
        return {"x": batch["x"].repeat_interleave(3, 0), "edge_index": ends,
                "batch": batch["batch"].repeat_interleave(3)}  # fmt: skip

    measure = "cka,estimator=debiased"
    once = matrix(layers=NODE_LAYERS, reduce="nodes", measure=measure)
    thrice = matrix(loader=map(copied, batches()), layers=NODE_LAYERS, reduce="nodes", measure=measure)
    assert thrice.samples == 3 * once.samples
    width = (once.high - once.low)[0, 2]
    assert (thrice.high - thrice.low)[0, 2] == pytest.approx(width, rel=0.15)


# --- measures of single layers -------------------------------------------------------------------------------------


def seeing(views: GraphViews, seed: int = 0) -> Callable[[Any], Any]:
    generator = torch.Generator().manual_seed(seed)
    return lambda batch: views(batch, generator)


def test_the_effective_rank_of_a_node_layer_is_that_of_its_rows():
    found = measure_layers(encoder(), batches(), reduce="graphs", estimator="whole-set")
    assert found.layers == LAYERS
    for name, value in zip(found.layers, found.values, strict=True):
        rows = torch.cat(rows_of(name, "graphs"))
        values = torch.linalg.svdvals(rows - rows.mean(0))
        shares = values[values > 0] / values.sum()
        assert value == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-4), name
    assert found.samples == COUNT


@pytest.mark.parametrize("kinds", [("node-drop",), ("subgraph",), ("node-drop", "subgraph")])
def test_alignment_under_views_that_drop_nodes_is_that_of_the_pooled_views(kinds: tuple[str, ...]):
    views, model = GraphViews(kinds=kinds, ratio=0.3, keep=0.5), encoder().eval()
    whole = [DATA.graphs.pick(torch.arange(COUNT))]
    found = measure_layers(encoder(), whole, reduce="graphs", measure="alignment", views=seeing(views))
    see = seeing(views)
    for _ in range(2):  # the first look at each of the two, which says which layers run
        see(first_graphs(whole[0]))
    shown = [see(whole[0]) for _ in range(2)]
    assert all(len(view["x"]) < len(whole[0]["x"]) for view in shown)
    assert found.layers == LAYERS
    for name, value in zip(found.layers, found.values, strict=True):
        expected = alignment(*(features(model, [view], name) for view in shown))
        assert value == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("measure", ["invariance", "diversity,views=3"])
def test_measures_over_views_run_at_every_layer(measure: str):
    found = measure_layers(encoder(), batches(), reduce="graphs", measure=measure, views=seeing(GraphViews()))
    assert np.isfinite(found.values).all()
    assert found.samples == COUNT


@pytest.mark.parametrize("kinds", [("node-drop",), ("subgraph",), ("node-drop", "subgraph")])
def test_nodes_of_views_that_drop_other_nodes_are_no_pairs(kinds: tuple[str, ...]):
    """Row i of one view is another node than row i of the other, also where both views are equally large."""
    views = seeing(GraphViews(kinds=kinds, ratio=0.3, keep=0.5))
    with pytest.raises(ConfigError, match=r"alignment with reduce='nodes': .* use reduce='graphs'"):
        measure_layers(encoder(), batches(), NODE_LAYERS, reduce="nodes", measure="alignment", views=views)


# --- features ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["mapping", "torch_geometric"])
@pytest.mark.parametrize("layer", ["input", *LAYERS])
def test_features_of_a_node_layer_are_sums_over_the_nodes_of_each_graph(layer: str, wrap: str):
    loader = batches() if wrap == "mapping" else DataLoader(objects(), batch_size=SIZE)
    found = ll.features(encoder(), loader, layer)
    torch.testing.assert_close(found, torch.cat(rows_of(layer, "graphs")).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrap", ["mapping", "torch_geometric"])
def test_the_embedding_is_what_goes_into_the_head(wrap: str):
    loader = batches() if wrap == "mapping" else DataLoader(objects(), batch_size=SIZE)
    expected = torch.cat(rows_of("pool", "graphs")).float()
    torch.testing.assert_close(ll.features(encoder(), loader), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ll.features(encoder(), batches(), "output"), torch.cat(rows_of("head", "graphs")).float(), rtol=1e-5, atol=1e-5
    )


def test_a_head_of_somebodys_own_model_is_found_on_a_batch_of_torch_geometric():
    class Own(Whole):
        def __init__(self) -> None:
            super().__init__(encoder())
            self.classifier = nn.Linear(5, 2)

        def forward(self, data: Any) -> Tensor:
            return self.classifier(super().forward(data))

    found = ll.features(Own(), DataLoader(objects(), batch_size=SIZE))
    torch.testing.assert_close(found, torch.cat(rows_of("head", "graphs")).float(), rtol=1e-5, atol=1e-5)


def test_features_of_an_unknown_layer_are_refused():
    with pytest.raises(UnknownLayerError, match="no layer 'layer9' in GraphEncoder; closest: layer"):
        ll.features(encoder(), batches(), "layer9")


# --- the whole path ------------------------------------------------------------------------------------------------

LOOK = Settings(samples=24, batch_size=8)


@pytest.mark.parametrize(
    ("reduce", "layers", "expected"),
    [
        ("flatten", "auto", ("graphs", "auto")),
        ("graphs", "auto", ("graphs", "auto")),
        ("graphs,pool=mean", "layer1,pool", ("graphs,pool=mean", "layer1,pool")),
        ("nodes", "auto", ("nodes", "layer1,layer2,layer3")),
        ("nodes", "layer2", ("nodes", "layer2")),
        ("positions", "auto", ("positions", "auto")),
    ],
)
def test_settings_are_filled_in_for_graphs(reduce: str, layers: str, expected: tuple[str, str]):
    given = Settings(reduce=reduce, layers=layers, samples=24)
    found = given.on(DATA, encoder())
    assert (found.reduce, found.layers) == expected
    assert {k: v for k, v in vars(found).items() if k not in ("reduce", "layers")} == {
        k: v for k, v in vars(given).items() if k not in ("reduce", "layers")
    }
    assert found.on(DATA, encoder()) == found
    assert (given.reduce, given.layers) == (reduce, layers)


def test_settings_mean_what_they_say_on_images():
    images = np.zeros((8, 1, 8, 8), np.uint8)
    data = ll.dataset_from_arrays("tiny", images, None, images, None)
    assert Settings().on(data, nn.Linear(1, 1)) == Settings()


@pytest.mark.parametrize(
    ("reduce", "layers", "samples"), [("graphs", LAYERS, 24), ("flatten", LAYERS, 24), ("nodes", NODE_LAYERS, None)]
)
def test_graphs_are_analysed_and_advised_about(reduce: str, layers: tuple[str, ...], samples: int | None):
    settings = Settings(samples=24, batch_size=8, reduce=reduce)
    found, twin = (analyze(encoder(seed=seed), DATA, settings=settings) for seed in (0, 1))
    chosen = DATA.batches(samples=24, batch_size=8)
    nodes = sum(len(batch["x"]) for batch in chosen)
    assert found.cka.layers == found.effective_rank.layers == layers
    assert found.cka.samples == found.effective_rank.samples == (samples or nodes)
    assert found.cka.reduce == ("nodes" if reduce == "nodes" else "graphs")
    assert found.geometry.samples == 24
    assert np.isfinite([found.geometry.alignment, found.geometry.uniformity]).all()
    expected = matrix(loader=chosen, layers=layers, reduce=found.cka.reduce)
    np.testing.assert_allclose(found.cka.values, expected.values, atol=1e-9)
    advice = recommend(found.cka, twin.cka, geometry=found.geometry)
    assert advice.verdict in ("supported", "no supported choice")
    assert {target.layer for target in advice.targets} <= set(layers)
    assert type(found).from_json(found.to_json()).cka.layers == layers


def test_the_advice_on_two_blocks_of_layers_is_at_the_ends_of_the_later_one():
    """Six layers of which the last four carry one code and the first two another: `recommend` sees it on graphs."""
    first, second = (torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for k in range(6):
                self.add_module(f"layer{k + 1}", nn.Identity())
            self.layer_names = tuple(f"layer{k + 1}" for k in range(6))

        def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
            one, other = x[:, :3] @ first[:3], x[:, 3:] @ second[:3]
            for k in range(6):
                out = self.get_submodule(f"layer{k + 1}")((one if k < 2 else other) + 0.0)
            return out

    data = rings_and_stars(120, features=6)
    found = matrix(Blocks(), data.batches(batch_size=30), reduce="graphs")
    advice = recommend(found)
    assert advice.verdict == "supported"
    assert [(t.layer, t.stop_gradient) for t in advice.targets[:2]] == [("layer3", True), ("layer6", False)]


@pytest.mark.parametrize("measure", ["cka", "svcca", "effective_rank", "alignment"])
def test_any_measure_of_a_network_on_graphs_has_its_layers(measure: str):
    found = measure_network(encoder(), DATA, measure, settings=LOOK)
    assert found.layers == LAYERS
    again = measure_network(encoder(), DATA, measure, settings=LOOK)
    np.testing.assert_array_equal(np.array(found.values), np.array(again.values))


def test_permutations_with_nodes_are_refused_on_the_whole_path():
    with pytest.raises(ConfigError, match=r"nodes or positions as samples allow .* no permutations"):
        measure_network(
            encoder(), DATA, "cka", settings=Settings(samples=24, batch_size=8, reduce="nodes"), permutations=3
        )


@pytest.mark.parametrize("depths", [(3, 2), (2, 3)])
@pytest.mark.parametrize("reduce", ["graphs", "nodes"])
def test_networks_of_other_depth_are_compared_at_all_their_layers(reduce: str, depths: tuple[int, int]):
    first, second = (encoder(layers=depth, seed=depth) for depth in depths)
    found = compare(first, second, DATA, settings=Settings(samples=24, batch_size=8, reduce=reduce))
    whole = ("pool", "head") if reduce == "graphs" else ()
    assert found.first == (*first.node_layers, *whole)
    assert found.second == (*second.node_layers, *whole)


def test_a_copy_of_the_network_is_alike_at_every_layer():
    model = encoder()
    found = compare(model, copy.deepcopy(model), DATA, settings=LOOK)
    np.testing.assert_allclose(found.values.diagonal(), 1.0, atol=1e-9)


# --- torch_geometric's own kinds of batches ------------------------------------------------------------------------


def test_more_attributes_of_a_batch_do_no_harm():
    def rich() -> Iterator[Data]:
        for i, graph in enumerate(objects()):
            graph.y, graph.name = torch.tensor([i % 2]), f"graph {i}"
            graph.edge_attr = torch.ones(graph.edge_index.shape[1], 2)
            yield graph

    found = matrix(encoder(), DataLoader(list(rich()), batch_size=SIZE), reduce="graphs")
    np.testing.assert_allclose(found.values, matrix(reduce="graphs").values, atol=1e-6)


class Reads(Whole):
    """A model that also reads what stands beside x: something for each node, edge or graph."""

    def __init__(self, what: str) -> None:
        super().__init__(encoder())
        self.what = what

    def forward(self, data: Any) -> Tensor:
        more = getattr(data, self.what)
        if self.what == "pos":
            more = pool_nodes(more, data.batch, data.num_graphs)
        elif self.what == "edge_label":
            more = pool_nodes(more, data.batch[data.edge_index[0]], data.num_graphs)
        elif self.what == "ptr":
            more = more.diff()[:, None].float()
        return super().forward(data) + more.sum(1, keepdim=True)


@pytest.mark.parametrize("what", ["pos", "edge_label", "u", "ptr"])
def test_a_model_may_read_more_of_a_batch_than_nodes_and_edges(what: str):
    graphs = objects()
    for graph in graphs:
        graph.pos, graph.u = torch.ones(len(graph.x), 2), torch.ones(1, 4)
        graph.edge_label = torch.ones(graph.edge_index.shape[1], 3)
    loader, names = DataLoader(graphs, batch_size=SIZE), [f"inner.{name}" for name in LAYERS]
    found = matrix(Reads(what), loader, names, reduce="graphs")
    np.testing.assert_allclose(found.values, matrix(reduce="graphs").values, atol=1e-6)
    embedding = torch.cat(rows_of("pool", "graphs")).float()
    torch.testing.assert_close(features(Reads(what), loader, "inner.pool"), embedding, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrap", [Named, Whole])
@pytest.mark.parametrize("change", ["fewer edges", "edges in another order", "no edge", "fewer nodes"])
def test_a_batch_may_be_changed_after_it_was_put_together(change: str, wrap: type[nn.Module]):
    """As augmentations of whole batches do; what torch_geometric remembers of its parts is then out of date."""
    draws = torch.Generator().manual_seed(0)
    batch = Batch.from_data_list(objects()[:SIZE])
    edges = batch.edge_index
    if change == "fewer nodes":
        batch = batch.subgraph(torch.rand(len(batch.x), generator=draws) < 0.7)
    else:
        some = torch.rand(edges.shape[1], generator=draws) < 0.5
        order = torch.randperm(edges.shape[1], generator=draws)
        batch.edge_index = {"fewer edges": edges[:, some], "no edge": edges[:, :0]}.get(change, edges[:, order])
    plain = {"x": batch.x, "edge_index": batch.edge_index, "batch": batch.batch}
    found = matrix(wrap(encoder()), [batch], [f"inner.{name}" for name in LAYERS], reduce="graphs")
    np.testing.assert_allclose(found.values, matrix(loader=[plain], reduce="graphs").values, atol=1e-6)


@pytest.mark.parametrize("wrap", [Named, Whole])
def test_a_batch_whose_edges_are_in_a_sparse_matrix_is_an_error_of_ours(wrap: type[nn.Module]):
    """`ToSparseTensor` leaves an `adj_t` in the place of `edge_index`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's sparse matrices are in beta
        graphs = [ToSparseTensor()(graph) for graph in objects()[:SIZE]]
        with pytest.raises(LayerlensError):
            matrix(wrap(encoder()), [Batch.from_data_list(graphs)], reduce="graphs")
