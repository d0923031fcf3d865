"""Random views of whole batches of graphs, drawn on the device, without a loop over graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerlens.errors import ConfigError, check_known
from layerlens.graph_batches import EDGES, NODE, OWNER, count_graphs

KINDS = ("node-drop", "edge-perturb", "feature-mask", "subgraph")


@dataclass(frozen=True, kw_only=True)
class GraphViews:
    """A random view of each graph, of one kind that is drawn for it.

    `node-drop` leaves out nodes and their edges. `edge-perturb` leaves out undirected edges and draws as many pairs of
    nodes, of which those that had no edge get one. `feature-mask` sets the features of nodes to 0. `subgraph` keeps a
    connected part that grew from a random node: each next node comes over a random edge at the rim (first-passage
    percolation).

    Attributes:
        kinds: From which each graph's is drawn; empty for the graphs as they are.
        ratio: Share of a graph's nodes (or edges) that is left out, exchanged or masked, rounded down, in [0, 1).
        keep: Share of the nodes that a subgraph keeps, rounded up, in (0, 1].

    Raises:
        UnknownNameError: An unknown kind. ConfigError: A share out of range.

    Source:
        GraphCL, You et al. 2020, arXiv:2010.13902; its code leaves edges out but adds none.

    >>> graphs = {"x": torch.ones(10, 1), "edge_index": torch.empty(2, 0).long(), "batch": torch.zeros(10).long()}
    >>> len(GraphViews(kinds=("node-drop",), ratio=0.2)(graphs, torch.Generator().manual_seed(0))["x"])
    8
    """

    kinds: Sequence[str] = ("node-drop", "subgraph")
    ratio: float = 0.1
    keep: float = 0.2

    def __post_init__(self) -> None:
        for kind in self.kinds:
            check_known("view of graphs", kind, KINDS)
        if not 0 <= self.ratio < 1 or not 0 < self.keep <= 1:
            raise ConfigError(f"ratio={self.ratio}, keep={self.keep}; allowed: 0 to below 1, above 0 to 1")

    def __call__(self, graphs: Mapping[str, Tensor], draws: torch.Generator) -> dict[str, Tensor]:
        """A view of each graph of a batch.

        Args:
            graphs: `x`, `edge_index` and `batch`; the nodes of a graph stand together.
            draws: Source of everything random, on the device of the graphs.

        Returns:
            A batch of as many graphs; each keeps at least one node.
        """
        x, edges, owner = graphs[NODE], graphs[EDGES], graphs[OWNER]
        if not self.kinds:
            return {NODE: x, EDGES: edges, OWNER: owner}
        count = count_graphs(owner)
        kind = torch.randint(len(self.kinds), (count,), generator=draws, device=x.device)
        stays = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for number, name in enumerate(self.kinds):
            mine = kind == number  # graphs of this kind
            if name == "node-drop":
                stays &= ~(mine[owner] & _random_share(owner, count, self.ratio, draws))
            elif name == "subgraph":
                stays &= ~mine[owner] | _connected_part(edges, owner, mine, self.keep, draws)
            elif name == "feature-mask":
                masked = mine[owner] & _random_share(owner, count, self.ratio, draws)
                x = torch.where(masked.unsqueeze(1), 0.0, x)
            else:
                edges = _perturbed(edges, owner, mine, self.ratio, draws)
        place = stays.cumsum(0) - 1
        inside = stays[edges[0]] & stays[edges[1]]
        return {NODE: x[stays], EDGES: place[edges[:, inside]], OWNER: owner[stays]}


def _rank(keys: Tensor, owner: Tensor, count: int) -> Tensor:
    """The place of each entry among those of its graph, by rising key; shape (n,)."""
    order = keys.argsort()
    order = order[owner[order].argsort(stable=True)]
    sizes = torch.bincount(owner, minlength=count)
    first = (sizes.cumsum(0) - sizes)[owner[order]]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device) - first)


def _random_share(owner: Tensor, count: int, share: float, draws: torch.Generator) -> Tensor:
    """A share of the entries of each graph, rounded down; bool, shape (n,)."""
    keys = torch.rand(len(owner), generator=draws, device=owner.device)
    sizes = torch.bincount(owner, minlength=count).double()
    most = (sizes * share + 1e-9).floor().minimum(sizes - 1)  # one is left, however close to 1 the share is
    return _rank(keys, owner, count) < most[owner]


def _connected_part(edges: Tensor, owner: Tensor, mine: Tensor, keep: float, draws: torch.Generator) -> Tensor:
    """Nodes that growth from a random node reaches first, in some of the graphs; bool, shape (nodes,).

    Each edge takes an exponential time. A node's time is that of its fastest path, found by relaxing all edges until
    nothing changes.
    """
    count, device = len(mine), owner.device
    sizes = torch.bincount(owner, minlength=count)
    roots = (sizes.cumsum(0) - sizes) + (torch.rand(count, generator=draws, device=device) * sizes).long()
    time = torch.full((len(owner),), torch.inf, device=device)
    at_root = torch.where(sizes > 0, 0.0, torch.inf)  # a graph without nodes has none
    time.scatter_reduce_(0, roots.minimum(sizes.cumsum(0) - 1).clamp_min(0), at_root, "amin")
    edges = edges[:, mine[owner[edges[0]]]]
    takes = torch.empty(edges.shape[1], device=device).exponential_(generator=draws)
    while True:
        found = time.scatter_reduce(0, edges[1], time[edges[0]] + takes, "amin")
        if torch.equal(found, time):
            break
        time = found
    most = (sizes.double() * keep - 1e-9).ceil().clamp_min(1)
    return (_rank(time, owner, count) < most[owner]) & time.isfinite()


def _perturbed(edges: Tensor, owner: Tensor, mine: Tensor, ratio: float, draws: torch.Generator) -> Tensor:
    """Edges of some of the graphs exchanged for others; both directions go and come together."""
    nodes, count = len(owner), len(mine)
    keys, pair = torch.unique(edges.min(0).values * nodes + edges.max(0).values, return_inverse=True)
    pair_owner = owner[keys // nodes] if len(keys) else keys
    gone = mine[pair_owner] & _random_share(pair_owner, count, ratio, draws)
    sizes = torch.bincount(owner, minlength=count)
    where = pair_owner[gone]
    ends = torch.rand(2, len(where), generator=draws, device=owner.device) * sizes[where]
    ends = (sizes.cumsum(0) - sizes)[where] + ends.long().minimum(sizes[where] - 1)
    low, high = ends.min(0).values, ends.max(0).values
    fresh = torch.unique((low * nodes + high)[low != high])
    fresh = fresh[~torch.isin(fresh, keys)]
    new = torch.stack([fresh // nodes, fresh % nodes])
    return torch.cat([edges[:, ~gone[pair]], new, new.flip(0)], 1)
