"""Graph networks of torch_geometric's parts, whose layers can all be named: nodes' states, pooled embedding, head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerlens.errors import ConfigError, check_known
from layerlens.graph_batches import EDGES, NODE, OWNER, import_graph_extra
from layerlens.specs import Spec, parse_spec

GRAPH_MODELS = ("gin", "gcn", "graphsage")
GRAPH_OPTIONS = ("layers", "width", "pooling", "features")
POOLINGS = ("sum", "mean", "max")


class GraphLayer(nn.Module):
    """One step of message passing, ReLU and batch norm.

    Args:
        conv: A convolution of torch_geometric, (nodes, features) and edges to (nodes, width).
        width: Features that go out.

    Shape:
        (nodes, features), (2, edges) -> (nodes, width)
    """

    def __init__(self, conv: nn.Module, width: int) -> None:
        super().__init__()
        self.conv, self.norm = conv, nn.BatchNorm1d(width)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """New states of all nodes."""
        return self.norm(self.conv(x, edge_index).relu())  # type: ignore[no-any-return]


class Readout(nn.Module):
    """The states of each graph's nodes, pooled layer by layer and put side by side.

    Args:
        pooling: `sum`, `mean` or `max` over the nodes.

    Shape:
        L times (nodes, width), (nodes,) -> (graphs, L · width)
    """

    def __init__(self, pooling: str) -> None:
        super().__init__()
        kinds = {"sum": "global_add_pool", "mean": "global_mean_pool", "max": "global_max_pool"}
        self.pooling, self._pool = pooling, getattr(import_graph_extra().nn, kinds[pooling])

    def forward(self, states: list[Tensor], batch: Tensor) -> Tensor:
        """The embeddings of all graphs."""
        return torch.cat([self._pool(h, batch) for h in states], 1)

    def extra_repr(self) -> str:
        """The pooling."""
        return self.pooling


class GraphEncoder(nn.Module):
    """Layers of message passing, a readout of all of them, and perhaps a head: graphs to vectors.

    Args:
        kind: `gin` (two-layer perceptron, ε = 0), `gcn` or `graphsage` (mean over neighbours).
        features: Numbers per node that come in.
        layers: How many.
        width: Features of a node's state, at each of them.
        pooling: `sum`, `mean` or `max`, see `Readout`.
        head: Behind the readout.

    Attributes:
        node_layers: Names of the layers that have a row per node.
        layer_names: `layer1` … `layerL` (nodes), `pool` (graphs), and `head` if there is one: 0 to L + 1.
        head_layer: `head`, or "" without one. The embedding is what goes into it.

    Raises:
        UnknownNameError: Another kind or pooling. ConfigError: A size below 1.
        ExtraMissingError: The extra `graph` is not installed.

    Source:
        GIN: Xu et al. 2019, arXiv:1810.00826; sizes and readout as in GraphCL, arXiv:2010.13902. GCN: Kipf & Welling
        2017, arXiv:1609.02907. GraphSAGE: Hamilton et al. 2017, arXiv:1706.02216.
    """

    def __init__(
        self,
        kind: str,
        features: int,
        *,
        layers: int = 5,
        width: int = 32,
        pooling: str = "sum",
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_known("graph network", kind, GRAPH_MODELS)
        check_known("pooling", str(pooling), POOLINGS)
        for name, value in (("features", features), ("layers", layers), ("width", width)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{kind} with {name}={value!r}; allowed: a whole number from 1")
        self.kind, self.features, self.width = kind, features, layers * width
        names = [f"layer{k}" for k in range(1, layers + 1)]
        for name, comes_in in zip(names, [features, *[width] * (layers - 1)], strict=True):
            self.add_module(name, GraphLayer(_convolution(kind, comes_in, width), width))
        self.node_layers = tuple(names)
        self.pool, self.head = Readout(pooling), head
        self.reset_parameters()

    @property
    def layer_names(self) -> tuple[str, ...]:
        """All layers by the paper's numbers, from 0."""
        return (*self.node_layers, "pool", *(("head",) if self.head is not None else ()))

    @property
    def head_layer(self) -> str:
        """The layer whose input is the embedding."""
        return "head" if self.head is not None else ""

    def reset_parameters(self) -> None:
        """Draw the weights of all linear layers as GraphCL does, after Glorot; biases are 0."""
        kinds = (nn.Linear, import_graph_extra().nn.Linear)
        for module in self.modules():
            if isinstance(module, kinds):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        """Vectors of graphs, through the head if there is one.

        Args:
            x: Node features, shape (nodes, features).
            edge_index: Both ends of each edge, shape (2, edges), int64.
            batch: The graph of each node, shape (nodes,), int64, never falling; every graph has a node.

        Returns:
            Shape (graphs, d).
        """
        states = []
        for name in self.node_layers:
            x = getattr(self, name)(x, edge_index)
            states.append(x)
        pooled = self.pool(states, batch)
        return pooled if self.head is None else self.head(pooled)

    def example(self) -> dict[str, Tensor]:
        """A batch of two small graphs, a path and a triangle, on the CPU."""
        edges = torch.tensor([[0, 1, 2, 3, 2, 4, 3, 4], [1, 0, 3, 2, 4, 2, 4, 3]])
        return {NODE: torch.ones(5, self.features), EDGES: edges, OWNER: torch.tensor([0, 0, 1, 1, 1])}


def reads_graphs(spec: str) -> bool:
    """Whether the specification is that of a graph network.

    >>> reads_graphs("gin,layers=3"), reads_graphs("mlp")
    (True, False)
    """
    return parse_spec(spec).kind in GRAPH_MODELS


def build_graph_encoder(
    spec: str | Spec, *, features: int | None = None, head: nn.Module | None = None
) -> GraphEncoder:
    """Build a graph network with fresh weights of the global generator.

    Args:
        spec: `gin`, `gcn` or `graphsage`; `,layers=5`, `,width=32`, `,pooling=sum` change it.
        features: Numbers per node of the data; 1 by default. `,features=7` may say so too, and must then agree.
        head: Behind the readout; its input is `width` of the result.

    Raises:
        ConfigError: An option that it does not take, or features that do not fit the data.
    """
    parsed = parse_spec(spec) if isinstance(spec, str) else spec
    parsed.check_no_argument()
    parsed.check_options(GRAPH_OPTIONS)
    options: dict[str, Any] = dict(parsed.options)
    own = options.pop("features", features)
    if features is not None and own != features:
        raise ConfigError(f"{parsed.text!r} takes features={own}; the data have {features} per node")
    return GraphEncoder(parsed.kind, 1 if own is None else own, head=head, **options)


def _convolution(kind: str, comes_in: int, width: int) -> nn.Module:
    parts = import_graph_extra().nn
    if kind == "gin":
        inner = nn.Sequential(nn.Linear(comes_in, width), nn.ReLU(), nn.Linear(width, width))
        return parts.GINConv(inner)  # type: ignore[no-any-return]
    return {"gcn": parts.GCNConv, "graphsage": parts.SAGEConv}[kind](comes_in, width)  # type: ignore[no-any-return]
