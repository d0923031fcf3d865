"""What the objective for graphs does with a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerlens.augment.graph_views import GraphViews
from layerlens.augment.spatial import Mix
from layerlens.graph_batches import join_graphs
from layerlens.training.methods import Method
from layerlens.training.objectives.graphcl import graph_cl


@dataclass(frozen=True, kw_only=True)
class GraphBatch:
    """What a step sees of graphs.

    Attributes:
        graphs: `x`, `edge_index` and `batch`, on the device.
        draws: Generator of the views, on the device.
    """

    graphs: Mapping[str, Tensor]
    draws: torch.Generator


class GraphCL(Method):
    """Two views of a graph attract, in one pass of the network over both."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        assert self.config.graph is not None
        self.graph_views = GraphViews(**self.config.graph.model_dump())

    def loss(self, batch: Any, latent_mix: Callable[[], Mix | None] = lambda: None) -> Tensor:
        """See `graph_cl`."""
        views = [self.graph_views(batch.graphs, batch.draws) for _ in range(2)]
        return graph_cl(self.run(join_graphs(*views)), temperature=self.temperature, scale=self.config.loss_scale)
