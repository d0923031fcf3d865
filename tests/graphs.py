"""Small data sets of graphs, made up, and TU's text files."""

from pathlib import Path

import numpy as np
import torch

from layerlens.graph_batches import import_graph_extra
from layerlens.graphs import GraphDataset, Graphs

import_graph_extra()  # the first import of torch_geometric warns


def write_tu(root: Path, name: str, count: int, *, seed: int = 0) -> None:
    """ROOT/NAME/raw with rings (class 1) and stars (class -1) of 5 to 9 nodes, whose labels are 0 to 2."""
    folder, draws = root / name / "raw", np.random.default_rng(seed)
    folder.mkdir(parents=True)
    edges, owners, labels, first = [], [], [], 1
    for graph in range(count):
        size = int(draws.integers(5, 10))
        ring = [(k, (k + 1) % size) for k in range(size)] if graph % 2 else [(0, k) for k in range(1, size)]
        edges += [(first + a, first + b) for a, b in [*ring, *((b, a) for a, b in ring)]]
        owners += [graph + 1] * size
        labels += draws.integers(0, 3, size).tolist()
        first += size
    lines = {
        "A": [f"{a}, {b}" for a, b in edges],
        "graph_indicator": owners,
        "graph_labels": [1 if graph % 2 else -1 for graph in range(count)],
        "node_labels": labels,
    }
    for kind, rows in lines.items():
        (folder / f"{name}_{kind}.txt").write_text("\n".join(map(str, rows)) + "\n")


def rings_and_stars(count: int = 24, *, features: int = 3, seed: int = 0) -> GraphDataset:
    """Rings (class 1) and stars (class 0) of 5 to 9 nodes with random features."""
    draws, node_ptr, edge_ptr, edges = np.random.default_rng(seed), [0], [0], []
    for graph in range(count):
        size = int(draws.integers(5, 10))
        ring = [(k, (k + 1) % size) for k in range(size)] if graph % 2 else [(0, k) for k in range(1, size)]
        edges += [*ring, *((b, a) for a, b in ring)]
        node_ptr.append(node_ptr[-1] + size)
        edge_ptr.append(len(edges))
    x = torch.from_numpy(draws.normal(size=(node_ptr[-1], features)).astype(np.float32))
    graphs = Graphs(
        x=x, edge_index=torch.tensor(edges).T, node_ptr=torch.tensor(node_ptr), edge_ptr=torch.tensor(edge_ptr)
    )
    return GraphDataset(name="rings and stars", graphs=graphs, y=torch.arange(count) % 2, classes=("star", "ring"))
