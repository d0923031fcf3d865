"""Deep Augmentation: transform a random part of the batch at one hidden layer, as a hook on any module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerlens.augment.transforms import dropout, remove_principal_components
from layerlens.errors import ConfigError, ShapeError, UnknownLayerError, check_known, closest
from layerlens.layers import INPUT, call_names, main_tensor, replace_main_tensor

Transform = Callable[[Tensor], Tensor]
TRANSFORMS = ("dropout", "pca")


class DeepAugmentation:
    """h_i <- sg(A(h_i)) for a random `fraction` of the samples, in training mode only.

    The model's code stays as it is: the operator hangs on a layer as a hook, in any training loop, and leaves
    with the block.

    Args:
        layer: Layer name, or several; `name#k` for the k-th call of a module that runs often in a pass; `input` for
            what the model is fed.
        transform: `dropout`, `pca`, or a function from activations (n, …) to the same shape.
        rate: Dropout rate in [0, 1].
        fraction: Probability in [0, 1] that a sample is transformed, independent per sample; 0.5 in the paper.
        stop_gradient: Let no gradient pass through the transformed samples (the others keep theirs).
        components: Principal components that `pca` removes, see `remove_principal_components`.
        generator: Source of all draws; the global generator by default.

    Raises:
        ConfigError: A rate or fraction outside [0, 1].
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
        generator: torch.Generator | None = None,
    ) -> None:
        for name, value in (("rate", rate), ("fraction", fraction)):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}={value}; allowed: 0 to 1")
        if isinstance(transform, str):
            check_known("transform", transform, TRANSFORMS)
        self.layers = [layer] if isinstance(layer, str) else list(layer)
        self.transform, self.rate, self.fraction = transform, rate, fraction
        self.stop_gradient, self.components, self.generator = stop_gradient, components, generator
        self._handles: list[Any] = []

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[DeepAugmentation]:
        """Attach for the length of a block, and detach whatever happens in it."""
        self.attach(model)
        try:
            yield self
        finally:
            self.detach()

    def attach(self, model: nn.Module) -> None:
        """Hang on the model until `detach`.

        Raises:
            UnknownLayerError: A layer that the model does not have; nothing stays attached.
            ConfigError: Already attached.
        """
        if self._handles:
            raise ConfigError("this DeepAugmentation is attached already; call detach() first")
        modules = {INPUT: model, **dict(call_names(model))}
        for layer in self.layers:
            name, _, call = layer.partition("#")
            if name not in modules:
                self.detach()
                raise UnknownLayerError(f"no layer {layer!r} in {type(model).__name__}; {closest(name, modules)}")
            hook = _LayerHook(self, layer, int(call) if call else None)
            self._handles.append(model.register_forward_pre_hook(hook.restart))
            if name == INPUT:
                self._handles.append(model.register_forward_pre_hook(hook.on_input, with_kwargs=True))
                continue
            self._handles.append(modules[name].register_forward_hook(hook.on_output))
            self._handles.append(model.register_forward_hook(hook.finish))

    def detach(self) -> None:
        """Remove every hook."""
        while self._handles:
            self._handles.pop().remove()

    def augment(self, h: Tensor) -> Tensor:
        """Apply the operator to one batch of activations, shape (n, …)."""
        if self.fraction == 0:
            return h
        place = h.device if self.generator is None else self.generator.device
        draw = torch.rand(h.shape[0], device=place, generator=self.generator).to(h.device)
        mask = (draw <= self.fraction).view(-1, *[1] * (h.ndim - 1))
        changed = self._transformed(h)
        return torch.where(mask, changed, h)

    def _transformed(self, h: Tensor) -> Tensor:
        source = h.detach() if self.stop_gradient else h
        if callable(self.transform):
            changed = self.transform(source)
            if changed.shape != h.shape:
                raise ShapeError(
                    f"the transform made {tuple(changed.shape)} of {tuple(h.shape)}; it must keep the shape"
                )
            return changed.detach() if self.stop_gradient else changed
        if self.transform == "pca":
            return remove_principal_components(source, self.components)
        return dropout(source, self.rate, generator=self.generator)

    def __deepcopy__(self, _memo: object) -> DeepAugmentation:
        """A copy of the model shares the operator: what it draws comes from one generator."""
        return self


class _LayerHook:
    """One layer's hooks; counts the calls of its module within a pass of the whole model."""

    def __init__(self, operator: DeepAugmentation, layer: str, wanted: int | None) -> None:
        self.operator, self.layer, self.wanted, self.count = operator, layer, wanted, 0
        self.ran = False

    def restart(self, _module: nn.Module, _args: Any) -> None:
        self.count = 0

    def on_input(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not module.training:
            return None
        if main_tensor(args) is not None:
            return self._changed(args), kwargs
        return args, self._changed(kwargs)

    def on_output(self, module: nn.Module, _args: Any, output: Any) -> Any:
        self.count += 1
        if not module.training or self.wanted not in (None, self.count):
            return None
        if self.wanted is None and self.count > 1:
            raise UnknownLayerError(
                f"{self.layer!r} runs several times in a pass; name one call: '{self.layer}#1', '{self.layer}#2', …"
            )
        return self._changed(output)

    def finish(self, module: nn.Module, _args: Any, _output: Any) -> None:
        """The first training pass must reach the layer; later ones may leave it out (stochastic depth)."""
        if module.training and not self.ran:
            if self.count < (self.wanted or 1):
                name = self.layer.partition("#")[0]
                raise UnknownLayerError(f"{self.layer!r} never ran: {name!r} runs {self.count} times in a pass")
            self.ran = True

    def _changed(self, output: Any) -> Any:
        found = main_tensor(output)
        return output if found is None else replace_main_tensor(output, self.operator.augment(found))
