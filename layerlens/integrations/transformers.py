"""Deep Augmentation in a training run of Hugging Face's Trainer; the `text` extra."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from layerlens.augment.deep import DeepAugmentation
from layerlens.errors import ConfigError, ExtraMissingError, UnknownLayerError
from layerlens.layers import Batch, Forward, call_labels, call_names, main_tensor, run_batch
from layerlens.untouched import observed

if find_spec("transformers") is None:
    raise ExtraMissingError(f"{__name__} needs Transformers: pip install 'layerlens-torch[text]'")

from transformers import TrainerCallback
from transformers.training_args import ParallelMode


class DeepAugmentationCallback(TrainerCallback):
    """Deep Augmentation while a Trainer trains: on the model at the beginning, gone at the end.

    Evaluation in between is as without it, since the operator acts in training mode only. Training that goes on from
    a checkpoint attaches it anew. The Trainer tells a callback nothing of an exception or Ctrl-C, after which the
    hooks are still there: let the callback be a context manager too, or leave it out and put `trainer.train()` into
    `with augmentation.attached(model):`, both of which clean up whatever happens.

    Args:
        augmentation: A `DeepAugmentation`; or the layers of one, each a name or the paper's number (0 = embeddings,
            k = output of the k-th block), with the rest of its settings as `settings`.
        settings: Of `DeepAugmentation`: transform, rate, fraction, stop_gradient, components, per_token, pairs,
            generator.

    Attributes:
        augmentation: The operator; it has the layers' names as soon as training begins.

    Raises:
        ConfigError: A `DeepAugmentation` and settings as well, or a setting out of range.
        TypeError: A setting that does not exist.

    Source:
        Brüel Gabrielsson, Wang, Baradad, Solomon 2023, arXiv:2303.14537

        with DeepAugmentationCallback(8, rate=0.5, stop_gradient=True) as callback:
            Trainer(model, arguments, train_dataset=sentences, callbacks=[callback]).train()
    """

    def __init__(self, augmentation: DeepAugmentation | str | int | Sequence[str | int], **settings: Any) -> None:
        if isinstance(augmentation, DeepAugmentation):
            if settings:
                raise ConfigError(f"a DeepAugmentation and {', '.join(settings)} as well; give them to the former")
            self.augmentation, self.layers = augmentation, list[str | int](augmentation.layers)
        else:
            self.layers = [augmentation] if isinstance(augmentation, str | int) else list(augmentation)
            self.augmentation = DeepAugmentation([str(layer) for layer in self.layers], **settings)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Attach to the model.

        Raises:
            UnknownLayerError: A layer that the model does not have.
            ConfigError: Several devices in one process.
        """
        if args.parallel_mode is ParallelMode.NOT_DISTRIBUTED:  # replicas in threads would share the hooks' counts
            raise ConfigError(
                f"{args.n_gpu} devices in one process (DataParallel); start one process for each, "
                "`torchrun --nproc-per-node N SCRIPT`, or show only one"
            )
        self.augmentation.detach()  # what an interrupted training left
        self.augmentation.layers = self._names(given["model"])
        self.augmentation.attach(given["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Leave the model without a hook."""
        self.augmentation.detach()

    def __enter__(self) -> DeepAugmentationCallback:
        return self

    def __exit__(self, *_error: object) -> None:
        self.augmentation.detach()

    def _names(self, model: nn.Module) -> list[str]:
        if not any(isinstance(layer, int) for layer in self.layers):
            return [str(layer) for layer in self.layers]
        found = self._numbered(model)
        return [pick_numbered(model, found, layer) if isinstance(layer, int) else layer for layer in self.layers]

    def _numbered(self, model: nn.Module) -> list[str]:
        return numbered_layers(model)


def layer_number(model: nn.Module, number: int, batch: Batch | None = None) -> str:
    """The name of a layer by the paper's number: 0 = embeddings, k = output of the k-th block.

    Args:
        model: A Transformer; it runs once and is left as it was.
        number: From 0 to the number of blocks.
        batch: A small batch that the model can run; by default the one that a Hugging Face model brings along.

    Raises:
        UnknownLayerError: No such number, or a model without blocks.
        ConfigError: No batch, and the model brings none.
    """
    return pick_numbered(model, numbered_layers(model, batch), number)


def numbered_layers(model: nn.Module, batch: Batch | None = None, *, forward: Forward = run_batch) -> list[str]:
    """The names of a Transformer's embeddings and blocks, in the order in which they run.

    Blocks are the members of the `nn.ModuleList` with the most parameters, each call counted; the embeddings are the
    outermost module that gives what the first block is fed.

    Args:
        model: A Transformer; it runs once and is left as it was.
        batch: A small batch; by default the one that a Hugging Face model brings along.
        forward: How to run it.

    Raises:
        UnknownLayerError: A model without blocks, or whose first block is fed what no module gives.
        ConfigError: No batch, and the model brings none.
    """
    blocks = _blocks(model)
    finished: list[tuple[str, Tensor | None]] = []
    fed: list[tuple[int, Tensor | None]] = []  # how many had finished as a block began, and what it was fed

    def begins(_module: nn.Module, args: Any, kwargs: Any) -> None:
        fed.append((len(finished), main_tensor(args) if args else main_tensor(kwargs)))

    handles = [block.register_forward_pre_hook(begins, with_kwargs=True) for block in blocks.values()]
    try:
        with observed(model, lambda name, _module, output: finished.append((name, main_tensor(output)))):
            forward(model, _own_batch(model) if batch is None else batch)
    finally:
        for handle in handles:
            handle.remove()
    if not fed:
        raise UnknownLayerError(f"no block of {type(model).__name__} ran; choose a layer by name")
    done, source = fed[0]
    givers = [name for name, output in finished[:done] if output is source]
    if not givers:
        raise UnknownLayerError(
            f"no module of {type(model).__name__} gives what its first block is fed; choose a layer by name"
        )
    return [givers[-1], *call_labels([name for name, _ in finished if name in blocks])]


def pick_numbered(model: nn.Module, names: Sequence[str], number: int) -> str:
    """One of the `numbered_layers`.

    Raises:
        UnknownLayerError: No such number.
    """
    if not 0 <= number < len(names):
        raise UnknownLayerError(
            f"no layer {number} in {type(model).__name__}; allowed: 0 (embeddings) to {len(names) - 1} (last block)"
        )
    return names[number]


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    lists = [(name, m) for name, m in call_names(model) if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise UnknownLayerError(f"{type(model).__name__} has no list of blocks to number; choose a layer by name")
    name, largest = max(lists, key=lambda named: sum(p.numel() for p in named[1].parameters()))
    return {f"{name}.{place}": block for place, block in largest.named_children()}


def _own_batch(model: nn.Module) -> Batch:
    brought = getattr(model, "dummy_inputs", None)
    if brought is None:
        raise ConfigError(f"{type(model).__name__} brings no batch to number its layers by; choose a layer by name")
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in brought.items()}
