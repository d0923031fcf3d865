"""The network of a run: a backbone with the head that its objective needs, built anew or from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from layerlens.activations import to_device
from layerlens.data import AnyDataset, Dataset
from layerlens.devices import device_of
from layerlens.encoders import SentenceEncoder, build_encoder, usual_settings
from layerlens.errors import CheckpointError, ConfigError
from layerlens.graph_models import GRAPH_MODELS, GraphEncoder, build_graph_encoder, reads_graphs
from layerlens.graphs import GraphDataset
from layerlens.layers import discover, select, split_at
from layerlens.models import (
    Example,
    ProjectionHead,
    Shape,
    build_model,
    default_input_shape,
    reads_sentences,
    replace_head,
    runs_only_layerlens_code,
)
from layerlens.text import TextDataset
from layerlens.training.checkpoint import load_into, load_state
from layerlens.training.config import SCHEMA, RunConfig, TextConfig, explain

_HEADS: dict[str, Any] = {"projection": ProjectionHead, "linear": nn.Linear}


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run starts.

    Attributes:
        network: With its weights, fresh or from `init`.
        metadata: What is written into the run's checkpoints.
        example: A small batch that the network can run.
    """

    network: nn.Module
    metadata: dict[str, Any]
    example: Example


def build_start(config: RunConfig, dataset: AnyDataset) -> Start:
    """The network of a run as it is before the first step.

    Fresh weights depend on the configuration's seed alone. From `init` everything is taken but a head of another
    kind or width, which stays fresh: so a contrastive checkpoint can be fine-tuned with a classifier.

    Raises:
        ConfigError: Labels that the objective needs are missing.
        CheckpointError: `init` is damaged or of another architecture.
    """
    network, heads = _fresh(config, dataset)
    metadata: dict[str, Any] = {
        "schema": SCHEMA, "model": config.model, "data": config.data, "run": config.identity(),
    }  # fmt: skip
    if isinstance(network, SentenceEncoder):
        metadata["encoder"] = network.description()
        _check_views(config, network)
        if config.init is not None:
            _check_tokens(config.init, network)
    elif isinstance(network, GraphEncoder):
        metadata |= {"features": network.features, "head": head_of(config, dataset)}
    elif isinstance(dataset, Dataset):
        metadata |= {"input_shape": list(dataset.input_shape), "head": head_of(config, dataset)}
    if config.init is not None:
        metadata["fresh_head"] = load_into(network, config.init, fresh=heads)["fresh"]
    return Start(network=network, metadata=metadata, example=example_of(network, dataset))


def build_network(config: RunConfig, dataset: AnyDataset) -> nn.Module:
    """The untrained network of a run; its weights depend on the configuration's seed alone."""
    return _fresh(config, dataset)[0]


def example_of(network: nn.Module, dataset: AnyDataset) -> Example:
    """A batch of two that a network on such data can run, on the CPU."""
    if isinstance(dataset, Dataset):
        return torch.zeros(2, *dataset.input_shape)
    return network.example()  # type: ignore[operator, no-any-return]


def _fresh(config: RunConfig, dataset: AnyDataset) -> tuple[nn.Module, tuple[str, ...]]:
    """The network, and the names of the heads that keep fresh weights where a checkpoint has others."""
    if isinstance(dataset, TextDataset):
        return _fresh_encoder(config), ("head", "mlm_head")
    if isinstance(dataset, GraphDataset):
        return _fresh_graph_encoder(config, dataset), ("head",)
    if reads_graphs(config.model):
        raise ConfigError(f"model={config.model!r} reads graphs; {dataset.name} holds images")
    if reads_sentences(config.model):
        raise ConfigError(f"model={config.model!r} reads sentences; {dataset.name} holds images")
    if config.objective == "supervised" and dataset.y_train is None:
        raise ConfigError(f"supervised training needs labels; {dataset.name} has none. Use --objective simclr")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        network, head = _assemble(config.model, dataset.input_shape, head_of(config, dataset))
    return network, (head,) if head else ()


def _fresh_encoder(config: RunConfig) -> SentenceEncoder:
    text = with_own_settings(config).text
    assert text is not None
    assert text.pooling is not None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        encoder = build_encoder(
            config.model, pooling=text.pooling, max_length=text.max_length, dropout=text.model_dropout,
            head=False if config.objective == "mlm" else True if text.pooling.startswith("cls") else None,
            mlm=config.objective == "mlm" or text.mlm_weight > 0,
        )  # fmt: skip
    return encoder


def _fresh_graph_encoder(config: RunConfig, dataset: GraphDataset) -> GraphEncoder:
    if not reads_graphs(config.model):
        raise ConfigError(
            f"model={config.model!r} reads no graphs, which {config.objective} trains on; allowed: "
            f"{', '.join(GRAPH_MODELS)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return _graph_encoder(config.model, dataset.features, head_of(config, dataset))


def _graph_encoder(spec: str, features: int | None, head: dict[str, Any] | None) -> GraphEncoder:
    """A graph network with the head of a run, or without one."""
    network = build_graph_encoder(spec, features=features)
    if head is not None:
        network.head = _HEADS[head["kind"]](network.width, head["out"])
        network.reset_parameters()
    return network


def with_own_settings(config: RunConfig) -> RunConfig:
    """A run over sentences with pooling and length filled in: the model's own, else SimCSE's."""
    if config.text is None:
        return config
    if not reads_sentences(config.model):
        raise ConfigError(
            f"model={config.model!r} reads no sentences, which {config.objective} trains on; give --model hf:PATH or "
            "hf-config:bert-tiny,tokenizer=FOLDER"
        )
    own, text = usual_settings(config.model), config.text
    filled = {
        "pooling": text.pooling or own["pooling"] or "cls-before-head",
        "max_length": text.max_length or own["max_length"] or 32,
    }  # fmt: skip
    try:
        return config.model_copy(update={"text": TextConfig.model_validate({**text.model_dump(), **filled})})
    except ValidationError as error:
        raise ConfigError(f"{config.model!r}: {explain(error, TextConfig)}; set it in [text]") from error


def _check_views(config: RunConfig, encoder: SentenceEncoder) -> None:
    """See that the two views of a sentence differ.

    Raises:
        ConfigError: Neither the model's dropout nor an augmentation makes a difference.
    """
    if config.objective == "simcse" and not encoder.has_dropout and config.augment is None:
        raise ConfigError(
            f"both views of a sentence are the same: {config.model!r} runs without dropout and there is no [augment]; "
            "set text.model_dropout = 0.1, or augment a layer"
        )


def _check_tokens(init: str, encoder: SentenceEncoder) -> None:
    """See that a checkpoint to start from was trained on the same tokens.

    Raises:
        CheckpointError: It was not.
    """
    other = load_state(init)[1].get("encoder")
    if isinstance(other, dict) and other.get("tokenizer") != encoder.description()["tokenizer"]:
        raise CheckpointError(f"{init!r} was trained with another tokenizer; name its own in --model")


def augmented_layers(config: RunConfig, network: nn.Module, example: Example) -> list[str]:
    """The names that the selection of [augment] means.

    Raises:
        UnknownLayerError: It matches nothing.
    """
    assert config.augment is not None
    return _selected(network, example, "auto" if config.augment.layer == "all" else config.augment.layer)


def _selected(network: nn.Module, example: Example, layers: str) -> list[str]:
    return [layer.name for layer in select(network, discover(network, _there(example, network)), layers)]


def adalase_layers(config: RunConfig, network: nn.Module, example: Example) -> list[str]:
    """The positions of AdaLASE: a selection, or the input and all default layers that its kinds can augment.

    Raises:
        ConfigError: No layer is left.
    """
    assert config.adalase is not None
    found = discover(network, _there(example, network))
    if config.adalase.layers != "auto":
        return [layer.name for layer in select(network, found, config.adalase.layers)]
    default = [layer for layer in found if layer.index is not None]
    inside = [layer for layer in default[:-1] if _can_augment(layer.shape, config.adalase.kinds)]
    if not inside:
        raise ConfigError(
            f"no layer of {config.model!r} has a map for {list(config.adalase.kinds)}; name adalase.layers"
        )
    return [layer.name for layer in inside]


def _can_augment(shape: tuple[int, ...], kinds: Sequence[str]) -> bool:
    """Whether a layer of that shape, (d,), (t, d) or (c, h, w), has what the kinds act on."""
    if {"cutmix", "cutout", "translation"} & set(kinds):
        return len(shape) == 3 and prod(shape[1:]) > 1
    if "position-dropout" in kinds:
        return (len(shape) == 2 and shape[0] > 1) or (len(shape) == 3 and prod(shape[1:]) > 1)
    return True


def frozen_modules(config: RunConfig, network: nn.Module, example: Example) -> list[nn.Module]:
    """The modules, with what they hold themselves, that [freeze] keeps as they are.

    Raises:
        ConfigError: Several target layers, or a target that is itself a batch norm, which could not be augmented.
        UnknownLayerError: The layer does not exist.
    """
    if config.freeze is None:
        return []
    named = config.freeze.layer
    layers = _selected(network, example, named) if named else augmented_layers(config, network, example)
    if len(layers) != 1:
        raise ConfigError(f"[freeze] needs one layer to part the network at; got {layers}. Set freeze.layer")
    before, after = split_at(network, _there(example, network), layers[0])
    names = before if config.freeze.part == "before" else after
    if not names:
        raise ConfigError(f"[freeze] {config.freeze.part} {layers[0]!r} holds nothing; choose another layer or part")
    if layers[0] in names and isinstance(network.get_submodule(layers[0]), nn.modules.batchnorm._BatchNorm):
        raise ConfigError(f"[freeze] at {layers[0]!r}, a batch norm; choose the layer or block behind it")
    return [network.get_submodule(name) for name in names]


def _there(example: Example, network: nn.Module) -> Example:
    return to_device(example, device_of(network))  # type: ignore[no-any-return]


def head_of(config: RunConfig, dataset: AnyDataset) -> dict[str, Any]:
    """What stands at the end of a run's network, as it is written into its checkpoints."""
    if config.objective == "supervised":
        return {"kind": "linear", "out": len(dataset.classes)}
    return {"kind": "projection", "out": config.projection}


def load_network(
    checkpoint: str | Path | None,
    *,
    model: str | None = None,
    dataset: AnyDataset | None = None,
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
    state, metadata = load_state(checkpoint) if checkpoint is not None else ({}, {})
    held = sum(tensor.numel() for tensor in state.values())
    if "encoder" in metadata:
        _check_size(checkpoint, metadata["encoder"], held=held)
    del state  # it is read again where its network is there
    if "encoder" in metadata or (model is not None and reads_sentences(model)):
        return _load_encoder(checkpoint, model, metadata, dataset, untrained, seed)
    if "features" in metadata or (model is not None and reads_graphs(model)):
        return _load_graph_encoder(checkpoint, model, metadata, dataset, untrained, seed, held)
    if isinstance(dataset, GraphDataset):
        raise ConfigError(
            f"{model or checkpoint!r} reads no graphs, which is what {dataset.name} holds; give --model gin, or a "
            "checkpoint of graphcl"
        )
    if isinstance(dataset, TextDataset):
        raise ConfigError(
            f"{model or checkpoint!r} reads no sentences, which is what {dataset.name} holds; give --model hf:PATH, or "
            "a checkpoint of simcse, pairs or mlm"
        )
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
        network, _ = _assemble(spec, shape, _head(metadata), classes)
    if checkpoint is not None and not untrained:
        load_into(network, checkpoint)
    return network, metadata


def _load_encoder(
    checkpoint: str | Path | None, model: str | None, metadata: dict[str, Any], dataset: AnyDataset | None,
    untrained: bool, seed: int,
) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
    if isinstance(dataset, Dataset):
        raise ConfigError(f"{str(checkpoint or model)!r} reads sentences; {dataset.name} holds images. Give text:PATH")
    if "encoder" in metadata and model not in (None, metadata.get("model")):
        raise CheckpointError(
            f"{str(checkpoint)!r} holds its own encoder, made as {metadata.get('model')!r}; leave --model {model} out"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if "encoder" in metadata:
            encoder = SentenceEncoder.from_description(metadata["encoder"])
        else:
            assert model is not None
            encoder = build_encoder(model)
            if untrained:
                encoder = SentenceEncoder.from_description(encoder.description())
    if checkpoint is not None and not untrained:
        load_into(encoder, checkpoint)
    return encoder, metadata


def _load_graph_encoder(
    checkpoint: str | Path | None, model: str | None, metadata: dict[str, Any], dataset: AnyDataset | None,
    untrained: bool, seed: int, held: int,
) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
    if dataset is not None and not isinstance(dataset, GraphDataset):
        raise ConfigError(f"{str(checkpoint or model)!r} reads graphs; {dataset.name} holds none. Give tu:NAME@ROOT")
    features, spec = metadata.get("features"), model or metadata.get("model")
    if features is not None and not (type(features) is int and 0 < features < 10**6):
        raise CheckpointError(f"the checkpoint's metadata is damaged: features={features!r}")
    if not isinstance(spec, str) or not reads_graphs(spec):
        raise CheckpointError(f"{str(checkpoint)!r} holds a graph network, but names the model {spec!r}")
    if dataset is not None and features not in (None, dataset.features):
        raise CheckpointError(
            f"{str(checkpoint)!r} was trained on nodes with {features} features; {dataset.name} has {dataset.features}"
        )
    if features is None and dataset is not None:
        features = dataset.features
    if checkpoint is not None:
        with torch.device("meta"):  # nothing is allocated
            needed = sum(part.numel() for part in _graph_encoder(spec, features, _head(metadata)).parameters())
        if needed > 2 * held:
            raise CheckpointError(
                f"{str(checkpoint)!r} is damaged or of another architecture: it holds {held} numbers, {spec!r} has "
                f"{needed} parameters"
            )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = _graph_encoder(spec, features, _head(metadata))
    if checkpoint is not None and not untrained:
        load_into(network, checkpoint)
    return network, metadata


def _check_size(checkpoint: str | Path | None, description: Any, *, held: int) -> None:
    """Refuse a description of a network far larger than what the file holds, before anything of that size is made."""
    content = description if isinstance(description, dict) else {}
    config = content.get("config") if isinstance(content.get("config"), dict) else {}
    assert isinstance(config, dict)
    numbers = {key: value for key, value in config.items() if type(value) is int}
    names = ("num_hidden_layers", "n_layers", "n_layer"), ("hidden_size", "dim", "n_embd"), ("vocab_size",)
    layers, width, words = (max((numbers.get(key, 1) for key in keys), default=1) for keys in names)
    inner = max((numbers.get(key, 1) for key in ("intermediate_size", "hidden_dim", "n_inner")), default=1)
    positions = numbers.get("max_position_embeddings", 1)
    ends = content.get("head") or [1, 1]
    head = ends[0] * ends[1] if len(ends) == 2 and all(type(end) is int for end in ends) else 0
    if max(layers * width, width * inner, (words + positions) * width, head) > 2 * held:
        raise CheckpointError(f"{str(checkpoint)!r} is damaged: it describes a larger encoder than it holds")


def _assemble(
    spec: str, shape: Shape | None, head: dict[str, Any] | None, classes: int | None = None
) -> tuple[nn.Module, str]:
    """The network, and the name of the head that was put on it ("" for none)."""
    network = build_model(spec, input_shape=shape, classes=classes)
    if head is None:
        return network, ""
    if shape is None:
        raise ConfigError(f"the image shape for {spec!r} is unknown; give --data")
    kind = _HEADS[head["kind"]]
    return replace_head(network, torch.zeros(2, *shape), lambda width: kind(width, head["out"]))


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
