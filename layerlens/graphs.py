"""Data sets of graphs, held as flat tensors: node features, edges, and where each graph begins."""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from layerlens.batch_sizes import even_batches, fixed_choice
from layerlens.errors import DataError, DownloadError, UnknownNameError
from layerlens.graph_batches import EDGES, NODE, OWNER, import_graph_extra
from layerlens.specs import Spec

GRAPH_SOURCES = {"tu": ("attributes", "empty"), "graphs-npz": ("attributes", "empty")}  # and their options
MOST_DEGREES = 64  # larger degrees share the last feature
TU_HOME = "https://www.chrsmrrs.com/graphkerneldatasets"
_NEEDED = ("node_ptr", "edge_ptr", "edge_index")
_KNOWN = (*_NEEDED, "graph_label", "node_label", "node_one_hot", "node_attr", "edge_label")


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """Many graphs in flat tensors.

    Attributes:
        x: Node features, shape (nodes, features), float32.
        edge_index: Both ends of each edge, counted from 0 within its graph, shape (2, edges), int64.
        node_ptr, edge_ptr: Where the nodes and edges of each graph begin, and the end; shape (graphs + 1,), int64.
    """

    x: Tensor
    edge_index: Tensor
    node_ptr: Tensor
    edge_ptr: Tensor

    def __len__(self) -> int:
        return len(self.node_ptr) - 1

    def to(self, device: torch.device) -> Graphs:
        """The same graphs on a device."""
        return Graphs(**{name: value.to(device) for name, value in vars(self).items()})

    def pick(self, rows: Tensor) -> dict[str, Tensor]:
        """A batch of some graphs, in that order, without a loop over them.

        Args:
            rows: Which, shape (n,), int64.

        Returns:
            `x` (nodes, features), `edge_index` (2, edges) over the nodes of the batch, and `batch` (nodes,).
        """
        sizes, edges = (ptr[rows + 1] - ptr[rows] for ptr in (self.node_ptr, self.edge_ptr))
        places = torch.arange(len(rows), device=rows.device)
        starts = sizes.cumsum(0) - sizes  # of each graph in the batch
        owner = places.repeat_interleave(sizes)
        nodes = torch.arange(len(owner), device=rows.device) + (self.node_ptr[rows] - starts)[owner]
        edge_owner = places.repeat_interleave(edges)
        first = (self.edge_ptr[rows] - (edges.cumsum(0) - edges))[edge_owner]
        ends = self.edge_index[:, torch.arange(len(edge_owner), device=rows.device) + first]
        return {NODE: self.x[nodes], EDGES: ends + starts[edge_owner], OWNER: owner}

    def part(self, rows: Tensor) -> Graphs:
        """Some of the graphs, in that order, as a set of their own."""
        picked = self.pick(rows)
        node_ptr, edge_ptr = (
            F.pad((ptr[rows + 1] - ptr[rows]).cumsum(0), (1, 0)) for ptr in (self.node_ptr, self.edge_ptr)
        )
        local = picked[EDGES] - node_ptr[:-1].repeat_interleave(edge_ptr.diff())
        return Graphs(x=picked[NODE], edge_index=local, node_ptr=node_ptr, edge_ptr=edge_ptr)


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphDataset:
    """Graphs, each perhaps with a class. There is no test split: they are trained on without their classes.

    Attributes:
        name: The specification that made it.
        graphs: All of them.
        y: Class indices, shape (graphs,), int64; None without classes.
        classes: Class names; empty without classes.
        notes: What was decided about the data, in words, such as which features stand in for missing ones.
    """

    name: str
    graphs: Graphs
    y: Tensor | None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Graphs."""
        return len(self.graphs)

    @property
    def y_train(self) -> Tensor | None:
        """The classes: every graph is trained on."""
        return self.y

    @property
    def y_test(self) -> Tensor | None:
        """The classes: every graph is scored, by cross-validation."""
        return self.y

    @property
    def features(self) -> int:
        """Numbers per node."""
        return self.graphs.x.shape[1]

    def fingerprint(self) -> str:
        """SHA-256 over nodes, edges and classes, as hexadecimal digits; made once, as these never change."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        parts = (*vars(self.graphs).values(), *(() if self.y is None else (self.y,)))
        digest = hashlib.sha256(repr([(str(part.dtype), tuple(part.shape)) for part in parts]).encode())
        for part in parts:
            digest.update(part.contiguous().numpy().data)
        return digest.hexdigest()

    def batches(
        self, split: str = "test", *, samples: int | None = None, batch_size: int = 100, seed: int = 0
    ) -> GraphBatches:
        """A fixed random choice of `samples` graphs, the same at every iteration.

        Args:
            split: `train` or `test`; both are all graphs.
            samples: How many; all if there are fewer.
            batch_size: Graphs per batch, but for one more or less.
            seed: Of the choice.
        """
        if split not in ("train", "test"):
            raise UnknownNameError(f"no split {split!r}; allowed: train, test")
        return GraphBatches(self.graphs, fixed_choice(len(self), samples, seed), batch_size)

    def in_order(self, batch_size: int = 512) -> GraphBatches:
        """All graphs, in their own order."""
        return GraphBatches(self.graphs, torch.arange(len(self)), batch_size)


class GraphBatches:
    """An iterable of batches of graphs (`Graphs.pick`), in an order that never changes.

    Args:
        graphs: Where they come from.
        order: Which of them, shape (n,).
        batch_size: Graphs per batch, but for one more or less.
    """

    def __init__(self, graphs: Graphs, order: Tensor, batch_size: int) -> None:
        self.graphs, self.order, self.batch_size = graphs, order, batch_size

    def __len__(self) -> int:
        return even_batches(len(self.order), self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for rows in self.order.tensor_split(len(self)):
            yield self.graphs.pick(rows)


def load_graphs(spec: Spec, *, download: bool = False) -> GraphDataset:
    """Load graphs by their specification, see `parse_spec`.

    `tu:NAME@ROOT`: a data set of TU Dortmund as text files in ROOT/NAME/raw, where torch_geometric's `TUDataset` has
    them. `graphs-npz:PATH`: arrays `node_ptr`, `edge_ptr` (graphs + 1), `edge_index` (2, edges; counted from 0 within
    each graph), and perhaps `graph_label`, `node_label`, `node_attr`.

    Node labels become one-hot features; `,attributes=true` adds the continuous ones. Where there are neither, the
    degree stands in, one-hot, degrees of 64 and more alike. `,empty=leave-out` leaves out graphs without nodes or
    edges, which are refused otherwise.

    Raises:
        DataError: The data are missing or damaged, or hold a graph that is refused.
        DownloadError: They could not be fetched.
        ExtraMissingError: The extra `graph` is not installed.
    """
    spec.check_options(GRAPH_SOURCES[spec.kind])
    attributes, empty = spec.options.get("attributes", False), spec.options.get("empty", "refuse")
    if not isinstance(attributes, bool):
        raise DataError(f"attributes={attributes!r} of {spec.text!r}; allowed: true, false")
    if empty not in ("refuse", "leave-out"):
        raise DataError(f"empty={empty!r} of {spec.text!r}; allowed: refuse, leave-out")
    raw = _read_tu(spec, download) if spec.kind == "tu" else _read_npz(spec)
    return _dataset(spec.text, raw, attributes=attributes, leave_out=empty == "leave-out")


def dataset_from_graphs(name: str, graphs: Sequence[Any]) -> GraphDataset:
    """Make a `GraphDataset` of torch_geometric's `Data` objects: `edge_index`, and perhaps `x` and `y`.

    Args:
        name: What errors and results call it.
        graphs: Objects with `edge_index` (2, edges), `x` (nodes, features) or `num_nodes`, and perhaps `y`, a class
            index. Edge features are not used.

    Raises:
        DataError: A graph without nodes or edges, features of different width, an edge to no node.
    """
    if not len(graphs):
        raise DataError(f"{name} holds no graph")
    given = [None if getattr(graph, "x", None) is None else torch.as_tensor(graph.x) for graph in graphs]
    known = [x for x in given if x is not None]
    if known and len(known) < len(given):
        missing = next(i for i, x in enumerate(given) if x is None)
        raise DataError(f"{name}: graph {missing} has no x, but others have; give features to all nodes or to none")
    widths = {tuple(x.shape[1:]) for x in known}
    if len(widths) > 1 or any(len(width) != 1 for width in widths):
        odd = next(i for i, x in enumerate(known) if x.ndim != 2 or x.shape[1:] != known[0].shape[1:])
        raise DataError(
            f"{name}: graph {odd} has x of shape {tuple(known[odd].shape)}, graph 0 {tuple(known[0].shape)}; allowed: "
            "(nodes, features) with as many features everywhere"
        )
    ys = [None if getattr(graph, "y", None) is None else torch.as_tensor(graph.y) for graph in graphs]
    labelled = all(y is not None and y.numel() == 1 and not y.is_floating_point() for y in ys)
    if none := [i for i, graph in enumerate(graphs) if graph.edge_index is None]:
        raise DataError(f"{name}: graph {none[0]} has no edge_index; allowed: (2, edges)")
    counts = [int(graph.num_nodes or 0) for graph in graphs]
    edges = [torch.as_tensor(graph.edge_index).cpu() for graph in graphs]
    if odd_edges := [i for i, e in enumerate(edges) if e.ndim != 2 or e.shape[0] != 2]:
        came = tuple(edges[odd_edges[0]].shape)
        raise DataError(f"{name}: graph {odd_edges[0]} has edge_index of shape {came}; allowed: (2, edges)")
    raw = {
        "node_ptr": np.cumsum([0, *counts]), "edge_ptr": np.cumsum([0, *(e.shape[1] for e in edges)]),
        "edge_index": torch.cat(edges, 1).numpy(),
    }  # fmt: skip
    if known:
        raw["node_attr"] = torch.cat([x.detach().float().cpu() for x in known]).numpy()
    if labelled:
        raw["graph_label"] = np.array([int(y) for y in ys if y is not None])
    return _dataset(name, raw, attributes=True, leave_out=False)


def describe_graphs(data: GraphDataset) -> str:
    """What a data set of graphs holds and what was decided about it, in one line."""
    graphs = data.graphs
    nodes, edges = len(graphs.x) / len(graphs), graphs.edge_index.shape[1] / len(graphs)
    classes = f", {len(data.classes)} classes" if data.classes else ""
    what = f"{len(graphs):,} graphs of {nodes:.1f} nodes and {edges:.1f} directed edges on average{classes}"
    return "; ".join([f"{data.name}: {what}, {data.features} features per node", *data.notes])


def _read_npz(spec: Spec) -> dict[str, Any]:
    path = spec.argument
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except FileNotFoundError as error:
        raise DataError(f"no file {path!r}; graphs-npz:PATH needs {', '.join(_NEEDED)}") from error
    except Exception as error:  # whatever a damaged archive makes zipfile and NumPy raise
        raise DataError(f"{path!r} is not a plain npz archive of arrays: {error}") from error
    if missing := [key for key in _NEEDED if key not in arrays]:
        raise DataError(f"{path!r} lacks {missing}; it holds {sorted(arrays)}")
    return arrays


def _read_tu(spec: Spec, download: bool) -> dict[str, Any]:
    """The text files of a TU data set, by torch_geometric's reader; its pickled cache is never opened."""
    import_graph_extra()
    from torch_geometric.io import read_tu_data, read_txt_array

    name, at, root = spec.argument.partition("@")
    if not name or not at or Path(name).name != name:
        raise DataError(f"{spec.text!r} names no place; allowed: tu:NAME@ROOT, such as tu:MUTAG@data")
    raw = Path(root) / name / "raw"
    if not (raw / f"{name}_A.txt").is_file():
        if not download:
            raise DataError(
                f"no {name}_A.txt in {str(raw)!r}; `--download` fetches {name} there, or unpack {name}.zip of "
                f"{TU_HOME} into that folder"
            )
        _fetch_tu(name, raw)
    try:
        with _plain_path(raw) as place:
            data, slices, sizes = read_tu_data(place, name)
            owner = read_txt_array(str(Path(place) / f"{name}_graph_indicator.txt"), sep=",", dtype=torch.long)
            named = Path(place) / f"{name}_graph_labels.txt"  # the reader counts the classes from 0
            classes = read_txt_array(str(named), sep=",", dtype=torch.long) if named.exists() else None
    except Exception as error:  # whatever damaged files make the reader raise
        raise DataError(f"the files of {name} in {str(raw)!r} are damaged: {error}") from error
    rows = len(owner) if data.x is None else len(data.x)
    if rows != len(owner) or bool((owner.diff() < 0).any()):
        raise DataError(
            f"the files of {name} in {str(raw)!r} are damaged: {rows} rows of node features for {len(owner)} nodes, "
            "which must stand graph by graph"
        )
    split = int(sizes["num_node_attributes"])
    node_ptr = slices["x"].numpy() if "x" in slices else np.cumsum([0, *data._num_nodes])
    edge_ptr = slices["edge_index"].numpy()  # ends at the last graph with an edge
    edge_ptr = np.pad(edge_ptr, (0, len(node_ptr) - len(edge_ptr)), mode="edge")
    found = {"node_ptr": node_ptr, "edge_ptr": edge_ptr, "edge_index": data.edge_index.numpy()}
    if data.x is not None:
        found["node_attr"], labels = data.x[:, :split].numpy(), data.x[:, split:]
        if labels.shape[1]:
            found["node_one_hot"] = labels.numpy()
    if classes is not None:
        found["graph_label"] = classes.numpy()
    if data.edge_attr is not None:
        found["edge_label"] = data.edge_attr.numpy()
    return found


@contextmanager
def _plain_path(folder: Path) -> Iterator[str]:
    """The folder under a name that torch_geometric does not take for a pattern."""
    if glob.escape(str(folder)) == str(folder):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory() as place:
        link = Path(place) / "raw"
        link.symlink_to(folder.absolute(), target_is_directory=True)
        yield str(link)


def _fetch_tu(name: str, raw: Path) -> None:
    """Fetch the text files as `TUDataset` does, without its pickled cache; the file that is looked for comes last."""
    from torch_geometric.datasets import TUDataset

    try:
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=raw.parent) as place:
            wanted = SimpleNamespace(url=TUDataset.url, cleaned=False, name=name, raw_dir=place)
            TUDataset.download(wanted)
            for file in sorted(Path(place).iterdir(), key=lambda file: file.name == f"{name}_A.txt"):
                os.replace(file, raw / file.name)
    except Exception as error:  # whatever the transfer, the archive or the disk raises
        raise DownloadError(f"could not fetch {name} into {str(raw)!r}: {error}; see {TU_HOME}") from error


def _dataset(name: str, raw: dict[str, Any], *, attributes: bool, leave_out: bool) -> GraphDataset:
    """Check flat arrays and make a data set of them."""
    node_ptr, edge_ptr = (_pointers(name, key, raw[key]) for key in ("node_ptr", "edge_ptr"))
    edges = _integers(name, "edge_index", raw["edge_index"])
    count = len(node_ptr) - 1
    if len(edge_ptr) != len(node_ptr) or count < 1:
        raise DataError(
            f"{name}: node_ptr has {len(node_ptr)} entries, edge_ptr {len(edge_ptr)}; allowed: graphs + 1 each"
        )
    if edges.ndim != 2 or edges.shape[0] != 2 or edges.shape[1] != edge_ptr[-1]:
        raise DataError(f"{name}: edge_index has shape {tuple(edges.shape)}; edge_ptr says (2, {int(edge_ptr[-1])})")
    sizes, edge_counts = node_ptr.diff(), edge_ptr.diff()
    most = sizes.repeat_interleave(edge_counts)
    if bad := ((edges < 0) | (edges >= most)).any(0).nonzero().flatten().tolist():
        graph = int(torch.searchsorted(edge_ptr, torch.tensor(bad[0]), right=True)) - 1
        raise DataError(
            f"{name}: graph {graph} has {int(sizes[graph])} nodes and an edge {edges[:, bad[0]].tolist()}; node "
            "numbers count from 0 within each graph"
        )
    if not len(most) and not int(sizes.sum()):
        raise DataError(f"{name}: every graph is without nodes or without edges")
    x, notes = _node_features(name, raw, edges, node_ptr, edge_ptr, attributes)
    labels = _labels(name, raw.get("graph_label"), count)
    graphs = Graphs(x=x, edge_index=edges, node_ptr=node_ptr, edge_ptr=edge_ptr)
    empty = (sizes == 0) | (edge_counts == 0)
    if bool(empty.any()):
        first = int(empty.nonzero()[0])
        what = "no node" if sizes[first] == 0 else "no edge"
        if not leave_out:
            raise DataError(
                f"{name}: graph {first} has {what} ({int(empty.sum())} such graphs); repair them, or add "
                ",empty=leave-out to go without them"
            )
        kept = (~empty).nonzero().flatten()
        if not len(kept):
            raise DataError(f"{name}: every graph is without nodes or without edges")
        graphs, labels = graphs.part(kept), None if labels is None else labels[kept]
        notes = (*notes, f"left out {int(empty.sum())} graphs without nodes or edges")
    if labels is None:
        return GraphDataset(name=name, graphs=graphs, y=None, notes=notes)
    values, y = labels.unique(return_inverse=True)
    return GraphDataset(name=name, graphs=graphs, y=y, classes=tuple(map(str, values.tolist())), notes=notes)


def _node_features(
    name: str, raw: dict[str, Any], edges: Tensor, node_ptr: Tensor, edge_ptr: Tensor, attributes: bool
) -> tuple[Tensor, tuple[str, ...]]:
    """Features of all nodes, float32, and what was decided about them."""
    nodes, parts, notes = int(node_ptr[-1]), list[Tensor](), list[str]()
    if "node_label" in raw:
        labels = _integers(name, "node_label", raw["node_label"])
        if labels.shape != (nodes,) or (nodes and int(labels.min()) < 0):
            came = f"node_label has shape {tuple(labels.shape)}"
            raise DataError(f"{name}: {came}; allowed: a whole number from 0 for each of {nodes} nodes")
        parts.append(F.one_hot(labels.unique(return_inverse=True)[1]).float())
    if "node_one_hot" in raw:
        parts.append(torch.from_numpy(raw["node_one_hot"]).float())
    if "node_attr" in raw and raw["node_attr"].size:
        values = _floats(name, raw["node_attr"], nodes)
        if attributes:
            parts.append(values)
        else:
            notes.append(f"its {values.shape[1]} continuous node attributes are not used (,attributes=true uses them)")
    if "edge_label" in raw:
        notes.append("edge labels are not used")
    if others := sorted(set(raw) - set(_KNOWN)):
        notes.append(f"arrays of other names are not used: {', '.join(others)}")
    if not parts:
        parts.append(_degrees(edges, node_ptr, edge_ptr))
        notes.append(f"nodes have no features: their degree stands in, one-hot, {MOST_DEGREES} and more alike")
    return torch.cat(parts, 1), tuple(notes)


def _degrees(edges: Tensor, node_ptr: Tensor, edge_ptr: Tensor) -> Tensor:
    """One-hot degrees of all nodes; an undirected edge stands twice, once from each end."""
    flat = edges[0] + node_ptr[:-1].repeat_interleave(edge_ptr.diff())
    degree = torch.bincount(flat, minlength=int(node_ptr[-1])).clamp_max(MOST_DEGREES)
    return F.one_hot(degree, int(degree.max()) + 1).float()


def _labels(name: str, labels: Any, count: int) -> Tensor | None:
    if labels is None:
        return None
    found = _integers(name, "graph_label", labels)
    if found.shape != (count,):
        raise DataError(f"{name}: graph_label has shape {tuple(found.shape)}; allowed: one for each of {count} graphs")
    return found


def _pointers(name: str, key: str, values: Any) -> Tensor:
    found = _integers(name, key, values)
    if found.ndim != 1 or not len(found) or int(found[0]) != 0 or bool((found.diff() < 0).any()):
        came = f"{tuple(found.shape)} from {found.flatten()[:1].tolist()}"
        raise DataError(f"{name}: {key} has shape {came}; allowed: (graphs + 1,), from 0 and never falling")
    return found


def _integers(name: str, key: str, values: Any) -> Tensor:
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise DataError(f"{name}: {key} holds {array.dtype}; allowed: whole numbers")
    return torch.from_numpy(array.astype(np.int64))


def _floats(name: str, values: Any, nodes: int) -> Tensor:
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":
        raise DataError(f"{name}: node features hold {array.dtype}; allowed: numbers, as many for each node")
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or len(array) != nodes:
        raise DataError(f"{name}: node features have shape {array.shape}; allowed: ({nodes}, features)")
    found = torch.from_numpy(array.astype(np.float32))
    if not bool(found.isfinite().all()):
        raise DataError(f"{name}: NaN or infinity in the node features; remove or repair those graphs")
    return found
