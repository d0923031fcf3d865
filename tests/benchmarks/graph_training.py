"""What a training epoch on graphs costs beside torch_geometric's own plain loop, with the same model and views.

    python tests/benchmarks/graph_training.py --data graphs-npz:NCI1.npz [--device cuda]

One process, epochs of the two sides in alternation. The plain loop is what a user of torch_geometric writes: its
`DataLoader` over a list of `Data`, two views of each batch, the network, the loss, Adam. A third side makes the views
one graph at a time in a transform of the data set, as GraphCL's code does (its last epochs alone, being slow). Writes
tests/benchmarks/results/graph_training.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from layerlens.augment.graph_views import GraphViews
from layerlens.data import load_data
from layerlens.devices import pick_device
from layerlens.graph_batches import import_graph_extra, join_graphs
from layerlens.graph_models import build_graph_encoder
from layerlens.graphs import GraphDataset
from layerlens.models import ProjectionHead
from layerlens.provenance import provenance
from layerlens.training.config import make_config
from layerlens.training.loop import train
from layerlens.training.objectives.graphcl import graph_cl
from layerlens.training.order import Order

EPOCHS = 12  # of which the first two warm up


class PerGraph(torch.utils.data.Dataset):
    """Two views of each graph, made one at a time, as a transform of the data set makes them."""

    def __init__(self, graphs: list, views: GraphViews, draws: torch.Generator) -> None:
        self.graphs, self.views, self.draws = graphs, views, draws

    def __len__(self) -> int:
        return len(self.graphs)

    def __getitem__(self, i: int) -> tuple:
        from torch_geometric.data import Data

        graph = self.graphs[i]
        whole = {"x": graph.x, "edge_index": graph.edge_index, "batch": torch.zeros(len(graph.x), dtype=torch.int64)}
        made = [self.views(whole, self.draws) for _ in range(2)]
        return tuple(Data(x=view["x"], edge_index=view["edge_index"]) for view in made)


def as_data(dataset: GraphDataset) -> list:
    """The graphs as torch_geometric's objects."""
    from torch_geometric.data import Data

    g = dataset.graphs
    return [
        Data(x=g.x[a:b], edge_index=g.edge_index[:, c:d])
        for a, b, c, d in zip(g.node_ptr[:-1], g.node_ptr[1:], g.edge_ptr[:-1], g.edge_ptr[1:], strict=True)
    ]


def plain_epoch(network, optimizer, loader, views, draws, device, per_graph: bool) -> None:
    """One epoch of the loop that a user of torch_geometric writes."""
    for batch in loader:
        if per_graph:
            made = [{"x": v.x, "edge_index": v.edge_index, "batch": v.batch} for v in (b.to(device) for b in batch)]
        else:
            batch = batch.to(device)
            whole = {"x": batch.x, "edge_index": batch.edge_index, "batch": batch.batch}
            made = [views(whole, draws) for _ in range(2)]
        loss = graph_cl(network(**join_graphs(*made)), temperature=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def measure(data: str, device: torch.device) -> dict:
    """Seconds of each side's epochs, and their ratios, epoch by epoch."""
    import_graph_extra()
    from torch_geometric.loader import DataLoader

    dataset = load_data(data)
    config = make_config({"objective": "graphcl", "data": data, "epochs": EPOCHS, "keep_every": EPOCHS})
    graphs, batch = as_data(dataset), Order(config, dataset).batch
    torch.manual_seed(0)
    draws, views = torch.Generator(device).manual_seed(0), GraphViews(**config.graph.model_dump())
    sides: dict[str, list[float]] = {"layerlens": [], "plain": [], "per_graph": []}
    plain = {}
    for side, source in (("plain", graphs), ("per_graph", PerGraph(graphs, views, torch.Generator().manual_seed(0)))):
        network = build_graph_encoder("gin", features=dataset.features, head=ProjectionHead(160, 160)).to(device)
        loader = DataLoader(source, batch_size=batch, shuffle=True, drop_last=True)
        plain[side] = network, torch.optim.Adam(network.parameters(), lr=0.01), loader

    steps, moments = Order(config, dataset).steps, []

    def after_step(progress) -> None:
        """At the end of each of layerlens' epochs the other sides have their turn."""
        if progress.step % steps:
            return
        _wait(device)
        moments.append(time.perf_counter())
        for side, (network, optimizer, loader) in plain.items():
            if side == "per_graph" and progress.step < progress.steps - steps:
                continue
            begin = time.perf_counter()
            plain_epoch(network, optimizer, loader, views, draws, device, side == "per_graph")
            _wait(device)
            sides[side].append(time.perf_counter() - begin)
        moments.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as place:
        train(config, Path(place) / "run", dataset=dataset, device=device.type, progress=after_step)
    sides["layerlens"] = [b - a for a, b in zip(moments[1:-1:2], moments[2::2], strict=True)]
    counted = {side: found[-(EPOCHS - 2) :] for side, found in sides.items()}
    ratios = {
        f"layerlens / {side}": [a / b for a, b in zip(reversed(counted["layerlens"]), reversed(found), strict=False)]
        for side, found in counted.items()
        if side != "layerlens"
    }
    return {
        "graphs": len(dataset), "batch": batch, "steps": steps, "epochs": EPOCHS - 2,
        "median_s": {side: round(statistics.median(found), 4) for side, found in counted.items()},
        "ratio": {
            name: {"median": round(statistics.median(r), 3), "least": round(min(r), 3), "most": round(max(r), 3)}
            for name, r in ratios.items()
        },
    }  # fmt: skip


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="graphs-npz:PATH or tu:NAME@ROOT")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    device = torch.device(pick_device(given.device))
    found = {Path(given.data.partition(":")[2]).stem: measure(given.data, device), "environment": provenance(device)}
    print(json.dumps(found, indent=1))
    path = Path(__file__).parent / "results" / "graph_training.json"
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
