"""From rows of the training split to what a step sees on the device, and what an epoch's end is judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerlens.activations import features
from layerlens.data import AnyDataset, Batches, Dataset, to_unit
from layerlens.errors import ConfigError, DegenerateError
from layerlens.evaluation.knn import knn_accuracy
from layerlens.evaluation.sts import sts_scores
from layerlens.graphs import GraphBatches, GraphDataset
from layerlens.text import StsTask, TextDataset, report
from layerlens.training.config import RunConfig
from layerlens.training.graph_methods import GraphBatch, GraphCL
from layerlens.training.methods import Batch, Method, MoCo, SimCLR, SupCon, Supervised
from layerlens.training.order import Order
from layerlens.training.text_methods import MaskedLM, SimCSE, TokenBatch

METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR, "supcon": SupCon, "moco": MoCo, "supervised": Supervised,
    "simcse": SimCSE, "pairs": SimCSE, "mlm": MaskedLM, "graphcl": GraphCL,
}  # fmt: skip


COUNTED = 100_000  # sentences that are looked at for their length
_OBJECTIVES = {
    "images": "an objective for images such as simclr",
    "sentences": "simcse, pairs or mlm",
    "graphs": "graphcl",
}
_DATA = {
    "images": "digits, npz:PATH, …",
    "sentences": "text:PATH or pairs:PATH",
    "graphs": "tu:NAME@ROOT or graphs-npz:PATH",
}


class _HeldOutFeed:
    """Samples that an online k-NN of the held-out ones is judged by."""

    unscored: ClassVar[dict[str, float | None]] = {"knn": None}
    order: Order

    def unaugmented(self, rows: Tensor) -> Any:
        """Batches of some rows of the training split as they are."""
        raise NotImplementedError

    def _knn(self, network: nn.Module, labels: Tensor | None) -> dict[str, float | None]:
        """k-NN accuracy of the held-out training samples against the others."""
        if labels is None or not len(self.order.held_out):
            return {"knn": None}
        bank, queries = self.order.rows[:4096], self.order.held_out[:1024]
        found = [features(network, self.unaugmented(rows)) for rows in (bank, queries)]
        return {"knn": knn_accuracy(found[0], labels[bank], found[1], labels[queries])}


class ImageFeed(_HeldOutFeed):
    """Images, all of them on the device."""

    def __init__(self, config: RunConfig, dataset: Dataset, order: Order, device: torch.device) -> None:
        self.config, self.dataset, self.order, self.rows_on = config, dataset, order, device
        self.images = dataset.x_train.to(device)
        self.mean = torch.tensor(dataset.mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(dataset.std, device=device).view(-1, 1, 1)
        self.labels: Tensor | None = None
        if dataset.y_train is not None:
            self.labels = torch.where(order.seen, dataset.y_train, -1).to(device)

    def batch(self, rows: Tensor, draws: torch.Generator) -> Batch:
        """The images of some rows."""
        labels = None if self.labels is None else self.labels[rows]
        return Batch(images=to_unit(self.images[rows]), labels=labels, draws=draws)

    def run(self, network: Callable[..., Tensor], images: Tensor) -> Tensor:
        """The network's output for images in [0, 1]."""
        return network(self.normalize(images))

    def normalize(self, images: Tensor) -> Tensor:
        """What the network sees of images in [0, 1]."""
        ready = (images - self.mean) / self.std
        return ready.contiguous(memory_format=torch.channels_last) if self.config.channels_last else ready

    def score(self, network: nn.Module) -> dict[str, float | None]:
        """See `_HeldOutFeed`."""
        return self._knn(network, self.dataset.y_train)

    def unaugmented(self, rows: Tensor) -> Batches:
        """Normalised, without views."""
        return Batches(self.dataset, self.dataset.x_train, None, rows, 512)


class GraphFeed(_HeldOutFeed):
    """Graphs, all of them on the device."""

    def __init__(self, config: RunConfig, dataset: GraphDataset, order: Order, device: torch.device) -> None:
        self.config, self.dataset, self.order, self.rows_on = config, dataset, order, device
        self.graphs = dataset.graphs.to(device)

    def batch(self, rows: Tensor, draws: torch.Generator) -> GraphBatch:
        """Some of the graphs."""
        return GraphBatch(graphs=self.graphs.pick(rows), draws=draws)

    def run(self, network: Callable[..., Tensor], graphs: dict[str, Tensor]) -> Tensor:
        """The network's output for graphs."""
        return network(**graphs)

    def normalize(self, graphs: Any) -> Any:
        """Graphs are what the network sees."""
        return graphs

    def score(self, network: nn.Module) -> dict[str, float | None]:
        """See `_HeldOutFeed`."""
        return self._knn(network, self.dataset.y)

    def unaugmented(self, rows: Tensor) -> GraphBatches:
        """Without views."""
        return GraphBatches(self.dataset.graphs, rows, 512)


class TextFeed:
    """Sentences, read and cut into tokens batch by batch.

    Args:
        config: The run's.
        dataset: The sentences.
        tokenize: Of the run's encoder.
        dev: Scored pairs of sentences to be judged by; may be empty.
        device: Where the tokens go.
    """

    unscored: ClassVar[dict[str, float | None]] = {"knn": None, "dev": None}

    def __init__(
        self,
        config: RunConfig,
        dataset: TextDataset,
        tokenize: Callable[..., dict[str, Tensor]],
        dev: tuple[StsTask, ...],
        device: torch.device,
    ) -> None:
        self.config, self.dataset, self.tokenize, self.dev, self.device = config, dataset, tokenize, dev, device
        self.rows_on = torch.device("cpu")  # they are read there

    def batch(self, rows: Tensor, draws: torch.Generator) -> TokenBatch:
        """The tokens of some rows: twice the same sentences for SimCSE, one column after the other for pairs."""
        read = [self.dataset.row(row) for row in rows.tolist()]
        columns = list(zip(*read, strict=True)) if self.config.objective == "pairs" else [[row[0] for row in read]]
        tokens = self.tokenize([sentence for column in columns for sentence in column])
        if self.config.objective == "simcse":
            tokens, columns = {name: value.repeat(2, 1) for name, value in tokens.items()}, columns * 2
        moved = {name: value.to(self.device, non_blocking=True) for name, value in tokens.items()}
        return TokenBatch(tokens=moved, columns=len(columns), draws=draws)

    def run(self, network: Callable[..., Tensor], tokens: dict[str, Tensor]) -> Tensor:
        """The network's output for tokens."""
        return network(**tokens)

    def normalize(self, tokens: Any) -> Any:
        """Tokens are what the network sees."""
        return tokens

    def score(self, network: nn.Module) -> dict[str, float | None]:
        """Spearman correlation with the scores of the dev pairs, mean over their tasks; None where all are alike."""
        with suppress(DegenerateError):  # a collapse is a finding, and no reason to stop
            return {"dev": sts_scores(network, self.dev)["mean"] if self.dev else None}
        return {"dev": None}


def describe_sentences(dataset: TextDataset, encoder: Any) -> Iterator[str]:
    """What was read and left out, and how many sentences are longer than the encoder reads.

    Args:
        dataset: Beyond 100,000 sentences, so many at even distances are counted.
        encoder: Whose tokens.
    """
    yield report(dataset)
    step = -(-len(dataset) // COUNTED)
    rows = range(0, len(dataset), step)
    if cut := sum(encoder.too_long(column[row] for row in rows) for column in dataset.columns):
        whole = "" if step == 1 else f" ({len(rows):,} of {len(dataset):,} rows counted)"
        yield f"{cut:,} sentences{whole} have more than {encoder.max_length} tokens and are cut there"


def check_data(config: RunConfig, dataset: AnyDataset) -> None:
    """See that the data are of the kind that the objective trains on.

    Raises:
        ConfigError: Images for an objective over sentences or graphs, or any other such pair; pairs that are none.
    """
    kinds = {Dataset: "images", TextDataset: "sentences", GraphDataset: "graphs"}
    there = next(word for kind, word in kinds.items() if isinstance(dataset, kind))
    if there != config.samples:
        ways = [_DATA[config.samples], _OBJECTIVES[there]]
        raise ConfigError(
            f"objective={config.objective!r} trains on {config.samples}; {dataset.name} has {there}. Use "
            + ", or ".join(ways if there == "images" else reversed(ways))
        )
    if config.objective == "pairs" and isinstance(dataset, TextDataset) and len(dataset.columns) < 2:
        raise ConfigError(f"objective='pairs' needs pairs of sentences; {dataset.name} has single ones. Use pairs:PATH")
