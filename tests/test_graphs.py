"""Graphs in flat tensors: their batches, their files, torch_geometric's objects, and what is refused."""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layerlens.data import load_data
from layerlens.errors import ConfigError, DataError, DownloadError, LayerlensError, ShapeError, UnknownNameError
from layerlens.graph_batches import (
    count_graphs,
    first_graphs,
    graph_of_node,
    holds_graphs,
    import_graph_extra,
    is_graph_object,
    join_graphs,
    moved,
    with_node_features,
)
from layerlens.graphs import GraphDataset, Graphs, dataset_from_graphs, describe_graphs
from layerlens.layers import run_batch

PATH = [(0, 1), (1, 0), (1, 2), (2, 1)]  # 0 - 1 - 2
RING = [(0, 1), (1, 2), (2, 3), (3, 0)]  # in one direction
SHAPES = [(3, PATH), (2, []), (1, []), (4, RING)]  # nodes and edges of each graph
BATCHED = ("x", "edge_index", "batch")


def ends(edges: list[tuple[int, int]]) -> Tensor:
    return torch.tensor(edges, dtype=torch.int64).view(-1, 2).T


def flat(shapes: list[tuple[int, list[tuple[int, int]]]] = SHAPES) -> Graphs:
    """Graphs whose nodes have the features (k, 10 k), k their number in the whole set."""
    sizes, edges = [n for n, _ in shapes], [e for _, e in shapes]
    k = torch.arange(float(sum(sizes)))
    return Graphs(
        x=torch.stack([k, 10 * k], 1), edge_index=torch.cat([ends(e) for e in edges], 1),
        node_ptr=torch.tensor([0, *sizes]).cumsum(0), edge_ptr=torch.tensor([0, *map(len, edges)]).cumsum(0),
    )  # fmt: skip


def objects(graphs: Graphs) -> list[Any]:
    """The same graphs as torch_geometric's Data."""
    made, g = import_graph_extra().data.Data, graphs
    return [
        made(x=g.x[g.node_ptr[i] : g.node_ptr[i + 1]], edge_index=g.edge_index[:, g.edge_ptr[i] : g.edge_ptr[i + 1]])
        for i in range(len(g))
    ]


def batched(data: list[Any]) -> dict[str, Tensor]:
    """What torch_geometric makes of them."""
    batch = import_graph_extra().data.Batch.from_data_list(data)
    return {name: getattr(batch, name) for name in BATCHED}


def same(batch: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(batch[name], other[name]) for name in BATCHED)


def dataset(count: int = 4, **changed: Any) -> GraphDataset:
    """Paths of three nodes that know their number."""
    made = GraphDataset(name="paths", graphs=flat([(3, PATH)] * count), y=torch.arange(count) % 2, classes=("a", "b"))
    return replace(made, **changed)


@contextmanager
def refused(match: str, kind: type[LayerlensError] = DataError) -> Iterator[None]:
    """One line, and it says that."""
    with pytest.raises(kind, match=match) as caught:
        yield
    assert len(str(caught.value).splitlines()) == 1, "an error is one line"


# --- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows", [[0, 1, 2, 3], [3, 2, 1, 0], [3, 0], [2, 2, 2], [1, 3, 1, 0, 3], [3], [1]], ids=lambda rows: str(rows)
)
def test_a_picked_batch_is_that_of_torch_geometric(rows: list[int]):
    data = objects(flat())
    assert same(flat().pick(torch.tensor(rows)), batched([data[i] for i in rows]))


def test_a_picked_batch_worked_by_hand():
    """The ring in front of the path: its four nodes come first, and the path's edges begin at 4."""
    batch = flat().pick(torch.tensor([3, 0]))
    assert batch["x"][:, 0].tolist() == [6, 7, 8, 9, 0, 1, 2]
    assert batch["batch"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert batch["edge_index"].T.tolist() == [[0, 1], [1, 2], [2, 3], [3, 0], [4, 5], [5, 4], [5, 6], [6, 5]]
    assert (batch["edge_index"].dtype, batch["batch"].dtype) == (torch.int64, torch.int64)


def test_a_part_holds_the_chosen_graphs_with_edges_counted_within_each():
    part = flat().part(torch.tensor([3, 1, 0]))
    assert (part.node_ptr.tolist(), part.edge_ptr.tolist()) == ([0, 4, 6, 9], [0, 4, 4, 8])
    assert part.x[:, 0].tolist() == [6, 7, 8, 9, 3, 4, 0, 1, 2]
    assert part.edge_index.T.tolist() == [list(edge) for edge in [*RING, *PATH]]
    assert len(part) == 3


def test_a_part_of_all_graphs_is_the_set_itself_and_parts_can_be_taken_of_parts():
    whole, part = flat(), flat().part(torch.arange(4))
    assert all(torch.equal(value, vars(whole)[name]) for name, value in vars(part).items())
    twice = flat().part(torch.tensor([0, 2, 3])).part(torch.tensor([2, 0]))
    assert same(twice.pick(torch.arange(2)), flat().pick(torch.tensor([3, 0])))


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(101, 100, [51, 50]), (10, 4, [5, 5]), (9, 4, [5, 4]), (8, 4, [4, 4]), (3, 100, [3]), (5, 1, [1] * 5)],
)
def test_batches_are_of_equal_size_but_for_one(count: int, batch_size: int, sizes: list[int]):
    batches = dataset(count).batches(batch_size=batch_size)
    assert [count_graphs(batch["batch"]) for batch in batches] == sizes
    assert len(batches) == len(sizes)


def chosen(batches: Any) -> list[int]:
    """Which graphs a loader yields, by their first node's number."""
    return [int(x) // 3 for batch in batches for x in batch["x"][::3, 0]]


def test_batches_hold_every_graph_once_in_a_random_order_that_never_changes():
    batches = dataset(20).batches(batch_size=6)
    first = chosen(batches)
    assert sorted(first) == list(range(20))
    assert first != list(range(20))
    assert chosen(batches) == first


def test_batches_are_random_by_seed_alone():
    first = chosen(dataset(20).batches(seed=0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        before = torch.get_rng_state()
        assert chosen(dataset(20).batches(seed=0)) == first
        assert torch.equal(torch.get_rng_state(), before)
    assert chosen(dataset(20).batches(seed=1)) != first


def test_samples_choose_the_first_of_the_same_order_whatever_the_batch_size():
    whole = chosen(dataset(20).batches())
    assert chosen(dataset(20).batches(samples=7)) == whole[:7]
    assert chosen(dataset(20).batches(samples=99, batch_size=3)) == whole
    assert chosen(dataset(20).batches("train")) == whole, "all graphs are in both splits"


def test_in_order_yields_the_graphs_as_they_stand():
    assert chosen(dataset(11).in_order(batch_size=4)) == list(range(11))


def test_a_split_that_is_not_there_is_an_error():
    with pytest.raises(UnknownNameError, match="no split 'val'; allowed: train, test"):
        dataset().batches("val")


# --- fingerprint -------------------------------------------------------------------------------------------------


def one_changed(key: str, place: tuple[int, ...], value: float) -> GraphDataset:
    graphs = flat([(3, PATH)] * 4)
    part = getattr(graphs, key).clone()
    part[place] = value
    return dataset(graphs=replace(graphs, **{key: part}))


DIFFERENT = {
    "a node feature": one_changed("x", (11, 1), 0.0),
    "an edge": one_changed("edge_index", (1, 15), 0),
    "a label": dataset(y=torch.tensor([0, 1, 0, 0])),
    "no labels": dataset(y=None, classes=()),
    "where a graph begins": one_changed("node_ptr", (1,), 2),
    "where a graph's edges begin": one_changed("edge_ptr", (1,), 2),
    "the order of graphs": dataset(graphs=flat([(3, PATH)] * 4).part(torch.tensor([1, 0, 2, 3]))),
    "features in another shape": dataset(graphs=replace(flat([(3, PATH)] * 4), x=torch.arange(24.0).view(24, 1))),
}


@pytest.mark.parametrize("other", DIFFERENT.values(), ids=DIFFERENT)
def test_fingerprint_changes_with(other: GraphDataset):
    assert other.fingerprint() != dataset().fingerprint()


def test_fingerprint_ignores_the_name_and_the_notes_and_is_a_sha256():
    assert dataset(name="other", notes=("a word",)).fingerprint() == dataset().fingerprint()
    assert len(bytes.fromhex(dataset().fingerprint())) == 32


# --- npz files ---------------------------------------------------------------------------------------------------


def arrays(**changed: Any) -> dict[str, Any]:
    """A path of three nodes and one of two; None leaves an entry out."""
    made = {
        "node_ptr": np.array([0, 3, 5]), "edge_ptr": np.array([0, 4, 6]),
        "edge_index": np.array([[0, 1, 1, 2, 0, 1], [1, 0, 2, 1, 1, 0]]),
        "node_label": np.array([4, 4, 7, 4, 9]), "graph_label": np.array([3, -1]),
    }  # fmt: skip
    return {key: value for key, value in {**made, **changed}.items() if value is not None}


def npz(folder: Path, options: str = "", **changed: Any) -> GraphDataset:
    np.savez(folder / "graphs.npz", **arrays(**changed))
    made = load_data(f"graphs-npz:{folder / 'graphs.npz'}{options}")
    assert isinstance(made, GraphDataset)
    return made


def test_node_labels_become_one_hot_in_the_order_of_their_values(tmp_path: Path):
    data = npz(tmp_path)
    assert data.graphs.x.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert (data.graphs.x.dtype, data.features, len(data), data.notes) == (torch.float32, 3, 2, ())
    assert same(
        data.graphs.pick(torch.arange(2)),
        {
            "x": data.graphs.x,
            "edge_index": ends([*PATH, (3, 4), (4, 3)]),
            "batch": torch.tensor([0, 0, 0, 1, 1]),
        },
    )


def test_classes_count_from_0_and_are_named_by_their_labels(tmp_path: Path):
    data = npz(tmp_path)
    assert data.y is not None
    assert (data.y.tolist(), data.y.dtype, data.classes) == ([1, 0], torch.int64, ("-1", "3"))
    assert data.y_train is data.y
    assert data.y_test is data.y
    without = npz(tmp_path, graph_label=None)
    assert (without.y, without.classes) == (None, ())


def test_attributes_are_used_with_their_option_only_and_it_is_said(tmp_path: Path):
    values = np.arange(10.0).reshape(5, 2)
    used, left = npz(tmp_path, ",attributes=true", node_attr=values), npz(tmp_path, node_attr=values)
    assert torch.equal(used.graphs.x, torch.cat([left.graphs.x, torch.from_numpy(values).float()], 1))
    assert left.features == 3
    assert used.notes == ()
    assert left.notes == ("its 2 continuous node attributes are not used (,attributes=true uses them)",)
    assert npz(tmp_path, ",attributes=false", node_attr=values).features == 3


def test_attributes_alone_and_of_one_column_are_features(tmp_path: Path):
    data = npz(tmp_path, ",attributes=true", node_attr=np.arange(5), node_label=None)
    assert data.graphs.x.tolist() == [[0.0], [1.0], [2.0], [3.0], [4.0]]


def test_edge_labels_are_said_to_be_unused(tmp_path: Path):
    data = npz(tmp_path, edge_label=np.arange(6))
    assert data.notes == ("edge labels are not used",)
    assert data.fingerprint() == npz(tmp_path).fingerprint()


def test_degrees_stand_in_for_missing_features_and_it_is_said_aloud(tmp_path: Path):
    data = npz(tmp_path, node_label=None)
    assert data.graphs.x.tolist() == [[0, 1, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0], [0, 1, 0]]
    assert describe_graphs(data) == (
        f"graphs-npz:{tmp_path / 'graphs.npz'}: 2 graphs of 2.5 nodes and 3.0 directed edges on average, 2 classes, "
        "3 features per node; nodes have no features: their degree stands in, one-hot, 64 and more alike"
    )


def test_unused_attributes_leave_the_degrees_and_both_are_said(tmp_path: Path):
    data = npz(tmp_path, node_label=None, node_attr=np.ones((5, 2)))
    assert data.graphs.x.argmax(1).tolist() == [1, 2, 1, 1, 1]
    assert [note.split()[1] for note in data.notes] == ["2", "have"]


def star(leaves: int) -> list[tuple[int, int]]:
    out = [(0, k) for k in range(1, leaves + 1)]
    return [*out, *((b, a) for a, b in out)]


def test_degrees_of_64_and_more_share_the_last_feature(tmp_path: Path):
    hubs = [62, 63, 64, 65, 80]
    graphs = flat([(n + 1, star(n)) for n in hubs])
    change = {name: getattr(graphs, name).numpy() for name in ("node_ptr", "edge_ptr", "edge_index")}
    data = npz(tmp_path, node_label=None, graph_label=None, **change)
    assert data.features == 65
    assert (data.graphs.x.sum(1) == 1).all()
    assert data.graphs.x[graphs.node_ptr[:-1]].argmax(1).tolist() == [62, 63, 64, 64, 64]
    leaves = torch.ones(len(data.graphs.x), dtype=torch.bool)
    leaves[graphs.node_ptr[:-1]] = False
    assert (data.graphs.x[leaves].argmax(1) == 1).all()


EMPTY = {  # graph 1 has no node, graph 3 no edge
    "node_ptr": np.array([0, 3, 3, 5, 6]), "edge_ptr": np.array([0, 4, 4, 6, 6]), "graph_label": np.array([5, 6, 7, 6]),
    "node_label": np.array([1, 2, 1, 2, 2, 1]),
}  # fmt: skip


def test_graphs_without_nodes_or_edges_are_left_out_with_their_labels_and_counted(tmp_path: Path):
    data = npz(tmp_path, ",empty=leave-out", **EMPTY)
    assert data.y is not None
    assert (data.classes, data.y.tolist()) == (("5", "7"), [0, 1]), "no class is left without a graph"
    assert (data.graphs.node_ptr.tolist(), data.graphs.edge_ptr.tolist()) == ([0, 3, 5], [0, 4, 6])
    assert data.graphs.x.argmax(1).tolist() == [0, 1, 0, 1, 1]
    assert data.graphs.edge_index.tolist() == arrays()["edge_index"].tolist()
    assert "left out 2 graphs without nodes or edges" in describe_graphs(data)


@pytest.mark.parametrize("samples", [0, -1])
def test_fewer_than_one_sample_is_refused(tmp_path: Path, samples: int):
    with pytest.raises(ConfigError, match=rf"samples={samples}; allowed: a whole number from 1"):
        npz(tmp_path).batches(samples=samples)


def test_leaving_out_where_nothing_is_empty_changes_and_says_nothing(tmp_path: Path):
    data = npz(tmp_path, ",empty=leave-out")
    assert data.fingerprint() == npz(tmp_path).fingerprint()
    assert data.notes == ()


@pytest.mark.parametrize("labels", [EMPTY["node_label"], None], ids=["labels", "degrees"])
@pytest.mark.parametrize(("start", "what"), [(0, "graph 1 has no node"), (1, "graph 0 has no edge")])
def test_graphs_without_nodes_or_edges_are_refused_otherwise(
    tmp_path: Path, start: int, what: str, labels: np.ndarray | None
):
    change = {**EMPTY, "node_label": labels}
    if start:
        change |= {"edge_ptr": np.array([0, 0, 0, 0, 2]), "edge_index": np.array([[0, 0], [0, 0]])}
        change["node_ptr"] = np.array([0, 3, 4, 5, 6])
    with refused(rf"{what} \({2 + start} such graphs\); repair them, or add ,empty=leave-out to go without them"):
        npz(tmp_path, **change)


@pytest.mark.parametrize("options", ["", ",empty=leave-out"])
@pytest.mark.parametrize("labels", [np.zeros(0, dtype=int), None], ids=["labels", "degrees"])
def test_a_file_without_any_node_is_refused(tmp_path: Path, labels: np.ndarray | None, options: str):
    none = {"node_ptr": np.array([0, 0]), "edge_ptr": np.array([0, 0]), "edge_index": np.zeros((2, 0), dtype=int)}
    with refused("graph 0 has no node|every graph is without nodes or without edges"):
        npz(tmp_path, options, node_label=labels, graph_label=None, **none)


def test_leaving_every_graph_out_is_refused(tmp_path: Path):
    none = {"node_ptr": np.array([0, 2, 5]), "edge_ptr": np.array([0, 0, 0]), "edge_index": np.zeros((2, 0), dtype=int)}
    with refused("every graph is without nodes or without edges"):
        npz(tmp_path, ",empty=leave-out", **none)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a key": ({"edge_ptr": None}, r"lacks \['edge_ptr'\]; it holds \['edge_index', 'graph_label', 'node_label'"),
    "two keys": ({"edge_ptr": None, "node_ptr": None}, r"lacks \['node_ptr', 'edge_ptr'\]"),
    "a falling node_ptr": (
        {"node_ptr": np.array([0, 5, 3])},
        r"node_ptr has shape \(3,\) from \[0\]; allowed: \(graphs \+ 1,\), from 0 and never falling",
    ),
    "a falling edge_ptr": ({"edge_ptr": np.array([0, 7, 6])}, "edge_ptr has shape .* never falling"),
    "a node_ptr from 1": ({"node_ptr": np.array([1, 3, 5])}, r"node_ptr has shape \(3,\) from \[1\]"),
    "a node_ptr of rows": ({"node_ptr": np.array([[0, 3, 5]])}, r"node_ptr has shape \(1, 3\) from \[0\]"),
    "a single number": ({"node_ptr": np.array(0)}, r"node_ptr has shape \(\) from \[0\]"),
    "an empty node_ptr": ({"node_ptr": np.zeros(0, dtype=int)}, r"node_ptr has shape \(0,\) from \[\]"),
    "a float node_ptr": ({"node_ptr": np.array([0.0, 3, 5])}, "node_ptr holds float64; allowed: whole numbers"),
    "pointers of different length": (
        {"edge_ptr": np.array([0, 6])},
        r"node_ptr has 3 entries, edge_ptr 2; allowed: graphs \+ 1 each",
    ),
    "no graph": (
        {"node_ptr": np.array([0]), "edge_ptr": np.array([0])},
        r"node_ptr has 1 entries, edge_ptr 1; allowed: graphs \+ 1 each",
    ),
    "edges in rows": (
        {"edge_index": arrays()["edge_index"].T},
        r"edge_index has shape \(6, 2\); edge_ptr says \(2, 6\)",
    ),
    "an edge too few": ({"edge_index": np.zeros((2, 5), dtype=int)}, r"has shape \(2, 5\); edge_ptr says \(2, 6\)"),
    "float edges": ({"edge_index": np.zeros((2, 6))}, "edge_index holds float64; allowed: whole numbers"),
    "an edge to a node of the next graph": (
        {"edge_index": np.array([[0, 1, 1, 3, 0, 1], [1, 0, 2, 1, 1, 0]])},
        r"graph 0 has 3 nodes and an edge \[3, 1\]; node numbers count from 0 within each graph",
    ),
    "an edge to no node of the second": (
        {"edge_index": np.array([[0, 1, 1, 2, 0, 1], [1, 0, 2, 1, 1, 2]])},
        r"graph 1 has 2 nodes and an edge \[1, 2\]",
    ),
    "an edge to a node below 0": (
        {"edge_index": np.array([[0, 1, 1, 2, 0, 1], [1, 0, 2, 1, -1, 0]])},
        r"graph 1 has 2 nodes and an edge \[0, -1\]",
    ),
    "an edge behind a graph without edges": (
        {"edge_ptr": np.array([0, 0, 6])},
        r"graph 1 has 2 nodes and an edge \[1, 2\]",
    ),
    "labels of wrong length": (
        {"graph_label": np.array([1, 2, 3])},
        r"graph_label has shape \(3,\); allowed: one for each of 2 graphs",
    ),
    "labels in a column": ({"graph_label": np.array([[1], [2]])}, r"graph_label has shape \(2, 1\)"),
    "float labels": ({"graph_label": np.array([0.5, 1.0])}, "graph_label holds float64; allowed: whole numbers"),
    "words as labels": ({"graph_label": np.array(["a", "b"])}, "graph_label holds <U1; allowed: whole numbers"),
    "node labels of wrong length": (
        {"node_label": np.array([1, 2, 3, 4])},
        r"node_label has shape \(4,\); allowed: a whole number from 0 for each of 5 nodes",
    ),
    "float node labels": ({"node_label": np.ones(5)}, "node_label holds float64; allowed: whole numbers"),
    "attributes of wrong length": (
        {"node_attr": np.ones((4, 2))},
        r"node features have shape \(4, 2\); allowed: \(5, features\)",
    ),
    "attributes of images": ({"node_attr": np.ones((5, 2, 2))}, r"node features have shape \(5, 2, 2\)"),
    "words as attributes": ({"node_attr": np.array(list("abcde"))}, "node features hold <U1; allowed: numbers"),
    "NaN": ({"node_attr": np.array([[1.0], [2.0], [np.nan], [1.0], [1.0]])}, "NaN or infinity in the node features"),
    "infinity": ({"node_attr": np.full((5, 1), np.inf)}, "NaN or infinity in the node features; remove or repair"),
}


@pytest.mark.parametrize(("change", "match"), BAD.values(), ids=BAD)
def test_npz_is_refused_for(tmp_path: Path, change: dict[str, Any], match: str):
    with refused(match):
        npz(tmp_path, ",attributes=true", **change)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # NumPy's own word on the same
def test_npz_is_refused_for_numbers_beyond_float32(tmp_path: Path):
    with refused("NaN or infinity in the node features"):
        npz(tmp_path, ",attributes=true", node_attr=np.full((5, 1), 1e300))


def test_a_missing_file_says_what_it_should_hold(tmp_path: Path):
    with refused(r"no file '.*gone\.npz'; graphs-npz:PATH needs node_ptr, edge_ptr, edge_index"):
        load_data(f"graphs-npz:{tmp_path / 'gone.npz'}")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_cut_short_anywhere_is_refused(tmp_path: Path, save: Callable[..., None]):
    save(tmp_path / "whole.npz", **arrays())
    whole = (tmp_path / "whole.npz").read_bytes()
    for length in range(0, len(whole), 37):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        with refused(r"cut\.npz' is not a plain npz archive of arrays"):
            load_data(f"graphs-npz:{tmp_path / 'cut.npz'}")


class Evil:
    """Unpickling it leaves a file behind."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place,)


def test_pickles_inside_an_archive_or_in_place_of_one_are_never_opened(tmp_path: Path):
    np.savez(tmp_path / "graphs.npz", **arrays(), extra=np.array([Evil(tmp_path / "ran")], dtype=object))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for name in ("graphs", "pickle"):
        with refused("is not a plain npz archive of arrays"):
            load_data(f"graphs-npz:{tmp_path / name}.npz")
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "pickle.npz").read_bytes())
    assert (tmp_path / "ran").exists(), "the trap works"


def test_what_is_no_archive_is_refused(tmp_path: Path):
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "text.npz").write_text("node_ptr")
    for name in ("array.npy", "text.npz", "."):
        with refused("is not a plain npz archive of arrays"):
            load_data(f"graphs-npz:{tmp_path / name}")


@pytest.mark.parametrize(
    ("option", "kind", "match"),
    [
        ("attribute=true", ConfigError, "has no option 'attribute'; closest: attributes"),
        ("normalize=none", ConfigError, "has no option 'normalize'"),
        ("attributes=yes", DataError, "attributes='yes' of 'graphs-npz:.*'; allowed: true, false"),
        ("attributes=1", DataError, "attributes=1 of .*; allowed: true, false"),
        ("empty=drop", DataError, "empty='drop' of .*; allowed: refuse, leave-out"),
    ],
)
def test_an_option_that_is_not_known_is_refused(tmp_path: Path, option: str, kind: type[LayerlensError], match: str):
    with refused(match, kind):
        npz(tmp_path, f",{option}")


# --- files of TU Dortmund ----------------------------------------------------------------------------------------

TOY = {  # a path and a single edge; nodes count from 1 over all graphs
    "A": "1, 2\n2, 1\n2, 3\n3, 2\n4, 5\n5, 4\n", "graph_indicator": "1\n1\n1\n2\n2\n", "graph_labels": "1\n-1\n",
    "node_labels": "2\n0\n2\n1\n0\n",
}  # fmt: skip
LONELY = {  # and a graph of two nodes without an edge behind them
    **TOY, "graph_indicator": "1\n1\n1\n2\n2\n3\n3\n", "graph_labels": "1\n-1\n-1\n",
    "node_labels": "2\n0\n2\n1\n0\n0\n1\n",
}  # fmt: skip


def write_tu(root: Path, files: dict[str, str] = TOY, **changed: str | None) -> Path:
    """ROOT/TOY/raw; returns it."""
    raw = root / "TOY" / "raw"
    raw.mkdir(parents=True)
    write_texts(raw, {**files, **changed})
    return raw


def write_texts(raw: Path, files: dict[str, str | None]) -> None:
    for kind, text in files.items():
        if text is not None:
            (raw / f"TOY_{kind}.txt").write_text(text)


def tu(root: Path, options: str = "", **changed: Any) -> GraphDataset:
    write_tu(root, **changed)
    made = load_data(f"tu:TOY@{root}{options}")
    assert isinstance(made, GraphDataset)
    return made


def test_tu_worked_by_hand(tmp_path: Path):
    data = tu(tmp_path)
    assert data.graphs.x.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert data.graphs.edge_index.T.tolist() == [[0, 1], [1, 0], [1, 2], [2, 1], [0, 1], [1, 0]]
    assert (data.graphs.node_ptr.tolist(), data.graphs.edge_ptr.tolist()) == ([0, 3, 5], [0, 4, 6])
    assert data.y is not None
    assert data.y.tolist() == [1, 0]
    assert len(data.classes) == 2


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ({}, ""),
        ({"A": "5, 4\n3, 2\n1, 2\n2, 1\n4, 5\n2, 3\n1, 2\n"}, ""),
        ({"node_attributes": "0.5, 1\n1, 2\n2, 3\n-1, 0\n7, 8\n"}, ""),
        ({"node_attributes": "0.5, 1\n1, 2\n2, 3\n-1, 0\n7, 8\n"}, ",attributes=true"),
        ({"node_attributes": "0.5\n1\n2\n-1\n7\n", "node_labels": None}, ",attributes=true"),
        ({"files": LONELY}, ",empty=leave-out"),
    ],
    ids=["as written", "edges in any order", "attributes left", "attributes used", "attributes alone", "lonely"],
)
def test_tu_files_give_the_batches_of_torch_geometric(tmp_path: Path, changed: dict[str, Any], options: str):
    data = tu(tmp_path / "ours", options, **changed)
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    theirs = import_graph_extra().datasets.TUDataset(
        str(tmp_path / "theirs"), "TOY", use_node_attr="attributes" in options
    )
    kept = [graph for graph in theirs if graph.num_edges]
    found = data.graphs.pick(torch.arange(len(data)))
    expected = batched(kept)
    if "attributes" in options:  # torch_geometric puts the attributes first
        split = expected["x"].shape[1] - theirs.num_node_attributes
        expected["x"] = torch.cat([expected["x"][:, -split:] if split else expected["x"][:, :0],
                                   expected["x"][:, : theirs.num_node_attributes]], 1)  # fmt: skip
    assert same(found, expected)
    assert data.y is not None
    assert data.y.tolist() == [int(graph.y) for graph in kept]
    assert not (tmp_path / "ours" / "TOY" / "processed").exists(), "nothing is written next to the files"


def test_a_trailing_graph_without_edges_is_found(tmp_path: Path):
    write_tu(tmp_path, LONELY)
    with refused(r"graph 2 has no edge \(1 such graphs\); repair them, or add ,empty=leave-out"):
        load_data(f"tu:TOY@{tmp_path}")
    data = load_data(f"tu:TOY@{tmp_path},empty=leave-out")
    assert isinstance(data, GraphDataset)
    assert (len(data), data.graphs.node_ptr.tolist()) == (2, [0, 3, 5])
    assert "left out 1 graphs without nodes or edges" in describe_graphs(data)


def test_tu_without_node_labels_has_degrees_also_in_front_of_a_graph_without_edges(tmp_path: Path):
    data = tu(tmp_path, ",empty=leave-out", files=LONELY, node_labels=None)
    assert data.graphs.x.tolist() == [[0, 1, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0], [0, 1, 0]]
    assert "nodes have no features: their degree stands in" in describe_graphs(data)


def test_classes_of_tu_are_called_as_in_its_file(tmp_path: Path):
    data = tu(tmp_path, graph_labels="7\n-1\n")
    assert data.y is not None
    assert [data.classes[k] for k in data.y.tolist()] == ["7", "-1"]


def test_tu_without_classes_or_with_numbers_to_predict_has_none(tmp_path: Path):
    assert tu(tmp_path / "a", graph_labels=None).y is None
    data = tu(tmp_path / "b", graph_labels=None, graph_attributes="0.5\n0.7\n")
    assert (data.y, data.classes) == (None, ())


def test_edge_labels_of_tu_are_said_to_be_unused_too(tmp_path: Path):
    assert "edge labels are not used" in describe_graphs(tu(tmp_path, edge_labels="0\n0\n1\n1\n0\n0\n"))


def test_a_folder_may_be_called_anything(tmp_path: Path):
    """Brackets and stars are patterns to a file search."""
    data = tu(tmp_path / "run[1]*@home, 2")
    assert data.features == 3
    assert data.y is not None


def plant(folder: Path, place: Path) -> None:
    """Pickles that leave a file behind when opened, in the format of `pickle` and in that of `torch.save`."""
    folder.mkdir(parents=True)
    torch.save(Evil(place), folder / "data.pt")
    for name in ("pre_filter.pt", "pre_transform.pt"):
        (folder / name).write_bytes(pickle.dumps(Evil(place)))


def test_a_planted_cache_is_never_opened(tmp_path: Path):
    plant(tmp_path / "TOY" / "processed", tmp_path / "ran")
    assert len(tu(tmp_path)) == 2
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "TOY" / "processed" / "data.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the trap works"


@pytest.mark.parametrize("names", [("data.pt",), ("pre_filter.pt", "pre_transform.pt")], ids=["data", "pre"])
def test_a_planted_cache_is_not_opened_by_a_download_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
):
    """A folder that somebody else prepared, whose raw files are fetched; no network: the fetched files are ours."""
    monkeypatch.setattr(import_graph_extra().datasets.TUDataset, "download", fetched)
    plant(tmp_path / "TOY" / "processed", tmp_path / "ran")
    for path in (tmp_path / "TOY" / "processed").iterdir():
        if path.name not in names:
            path.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an error in place of torch_geometric's warning would stop the attack
        assert len(load_data(f"tu:TOY@{tmp_path}", download=True)) == 2
    assert not (tmp_path / "ran").exists()


def fetched(self: Any) -> None:
    """In place of the network: what `TUDataset.download` leaves in its raw folder."""
    Path(self.raw_dir).mkdir(parents=True, exist_ok=True)
    write_texts(Path(self.raw_dir), TOY)


def test_missing_tu_files_point_to_download_and_to_their_place(tmp_path: Path):
    folder = tmp_path / "MUTAG" / "raw"
    with refused(rf"no MUTAG_A\.txt in '{folder}'; `--download` fetches MUTAG there, or unpack MUTAG\.zip of https://"):
        load_data(f"tu:MUTAG@{tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_fails_is_a_download_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(_self: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(import_graph_extra().datasets.TUDataset, "download", fail)
    with refused(f"could not fetch MUTAG into '{tmp_path}.*': no network; see https://", DownloadError):
        load_data(f"tu:MUTAG@{tmp_path}", download=True)


def test_a_download_fetches_what_then_loads_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(import_graph_extra().datasets.TUDataset, "download", fetched)
    first = load_data(f"tu:TOY@{tmp_path}", download=True)
    assert load_data(f"tu:TOY@{tmp_path}").fingerprint() == first.fingerprint()


@pytest.mark.parametrize("spec", ["tu:MUTAG", "tu:@data", "tu:", "tu:a/b@data", "tu:../MUTAG@data"])
def test_tu_without_a_name_or_a_place_is_refused(spec: str):
    with refused(rf"'{spec}' names no place; allowed: tu:NAME@ROOT, such as tu:MUTAG@data"):
        load_data(spec)


DAMAGED: dict[str, tuple[dict[str, str | None], str]] = {
    "ragged attributes": ({"node_attributes": "1, 2\n1\n1, 2\n1, 2\n1, 2\n"}, "the files of TOY in .* are damaged"),
    "letters among edges": ({"A": "1, x\n"}, "the files of TOY in .* are damaged"),
    "three ends of an edge": ({"A": "1, 2, 3\n2, 1, 3\n"}, "the files of TOY in .* are damaged"),
    "no edge at all": ({"A": ""}, "the files of TOY in .* are damaged"),
    "no indicator": ({"graph_indicator": None}, "the files of TOY in .* are damaged"),
    "an empty indicator": ({"graph_indicator": ""}, "the files of TOY in .* are damaged"),
    "graphs from 0": ({"graph_indicator": "0\n0\n0\n1\n1\n"}, "the files of TOY in .* are damaged"),
    "an edge from no node": ({"A": "1, 2\n2, 1\n9, 4\n4, 9\n"}, "the files of TOY in .* are damaged"),
    "an edge to no node": ({"A": "1, 2\n2, 1\n4, 9\n"}, r"graph 1 has 2 nodes and an edge \[0, 5\]"),
    "an edge between graphs": ({"A": "1, 2\n2, 1\n3, 4\n4, 3\n4, 5\n"}, r"graph 0 has 3 nodes and an edge \[2, 3\]"),
    "words as classes": ({"graph_labels": "a\nb\n"}, "the files of TOY in .* are damaged"),
    "a class too many": ({"graph_labels": "1\n-1\n1\n"}, r"graph_label has shape \(3,\); allowed: one .* of 2 graphs"),
    "a graph left out": ({"graph_indicator": "1\n1\n1\n3\n3\n"}, r"graph_label has shape \(2,\); .* of 3 graphs"),
    "NaN": ({"node_attributes": "nan\n1\n1\n1\n1\n"}, "NaN or infinity in the node features"),
    "attributes too few": ({"node_attributes": "1\n1\n1\n1\n", "node_labels": None}, r"shape \(4, 1\)|are damaged"),
    "node labels too few": ({"node_labels": "2\n0\n2\n1\n"}, "TOY.*node"),
    "node labels too many": ({"node_labels": "2\n0\n2\n1\n0\n0\n"}, "TOY.*node"),
    "nodes not graph by graph": (
        {"graph_indicator": "1\n1\n2\n1\n2\n2\n", "A": "1, 2\n2, 1\n5, 6\n6, 5\n", "node_labels": "0\n0\n1\n0\n1\n1\n"},
        "TOY.*node",
    ),
}


@pytest.mark.parametrize(("changed", "match"), DAMAGED.values(), ids=DAMAGED)
def test_tu_files_are_refused_for(tmp_path: Path, changed: dict[str, str | None], match: str):
    write_tu(tmp_path, **changed)
    with refused(match):
        load_data(f"tu:TOY@{tmp_path}")


# --- objects of torch_geometric ----------------------------------------------------------------------------------


def thing(edges: list[tuple[int, int]] = PATH, **parts: Any) -> Any:
    """A path of three nodes, with whatever else it holds."""
    return import_graph_extra().data.Data(edge_index=ends(edges), **parts)


def test_objects_become_the_same_batches_and_classes():
    made = objects(flat([(3, PATH), (4, RING), (3, PATH)]))
    for graph, label in zip(made, (7, 2, 7), strict=True):
        graph.y = torch.tensor([label])
    data = dataset_from_graphs("mine", made)
    assert same(data.graphs.pick(torch.tensor([2, 0, 1])), batched([made[k] for k in (2, 0, 1)]))
    assert data.y is not None
    assert (data.y.tolist(), data.classes, data.name, data.notes) == ([1, 0, 1], ("2", "7"), "mine", ())


@pytest.mark.parametrize("y", [None, torch.tensor([0.0, 1.0])], ids=["missing", "two numbers"])
def test_objects_without_a_class_each_have_none(y: Tensor | None):
    data = dataset_from_graphs("mine", [thing(x=torch.ones(3, 2), y=1), thing(x=torch.ones(3, 2), y=y)])
    assert (data.y, data.classes) == (None, ())


def test_numbers_to_predict_are_no_classes():
    """As with TU's graph attributes; cut down to whole numbers, 0.2 and 0.7 would be one class."""
    data = dataset_from_graphs("mine", [thing(x=torch.ones(3, 2), y=torch.tensor([v])) for v in (0.2, 0.7)])
    assert (data.y, data.classes) == (None, ())


def test_objects_with_a_number_of_nodes_only_have_degrees():
    data = dataset_from_graphs("mine", [thing(num_nodes=3), thing(PATH[:2], num_nodes=3)])
    assert data.graphs.x.tolist() == [[0, 1, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert "their degree stands in" in describe_graphs(data)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("learned", [False, True])
def test_features_of_any_number_type_become_plain_float32(dtype: torch.dtype, learned: bool):
    x = torch.ones(3, 2, dtype=dtype, requires_grad=learned and dtype.is_floating_point)
    data = dataset_from_graphs("mine", [thing(x=x), thing(x=x)])
    assert torch.equal(data.graphs.x, torch.ones(6, 2))
    assert data.graphs.x.dtype == torch.float32
    assert not data.graphs.x.requires_grad


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({"x": torch.ones(3, 5)}, r"graph 1 has x of shape \(3, 5\), graph 0 \(3, 2\); allowed: \(nodes, features\)"),
        ({"x": torch.ones(3)}, r"graph 1 has x of shape \(3,\), graph 0 \(3, 2\)"),
        ({"num_nodes": 3}, "graph 1 has no x, but others have; give features to all nodes or to none"),
        ({"x": torch.ones(2, 2)}, r"graph 1 has 2 nodes and an edge \[1, 2\]"),
        ({"x": torch.ones(3, 2), "edges": []}, "graph 1 has no edge"),
        ({"x": torch.ones(0, 2), "edges": []}, "graph 1 has no node"),
        ({"x": torch.full((3, 2), torch.nan)}, "NaN or infinity in the node features"),
    ],
)
def test_objects_are_refused(parts: dict[str, Any], match: str):
    with refused(f"mine: .*{match}"):
        dataset_from_graphs("mine", [thing(x=torch.ones(3, 2)), thing(**parts)])


@pytest.mark.parametrize("edges", [ends(PATH).T, ends(PATH)[0], ends(PATH).float(), None])
def test_objects_whose_edges_are_none_are_refused(edges: Tensor | None):
    odd = import_graph_extra().data.Data(x=torch.ones(3, 2), edge_index=edges)
    with refused("mine.*edge_index"):
        dataset_from_graphs("mine", [thing(x=torch.ones(3, 2)), odd])


def test_no_objects_are_refused():
    with refused("mine holds no graph"):
        dataset_from_graphs("mine", [])


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_graph_data.py").write_text(
        "import torch\n"
        "from torch_geometric.data import Data\n"
        "from layerlens.graphs import dataset_from_graphs\n"
        "PATH = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])\n"
        "def graphs(n=3, width=2):\n"
        "    return [Data(x=torch.full((3, width), float(k)), edge_index=PATH, y=k % 2) for k in range(n)]\n"
        "def several():\n    return tuple(graphs(4))\n"
        "def dataset():\n    return dataset_from_graphs('mine', graphs())\n"
        "def uneven():\n    return [*graphs(), *graphs(width=5)]\n"
        "def mixed():\n    return [*graphs(), 'no graph']\n"
        "def nothing():\n    return []\n"
    )
    import_graph_extra()
    monkeypatch.syspath_prepend(tmp_path)
    return "my_graph_data"


@pytest.mark.parametrize(("name", "count"), [("graphs", 3), ("graphs,n=5", 5), ("several", 4), ("dataset", 3)])
def test_a_factory_may_return_graphs_or_their_data_set(factories: str, name: str, count: int):
    data = load_data(f"{factories}:{name}")
    assert isinstance(data, GraphDataset)
    assert data.y is not None
    assert data.y.tolist() == [k % 2 for k in range(count)]
    assert data.graphs.x.tolist() == [[k, k] for k in range(count) for _ in range(3)]


def test_a_factory_of_uneven_graphs_is_refused_by_its_name(factories: str):
    with refused(r"my_graph_data:uneven: graph 3 has x of shape \(3, 5\), graph 0 \(3, 2\)"):
        load_data(f"{factories}:uneven")


@pytest.mark.parametrize("name", ["mixed", "nothing"])
def test_a_factory_that_returns_something_else_is_refused(factories: str, name: str):
    with refused(rf"my_graph_data:{name} must return a Dataset, .* or a list of graphs"):
        load_data(f"{factories}:{name}")


# --- batches of graphs -------------------------------------------------------------------------------------------


def whole(kind: str) -> Any:
    """Four graphs as one batch, a mapping or torch_geometric's own."""
    if kind == "mapping":
        return flat().pick(torch.arange(4))
    return import_graph_extra().data.Batch.from_data_list(objects(flat()))


def parts_of(batch: Any) -> dict[str, Tensor]:
    return {name: batch[name] for name in BATCHED}  # torch_geometric's batch takes names too


@pytest.mark.parametrize("kind", ["mapping", "object"])
def test_the_graph_of_each_node_is_known(kind: str):
    owner = graph_of_node(whole(kind))
    assert owner is not None
    assert owner.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3]
    assert count_graphs(owner) == 4


def test_what_is_not_several_graphs_has_no_graph_of_each_node():
    x = torch.ones(3, 1)
    for batch in (x, (x, x), {"x": x, "batch": torch.zeros(3)}, {"x": x, "edge_index": ends(PATH)}, thing(x=x), None):
        assert graph_of_node(batch) is None
    assert count_graphs(torch.zeros(0, dtype=torch.int64)) == 0


@pytest.mark.parametrize("kind", [dict, "object"])
@pytest.mark.parametrize(
    ("owner", "match"),
    [
        (torch.tensor([0, 1, 0]), "the nodes of a batch must stand graph by graph: `batch` may not fall"),
        (torch.tensor([0, 0]), r"batch has shape \(2,\) and torch.int64; allowed: the graph of each of the 3 nodes"),
        (torch.tensor([[0, 0, 1]]), r"batch has shape \(1, 3\)"),
        (torch.tensor([0.0, 0.0, 1.0]), r"batch has shape \(3,\) and torch.float32; .* nodes, int64"),
        (torch.tensor([0, 0, 1], dtype=torch.int32), r"and torch.int32; .* nodes, int64"),
    ],
)
def test_a_batch_whose_graphs_are_not_known_is_refused(kind: Any, owner: Tensor, match: str):
    x = torch.ones(3, 1)
    batch = {"x": x, "edge_index": ends(PATH), "batch": owner} if kind is dict else thing(x=x, batch=owner)
    with refused(match, ShapeError):
        graph_of_node(batch)


@pytest.mark.parametrize("kind", ["mapping", "object"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_the_first_graphs_are_those_that_would_be_picked(kind: str, count: int):
    batch = whole(kind)
    assert same(parts_of(first_graphs(batch, count)), flat().pick(torch.arange(min(count, 4))))
    assert same(parts_of(batch), flat().pick(torch.arange(4))), "the batch itself is as it was"


def test_the_first_graphs_keep_their_edges_numbers_and_are_a_copy():
    """Edges of all graphs in any order, as random views leave them."""
    batch = {
        "x": torch.arange(5.0).unsqueeze(1), "edge_index": torch.tensor([[3, 0, 4, 1], [4, 1, 3, 0]]),
        "batch": torch.tensor([0, 0, 1, 2, 2]), "edge_weight": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "edge_attr": torch.arange(8.0).view(4, 2),
    }  # fmt: skip
    few = first_graphs(batch)
    assert few["edge_index"].T.tolist() == [[0, 1], [1, 0]]
    assert (few["edge_weight"].tolist(), few["edge_attr"].tolist()) == ([2, 4], [[2, 3], [6, 7]])
    few["x"] += 1
    assert batch["x"][:, 0].tolist() == [0, 1, 2, 3, 4]


def test_the_first_graphs_of_torch_geometrics_batch_are_a_batch_that_it_understands():
    few = first_graphs(whole("object"))
    assert few.num_graphs == 2
    assert few.ptr.tolist() == [0, 3, 5], "where each graph begins, as readouts of a first node use it"


class Whole(nn.Module):
    """A model that takes torch_geometric's object itself."""

    def forward(self, data: Any) -> Tensor:
        return data.x * 2


def test_a_single_graph_is_its_own_first_graph_and_runs_like_itself():
    graph = thing(x=torch.ones(3, 1))
    few = first_graphs(graph)
    assert torch.equal(run_batch(Whole(), graph), torch.full((3, 1), 2.0))
    assert torch.equal(run_batch(Whole(), few), torch.full((3, 1), 2.0))
    assert few["x"] is not graph.x


@pytest.mark.parametrize("rows", [[[0], [1]], [[3, 0], [2]], [[1, 2], [3], [0, 0]], [[2]]], ids=str)
def test_joined_batches_are_those_of_torch_geometric(rows: list[list[int]]):
    data, graphs = objects(flat()), flat()
    joined = join_graphs(*(graphs.pick(torch.tensor(part)) for part in rows))
    assert same(joined, batched([data[i] for part in rows for i in part]))


def test_what_holds_graphs_and_what_does_not():
    x = torch.ones(3, 1)
    holds = [{"x": x, "edge_index": ends(PATH)}, {"edge_index": ends(PATH)}, thing(x=x), whole("object"), thing()]
    assert [holds_graphs(batch) for batch in holds] == [True] * 5
    assert [is_graph_object(batch) for batch in holds] == [False, False, True, True, True]
    others = [x, (x, ends(PATH)), {"input_ids": x}, [thing(x=x)], nn.Linear(2, 2), None, "graph"]
    assert [holds_graphs(batch) for batch in others] == [False] * 7


@pytest.mark.parametrize("kind", ["mapping", "object"])
def test_other_node_features_leave_the_batch_as_it_was(kind: str):
    batch, x = whole(kind), torch.zeros(10, 2)
    other = with_node_features(batch, x)
    assert type(other) is type(batch)
    assert same(parts_of(other), {**flat().pick(torch.arange(4)), "x": x})
    assert same(parts_of(batch), flat().pick(torch.arange(4)))


def test_a_moved_batch_leaves_the_original_where_it_is():
    batch = whole("object")
    other = moved(batch, torch.device("meta"))
    assert {part.device.type for part in parts_of(other).values()} == {"meta"}
    assert {part.device.type for part in parts_of(batch).values()} == {"cpu"}


# --- real graphs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "features", "per_class", "nodes", "edges"),
    [
        ("MUTAG", 7, [63, 125], 17.93, 19.79),
        ("PROTEINS", 3, [450, 663], 39.06, 72.82),
        ("NCI1", 37, [2053, 2057], 29.87, 32.30),
        ("IMDB-BINARY", 65, [500, 500], 19.77, 96.53),
    ],
)
def test_shared_graphs_have_the_published_statistics(
    shared_data: Path, name: str, features: int, per_class: list[int], nodes: float, edges: float
):
    """Graphs, nodes and undirected edges per graph: https://chrsmrrs.github.io/datasets/docs/datasets/."""
    data = load_data(f"graphs-npz:{shared_data / 'graphs' / f'graphs_{name}.npz'}")
    assert isinstance(data, GraphDataset)
    assert data.y is not None
    assert (len(data), data.features) == (sum(per_class), features)
    assert sorted(data.y.bincount().tolist()) == per_class
    assert len(data.graphs.x) / len(data) == pytest.approx(nodes, abs=0.005)
    assert data.graphs.edge_index.shape[1] / 2 / len(data) == pytest.approx(edges, abs=0.005)
    assert ("their degree stands in" in describe_graphs(data)) == (name == "IMDB-BINARY")
    one_hot = data.graphs.x
    assert ((one_hot == 0) | (one_hot == 1)).all()
    assert (one_hot.sum(1) == 1).all()
