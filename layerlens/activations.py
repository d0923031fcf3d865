"""capture(): hooks that hand each layer's output to a consumer, then leave no trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from layerlens.devices import device_of
from layerlens.errors import DataError, ShapeError, UnknownLayerError
from layerlens.layers import INPUT, Batch, Forward, Layer, call_names, discover, main_tensor, run_batch, select
from layerlens.models import head_name
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


def sweep(
    model: nn.Module,
    loader: Iterable[Batch],
    layers: str | Sequence[str],
    begin: Callable[[list[Layer]], Consumer],
    *,
    forward: Forward | None = None,
) -> None:
    """Run a model over batches in eval mode and hand every chosen layer to a consumer; the model is left as it was.

    A batch with an `attention_mask` has its token layers, shape (n, t, d), averaged over the tokens that the mask
    keeps, so that padding never counts.

    Args:
        model: Any module, on any device; batches are moved to it.
        loader: Batches as `run_batch` takes them, read exactly once.
        layers: A selection, see `layers.select`.
        begin: Makes the consumer once the layers are known.
        forward: How to run one batch; `run_batch` by default.

    Raises:
        DataError: The loader is empty.
        ShapeError: A layer whose first dimension is not the samples.
        UnknownLayerError: A chosen layer that does not run, or runs more often in a later batch.
    """
    run = forward or run_batch
    device = device_of(model)
    consumer: Consumer | None = None
    chosen: list[Layer] = []
    arrange: Callable[[Batch], Batch] = _as_it_is
    with untouched(model), torch.no_grad():
        model.eval()
        for number, raw in enumerate(loader):
            batch = to_device(raw, device)
            if consumer is None:
                found, arrange = _first_look(model, batch, forward)
                chosen = select(model, found, layers)
                consumer = begin(chosen)
            batch = arrange(batch)
            hand = _Hand(consumer, chosen, batch, number)
            with capture(model, [layer.name for layer in chosen], hand):
                run(model, batch)
            hand.finish()
    if consumer is None:
        raise DataError("the loader yielded no batch")


class _Hand:
    """Checks one batch's outputs on their way to the consumer."""

    def __init__(self, consumer: Consumer, layers: list[Layer], batch: Batch, number: int) -> None:
        self.consumer, self.layers, self.number = consumer, layers, number
        first = main_tensor(batch)
        if first is None or not first.ndim:
            raise ShapeError(f"batch {number} holds no tensor of samples")
        self.samples, self.seen = first.shape[0], Counter[int]()
        self.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None

    def __call__(self, position: int, output: Tensor) -> None:
        self.seen[position] += 1
        name = self.layers[position].name
        if not output.ndim or output.shape[0] != self.samples:
            raise ShapeError(
                f"layer {name!r} returned shape {tuple(output.shape)} for a batch of {self.samples}; "
                "its first dimension must be the samples"
            )
        if self.mask is not None and output.ndim == 3 and output.shape[:2] == self.mask.shape:
            output = masked_mean(output, self.mask)
        self.consumer.take(position, output)

    def finish(self) -> None:
        for position, layer in enumerate(self.layers):
            if self.seen[position] != 1:
                raise UnknownLayerError(
                    f"layer {layer.name!r} ran {self.seen[position]} times in batch {self.number} but once in the "
                    "first; choose layers that run in every pass"
                )
        self.consumer.end_batch()


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that a mask keeps.

    Args:
        tokens: Shape (n, t, d).
        mask: Shape (n, t); 1 for a token, 0 for padding.

    Returns:
        Shape (n, d); what stands at a padded place has no influence, NaN included.
    """
    keep = mask.bool().unsqueeze(-1)
    return torch.where(keep, tokens.float(), 0.0).sum(1) / keep.sum(1).clamp_min(1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch with all its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
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
        Shape (n, d), float32, in the loader's order. Feature maps (n, c, h, w) are averaged over positions.

    Raises:
        UnknownLayerError: No such layer.
    """
    rows: list[Tensor] = []

    def keep(_position: int, activation: Tensor) -> None:
        pooled = activation.mean((2, 3)) if activation.ndim == 4 else activation.flatten(1)
        rows.append(pooled.detach().float().cpu().clone())

    device = device_of(model)
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(torch.no_grad())
        model.eval()
        for number, raw in enumerate(loader):
            batch = to_device(raw, device)
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
    example = few if isinstance(few, Mapping) else main_tensor(few)
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
