"""What each objective does with a batch: which views it makes, which networks it runs, which loss it takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerlens.augment.spatial import Mix, cutmix, cutout, mixup, random_erasing
from layerlens.augment.views import Views
from layerlens.training.config import RunConfig
from layerlens.training.objectives.moco import KeyQueue, info_nce, momentum_update
from layerlens.training.objectives.simclr import nt_xent
from layerlens.training.objectives.supcon import sup_con

_MASKS: dict[str, Callable[..., Tensor]] = {"erasing": random_erasing, "cutout": cutout}
_MIXES: dict[str, Callable[..., tuple[Tensor, Mix]]] = {"mixup": mixup, "cutmix": cutmix}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step sees of the data.

    Attributes:
        images: Shape (n, c, h, w), float in [0, 1], on the device.
        labels: Class indices, shape (n,), -1 where the label is not to be seen; None without labels.
        draws: Generator of everything random about the views, on the device.
    """

    images: Tensor
    labels: Tensor | None
    draws: torch.Generator


class Method:
    """One objective: `loss` of a batch, `after_step`, and a state for exact resume.

    Args:
        config: The run's.
        network: The bare network that learns.
        run: Runs it: images in [0, 1], or tokens -> outputs.
        views: Random views of images.
        normalize: What the network sees of images in [0, 1].
        autocast: Opens the precision of the run, for passes outside `run`.
    """

    needs_labels = False

    def __init__(
        self,
        config: RunConfig,
        network: nn.Module,
        run: Callable[[Any], Tensor],
        views: Views,
        normalize: Callable[[Tensor], Tensor],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.config, self.network, self.run, self.views = config, network, run, views
        self.normalize, self.autocast = normalize, autocast
        self.temperature, self.input_augment = config.temperature or 0.5, config.input_augment

    def loss(self, batch: Any, latent_mix: Callable[[], Mix | None] = lambda: None) -> Tensor:
        """Scalar, mean over the batch, in nats times the configuration's scale.

        Args:
            batch: What the step sees.
            latent_mix: Asked after the forward pass: how a layer mixed the samples, if it did.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """The optimizer has moved the network."""

    def modules(self) -> Iterator[nn.Module]:
        """Networks and queues beside the one that learns, whose state belongs to the run."""
        return iter(())

    @contextmanager
    def seeing(self, views: Views) -> Iterator[None]:
        """Only these views inside the block, neither masked nor mixed."""
        usual = self.views, self.input_augment
        self.views, self.input_augment = views, "none"
        try:
            yield
        finally:
            self.views, self.input_augment = usual

    def _two_views(self, batch: Batch) -> Tensor:
        """(2n, c, h, w): rows i and i + n are views of image i, masked where the configuration says so."""
        return self._masked(self.views(torch.cat([batch.images, batch.images]), batch.draws), batch.draws)

    def _masked(self, images: Tensor, draws: torch.Generator) -> Tensor:
        mask = _MASKS.get(self.input_augment)
        return images if mask is None else mask(images, generator=draws)

    def _mixed(self, images: Tensor, draws: torch.Generator) -> tuple[Tensor, Mix | None]:
        mix = _MIXES.get(self.input_augment)
        return (images, None) if mix is None else mix(images, generator=draws)


class SimCLR(Method):
    """Two views of an image attract, all others in the batch repel."""

    def loss(self, batch: Batch, latent_mix: Callable[[], Mix | None] = lambda: None) -> Tensor:
        """NT-Xent, see `nt_xent`."""
        z = self.run(self._two_views(batch))
        return nt_xent(z, temperature=self.temperature, scale=self.config.loss_scale)


class SupCon(Method):
    """All views of a class attract."""

    needs_labels = True

    def loss(self, batch: Batch, latent_mix: Callable[[], Mix | None] = lambda: None) -> Tensor:
        """L_out, see `sup_con`."""
        assert batch.labels is not None
        z = self.run(self._two_views(batch))
        return sup_con(z, batch.labels, temperature=self.temperature, scale=self.config.loss_scale)


class Supervised(Method):
    """Cross-entropy of one view."""

    needs_labels = True

    def loss(self, batch: Batch, latent_mix: Callable[[], Mix | None] = lambda: None) -> Tensor:
        """Cross-entropy, mixed as the samples are."""
        assert batch.labels is not None
        images = self._masked(self.views(batch.images, batch.draws), batch.draws)
        images, mix = self._mixed(images, batch.draws)
        logits = self.run(images).float()
        mix = mix or latent_mix()
        each = F.cross_entropy(logits, batch.labels, reduction="none")
        if mix is not None:
            partner = F.cross_entropy(logits, batch.labels[mix.partner], reduction="none")
            each = mix.weight * each + (1 - mix.weight) * partner
        return self.config.loss_scale * each.mean()


class MoCo(Method):
    """Queries attract their key, which a slowly following network made, and repel the keys of a queue.

    Labelled and unlabelled images have queues of their own; a query meets the queue of its kind, without the keys of
    its class.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        assert self.config.moco is not None
        assert self.config.moco.queue is not None
        self.settings, size = self.config.moco, self.config.moco.queue
        self.labelled = self.config.labelled_per_part
        self.keys = copy.deepcopy(self.network).requires_grad_(False)
        device = next(self.keys.parameters()).device
        seeded = torch.Generator().manual_seed(self.config.seed)
        rounds = size // (self.config.part * self.config.devices)  # passes that fill the queues
        counts = {"labelled": self.labelled, "unlabelled": self.config.part - self.labelled}
        keys = {name: count * self.config.devices for name, count in counts.items() if count}
        self.queues = nn.ModuleDict(
            {
                name: KeyQueue(rounds * count, self.config.projection, batch=count, generator=seeded)
                for name, count in keys.items()
            }
        ).to(device)

    def modules(self) -> Iterator[nn.Module]:
        """The key network and the queues."""
        yield self.keys
        yield self.queues

    def loss(self, batch: Batch, latent_mix: Callable[[], Mix | None] = lambda: None) -> Tensor:
        """InfoNCE over the kinds of images, weighted by their number; then the keys join their queues."""
        first, second = self._two_views(batch).chunk(2)
        count, total = self.labelled, torch.zeros((), device=first.device)
        parts = {"labelled": slice(0, count), "unlabelled": slice(count, None)}
        mixed, mixes = [], {}
        for name in self.queues:
            images, mixes[name] = self._mixed(first[parts[name]], batch.draws)
            mixed.append(images)
        q, k = self._queries(torch.cat(mixed)), self._keys(second, batch.draws)
        for name, queue in self.queues.items():
            rows = parts[name]
            labels = batch.labels[rows] if batch.labels is not None and name == "labelled" else None
            excluded = queue.same_class(labels) if labels is not None else None  # type: ignore[operator]
            negatives: Any = queue.keys
            loss = info_nce(
                q[rows], k[rows], negatives, temperature=self.temperature, excluded=excluded, mix=mixes[name]
            )
            total = total + loss * (len(q[rows]) / len(q))
            queue.enqueue(k[rows], labels)  # type: ignore[operator]
        return self.config.loss_scale * total

    def after_step(self) -> None:
        """The key network follows."""
        momentum_update(self.keys, self.network, self.settings.key_momentum)

    def _queries(self, images: Tensor) -> Tensor:
        """In groups that each hold labelled and unlabelled images alike."""
        groups = [self.run(images[k :: self.settings.bn_splits]) for k in range(self.settings.bn_splits)]
        return torch.stack(groups, dim=1).flatten(0, 1)

    @torch.no_grad()
    def _keys(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """Keys, made in shuffled groups, so that batch statistics do not tell which key belongs to which query."""
        if self.settings.bn_splits == 1:
            outputs = self._key_pass(images)
        else:
            order = torch.randperm(len(images), generator=draws, device=draws.device).to(images.device)
            groups = [self._key_pass(group) for group in images[order].chunk(self.settings.bn_splits)]
            outputs = torch.cat(groups)[order.argsort()]
        return outputs

    def _key_pass(self, images: Tensor) -> Tensor:
        with self.autocast():
            return self.keys(self.normalize(images))  # type: ignore[no-any-return]
