"""Graphs in flat tensors, from files and from torch_geometric's objects, and their views."""

from __future__ import annotations

import pickle
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import rings_and_stars, write_tu
from torch import Tensor
from torch_geometric.data import Batch, Data
from torch_geometric.datasets import TUDataset

from layerlens.augment.graph_views import KINDS, GraphViews
from layerlens.data import load_data
from layerlens.errors import ConfigError, DataError, DownloadError, ShapeError, UnknownNameError
from layerlens.graph_batches import (
    first_graphs,
    graph_of_node,
    holds_graphs,
    is_graph_object,
    join_graphs,
)
from layerlens.graphs import GraphDataset, dataset_from_graphs, describe_graphs

PATH = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])  # 0 - 1 - 2


def arrays(**change: Any) -> dict[str, Any]:
    """A path of three nodes and one of two."""
    good = {
        "node_ptr": np.array([0, 3, 5]), "edge_ptr": np.array([0, 4, 6]),
        "edge_index": np.array([[0, 1, 1, 2, 0, 1], [1, 0, 2, 1, 1, 0]]),
        "node_label": np.array([4, 4, 7, 4, 7]), "graph_label": np.array([-1, 3]),
    }  # fmt: skip
    return {name: value for name, value in {**good, **change}.items() if value is not None}


def stored(folder: Path, options: str = "", **change: Any) -> GraphDataset:
    np.savez(folder / "graphs.npz", **arrays(**change))
    found = load_data(f"graphs-npz:{folder / 'graphs.npz'}{options}")
    assert isinstance(found, GraphDataset)
    return found


def as_data(dataset: GraphDataset) -> list[Any]:
    g = dataset.graphs
    return [
        Data(x=g.x[g.node_ptr[i] : g.node_ptr[i + 1]], edge_index=g.edge_index[:, g.edge_ptr[i] : g.edge_ptr[i + 1]])
        for i in range(len(dataset))
    ]


def same(batch: dict[str, Tensor], other: Any) -> bool:
    return all(batch[name].equal(getattr(other, name)) for name in ("x", "edge_index", "batch"))


# --- batches ---


@pytest.mark.parametrize("rows", [[0, 1, 2], [5, 0, 5, 3], [7], list(range(24))])
def test_a_picked_batch_is_that_of_torch_geometric(rows: list[int]):
    dataset = rings_and_stars()
    objects = as_data(dataset)
    assert same(dataset.graphs.pick(torch.tensor(rows)), Batch.from_data_list([objects[i] for i in rows]))


def test_a_part_holds_the_same_graphs():
    dataset = rings_and_stars()
    part = dataset.graphs.part(torch.tensor([4, 9, 2]))
    assert len(part) == 3
    whole, few = dataset.graphs.pick(torch.tensor([9, 2])), part.pick(torch.tensor([1, 2]))
    assert all(whole[name].equal(few[name]) for name in whole)


def test_batches_are_a_fixed_choice_of_equal_size():
    batches = rings_and_stars(23).batches(samples=21, batch_size=5, seed=3)
    first, second = list(batches), list(batches)
    assert [int(b["batch"][-1]) + 1 for b in first] == [5, 4, 4, 4, 4]
    assert all(a["x"].equal(b["x"]) for a, b in zip(first, second, strict=True))
    assert not first[0]["x"].equal(next(iter(rings_and_stars(23).batches(samples=21, batch_size=5, seed=4)))["x"])
    with pytest.raises(UnknownNameError, match="no split 'dev'; allowed: train, test"):
        rings_and_stars().batches("dev")


def test_joined_batches_are_those_of_torch_geometric():
    dataset = rings_and_stars()
    one, other = dataset.graphs.pick(torch.tensor([0, 3])), dataset.graphs.pick(torch.tensor([8]))
    assert same(join_graphs(one, other), Batch.from_data_list([as_data(dataset)[i] for i in (0, 3, 8)]))


@pytest.mark.parametrize("kind", [dict, Batch])
def test_the_first_graphs_are_a_batch_of_the_same_kind(kind: type):
    dataset = rings_and_stars()
    whole = dataset.graphs.pick(torch.arange(5))
    batch = whole if kind is dict else Batch.from_data_list(as_data(dataset)[:5])
    few = first_graphs(batch)
    expected = dataset.graphs.pick(torch.arange(2))
    get = few.get if kind is dict else lambda name: getattr(few, name)
    assert all(get(name).equal(value) for name, value in expected.items())
    assert len(whole["batch"]) > len(expected["batch"]), "the batch itself is as it was"
    assert kind is dict or few.num_graphs == 2
    single = Data(x=torch.ones(3, 1), edge_index=PATH)
    copied = first_graphs(single)
    assert copied.edge_index.equal(PATH)
    assert copied.x is not single.x


def test_what_is_a_batch_of_graphs():
    batch = rings_and_stars().graphs.pick(torch.arange(2))
    assert holds_graphs(batch)
    assert holds_graphs(Data(x=torch.ones(3, 1), edge_index=PATH))
    assert not is_graph_object(batch)
    assert not holds_graphs({"input_ids": torch.ones(2)})
    assert graph_of_node({"x": torch.ones(3, 1), "edge_index": PATH}) is None
    for owner, match in (([1, 0, 0], "may not fall"), ([0, 0], "the graph of each of the 3 nodes")):
        with pytest.raises(ShapeError, match=match):
            graph_of_node({"x": torch.ones(3, 1), "edge_index": PATH, "batch": torch.tensor(owner)})


# --- files ---


def test_node_labels_are_one_hot_and_classes_count_from_0(tmp_path: Path):
    found = stored(tmp_path)
    assert found.graphs.x.tolist() == [[1, 0], [1, 0], [0, 1], [1, 0], [0, 1]]
    assert found.y is not None
    assert (found.y.tolist(), found.classes, len(found)) == ([0, 1], ("-1", "3"), 2)
    assert found.y_train is found.y_test is found.y


def test_attributes_count_where_they_are_asked_for(tmp_path: Path):
    values = np.arange(10.0).reshape(5, 2)
    with_them, without = stored(tmp_path, ",attributes=true", node_attr=values), stored(tmp_path, node_attr=values)
    assert with_them.graphs.x[:, 2:].tolist() == values.tolist()
    assert without.features == 2
    assert "2 continuous node attributes are not used" in describe_graphs(without)
    assert "edge labels are not used" in describe_graphs(stored(tmp_path, edge_label=np.zeros(6, dtype=int)))


def test_degrees_stand_in_for_missing_features_and_it_is_said(tmp_path: Path):
    found = stored(tmp_path, node_label=None)
    assert found.graphs.x.argmax(1).tolist() == [1, 2, 1, 1, 1]
    assert "their degree stands in, one-hot, 64 and more alike" in describe_graphs(found)
    star = [(0, k) for k in range(1, 81)]
    hub = np.array([*star, *((b, a) for a, b in star)]).T
    many = stored(tmp_path, node_label=None, node_ptr=np.array([0, 81]), edge_ptr=np.array([0, 160]), edge_index=hub,
                  graph_label=None)  # fmt: skip
    assert (many.features, int(many.graphs.x[0].argmax())) == (65, 64)
    assert (many.y, many.classes) == (None, ())


def test_the_fingerprint_is_that_of_the_contents(tmp_path: Path):
    first = stored(tmp_path).fingerprint()
    (tmp_path / "elsewhere").mkdir()
    assert stored(tmp_path / "elsewhere").fingerprint() == first
    changed = [
        {"node_label": np.array([4, 7, 7, 4, 7])}, {"graph_label": np.array([3, -1])},
        {"edge_index": np.array([[0, 2, 1, 2, 0, 1], [2, 0, 2, 1, 1, 0]])},
    ]  # fmt: skip
    assert all(stored(tmp_path, **change).fingerprint() != first for change in changed)


def test_graphs_without_nodes_or_edges_are_left_out_if_that_is_asked_for(tmp_path: Path):
    change = {"node_ptr": np.array([0, 3, 3, 5, 6]), "edge_ptr": np.array([0, 4, 4, 6, 6]), "graph_label": [5, 6, 7, 8],
              "node_label": np.zeros(6, dtype=int)}  # fmt: skip
    found = stored(tmp_path, ",empty=leave-out", **change)
    assert found.y is not None
    assert (len(found), found.y.tolist(), found.graphs.node_ptr.tolist()) == (2, [0, 2], [0, 3, 5])
    assert found.graphs.edge_index.tolist() == arrays()["edge_index"].tolist()
    assert "left out 2 graphs without nodes or edges" in describe_graphs(found)
    with pytest.raises(DataError, match=r"graph 1 has no node \(2 such graphs\).*,empty=leave-out"):
        stored(tmp_path, **change)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"node_ptr": None}, r"lacks \['node_ptr'\]; it holds"),
        (
            {"edge_index": np.array([[0, 1, 1, 3, 0, 1], [1, 0, 2, 1, 1, 0]])},
            r"graph 0 has 3 nodes and an edge \[3, 1\]",
        ),
        ({"node_ptr": np.array([0, 5, 3])}, r"node_ptr has shape \(3,\) from \[0\]; allowed: .* never falling"),
        ({"edge_ptr": np.array([1, 4, 6])}, r"edge_ptr has shape \(3,\) from \[1\]"),
        ({"edge_ptr": np.array([0, 4])}, r"node_ptr has 3 entries, edge_ptr 2; allowed: graphs \+ 1 each"),
        ({"edge_index": np.zeros((3, 6), dtype=int)}, r"edge_index has shape \(3, 6\); edge_ptr says \(2, 6\)"),
        ({"graph_label": np.array([1, 2, 3])}, r"graph_label has shape \(3,\); allowed: one for each of 2 graphs"),
        ({"graph_label": np.array([0.5, 1.0])}, "graph_label holds float64; allowed: whole numbers"),
        (
            {"node_label": np.array([1, 2])},
            r"node_label has shape \(2,\); allowed: a whole number from 0 for each of 5",
        ),
        ({"node_attr": np.ones((4, 2))}, r"node features have shape \(4, 2\); allowed: \(5, features\)"),
        ({"node_attr": np.full((5, 1), np.nan)}, "NaN or infinity in the node features"),
        ({"node_attr": np.array([[1], [2, 3], [1], [1], [1]], dtype=object)}, "is not a plain npz archive of arrays"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: dict[str, Any], match: str):
    with pytest.raises(DataError, match=match):
        stored(tmp_path, ",attributes=true", **change)


def test_a_file_that_is_no_archive_or_no_file_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"no file 'gone\.npz'; graphs-npz:PATH needs node_ptr, edge_ptr, edge_index"):
        load_data("graphs-npz:gone.npz")
    stored(tmp_path)
    whole = (tmp_path / "graphs.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is not a plain npz archive"):
        load_data(f"graphs-npz:{tmp_path / 'half.npz'}")
    with pytest.raises(DataError, match=r"empty='yes' of .*; allowed: refuse, leave-out"):
        load_data(f"graphs-npz:{tmp_path / 'graphs.npz'},empty=yes")


def test_tu_files_give_the_graphs_of_torch_geometric(tmp_path: Path):
    write_tu(tmp_path / "ours", "TOY", 12)
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    found, theirs = load_data(f"tu:TOY@{tmp_path / 'ours'}"), TUDataset(str(tmp_path / "theirs"), "TOY")
    assert isinstance(found, GraphDataset)
    assert found.y is not None
    assert same(found.graphs.pick(torch.arange(12)), Batch.from_data_list([theirs[i] for i in range(12)]))
    assert found.y.tolist() == [int(graph.y) for graph in theirs]
    assert not (tmp_path / "ours" / "TOY" / "processed").exists()


def test_tu_without_node_labels_has_degrees_and_a_graph_without_edges_is_found(tmp_path: Path):
    write_tu(tmp_path, "TOY", 6)
    raw = tmp_path / "TOY" / "raw"
    (raw / "TOY_node_labels.txt").unlink()
    found = load_data(f"tu:TOY@{tmp_path}")
    assert isinstance(found, GraphDataset)
    assert "their degree stands in" in describe_graphs(found)
    nodes = len((raw / "TOY_graph_indicator.txt").read_text().split())
    with (raw / "TOY_graph_indicator.txt").open("a") as file:
        file.write("7\n7\n")
    with (raw / "TOY_graph_labels.txt").open("a") as file:
        file.write("1\n")
    (raw / "TOY_node_labels.txt").write_text("0\n" * (nodes + 2))
    with pytest.raises(DataError, match="graph 6 has no edge"):
        load_data(f"tu:TOY@{tmp_path}")


def test_a_missing_tu_data_set_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_tu(tmp_path / "server", "TOY", 6)
    (tmp_path / "server" / "TOY" / "raw").rename(tmp_path / "server" / "zip")
    (tmp_path / "server" / "TOY").rmdir()
    (tmp_path / "server" / "zip").rename(tmp_path / "server" / "TOY")
    shutil.make_archive(str(tmp_path / "TOY"), "zip", tmp_path / "server", "TOY")
    monkeypatch.setattr(TUDataset, "url", str(tmp_path))
    found = load_data(f"tu:TOY@{tmp_path / 'data'}", download=True)
    assert len(found) == 6
    assert {path.name for path in (tmp_path / "data" / "TOY").iterdir()} == {"raw"}
    monkeypatch.setattr(TUDataset, "url", str(tmp_path / "nowhere"))
    assert load_data(f"tu:TOY@{tmp_path / 'data'}", download=True).fingerprint() == found.fingerprint()
    with pytest.raises(DownloadError, match=r"could not fetch GONE into .*; see https://www\.chrsmrrs\.com"):
        load_data(f"tu:GONE@{tmp_path / 'data'}", download=True)


class _Evil:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place,)


def test_a_pickled_cache_is_never_opened(tmp_path: Path):
    write_tu(tmp_path, "TOY", 6)
    (tmp_path / "TOY" / "processed").mkdir()
    for name in ("data.pt", "pre_filter.pt", "pre_transform.pt"):
        (tmp_path / "TOY" / "processed" / name).write_bytes(pickle.dumps(_Evil(tmp_path / "owned")))
    load_data(f"tu:TOY@{tmp_path}")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (
            lambda raw: (raw / "TOY_A.txt").unlink(),
            r"no TOY_A.txt in .*`--download` fetches TOY there, or unpack TOY.zip",
        ),
        (lambda raw: (raw / "TOY_node_attributes.txt").write_text("1, 2\n1\n"), "the files of TOY in .* are damaged"),
        (lambda raw: (raw / "TOY_A.txt").write_text("1, x\n"), "the files of TOY in .* are damaged"),
        (lambda raw: (raw / "TOY_graph_indicator.txt").write_text(""), "the files of TOY in .* are damaged"),
    ],
    ids=["missing", "ragged", "letters", "empty"],
)
def test_damaged_tu_files_are_one_line(tmp_path: Path, spoil: Callable[[Path], Any], match: str):
    write_tu(tmp_path, "TOY", 6)
    spoil(tmp_path / "TOY" / "raw")
    with pytest.raises(DataError, match=match):
        load_data(f"tu:TOY@{tmp_path}")


@pytest.mark.parametrize(
    ("name", "graphs", "features"),
    [("MUTAG", 188, 7), ("PROTEINS", 1113, 3), ("NCI1", 4110, 37), ("IMDB-BINARY", 1000, 65)],
)
def test_the_shared_graphs_are_read(shared_data: Path, name: str, graphs: int, features: int):
    found = load_data(f"graphs-npz:{shared_data / 'graphs' / f'graphs_{name}.npz'}")
    assert isinstance(found, GraphDataset)
    assert (len(found), found.features, len(found.classes)) == (graphs, features, 2)


# --- objects ---


def test_objects_of_torch_geometric_make_a_data_set(monkeypatch: pytest.MonkeyPatch):
    made = [Data(x=torch.full((3, 2), float(i)), edge_index=PATH, y=torch.tensor([i % 2])) for i in range(4)]
    module = types.ModuleType("my_graphs")
    module.make = lambda: made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_graphs", module)
    found = load_data("my_graphs:make")
    assert isinstance(found, GraphDataset)
    assert found.y is not None
    assert found.y.tolist() == [0, 1, 0, 1]
    assert same(found.graphs.pick(torch.arange(4)), Batch.from_data_list(made))


def test_objects_without_features_have_degrees_and_without_classes_none():
    found = dataset_from_graphs("mine", [Data(edge_index=PATH, num_nodes=3), Data(edge_index=PATH, num_nodes=3)])
    assert found.graphs.x.argmax(1).tolist() == [1, 2, 1, 1, 2, 1]
    assert found.y is None


@pytest.mark.parametrize(
    ("second", "match"),
    [
        (Data(x=torch.ones(3, 5), edge_index=PATH), r"graph 1 has x of shape \(3, 5\), graph 0 \(3, 2\)"),
        (Data(edge_index=PATH, num_nodes=3), "graph 1 has no x, but others have"),
        (Data(x=torch.ones(2, 2), edge_index=PATH), r"graph 1 has 2 nodes and an edge \[1, 2\]"),
        (Data(x=torch.ones(3, 2), edge_index=PATH[:, :0]), "graph 1 has no edge"),
        (
            Data(x=torch.ones(3, 2), edge_index=PATH.T),
            r"graph 1 has edge_index of shape \(4, 2\); allowed: \(2, edges\)",
        ),
    ],
)
def test_objects_that_do_not_fit_are_refused(second: Any, match: str):
    with pytest.raises(DataError, match=match):
        dataset_from_graphs("mine", [Data(x=torch.ones(3, 2), edge_index=PATH), second])


# --- views ---


def numbered(count: int = 6) -> dict[str, Tensor]:
    """A batch whose nodes have their own number as feature."""
    batch = rings_and_stars(count).graphs.pick(torch.arange(count))
    return {**batch, "x": torch.arange(1.0, 1 + len(batch["x"])).unsqueeze(1)}


def pairs(batch: dict[str, Tensor]) -> set[tuple[float, float]]:
    """Both ends of each edge by their nodes' features."""
    ends = batch["x"][:, 0][batch["edge_index"]]
    return set(map(tuple, ends.T.tolist()))


def look(kinds: tuple[str, ...], batch: dict[str, Tensor], seed: int = 0, **shares: float) -> dict[str, Tensor]:
    return GraphViews(kinds=kinds, **shares)(batch, torch.Generator().manual_seed(seed))


def test_node_drop_leaves_out_its_share_of_each_graph_and_the_edges_there():
    batch = numbered()
    seen = look(("node-drop",), batch, ratio=0.4)
    sizes, left = (torch.bincount(b["batch"], minlength=6) for b in (batch, seen))
    assert left.tolist() == (sizes - (sizes * 0.4 + 1e-9).floor()).tolist()
    kept = set(seen["x"][:, 0].tolist())
    assert pairs(seen) == {pair for pair in pairs(batch) if set(pair) <= kept}
    owners = dict(zip(batch["x"][:, 0].tolist(), batch["batch"].tolist(), strict=True))
    assert [owners[x] for x in seen["x"][:, 0].tolist()] == seen["batch"].tolist()


def test_feature_mask_sets_its_share_of_rows_to_zero_and_nothing_else():
    batch = numbered()
    seen = look(("feature-mask",), batch, ratio=0.4)
    masked = seen["x"][:, 0] == 0
    sizes = torch.bincount(batch["batch"])
    assert torch.bincount(batch["batch"][masked], minlength=6).tolist() == (sizes * 0.4 + 1e-9).floor().tolist()
    assert seen["x"][~masked].equal(batch["x"][~masked])
    assert seen["edge_index"].equal(batch["edge_index"])


@pytest.mark.parametrize("seed", range(5))
def test_edge_perturb_exchanges_undirected_edges_within_each_graph(seed: int):
    batch = numbered()
    seen = look(("edge-perturb",), batch, seed, ratio=0.4)
    before, after = pairs(batch), pairs(seen)
    owners = dict(zip(batch["x"][:, 0].tolist(), batch["batch"].tolist(), strict=True))
    assert len(after) == seen["edge_index"].shape[1], "no edge stands twice"
    assert all((b, a) in after and a != b and owners[a] == owners[b] for a, b in after)
    assert seen["x"].equal(batch["x"])
    for graph in range(6):
        gone, new = (sum(owners[a] == graph for a, _ in some) // 2 for some in (before - after, after - before))
        whole = sum(owners[a] == graph for a, _ in before) // 2
        assert gone == int(whole * 0.4 + 1e-9)
        assert new <= gone


@pytest.mark.parametrize("seed", range(5))
def test_a_subgraph_is_connected_and_has_its_share(seed: int):
    batch = numbered()
    seen = look(("subgraph",), batch, seed, keep=0.5)
    sizes = torch.bincount(batch["batch"])
    assert torch.bincount(seen["batch"], minlength=6).tolist() == (sizes * 0.5 - 1e-9).ceil().tolist()
    assert pairs(seen) == {p for p in pairs(batch) if set(p) <= set(seen["x"][:, 0].tolist())}
    for graph in range(6):
        nodes = set(seen["x"][seen["batch"] == graph][:, 0].tolist())
        reached = {min(nodes)}
        for _ in nodes:
            reached |= {b for a, b in pairs(seen) if a in reached}
        assert reached == nodes


def test_a_subgraph_keeps_to_its_component():
    two = {
        "x": torch.arange(1.0, 7).unsqueeze(1),
        "edge_index": torch.tensor([[0, 1], [1, 0]]),
        "batch": torch.zeros(6).long(),
    }
    sizes = {len(look(("subgraph",), two, seed, keep=1.0)["x"]) for seed in range(20)}
    assert sizes == {1, 2}


def test_the_middle_of_a_path_is_reached_more_often_than_its_ends():
    """From a random node of 0 - 1 - 2, two of three nodes: 1 always, 0 and 2 in half of the views."""
    path = {"x": torch.arange(1.0, 4).unsqueeze(1), "edge_index": PATH, "batch": torch.zeros(3).long()}
    kept = [look(("subgraph",), path, seed, keep=0.6)["x"][:, 0].tolist() for seed in range(400)]
    assert all(2.0 in nodes and len(nodes) == 2 for nodes in kept)
    assert 0.42 < sum(1.0 in nodes for nodes in kept) / 400 < 0.58


def test_each_node_is_dropped_as_often_as_any_other():
    ring = torch.tensor([list(range(10)), [(k + 1) % 10 for k in range(10)]])
    batch = {"x": torch.arange(10.0).unsqueeze(1), "edge_index": ring, "batch": torch.zeros(10).long()}
    kept = torch.zeros(10)
    for seed in range(500):
        kept[look(("node-drop",), batch, seed, ratio=0.2)["x"][:, 0].long()] += 1
    assert float(kept.sum()) == 500 * 8
    assert 0.72 < float(kept.min()) / 500 < float(kept.max()) / 500 < 0.88


def test_each_graph_draws_its_kind():
    batch = rings_and_stars(200).graphs.pick(torch.arange(200))
    seen = look(("node-drop", "feature-mask"), batch, ratio=0.2)
    lost = torch.bincount(batch["batch"]) - torch.bincount(seen["batch"], minlength=200)
    assert set(lost.tolist()) == {0, 1}
    assert 70 < int((lost > 0).sum()) < 130


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_is_one_of_its_seed_and_leaves_the_batch_alone(kind: str):
    batch = numbered()
    before = {name: value.clone() for name, value in batch.items()}
    first, again, other = (look((kind,), batch, seed, ratio=0.4) for seed in (0, 0, 1))
    assert all(first[name].equal(again[name]) for name in first)
    assert any(first[name].shape != other[name].shape or not first[name].equal(other[name]) for name in first)
    assert all(batch[name].equal(before[name]) for name in batch)


@pytest.mark.parametrize("kind", KINDS)
def test_single_nodes_and_graphs_without_edges_have_views(kind: str):
    lonely = {"x": torch.ones(4, 2), "edge_index": torch.zeros(2, 0).long(), "batch": torch.tensor([0, 1, 1, 2])}
    seen = look((kind,), lonely, ratio=0.9)
    assert seen["batch"].unique().tolist() == [0, 1, 2]
    assert seen["edge_index"].shape == (2, 0) or kind == "edge-perturb"


def test_no_kind_leaves_the_graphs_and_wrong_shares_are_refused():
    batch = numbered()
    assert all(value.equal(batch[name]) for name, value in look((), batch).items())
    with pytest.raises(UnknownNameError, match="unknown view of graphs 'node-drops'; closest: node-drop"):
        GraphViews(kinds=("node-drops",))
    for shares in ({"ratio": 1.0}, {"keep": 0.0}):
        with pytest.raises(ConfigError, match="allowed: 0 to below 1, above 0 to 1"):
            GraphViews(**shares)
