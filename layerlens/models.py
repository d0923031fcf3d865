"""Models by name: networks for CIFAR, an MLP, torchvision's models, or anybody's factory; heads are part of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from layerlens.devices import device_of
from layerlens.errors import ConfigError, DownloadError, ShapeError, UnknownNameError, closest
from layerlens.graph_models import GRAPH_MODELS, build_graph_encoder
from layerlens.layers import run_batch
from layerlens.specs import Spec, call_factory, is_factory, parse_spec
from layerlens.untouched import observed, seed_everything, trial_run, untouched

ENCODERS = ("hf", "hf-config")
Shape = tuple[int, ...]
Example = Tensor | Mapping[str, Any]


class ProjectionHead(nn.Sequential):
    """The two-layer perceptron in front of a contrastive loss: Linear, ReLU, Linear.

    Args:
        width: Features that come in, and hidden units.
        out: Features that go out.

    Shape:
        (n, width) -> (n, out)

    Source:
        Chen et al. 2020, arXiv:2002.05709
    """

    def __init__(self, width: int, out: int = 128) -> None:
        super().__init__(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


class CifarBlock(nn.Module):
    """Two 3×3 convolutions with a parameter-free shortcut (option A: subsample, pad channels with zeros).

    Source:
        He et al. 2015, arXiv:1512.03385, section 4.2
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.stride, self.padding = stride, (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(n, width_in, h, w) -> (n, width, h / stride, w / stride)."""
        h = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.padding:
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return self.relu2(h + x)  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """The ResNet family that He et al. made for CIFAR: 6·blocks + 2 weighted layers, 16-32-64 channels.

    Args:
        blocks: Blocks per stage; 3, 5, 7, 9 for ResNet-20, 32, 44, 56.
        classes: Outputs of the last linear layer.
        channels: Channels of the images.

    Source:
        He et al. 2015, arXiv:1512.03385; parameter names as in akamaster/pytorch_resnet_cifar10.
    """

    def __init__(self, blocks: int, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights of every convolution and of the classifier as He et al. do."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
        first = CifarBlock(width_in, width, stride)
        return nn.Sequential(first, *(CifarBlock(width, width, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> (n, classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Linear-ReLU blocks on flattened images, and a linear output.

    Args:
        inputs: Numbers per image.
        width: Units of each hidden block.
        depth: Hidden blocks.
        classes: Outputs.
    """

    def __init__(self, inputs: int, width: int = 256, depth: int = 4, classes: int = 10) -> None:
        super().__init__()
        widths = [inputs] + [width] * depth
        pairs = pairwise(widths)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairs))
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, …) -> (n, classes)."""
        return self.fc(self.blocks(x.flatten(1)))  # type: ignore[no-any-return]


class ConvNetQuick(nn.Module):
    """Caffe's quick CIFAR-10 network: three 5×5 convolutions, each with a pooling that halves, and two linear layers.

    No nonlinearity stands between the two linear layers, as in Caffe. Weights are drawn as PyTorch draws them.

    Args:
        shape: (channels, height, width) of the images, at least 8×8.
        classes: Outputs of the last linear layer.

    Raises:
        ShapeError: Images below 8×8, of which three poolings leave nothing.

    Source:
        BVLC/caffe, examples/cifar10/cifar10_quick_train_test.prototxt
    """

    def __init__(self, shape: Shape, classes: int = 10) -> None:
        super().__init__()
        channels, height, width = shape
        if min(height, width) < 8:
            raise ShapeError(f"convnet-quick needs images of 8×8 or more; got {height}×{width}")
        self.conv1 = nn.Conv2d(channels, 32, 5, padding=2)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(32, 32, 5, padding=2)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.AvgPool2d(3, 2, ceil_mode=True)
        self.conv3 = nn.Conv2d(32, 64, 5, padding=2)
        self.relu3 = nn.ReLU()
        self.pool3 = nn.AvgPool2d(3, 2, ceil_mode=True)
        self.fc1 = nn.Linear(64 * (height // 8) * (width // 8), 64)
        self.fc2 = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) -> (n, classes)."""
        x = self.relu1(self.pool1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = self.pool3(self.relu3(self.conv3(x)))
        return self.fc2(self.fc1(x.flatten(1)))  # type: ignore[no-any-return]


def build_model(spec: str, *, input_shape: Shape | None = None, classes: int | None = None) -> nn.Module:
    """Build a model with fresh weights from its specification.

    Args:
        spec: `resnet18-cifar`, `resnet50-cifar`, `resnet20-cifar` (32, 44, 56), `convnet-quick`, `mlp`,
            `torchvision:NAME` or `pkg.module:factory`, with options behind: `resnet18-cifar,width=16`; for sentences
            `hf:NAME_OR_PATH` or `hf-config:NAME`, see `build_encoder`; for graphs `gin`, `gcn` or `graphsage`, see
            `build_graph_encoder`.
        input_shape: (channels, height, width) of the images; (3, 32, 32) where the model may choose. Of graphs,
            (features,) of a node.
        classes: Outputs of the classifier, unless the specification says.

    Raises:
        UnknownNameError: No such model; the message lists the closest names.
        ConfigError: An option that the model does not take.
        DownloadError: `weights=…` could not be fetched.
    """
    parsed = parse_spec(spec)
    if parsed.kind in ENCODERS:
        from layerlens.encoders import build_encoder

        return build_encoder(spec)
    if parsed.kind in GRAPH_MODELS:
        return build_graph_encoder(parsed, features=input_shape[0] if input_shape else None)
    options = dict(parsed.options)
    if parsed.kind in FAMILIES:
        build, allowed = FAMILIES[parsed.kind]
        parsed.check_no_argument()
        parsed.check_options(allowed)
        if classes is not None:
            options.setdefault("classes", classes)
        return build(input_shape or (3, 32, 32), options)
    if parsed.kind == "torchvision":
        return _torchvision(parsed, options, classes)
    if is_factory(parsed):
        made = call_factory(parsed, options, [*FAMILIES, "torchvision"])
        if not isinstance(made, nn.Module):
            raise ConfigError(f"{spec!r} must return a torch.nn.Module; it returned {type(made).__name__}")
        return made
    known = [*FAMILIES, *GRAPH_MODELS, "torchvision:NAME", "hf:PATH"]
    raise UnknownNameError(f"unknown model {spec!r}; {closest(parsed.kind, known)}, or pkg.module:factory")


def reads_sentences(spec: str) -> bool:
    """Whether the specification is that of an encoder of sentences.

    >>> reads_sentences("hf:sentence-transformers/all-MiniLM-L6-v2"), reads_sentences("mlp")
    (True, False)
    """
    return parse_spec(spec).kind in ENCODERS


def default_input_shape(spec: str) -> Shape | None:
    """The image shape that a model is usually fed, or None if only its author knows; of graphs, (features,)."""
    kind = parse_spec(spec).kind
    if kind in GRAPH_MODELS:
        return (int(parse_spec(spec).options.get("features", 1)),)
    return (3, 32, 32) if kind in FAMILIES else (3, 224, 224) if kind == "torchvision" else None


def runs_only_layerlens_code(spec: str) -> bool:
    """Whether building the specification imports nothing but layerlens and its libraries (so a file may name it)."""
    kind = parse_spec(spec).kind
    return kind in FAMILIES or kind in GRAPH_MODELS or kind == "torchvision"


def replace_head(model: nn.Module, example: Tensor, head: Callable[[int], nn.Module]) -> tuple[nn.Module, str]:
    """Put a head in the place of the last linear layer, or behind a model that ends in an embedding.

    Args:
        model: Any module that maps a batch to one tensor.
        example: A small batch, shape (n, …), to find out how the model ends.
        head: From the number of features that come in to the new module.

    Returns:
        The model with its head (the same object, unless it had to be wrapped), and the head's layer name.

    Raises:
        ShapeError: The model ends in something that is neither.
    """
    name = head_name(model, example)
    if name:
        old = model.get_submodule(name)
        last = old[0] if isinstance(old, ProjectionHead) else old
        model.set_submodule(name, head(last.in_features))  # type: ignore[arg-type]
        return model, name
    final = _endings(model, example)[1]
    if not isinstance(final, Tensor) or final.ndim != 2:
        what = f"shape {tuple(final.shape)}" if isinstance(final, Tensor) else f"a {type(final).__name__}"
        raise ShapeError(f"the model returns {what}; training needs one tensor, an embedding of shape (n, d)")
    wrapped = nn.Sequential()
    wrapped.add_module("backbone", model)
    wrapped.add_module("head", head(final.shape[1]))
    return wrapped, "head"


def head_name(model: nn.Module, example: Example) -> str:
    """The layer whose output the model returns: its projection head or last linear layer; "" if there is none.

    A model that says so itself, as its `head_layer`, is believed.
    """
    own = getattr(model, "head_layer", None)
    if isinstance(own, str):
        return own
    seen, final = _endings(model, example)
    ends = [name for name, out in seen if out is final]
    for kind in (ProjectionHead, nn.Linear):
        for name in ends:
            if isinstance(model.get_submodule(name), kind):
                return name
    return ""


def reinitialized(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy of the model with fresh weights: the twin that shows what the architecture alone does.

    Every module with a `reset_parameters` is drawn anew by it, children before parents, torchvision's ResNets as their
    constructor does, and models of transformers by their own class; the draw is seeded and leaves the global generators
    as they were. Where another architecture's constructor draws weights of its own, call it for the twin instead.

    Raises:
        ConfigError: A module holds parameters of its own but has no `reset_parameters`. Build the twin by
            calling your own constructor instead.
    """
    twin = copy.deepcopy(model)
    with untouched(twin, keep_buffers=False):
        seed_everything(seed, device_of(twin))
        drawn = [name for name, module in twin.named_modules() if _draw_pretrained(module)]
        for name, module in reversed(list(twin.named_modules())):
            if any(not own or name == own or name.startswith(f"{own}.") for own in drawn):
                continue
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
            elif any(True for _ in module.parameters(recurse=False)):
                raise ConfigError(
                    f"{name or 'the model'} ({type(module).__name__}) has parameters but no reset_parameters(); "
                    "build the untrained twin with your own constructor"
                )
            if type(module).__name__ == "ResNet" and type(module).__module__.startswith("torchvision."):
                _draw_resnet(module)
    return twin


def _endings(model: nn.Module, example: Example) -> tuple[list[tuple[str, Any]], Any]:
    """Every submodule's output by name, in the order in which they finish, and the model's."""
    seen: list[tuple[str, Any]] = []
    with observed(model, lambda name, _m, out: seen.append((name, out))), trial_run(example):
        final = run_batch(model, example)
    return seen, final


def _torchvision_cifar(name: str, block: str, counts: Sequence[int]) -> Callable[[Shape, dict[str, Any]], nn.Module]:
    """A torchvision ResNet of any width with the stem for small images: 3×3, stride 1, no pooling."""

    def build(shape: Shape, options: dict[str, Any]) -> nn.Module:
        from torchvision.models import resnet

        width, classes = _count(name, options, "width", 64), _count(name, options, "classes", 10)
        kind = getattr(resnet, block)
        model = resnet.ResNet(kind, list(counts), num_classes=classes)
        model.inplanes = width
        model.conv1 = nn.Conv2d(_count(name, options, "channels", shape[0]), width, 3, 1, 1, bias=False)
        model.bn1 = nn.BatchNorm2d(width)
        model.maxpool = nn.Identity()
        for stage, count in enumerate(counts):
            made = model._make_layer(kind, width * 2**stage, count, stride=1 if stage == 0 else 2)
            setattr(model, f"layer{stage + 1}", made)
        model.fc = nn.Linear(8 * width * kind.expansion, classes)
        _draw_resnet(model)
        return model

    return build


def _draw_resnet(model: nn.Module) -> None:
    """Convolutions as torchvision's ResNet draws them."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _draw_pretrained(module: nn.Module) -> bool:
    """Whether this is a model of transformers, whose embeddings are not drawn as `reset_parameters` does: now anew."""
    if not hasattr(module, "_init_weights") or not type(module).__module__.startswith("transformers."):
        return False
    fresh = type(module)(copy.deepcopy(module.config))  # type: ignore[call-arg]
    module.load_state_dict(fresh.state_dict(), strict=False)  # it may have been built without its pooler
    return True


def _cifar_resnet(blocks: int) -> Callable[[Shape, dict[str, Any]], nn.Module]:
    name = f"resnet{6 * blocks + 2}-cifar"
    return lambda shape, options: CifarResNet(
        blocks, _count(name, options, "classes", 10), _count(name, options, "channels", shape[0])
    )


def _convnet_quick(shape: Shape, options: dict[str, Any]) -> nn.Module:
    channels = _count("convnet-quick", options, "channels", shape[0])
    return ConvNetQuick((channels, *shape[1:]), _count("convnet-quick", options, "classes", 10))


def _mlp(shape: Shape, options: dict[str, Any]) -> nn.Module:
    inputs = int(torch.Size(shape).numel())
    return MLP(inputs, **{key: _count("mlp", options, key, 1) for key in options})


def _count(model: str, options: dict[str, Any], key: str, default: int) -> int:
    value = options.get(key, default)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{model} with {key}={value!r}; allowed: a whole number from 1")
    return value


def _torchvision(spec: Spec, options: dict[str, Any], classes: int | None) -> nn.Module:
    from torchvision import models

    if spec.argument not in models.list_models():
        raise UnknownNameError(
            f"torchvision has no model {spec.argument!r}; {closest(spec.argument, models.list_models())}"
        )
    if classes is not None and "weights" not in options:
        options.setdefault("num_classes", classes)
    try:
        return models.get_model(spec.argument, **options)  # type: ignore[no-any-return]
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{spec.text!r}: {error}") from error
    except (OSError, RuntimeError) as error:
        raise DownloadError(
            f"could not fetch the weights of {spec.text!r}: {error}; download them where there is a network, "
            "then give the file with --checkpoint"
        ) from error


FAMILIES: dict[str, tuple[Callable[[Shape, dict[str, Any]], nn.Module], tuple[str, ...]]] = {
    "resnet18-cifar": (
        _torchvision_cifar("resnet18-cifar", "BasicBlock", (2, 2, 2, 2)),
        ("width", "classes", "channels"),
    ),
    "resnet50-cifar": (
        _torchvision_cifar("resnet50-cifar", "Bottleneck", (3, 4, 6, 3)),
        ("width", "classes", "channels"),
    ),
    **{f"resnet{6 * n + 2}-cifar": (_cifar_resnet(n), ("classes", "channels")) for n in (3, 5, 7, 9)},
    "convnet-quick": (_convnet_quick, ("classes", "channels")),
    "mlp": (_mlp, ("width", "depth", "classes")),
}
