"""The network of a run: a backbone with the head that its objective needs, built anew or from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerlens.data import Dataset
from layerlens.errors import CheckpointError, ConfigError
from layerlens.models import (
    ProjectionHead,
    Shape,
    build_model,
    default_input_shape,
    replace_head,
    runs_only_layerlens_code,
)
from layerlens.training.checkpoint import load_into, load_state
from layerlens.training.config import RunConfig


def build_network(config: RunConfig, dataset: Dataset) -> nn.Module:
    """The untrained network of a run; its weights depend on the configuration's seed alone."""
    if config.objective == "supervised" and dataset.y_train is None:
        raise ConfigError(f"supervised training needs labels; {dataset.name} has none. Use --objective simclr")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return _assemble(config.model, dataset.input_shape, head_of(config, dataset))


def head_of(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """What stands at the end of a run's network, as it is written into its checkpoints."""
    if config.objective == "supervised":
        return {"kind": "linear", "out": len(dataset.classes)}
    return {"kind": "projection", "out": config.projection}


def load_network(
    checkpoint: str | Path | None,
    *,
    model: str | None = None,
    dataset: Dataset | None = None,
    untrained: bool = False,
    seed: int = 0,
) -> tuple[nn.Module, dict[str, Any]]:
    """The network that a checkpoint holds, with its weights, or an untrained one.

    Args:
        checkpoint: A layerlens checkpoint or anybody's state dict; None for fresh weights.
        model: The model's specification; may be left out for layerlens' own checkpoints, unless that is
            somebody's factory: what a file names is never imported.
        dataset: Gives the image shape, and the number of classes where the checkpoint does not tell.
        untrained: Build the checkpoint's architecture with fresh weights: the twin that is compared with it.
        seed: Of fresh weights.

    Returns:
        The network and the checkpoint's metadata.

    Raises:
        CheckpointError: Damaged, of another architecture, or silent about its model.
    """
    metadata = load_state(checkpoint)[1] if checkpoint is not None else {}
    spec = model or metadata.get("model")
    if not isinstance(spec, str):
        raise CheckpointError(f"{str(checkpoint)!r} does not say which model it holds; name it with --model")
    if model is None and not runs_only_layerlens_code(spec):
        raise CheckpointError(
            f"{str(checkpoint)!r} names the model {spec!r}, and layerlens imports nothing that a file names; "
            f"if you trust it, add --model {spec}"
        )
    shape = _shape(metadata) or (dataset.input_shape if dataset else default_input_shape(spec))
    if dataset is not None and shape != dataset.input_shape:
        raise CheckpointError(
            f"{str(checkpoint)!r} was trained on images {shape}; {dataset.name} has {dataset.input_shape}"
        )
    classes = len(dataset.classes) if dataset is not None and dataset.classes else None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = _assemble(spec, shape, _head(metadata), classes)
    if checkpoint is not None and not untrained:
        load_into(network, checkpoint)
    return network, metadata


def _assemble(spec: str, shape: Shape | None, head: dict[str, Any] | None, classes: int | None = None) -> nn.Module:
    network = build_model(spec, input_shape=shape, classes=classes)
    if head is None:
        return network
    if shape is None:
        raise ConfigError(f"the image shape for {spec!r} is unknown; give --data")
    kinds = {"projection": ProjectionHead, "linear": nn.Linear}
    made = replace_head(network, torch.zeros(2, *shape), lambda width: kinds[head["kind"]](width, head["out"]))
    return made[0]


def _shape(metadata: dict[str, Any]) -> Shape | None:
    shape = metadata.get("input_shape")
    if shape is None:
        return None
    if not isinstance(shape, list) or len(shape) != 3 or not all(isinstance(s, int) and 0 < s < 65536 for s in shape):
        raise CheckpointError(f"the checkpoint's metadata is damaged: input_shape={shape!r}")
    return tuple(shape)


def _head(metadata: dict[str, Any]) -> dict[str, Any] | None:
    head = metadata.get("head")
    if head is None:
        return None
    fits = isinstance(head, dict) and head.get("kind") in ("projection", "linear") and isinstance(head.get("out"), int)
    if not fits or not 0 < head["out"] < 10**7:
        raise CheckpointError(f"the checkpoint's metadata is damaged: head={head!r}")
    return head
