"""Batches of graphs: a mapping with `x`, `edge_index` and `batch`, or torch_geometric's own `Batch`.

The nodes of all graphs of a batch stand below each other; `batch`, shape (nodes,), says which graph each belongs to.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from layerlens.errors import ExtraMissingError, ShapeError

NODE, EDGES, OWNER = "x", "edge_index", "batch"
_FED = (NODE, EDGES, "edge_weight", "edge_attr", OWNER)  # what torch_geometric's models are called with


def import_graph_extra() -> Any:
    """torch_geometric, without the warning that its import gives.

    Raises:
        ExtraMissingError: The extra `graph` is not installed.
    """
    if find_spec("torch_geometric") is None:
        raise ExtraMissingError("graphs need torch_geometric: pip install 'layerlens-torch[graph]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        import torch_geometric.nn
    return torch_geometric


def is_graph_object(batch: Any) -> bool:
    """Whether it is torch_geometric's `Data` or `Batch`; knows them by what they hold, without an import."""
    return not isinstance(batch, Mapping | Tensor | nn.Module) and hasattr(batch, EDGES) and hasattr(batch, NODE)


def holds_graphs(batch: Any) -> bool:
    """Whether a batch holds graphs.

    >>> holds_graphs({"x": torch.ones(2, 1), "edge_index": torch.tensor([[0], [1]])}), holds_graphs(torch.ones(2))
    (True, False)
    """
    return (isinstance(batch, Mapping) and EDGES in batch) or is_graph_object(batch)


def fed_with(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch of graphs by the names that models call them, those that it has."""
    get = batch.get if isinstance(batch, Mapping) else lambda name: getattr(batch, name, None)
    return {name: found for name in _FED if isinstance(found := get(name), Tensor)}


def graph_of_node(batch: Any) -> Tensor | None:
    """Which graph each node of a batch belongs to, shape (nodes,), int64; None for anything but several graphs.

    Raises:
        ShapeError: `batch` and `x` do not fit, or the nodes of a graph do not stand together.
    """
    fed = fed_with(batch) if holds_graphs(batch) else {}
    owner = fed.get(OWNER)
    if owner is None:
        return None
    if owner.ndim != 1 or owner.dtype != torch.int64 or (NODE in fed and len(owner) != len(fed[NODE])):
        raise ShapeError(
            f"batch has shape {tuple(owner.shape)} and {owner.dtype}; allowed: the graph of each of the "
            f"{len(fed.get(NODE, owner))} nodes, int64"
        )
    return checked_owner(owner)


def checked_owner(owner: Tensor) -> Tensor:
    """The graph of each node, if the nodes of a graph stand together.

    Raises:
        ShapeError: They do not.
    """
    if bool((owner.diff() < 0).any()):
        raise ShapeError("the nodes of a batch must stand graph by graph: `batch` may not fall")
    return owner


def count_graphs(owner: Tensor) -> int:
    """How many graphs a batch has, by the graph of each node; the last one must have a node."""
    return int(owner[-1]) + 1 if len(owner) else 0


def first_graphs(batch: Any, count: int = 2) -> Any:
    """A copy of the first graphs of a batch, of the same kind; of a single graph, all of it."""
    fed, owner = fed_with(batch), graph_of_node(batch)
    if EDGES not in fed:
        raise ShapeError("a batch of graphs needs edge_index, shape (2, edges); sparse adjacency matrices are not read")
    if owner is None:
        return _like(batch, {name: part.clone() for name, part in fed.items()})
    few = owner < count
    inside = few[fed[EDGES][0]] & few[fed[EDGES][1]]
    # what stays of a tensor as long as the edges, the graphs or the nodes
    whole: dict[int, Any] = {len(inside): inside, count_graphs(owner): slice(count), len(owner): few}
    parts = batch if isinstance(batch, Mapping) else batch.to_dict()
    cut = {
        name: part[whole[len(part)]]
        for name, part in parts.items()
        if isinstance(part, Tensor) and part.ndim and len(part) in whole and name != EDGES
    }
    cut |= {name: fed[name][few] for name in (NODE, OWNER) if name in fed}
    made = _like(batch, {**cut, EDGES: fed[EDGES][:, inside]})
    if is_graph_object(made):
        made.ptr = torch.nn.functional.pad(torch.bincount(cut[OWNER]).cumsum(0), (1, 0))
        made._num_graphs = len(made.ptr) - 1
    return made


def _like(batch: Any, parts: dict[str, Tensor]) -> Any:
    """The same kind of batch with other tensors in it."""
    if isinstance(batch, Mapping):
        return {name: parts.get(name, value) for name, value in batch.items()}
    made = copy.copy(batch)
    for name, value in parts.items():
        setattr(made, name, value)
    return made


def with_node_features(batch: Any, x: Tensor) -> Any:
    """The same batch with other node features; the original is left as it was."""
    return _like(batch, {NODE: x})


def moved(batch: Any, device: torch.device) -> Any:
    """torch_geometric's batch on a device; the original is left where it is."""
    return copy.copy(batch).to(device)


def run_graphs(model: nn.Module, batch: Any) -> Any:
    """Run a model on torch_geometric's batch: by `x, edge_index, …` where its forward names these, else by itself."""
    try:
        names = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # a compiled callable without a signature
        return model(batch)
    if EDGES not in names:
        return model(batch)
    return model(**{name: value for name, value in fed_with(batch).items() if name in names})


def join_graphs(*batches: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Several batches as one, graph after graph.

    >>> one = {"x": torch.ones(2, 1), "edge_index": torch.tensor([[0], [1]]), "batch": torch.zeros(2).long()}
    >>> join_graphs(one, one)["batch"].tolist(), join_graphs(one, one)["edge_index"].tolist()
    ([0, 0, 1, 1], [[0, 2], [1, 3]])
    """
    nodes = graphs = 0
    edges, owners = [], []
    for batch in batches:
        edges.append(batch[EDGES] + nodes)
        owners.append(batch[OWNER] + graphs)
        nodes, graphs = nodes + len(batch[NODE]), graphs + count_graphs(batch[OWNER])
    x = torch.cat([batch[NODE] for batch in batches])
    return {NODE: x, EDGES: torch.cat(edges, 1), OWNER: torch.cat(owners)}
