"""Which images a step sees: the split, the subset, and an order for each epoch, as functions of the seed."""

from __future__ import annotations

import hashlib
from typing import NoReturn

import torch
from torch import Tensor

from layerlens.data import AnyDataset
from layerlens.errors import ConfigError
from layerlens.training.config import RunConfig


class Order:
    """The rows of the training split that a run trains on, and in which order.

    Attributes:
        held_out: Rows for the online k-NN; never trained on.
        rows: Rows trained on, shape (n,).
        seen: Of each image of the training split whether the objective may see its label, shape (n,), bool.
        batch: Samples of a step: the configuration's, but of graphs, of which there may be few, no more than makes
            all batches of an epoch equally large.
        steps: Optimizer steps per epoch; what does not fill a batch is left out, others each pass over the data.

    Raises:
        ConfigError: More images asked for than there are, or a batch larger than the data.
    """

    def __init__(self, config: RunConfig, dataset: AnyDataset) -> None:
        self.config = config
        total, labelled = len(dataset), dataset.y_train is not None
        held = int(total * config.holdout) if labelled else 0
        order = torch.randperm(total, generator=generator(config.seed, "holdout"))
        self.held_out, self.rows = order[:held], order[held:]
        self._take_subset()
        self.batch = self._even_batch() if config.reads_graphs else config.batch_size
        share = config.labels if config.labels is not None else 1.0
        count = round(len(self.rows) * share) if labelled else 0
        self.seen = torch.zeros(total, dtype=torch.bool)
        self.seen[self.rows[:count]] = True
        self.groups = self._groups(count)
        parts = self.parts
        self.all_steps = self.steps = min(len(rows) // (size * parts) for rows, size in self.groups)
        if not self.steps:
            self._refuse()
        if config.epoch_samples is not None:
            self.steps = self._steps_of(config.epoch_samples)

    def _take_subset(self) -> None:
        wanted = self.config.train_samples
        if wanted is None:
            return
        if wanted > len(self.rows):
            raise ConfigError(
                f"train_samples={wanted} but only {len(self.rows)} training {self.config.samples} beside the "
                f"{len(self.held_out)} held out; ask for fewer, or for a smaller holdout"
            )
        self.rows = self.rows[:wanted]

    @property
    def parts(self) -> int:
        """Forward passes of a step, over all ranks."""
        return self.config.accumulate * self.config.devices

    def _even_batch(self) -> int:
        """Of batches no larger than the configuration's, the largest that part the rows with next to none left."""
        steps = max(-(-len(self.rows) // self.config.batch_size), 1)
        even = len(self.rows) // steps // self.parts * self.parts
        if even // self.parts >= 2:
            return even
        return min(self.config.batch_size, len(self.rows) // self.parts * self.parts)  # so small that some are left out

    def _groups(self, labelled: int) -> list[tuple[Tensor, int]]:
        """Rows of each kind, and how many of them each forward pass holds; kinds keep their places in a batch."""
        part, share = self.batch // self.parts, self.config.labelled_per_part
        if part < 2:
            self._refuse_few(len(self.rows), "training")
        if not 0 < share < part:
            return [(self.rows, part)]
        return [(self.rows[:labelled], share), (self.rows[labelled:], part - share)]

    def _refuse(self) -> None:
        rows, _ = min(self.groups, key=lambda group: len(group[0]) / group[1])
        self._refuse_few(len(rows), "training" if len(self.groups) == 1 else "labelled or unlabelled training")

    def _refuse_few(self, count: int, what: str) -> NoReturn:
        raise ConfigError(
            f"batch_size={self.config.batch_size} but only {count} {what} {self.config.samples}; use a smaller batch"
        )

    def _steps_of(self, samples: int) -> int:
        """Steps of an epoch that is a part of a pass over the data."""
        batch, most = self.batch, self.all_steps * self.batch
        if not batch <= samples <= most:
            raise ConfigError(f"epoch_samples={samples}; allowed: {batch} (a batch) to {most}")
        return samples // batch

    def epoch(self, number: int) -> Tensor:
        """Rows of one epoch, shape (steps, ranks, accumulate, part): the same on every rank."""
        whole, part = divmod(number, self.all_steps // self.steps)  # epochs that share a pass share no sample
        config, parts, drawn = self.config, self.parts, generator(self.config.seed, "order", whole)
        first, last = part * self.steps * parts, (part + 1) * self.steps * parts
        shuffled = [
            rows[torch.randperm(len(rows), generator=drawn)][first * size : last * size].view(self.steps, parts, size)
            for rows, size in self.groups
        ]
        return torch.cat(shuffled, dim=2).view(self.steps, config.devices, config.accumulate, -1)


def seed_of(*parts: object) -> int:
    """A number in [0, 2^63) for one purpose, so that draws need no state."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose."""
    return torch.Generator(device).manual_seed(seed_of(*parts))
