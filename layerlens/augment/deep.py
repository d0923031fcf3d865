"""Deep Augmentation: transform a random part of the batch at one hidden layer, as a hook on any module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from layerlens.augment.transforms import (
    dropout,
    dropout_channels,
    dropout_channels_of_graphs,
    dropout_nodes,
    dropout_positions,
    gaussian_noise,
    real_positions,
    remove_principal_components,
)
from layerlens.errors import ConfigError, ShapeError, UnknownLayerError, check_known, closest
from layerlens.graph_batches import EDGES, NODE, OWNER, checked_owner, count_graphs, graph_of_node, holds_graphs
from layerlens.layers import INPUT, call_names, main_tensor, replace_main_tensor

A = TypeVar("A", bound="Attachable")
Transform = Callable[[Tensor], Tensor]
RANDOM = {
    "dropout": dropout,
    "channel-dropout": dropout_channels,
    "position-dropout": dropout_positions,
    "noise": gaussian_noise,
}
RANDOM_OF_NODES = {"channel-dropout": dropout_channels_of_graphs, "position-dropout": dropout_nodes}
TRANSFORMS = (*RANDOM, "pca")
PAIRS = ("independent", "one")
MASK = "attention_mask"
PACKED = "cu_seq_lens_q"  # transformers' and sentence-transformers' name, for batches without padding


class Attachable:
    """What hangs on a model's layers as hooks and leaves nothing behind."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def attach(self, model: nn.Module) -> None:
        """Hang on the model until `detach`."""
        raise NotImplementedError

    def detach(self) -> None:
        """Remove every hook."""
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def attached(self: A, model: nn.Module) -> Iterator[A]:
        """Attach for the length of a block, and detach whatever happens in it."""
        self.attach(model)
        try:
            yield self
        finally:
            self.detach()

    def _hang(self, model: nn.Module, operators: Iterable[tuple[str, Operator]]) -> None:
        """Hang each operator on its layer; an unknown layer leaves nothing attached."""
        modules = {INPUT: model, **dict(call_names(model))}
        for layer, operator in operators:
            name, _, call = layer.partition("#")
            if name not in modules:
                self.detach()
                raise UnknownLayerError(f"no layer {layer!r} in {type(model).__name__}; {closest(name, modules)}")
            hook = LayerHook(operator, layer, int(call) if call else None)
            self._handles += hook.attach(model, modules[name])


class DeepAugmentation(Attachable):
    """h_i <- sg(A(h_i)) for a random `fraction` of the samples, in training mode only.

    The model's code stays as it is: the operator hangs on a layer as a hook, in any training loop, and leaves
    with the block.

    Padding stays as it is and enters no statistic where the model is called with an `attention_mask` (n, t), or with
    a mapping that holds one, and the layer gives (n, t, d).

    Samples are graphs where the model is called with `batch`, the graph of each node, or with torch_geometric's own
    batch: the nodes of a graph are transformed together or not at all, at layers with a row per node. `pca` is over
    nodes there, `position-dropout` drops nodes, `channel-dropout` a feature of all nodes of a graph.

    Args:
        layer: Layer name, or several; `name#k` for the k-th call of a module that runs often in a pass; `input` for
            what the model is fed.
        transform: `dropout`, `channel-dropout`, `position-dropout`, `noise`, `pca`, or a function from activations
            (n, …) to the same shape (which sees padding too; what it makes of it is dropped).
        rate: Dropout rate in [0, 1]; of `noise`, its deviation over the sample's own.
        fraction: Probability in [0, 1] that a sample is transformed, independent per sample; 0.5 in the paper.
        stop_gradient: Let no gradient pass through the transformed samples (the others keep theirs).
        components: Principal components that `pca` removes, see `remove_principal_components`.
        per_token: Let `pca` treat each position as a sample.
        pairs: `independent`, or `one`: of the 2n rows, i and i + n are views of one image, and exactly one of them,
            chosen by a coin, is transformed, at every layer the same one (the paper's lower-to-higher pairs).
        generator: Source of all draws; the global generator by default.

    Raises:
        ConfigError: A rate or fraction outside [0, 1]; `pairs="one"` with a fraction other than 0.5.
        UnknownNameError: An unknown transform.

    Source:
        Brüel Gabrielsson, Wang, Baradad, Solomon 2023, arXiv:2303.14537

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> with DeepAugmentation("0", rate=0.5).attached(model):
    ...     loss = model(torch.ones(8, 2)).mean()
    """

    def __init__(
        self,
        layer: str | Sequence[str],
        *,
        transform: str | Transform = "dropout",
        rate: float = 0.5,
        fraction: float = 0.5,
        stop_gradient: bool = False,
        components: int = 1,
        per_token: bool = False,
        pairs: str = "independent",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("rate", rate), ("fraction", fraction)):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}={value}; allowed: 0 to 1")
        if isinstance(transform, str):
            check_known("transform", transform, TRANSFORMS)
        check_known("pairs", pairs, PAIRS)
        if pairs == "one" and fraction != 0.5:
            raise ConfigError(
                f"pairs='one' with fraction={fraction}; half of all views are transformed: leave it at 0.5"
            )
        self.layers = [layer] if isinstance(layer, str) else list(layer)
        self.transform, self.rate, self.fraction = transform, rate, fraction
        self.stop_gradient, self.components, self.per_token = stop_gradient, components, per_token
        self.pairs, self.generator = pairs, generator
        self._chosen: Tensor | None = None  # the views of this pass, where all layers share them
        self._resting = False

    def attach(self, model: nn.Module) -> None:
        """Hang on the model until `detach`.

        Raises:
            UnknownLayerError: A layer that the model does not have; nothing stays attached.
            ConfigError: Already attached.
        """
        if self._handles:
            raise ConfigError("this DeepAugmentation is attached already; call detach() first")
        self._hang(model, ((layer, self) for layer in self.layers))

    def augment(self, h: Tensor, mask: Tensor | None = None, owner: Tensor | None = None) -> Tensor:
        """Apply the operator to one batch of activations, shape (n, …).

        Args:
            h: Activations.
            mask: Shape (n, t) of activations (n, t, d): nonzero marks a token, zero padding, which stays as it is.
            owner: The graph of each node, shape (n,), where the rows are nodes: the samples are then the graphs.

        Raises:
            ShapeError: A mask that does not fit, activations without the positions that the transform needs, or
                `pairs="one"` with an odd number of rows.
        """
        if self.fraction == 0 or self._resting:
            return h
        count = h.shape[0] if owner is None else count_graphs(owner)
        chosen = self._views(count, h.device) if self.pairs == "one" else self._draw(count, h.device) <= self.fraction
        chosen = (chosen if owner is None else chosen[owner]).view(-1, *[1] * (h.ndim - 1))
        if (real := real_positions(h, mask)) is not None:
            chosen = chosen & real
        return torch.where(chosen, self._transformed(h, mask, owner), h)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """No augmentation inside the block."""
        before, self._resting = self._resting, True
        try:
            yield
        finally:
            self._resting = before

    def restart(self) -> None:
        """A pass begins."""
        self._chosen = None

    def _draw(self, n: int, device: torch.device) -> Tensor:
        place = device if self.generator is None else self.generator.device
        return torch.rand(n, device=place, generator=self.generator).to(device)

    def _views(self, count: int, device: torch.device) -> Tensor:
        """One view of each pair, the same at every layer of a pass; shape (2n,)."""
        if count % 2:
            raise ShapeError(f"pairs='one' needs 2n rows, i and i + n views of one image; got {count}")
        if self._chosen is None or len(self._chosen) != count:
            first = self._draw(count // 2, device) < 0.5
            self._chosen = torch.cat([first, ~first])
        return self._chosen

    def _transformed(self, h: Tensor, mask: Tensor | None, owner: Tensor | None) -> Tensor:
        source = h.detach() if self.stop_gradient else h
        if callable(self.transform):
            changed = self.transform(source)
            if changed.shape != h.shape:
                raise ShapeError(
                    f"the transform made {tuple(changed.shape)} of {tuple(h.shape)}; it must keep the shape"
                )
            return changed.detach() if self.stop_gradient else changed
        if self.transform == "pca":
            per_token = self.per_token and owner is None  # nodes are the rows already
            return remove_principal_components(source, self.components, per_token=per_token, mask=mask)
        if self.transform == "noise":
            return gaussian_noise(source, self.rate, generator=self.generator, mask=mask, owner=owner)
        if owner is not None and self.transform != "dropout":
            return RANDOM_OF_NODES[self.transform](source, owner, self.rate, generator=self.generator)
        return RANDOM[self.transform](source, self.rate, generator=self.generator)

    def __deepcopy__(self, _memo: object) -> DeepAugmentation:
        """A copy of the model shares the operator: what it draws comes from one generator."""
        return self


class Operator(Protocol):
    """What may hang on a layer."""

    def augment(self, h: Tensor, mask: Tensor | None = None, owner: Tensor | None = None) -> Tensor:
        """One batch of activations, changed.

        A mask (n, t) says where those of shape (n, t, d) hold tokens; an owner (n,), of which graph each row is a node.
        """
        ...

    def restart(self) -> None:
        """A pass of the whole model begins."""
        ...


class LayerHook:
    """One layer's hooks; counts its module's calls, and knows attention mask or graphs, within a pass of the model."""

    def __init__(self, operator: Operator, layer: str, wanted: int | None) -> None:
        self.operator, self.layer, self.wanted, self.count = operator, layer, wanted, 0
        self.ran = self.running = False
        self.mask: Tensor | None = None
        self.owner: Tensor | None = None  # the graph of each node
        self.places: dict[str, int] = {}  # of some names among the positional arguments

    def attach(self, model: nn.Module, module: nn.Module) -> list[Any]:
        """Hang on the layer's module; the handles remove it."""
        self.places = _places_of_arguments(model, (MASK, OWNER, NODE, EDGES))
        begin = model.register_forward_pre_hook(self._restart, prepend=True, with_kwargs=True)  # before any input hook
        if self.layer == INPUT:
            return [begin, model.register_forward_pre_hook(self._on_input, with_kwargs=True)]
        output = module.register_forward_hook(self._on_output)
        return [begin, output, model.register_forward_hook(self._finish)]

    def _restart(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.count, self.running = 0, True
        self.mask = self._mask_of(args, kwargs) if module.training else None
        self.owner = self._owner_of(args, kwargs) if module.training else None
        self.operator.restart()

    def _mask_of(self, args: Any, kwargs: Any) -> Tensor | None:
        """The attention mask (n, t) that the model is called with."""
        named = {**args[0], **kwargs} if args and isinstance(args[0], Mapping) else kwargs
        if PACKED in named:
            raise ConfigError(
                f"sentences came packed into one row ({PACKED!r}), so the samples of {self.layer!r} are not known; "
                "feed padded batches (sentence-transformers: model[0].unpad_inputs = False)"
            )
        mask = self._argument(MASK, args, named)
        return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _owner_of(self, args: Any, kwargs: Any) -> Tensor | None:
        """The graph of each node that the model is called with."""
        for given in (*args, kwargs, *kwargs.values()):
            if holds_graphs(given) and (owner := graph_of_node(given)) is not None:
                return owner
        found = self._argument(OWNER, args, kwargs)
        fits = isinstance(found, Tensor) and found.ndim == 1 and found.dtype == torch.int64
        return checked_owner(found) if fits else None

    def _argument(self, name: str, args: Any, named: Mapping[str, Any]) -> Any:
        """An argument of the model's forward, given by name or by place."""
        place = self.places.get(name, len(args))
        return named[name] if named.get(name) is not None else args[place] if place < len(args) else None

    def _on_input(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not module.training:
            return None
        nodes = self.places.get(NODE, len(args))
        if EDGES in self.places and nodes < len(args):  # edges may stand before the nodes
            return (*args[:nodes], self._changed(module, args[nodes]), *args[nodes + 1 :]), kwargs
        if main_tensor(args) is not None:
            return self._changed(module, args), kwargs
        return args, self._changed(module, kwargs)

    def _on_output(self, module: nn.Module, _args: Any, output: Any) -> Any:
        if not module.training:
            self.count += 1
            return None
        self._refuse_recomputation()
        self.count += 1
        if self.wanted not in (None, self.count):
            return None
        if self.wanted is None and self.count > 1:
            raise UnknownLayerError(
                f"{self.layer!r} runs several times in a pass; name one call: '{self.layer}#1', '{self.layer}#2', …"
            )
        return self._changed(module, output)

    def _refuse_recomputation(self) -> None:
        """Inside a checkpointed block the pass that a call repeats, its draws and its mask, are not known."""
        if not self.running and torch._C._current_graph_task_id() >= 0:
            raise ConfigError(
                f"{self.layer!r} runs again in the backward pass (gradient checkpointing), where its draws can't be "
                "repeated; augment the output of a whole block, or train without gradient checkpointing"
            )

    def _finish(self, module: nn.Module, _args: Any, _output: Any) -> None:
        """The first training pass must reach the layer; later ones may leave it out (stochastic depth)."""
        self.running, self.mask, self.owner = False, None, None
        if module.training and not self.ran:
            if self.count < (self.wanted or 1):
                name = self.layer.partition("#")[0]
                raise UnknownLayerError(f"{self.layer!r} never ran: {name!r} runs {self.count} times in a pass")
            self.ran = True

    def _changed(self, module: nn.Module, output: Any) -> Any:
        found = main_tensor(output)
        if found is None:
            return output
        if found.dtype in (torch.int32, torch.int64):
            raise ConfigError(_not_activations(self.layer, module, found))
        if self.mask is not None and found.ndim == 3 and found.shape[:2] == self.mask.shape:
            return replace_main_tensor(output, self.operator.augment(found, self.mask))
        if self.owner is not None and found.ndim and len(found) == len(self.owner):
            return replace_main_tensor(output, self.operator.augment(found, owner=self.owner))
        if self.owner is not None and found.ndim and len(found) != count_graphs(self.owner):
            raise ShapeError(
                f"{self.layer!r} gives {len(found)} rows for {len(self.owner)} nodes of {count_graphs(self.owner)} "
                "graphs; allowed: a layer with a row per node or per graph"
            )
        return replace_main_tensor(output, self.operator.augment(found))


def _places_of_arguments(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    try:
        known = list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):  # a compiled callable without a signature
        return {}
    return {name: known.index(name) for name in names if name in known}


def _not_activations(layer: str, module: nn.Module, found: Tensor) -> str:
    kind, numbers = type(module).__name__, f"whole numbers {tuple(found.shape)}"
    if layer != INPUT:
        return f"{layer!r} ({kind}) gives {numbers}, no activations; choose a layer inside it"
    inside = next((name for name, _ in call_names(module) if "embedding" in name.rpartition(".")[2].lower()), None)
    choice = f", {inside!r}" if inside else ""
    return f"the input of {kind} are token ids, {numbers}, no activations; choose the embeddings layer{choice}"
