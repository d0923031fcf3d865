"""capture(): hooks that hand each layer's output to a consumer, then leave no trace."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from layerlens.devices import device_of
from layerlens.errors import ConfigError, DataError, EmptyLoaderError, ShapeError, UnknownLayerError
from layerlens.graph_batches import (
    count_graphs,
    fed_with,
    first_graphs,
    graph_of_node,
    holds_graphs,
    is_graph_object,
    moved,
)
from layerlens.layers import INPUT, Batch, Forward, Layer, call_names, discover, main_tensor, run_batch, select
from layerlens.models import head_name
from layerlens.reduction import Reduction, masked_mean, pool_nodes
from layerlens.untouched import untouched

OUTPUT = "output"


class Consumer(Protocol):
    """What takes activations in, layer by layer, while the network runs."""

    def take(self, position: int, activation: Tensor) -> None:
        """One layer's output for the current batch, shape (n, …); valid only during this call."""

    def end_batch(self) -> None:
        """All layers of the batch have been handed over."""


@contextmanager
def capture(model: nn.Module, layers: Sequence[str], hand: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While the block runs, call `hand(position, output)` for each named layer as it is computed.

    The tensor is the layer's own output, before any in-place operation behind it: reduce it at once or copy it.
    The hooks are gone afterwards, whatever happened.

    Args:
        model: Any module.
        layers: Layer names, as `discover` gives them.
        hand: Gets the place of the layer in `layers` and its output.

    Raises:
        UnknownLayerError: A name that is no module.
    """
    wanted = {name: position for position, name in enumerate(layers)}
    modules = dict(call_names(model))
    handles = []
    calls: Counter[str] = Counter()

    def start(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.clear()
        source = main_tensor(args) if args else main_tensor(kwargs)
        if INPUT in wanted and source is not None:
            hand(wanted[INPUT], source)

    def note(name: str, output: Any) -> None:
        calls[name] += 1
        position = wanted.get(name, wanted.get(f"{name}#{calls[name]}"))
        if position is None:
            return
        found = main_tensor(output)
        if found is None:
            raise ShapeError(f"layer {name!r} returned a {type(output).__name__} without a tensor")
        hand(position, found)

    try:
        handles.append(model.register_forward_pre_hook(start, with_kwargs=True))
        for name in {n.partition("#")[0] for n in wanted if n != INPUT}:
            if name not in modules:
                raise UnknownLayerError(f"no layer {name!r} in {type(model).__name__}")
            hook = lambda _m, _i, out, name=name: note(name, out)  # noqa: E731
            handles.append(modules[name].register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Look:
    """One model to run and what to take from it.

    Attributes:
        model: Any module, on any device; batches are moved to it.
        layers: A selection, see `layers.select`.
        forward: How to run one batch; `run_batch` by default, and then nothing runs behind the last chosen layer.
        label: What messages put in front of its layers' names; nothing by default.
        view: Makes of each batch what the model sees instead; itself by default.
    """

    model: nn.Module
    layers: str | Sequence[str] = "auto"
    forward: Forward | None = None
    label: str = ""
    view: Callable[[Batch], Batch] | None = None

    def run(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model on what it sees of a batch."""
        return (self.forward or run_batch)(model, batch if self.view is None else self.view(batch))


@dataclass(frozen=True)
class Seen:
    """What a sweep went over.

    Attributes:
        batches: How many.
        sample_id: Digest of the batches' contents, in their order.
    """

    batches: int
    sample_id: str


def sweep(
    model: nn.Module,
    loader: Iterable[Batch],
    layers: str | Sequence[str],
    begin: Callable[[list[Layer]], Consumer],
    *,
    forward: Forward | None = None,
    reduce: Reduction = Reduction(),  # noqa: B008
) -> Seen:
    """Run one model over batches, see `sweep_models`.

    Args:
        model, layers, forward: As for `Look`.
        loader, reduce: As for `sweep_models`.
        begin: Makes the consumer once the layers are known.
    """
    return sweep_models([Look(model, layers, forward)], loader, lambda chosen: begin(chosen[0]), reduce=reduce)


def sweep_models(
    looks: Sequence[Look],
    loader: Iterable[Batch],
    begin: Callable[[list[list[Layer]]], Consumer],
    *,
    reduce: Reduction = Reduction(),  # noqa: B008
    enough: Callable[[], bool] | None = None,
) -> Seen:
    """Run models over the same batches in eval mode and hand every chosen layer to a consumer.

    The models are left as they were. Layers are numbered through: those of the first model, then of the second.

    Args:
        looks: The models.
        loader: Batches as `run_batch` takes them, read at most once.
        begin: Makes the consumer once the layers of each model are known.
        reduce: How outputs become rows. With an `attention_mask` in the batch, padding never counts.
        enough: Asked after each batch whether to stop.

    Raises:
        DataError: The loader is empty.
        ShapeError: A layer whose first dimension is not the samples.
        UnknownLayerError: A chosen layer that does not run, or runs more often in a later batch.
    """
    passes: list[_Pass] = []
    consumer: Consumer | None = None
    checksums: list[Tensor] = []
    with ExitStack() as stack:
        for look in looks:
            stack.enter_context(untouched(look.model))
        stack.enter_context(torch.no_grad())
        for look in looks:
            look.model.eval()
        for number, raw in enumerate(loader):
            if consumer is None:
                for look in looks:
                    passes.append(_Pass(look, raw, sum(len(p.layers) for p in passes)))
                consumer = begin([p.layers for p in passes])
            checksums.append(_checksum(raw))
            hands = [p.run(raw if p is passes[-1] else _copy(raw), number, consumer, reduce) for p in passes]
            if reduce.many:
                _check_positions(hands)
                consumer.counts = hands[0].counts  # type: ignore[attr-defined]
            consumer.end_batch()
            if enough is not None and enough():
                break
    if consumer is None:
        raise EmptyLoaderError("the loader yielded no batch")
    return Seen(len(checksums), _digest(checksums))


class _AllSeen(BaseException):
    """The last chosen layer has been handed over; no error, and not to be caught by a model."""


class _Pass:
    """One model's part in a sweep."""

    def __init__(self, look: Look, raw: Batch, offset: int) -> None:
        self.look, self.offset, self.device = look, offset, device_of(look.model)
        found, self.arrange = _first_look(look.model, to_device(raw, self.device), look.run)
        self.layers = select(look.model, found, look.layers)
        whole = type(look.model).__name__ in ("OptimizedModule", "DataParallel") or not self.layers
        self.stops = look.forward is None and not whole and self.layers[-1].name != found[-1].name

    def run(self, raw: Batch, number: int, consumer: Consumer, reduce: Reduction) -> _Hand:
        batch = self.arrange(to_device(raw, self.device))
        batch = batch if self.look.view is None else self.look.view(batch)
        hand = _Hand(self, consumer, batch, number, reduce)
        with suppress(_AllSeen), capture(self.look.model, [layer.name for layer in self.layers], hand):
            (self.look.forward or run_batch)(self.look.model, batch)
        hand.finish()
        return hand


class _Hand:
    """Checks one batch's outputs on their way to the consumer."""

    def __init__(self, owner: _Pass, consumer: Consumer, batch: Batch, number: int, reduce: Reduction) -> None:
        self.owner, self.consumer, self.number, self.reduce = owner, consumer, number, reduce
        first = main_tensor(batch)
        if first is None or not first.ndim:
            raise ShapeError(f"batch {number} holds no tensor of samples")
        self.graph_of = graph_of_node(batch)
        self.samples = first.shape[0] if self.graph_of is None else count_graphs(self.graph_of)
        self.seen = Counter[int]()
        self.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self.counts: Tensor | None = None
        self.rows: dict[str, int] = {}

    def __call__(self, position: int, output: Tensor) -> None:
        self.seen[position] += 1
        name = self.owner.look.label + self.owner.layers[position].name
        if self.graph_of is None and (not output.ndim or output.shape[0] != self.samples):
            raise ShapeError(
                f"layer {name!r} returned shape {tuple(output.shape)} for a batch of {self.samples}; "
                "its first dimension must be the samples"
            )
        try:
            if self.graph_of is None:
                rows = self.reduce(output, self.mask)
            else:
                rows = self.reduce.of_graphs(output, self.graph_of, self.samples)
        except (ShapeError, ConfigError) as error:
            raise type(error)(f"layer {name!r}: {error}") from error
        if self.reduce.many:
            self.rows[name] = len(rows)
            self.counts = self.counts if len(self.rows) > 1 else self._counts(output)
            _check_positions([self])
        self.consumer.take(self.owner.offset + position, rows)
        if self.owner.stops and len(self.seen) == len(self.owner.layers) and max(self.seen.values()) == 1:
            raise _AllSeen

    def _counts(self, output: Tensor) -> Tensor | None:
        """Rows of each sample."""
        if self.graph_of is None:
            return self.reduce.counts(output, self.mask)
        return torch.bincount(self.graph_of, minlength=self.samples)

    def finish(self) -> None:
        for position, layer in enumerate(self.owner.layers):
            if self.seen[position] != 1:
                raise UnknownLayerError(
                    f"layer {layer.name!r} ran {self.seen[position]} times in batch {self.number} but once in the "
                    "first; choose layers that run in every pass"
                )


def _check_positions(hands: Sequence[_Hand]) -> None:
    """See that all layers have the same positions."""
    rows = [(name, count // max(hand.samples, 1)) for hand in hands for name, count in hand.rows.items()]
    for name, count in rows:
        if count != rows[0][1]:
            raise ShapeError(
                f"layer {name!r} has {count} positions per sample and layer {rows[0][0]!r} {rows[0][1]}: they can't be "
                "compared position by position; average the maps to one grid with reduce='positions,grid=4', or choose "
                "layers of one resolution"
            )


def _copy(batch: Batch) -> Batch:
    """For a model that is not the last: an in-place first layer must not reach the next one's input."""
    if isinstance(batch, Tensor) or is_graph_object(batch):
        return batch.clone()
    if isinstance(batch, Mapping):
        return {key: _copy(value) for key, value in batch.items()}
    return tuple(map(_copy, batch)) if isinstance(batch, tuple | list) else batch


def _checksum(batch: Batch) -> Tensor:
    """One number for the contents that a model is fed and their order, on their device."""
    fed = batch.values() if isinstance(batch, Mapping) else [main_tensor(batch)]
    fed = fed_with(batch).values() if is_graph_object(batch) else fed
    parts = [_weighted_sum(t) * (k + 1) for k, t in enumerate(fed) if isinstance(t, Tensor) and t.ndim]
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)


def _weighted_sum(tensor: Tensor) -> Tensor:
    rows = tensor.reshape(len(tensor), -1)
    rows = (rows.abs() if rows.is_complex() else rows).double()
    weights = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float64).sqrt()
    return (rows @ weights) @ torch.arange(1, len(rows) + 1, device=rows.device, dtype=torch.float64).sqrt()


def _digest(checksums: Sequence[Tensor]) -> str:
    numbers = [f"{float(value):.6e}" for value in torch.stack(list(checksums)).tolist()]
    return hashlib.sha256(" ".join(numbers).encode()).hexdigest()[:16]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch with all its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if is_graph_object(batch):
        return moved(batch, device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(to_device(value, device) for value in batch)
    return batch


def _first_look(
    model: nn.Module, batch: Batch, forward: Forward | None
) -> tuple[list[Layer], Callable[[Batch], Batch]]:
    """The layers, and how to lay images out in memory: channels last where the model takes it, which a CPU likes."""
    few = _first_two(batch)
    if _channels_last(few) is not few:
        try:
            return discover(model, _channels_last(few), forward=forward), _channels_last
        except ShapeError:  # a `view` that needs contiguous maps; an error of another kind comes again below
            pass
    return discover(model, few, forward=forward), _as_it_is


def _channels_last(batch: Batch) -> Batch:
    if isinstance(batch, Tensor):
        images = batch.ndim == 4 and batch.device.type == "cpu" and batch.is_floating_point()
        return batch.contiguous(memory_format=torch.channels_last) if images else batch
    if isinstance(batch, tuple):
        parts = tuple(map(_channels_last, batch))
        return parts if any(a is not b for a, b in zip(parts, batch, strict=True)) else batch
    return batch


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _first_two(batch: Batch) -> Batch:
    """A copy of two samples, enough to see which layers run; an in-place layer then can't reach the batch."""
    if holds_graphs(batch):
        return first_graphs(batch)
    whole = main_tensor(batch)
    count = None if whole is None or not whole.ndim else whole.shape[0]

    def cut(part: Batch) -> Batch:
        if isinstance(part, Tensor):
            return part[:2].clone() if part.ndim and part.shape[0] == count else part
        if isinstance(part, Mapping):
            return {key: cut(value) for key, value in part.items()}
        return tuple(map(cut, part)) if isinstance(part, tuple | list) else part

    return cut(batch)


def features(model: nn.Module, loader: Iterable[Batch], layer: str | None = None) -> Tensor:
    """One layer's features for all samples, on the CPU; the model is left as it was.

    Args:
        model: Any module; runs in eval mode.
        loader: Batches as `run_batch` takes them.
        layer: A layer name, or `output` for what the model returns; None means the embedding, which is what goes
            into the head (see `models.head_name`), or the model's output where it has no head.

    Returns:
        Shape (n, d), float32, in the loader's order. Feature maps (n, c, h, w) are averaged over positions, and
        tokens (n, t, d) over those that the batch's `attention_mask` keeps.

    Raises:
        UnknownLayerError: No such layer.
    """
    rows: list[Tensor] = []
    masks: list[Tensor | None] = []
    owners: list[Tensor | None] = []

    def keep(_position: int, activation: Tensor) -> None:
        mask, owner = masks[-1], owners[-1]
        if owner is not None and len(activation) == len(owner):
            activation = pool_nodes(activation, owner, count_graphs(owner))
        if mask is not None and activation.ndim == 3 and activation.shape[:2] == mask.shape:
            pooled = masked_mean(activation, mask)
        else:
            pooled = activation.mean((2, 3)) if activation.ndim == 4 else activation.flatten(1)
        rows.append(pooled.detach().float().cpu().clone())

    device = device_of(model)
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(torch.no_grad())
        model.eval()
        for number, raw in enumerate(loader):
            batch = to_device(raw, device)
            masks[:] = [batch.get("attention_mask") if isinstance(batch, Mapping) else None]
            owners[:] = [graph_of_node(batch)]
            if number == 0:
                _keep_layer(stack, model, _first_two(batch), layer, keep)
            before = len(rows)
            run_batch(model, batch)
            if len(rows) != before + 1:
                raise UnknownLayerError(f"layer {layer!r} ran {len(rows) - before} times in batch {number}, not once")
    if not rows:
        raise DataError("the loader yielded no batch")
    return torch.cat(rows)


def _keep_layer(
    stack: ExitStack, model: nn.Module, few: Batch, layer: str | None, keep: Callable[[int, Tensor], None]
) -> None:
    if layer not in (None, OUTPUT):
        chosen = select(model, discover(model, few), [layer])
        if len(chosen) != 1:
            names = ", ".join(found.name for found in chosen)
            raise UnknownLayerError(f"{layer!r} means {len(chosen)} layers ({names}); name one")
        stack.enter_context(capture(model, [chosen[0].name], keep))
        return
    example = few if isinstance(few, Mapping) or is_graph_object(few) else main_tensor(few)
    head = head_name(model, example) if layer is None and example is not None else ""
    if head:
        handle = model.get_submodule(head).register_forward_pre_hook(lambda _m, args: keep(0, args[0]))
    else:
        handle = model.register_forward_hook(lambda _m, _i, out: keep(0, _must_be_tensor(out)))
    stack.callback(handle.remove)


def _must_be_tensor(output: Any) -> Tensor:
    found = main_tensor(output)
    if found is None:
        raise ShapeError(f"the model returned a {type(output).__name__} without a tensor")
    return found
