"""How a layer's output becomes rows: flattened, pooled, or each position by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from layerlens.errors import ConfigError, ShapeError, check_known
from layerlens.specs import parse_spec

KINDS = ("flatten", "pool", "positions")
OF_GRAPHS = ("graphs", "nodes")
GRAPH_POOLS = ("sum", "mean")


@dataclass(frozen=True)
class Reduction:
    """One way of making rows from activations.

    `flatten`: a row per sample, all its numbers. `pool`: a row per sample, the mean over positions. `positions`: a
    row per position of each sample; `positions,grid=4` first averages maps to 4 × 4 cells, so that layers of
    different resolution compare. Outputs (n, t, d) have t positions, (n, c, h, w) have h·w; with `channels=last`
    maps are (n, h, w, c). Tokens that an attention mask leaves out never count: `flatten` then takes the mean over
    the others, for padding can't be flattened away.

    Batches of graphs have two kinds of their own, and no other. `graphs`: a row per graph; layers with a row per node
    are summed over the nodes of each graph, as GIN reads them out, or with `graphs,pool=mean` averaged. `nodes`: a
    row per node, for layers that have these.

    Attributes:
        kind: `flatten`, `pool`, `positions`, `graphs` or `nodes`.
        grid: Cells along each side for `positions`; 0 keeps maps as they are.
        channels: `first` or `last`.
        pool: Of `graphs`: `sum` or `mean`.
    """

    kind: str = "flatten"
    grid: int = 0
    channels: str = "first"
    pool: str = "sum"

    def __post_init__(self) -> None:
        check_known("reduction", self.kind, (*KINDS, *OF_GRAPHS))
        check_known("channels", self.channels, ("first", "last"))
        check_known("pool", self.pool, GRAPH_POOLS)
        if (self.pool != "sum" and self.kind != "graphs") or (self.channels == "last" and self.kind in OF_GRAPHS):
            raise ConfigError(f"pool={self.pool}, channels={self.channels} with {self.kind}; allowed: graphs,pool=mean")
        whole = isinstance(self.grid, int) and not isinstance(self.grid, bool)
        if not whole or self.grid < 0 or (self.grid and self.kind != "positions"):
            raise ConfigError(f"grid={self.grid}; allowed: 1 or more, with positions")

    def __str__(self) -> str:
        grid = f",grid={self.grid}" if self.grid else ""
        pool = f",pool={self.pool}" if self.pool != "sum" else ""
        return self.kind + grid + (",channels=last" if self.channels == "last" else "") + pool

    @property
    def many(self) -> bool:
        """Whether a sample gives many rows: positions of a map, nodes of a graph."""
        return self.kind in ("positions", "nodes")

    def __call__(self, output: Tensor, mask: Tensor | None = None) -> Tensor:
        """Rows of one layer's output.

        Args:
            output: Shape (n, …).
            mask: Shape (n, t), 1 for a token and 0 for padding; used for outputs (n, t, d).

        Returns:
            Shape (n, …) as it was, or (n, d) pooled, or (rows, d).

        Raises:
            ShapeError: Position-wise, an output that has no positions.
        """
        if self.kind in OF_GRAPHS:
            raise ConfigError(f"reduce={self.kind!r} is for batches of graphs; allowed here: {', '.join(KINDS)}")
        masked = mask is not None and output.ndim == 3 and output.shape[:2] == mask.shape
        if masked and self.kind != "positions":
            assert mask is not None
            return masked_mean(output, mask)
        if self.kind == "flatten":
            return output
        spots = self._spots(output)
        if spots is None:
            if self.kind == "pool":
                return output
            raise ShapeError(
                f"an output of shape {tuple(output.shape)} has no positions; leave this layer out, or pool the maps "
                "with reduce='pool'"
            )
        if self.kind == "pool":
            return spots.float().mean(1) if spots.dtype in (torch.float16, torch.bfloat16) else spots.mean(1)
        return spots[mask.bool()] if masked and mask is not None else spots.flatten(0, 1)

    def of_graphs(self, output: Tensor, owner: Tensor, count: int) -> Tensor:
        """Rows of one layer's output on a batch of graphs.

        Args:
            output: Shape (nodes, d) or (graphs, d).
            owner: The graph of each node, shape (nodes,).
            count: Graphs.

        Returns:
            Shape (graphs, d) or (nodes, d), by the kind.

        Raises:
            ConfigError: A kind that is not for graphs.
            ShapeError: Rows that are neither nodes nor graphs; `nodes` of a layer that has graphs.
        """
        if self.kind not in OF_GRAPHS:
            raise ConfigError(
                f"reduce={self.kind!r} on a batch of graphs; allowed: 'graphs' (each layer summed over the nodes of a "
                "graph), 'graphs,pool=mean', or 'nodes'"
            )
        rows = output.shape[0] if output.ndim else 0
        if rows not in (len(owner), count):
            raise ShapeError(
                f"{rows} rows for {len(owner)} nodes of {count} graphs; allowed: layers with a row per node or graph"
            )
        if rows != len(owner):
            if self.kind == "graphs":
                return output
            raise ShapeError("a row per graph, which has no nodes; leave this layer out, or use reduce='graphs'")
        return output if self.kind == "nodes" else pool_nodes(output, owner, count, self.pool)

    def counts(self, output: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Rows that each sample gives, shape (n,); None if one each."""
        if self.kind != "positions":
            return None
        if mask is not None and output.ndim == 3 and output.shape[:2] == mask.shape:
            return mask.bool().sum(1)
        spots = self._spots(output)
        return None if spots is None else torch.full((len(output),), spots.shape[1])

    def _spots(self, output: Tensor) -> Tensor | None:
        """Shape (n, positions, d), or None for an output without positions."""
        if output.ndim < 3:
            return None
        if output.ndim == 3:
            return output
        maps = output.movedim(-1, 1) if self.channels == "last" else output
        if self.grid:
            if maps.ndim != 4 or min(maps.shape[2:]) < self.grid:
                raise ShapeError(f"maps of shape {tuple(maps.shape[1:])} can't be averaged to a {self.grid}-grid")
            maps = adaptive_avg_pool2d(maps, self.grid)
        return maps.flatten(2).transpose(1, 2)


def make_reduction(text: str | Reduction) -> Reduction:
    """A reduction from its specification.

    >>> make_reduction("positions,grid=4")
    Reduction(kind='positions', grid=4, channels='first', pool='sum')
    """
    if isinstance(text, Reduction):
        return text
    spec = parse_spec(text)
    spec.check_options(("grid", "channels", "pool"))
    if spec.argument:
        raise ConfigError(f"{text!r} has an argument; allowed: {', '.join(KINDS)}, with ,grid=N or ,channels=last")
    return Reduction(spec.kind, **spec.options)


def pool_nodes(h: Tensor, owner: Tensor, count: int, pool: str = "sum") -> Tensor:
    """The sum or mean of each graph's nodes.

    Args:
        h: Shape (nodes, …).
        owner: The graph of each node, shape (nodes,).
        count: Graphs.
        pool: `sum` or `mean`.

    Returns:
        Shape (graphs, …); float32 at least.

    >>> pool_nodes(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([0, 0, 1]), 2, "mean").tolist()
    [[1.5], [5.0]]
    """
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    total = h.new_zeros(count, *h.shape[1:]).index_add_(0, owner, h)
    if pool == "sum":
        return total
    sizes = torch.bincount(owner, minlength=count).clamp_min(1)
    return total / sizes.view(-1, *[1] * (h.ndim - 1)).to(h.dtype)


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that a mask keeps.

    Args:
        tokens: Shape (n, t, d).
        mask: Shape (n, t); 1 for a token, 0 for padding.

    Returns:
        Shape (n, d); what stands at a padded place has no influence, NaN included.
    """
    keep = mask.bool().unsqueeze(-1)
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return torch.where(keep, tokens, 0.0).sum(1) / keep.sum(1).clamp_min(1)
