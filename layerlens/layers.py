"""Which layers a network has: discovery in execution order, the block level, selection by name or pattern.

A layer is a module's dotted name. A module that runs several times in one pass has one layer per call, `relu#1`,
`relu#2`. `input` is what the model is fed, index -1.
"""

from __future__ import annotations

import fnmatch
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass, replace
from math import prod
from typing import Any

from torch import Tensor, nn

from layerlens.errors import ConfigError, ShapeError, UnknownLayerError, closest
from layerlens.graph_batches import NODE, fed_with, holds_graphs, is_graph_object, run_graphs, with_node_features
from layerlens.untouched import observed, trial_run

INPUT = "input"
Batch = Any
Forward = Callable[[nn.Module, Batch], Any]
_PASSIVE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a network, as a forward pass runs it.

    Attributes:
        name: Dotted module name; `input` for what comes in; `name#k` for the k-th call of a module that runs often.
        kind: Class name of the module.
        shape: Shape of one sample's output, without the batch dimension.
        index: Place among the default layers, -1 = input; None for a layer outside them.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    index: int | None = None

    @property
    def neurons(self) -> int:
        """Numbers in one sample's output."""
        return prod(self.shape)


def discover(model: nn.Module, batch: Batch, *, forward: Forward | None = None) -> list[Layer]:
    """Every layer that runs, in execution order, beginning with `input`; the default ones carry an index.

    Args:
        model: Any module; it is left as it was.
        batch: One batch that the model can run.
        forward: How to run it; `run_batch` by default.

    Raises:
        ShapeError: The batch holds no tensor.
    """
    calls = _trace(model, batch, forward or run_batch)
    indices = {name: i for i, name in enumerate(default_names(model, calls))}
    source = main_tensor(batch)
    if source is None:
        raise ShapeError(f"a batch must hold a tensor; got {type(batch).__name__}")
    first = Layer(name=INPUT, kind="Input", shape=tuple(source.shape[1:]), index=-1)
    return [first, *(replace(call, index=indices.get(call.name)) for call in calls)]


def select(model: nn.Module, found: Sequence[Layer], layers: str | Sequence[str] = "auto") -> list[Layer]:
    """The layers that a selection means, in execution order.

    Args:
        model: The network that `found` was discovered on.
        found: All its layers.
        layers: `auto` (stem, stages, pool, head), `blocks` (every repeated block), `all`, or names, indices and
            globs, as a sequence or comma-separated.

    Raises:
        UnknownLayerError: A name that matches nothing; it lists the closest ones.
    """
    by_name = {layer.name: layer for layer in found}
    if layers == "auto":
        return [layer for layer in found if layer.index is not None and layer.index >= 0]
    if layers == "blocks":
        return [by_name[name] for name in default_names(model, found[1:], whole_stages=False)]
    if layers == "all":
        return list(found[1:])
    patterns = [p.strip() for p in layers.split(",")] if isinstance(layers, str) else list(layers)
    wanted: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(by_name, pattern) or _numbered(found, pattern)
        if not matches:
            raise UnknownLayerError(_unknown(model, pattern, found))
        wanted.update(matches)
    return [layer for layer in found if layer.name in wanted]


def _numbered(found: Sequence[Layer], pattern: str) -> list[str]:
    """The default layer with that index: the paper's number of a layer, -1 for the input."""
    return [layer.name for layer in found if layer.index is not None and str(layer.index) == pattern]


def default_names(model: nn.Module, calls: Sequence[Layer], *, whole_stages: bool = True) -> list[str]:
    """Names at the block level: the stem's last output, the stages (or blocks), then pool, norm and head.

    The blocks are the container class with two or more instances that holds the most parameters. Blocks that sit
    in several containers form stages (ResNet); blocks in one container stand for themselves (transformers). A
    network without repeated containers is cut behind each weighted layer and what follows it. A model that says so
    itself, as its `layer_names`, is believed.
    """
    names = [call.name for call in calls]
    own = getattr(model, "layer_names", None)
    if isinstance(own, tuple) and whole_stages:
        return [name for name in names if name in own]
    units = _blocks(model, names)
    if whole_stages:
        parents = list(dict.fromkeys(unit.rpartition(".")[0] for unit in units))
        if len(parents) >= 2 and all(parent in names for parent in parents):
            units = parents
    if not units:
        return _weighted_groups(model, names)
    around = _maximal([n for n in names if not any(_related(n, unit) for unit in units)], units)
    first = min(names.index(unit) for unit in units)
    first_inner = min((i for i, n in enumerate(names) if any(_inside(n, u) for u in units)), default=first)
    stem = [n for n in around if names.index(n) < first_inner and not _passive(model, n)][-1:]
    rest = [n for n in around if names.index(n) > first_inner and _notable(model, n)]
    return sorted({*stem, *units, *rest}, key=names.index)


def split_at(
    model: nn.Module, batch: Batch, layer: str, *, forward: Forward | None = None
) -> tuple[list[str], list[str]]:
    """The submodules with parameters or buffers of their own, parted where the output of a layer exists.

    A module belongs to the first part, f^{-1..l}, if it begins to run before the layer is done, the layer's inside
    included; to the second if it begins afterwards. So what a container holds itself (a class token, position
    embeddings) counts where the container's forward begins. What never runs is in neither part. Modules that never
    run as such but lend their parameters, lists of parameters and the output projection of `nn.MultiheadAttention`,
    go with their parent.

    Args:
        model: Any module; it is left as it was.
        batch: One batch that the model can run.
        layer: A layer name; `name#k` for the k-th call of a module that runs often; `input` for an empty first part.
        forward: How to run it; `run_batch` by default.

    Returns:
        Names before or inside the layer, and names after it, both in execution order; "" is the model itself. A name
        stands for what `get_submodule(name)` holds with `recurse=False`. One parameter that two modules share can
        stand on both sides.

    Raises:
        UnknownLayerError: A layer that is not there, never runs, or runs often without `#k`.
        ConfigError: A module that runs on both sides.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    >>> split_at(model, torch.zeros(2, 3), "2")
    (['0', '1'], ['3'])
    """
    begun, done = _timeline(model, batch, forward or run_batch)
    if layer != INPUT and layer not in done:
        there = [Layer(name=name, kind="", shape=()) for name in (INPUT, *done)]
        raise UnknownLayerError(_unknown(model, layer, there))
    cut = 0 if layer == INPUT else done[layer]
    before = list(dict.fromkeys(name for name in begun[:cut] if _holds_state(model, name)))
    after = list(dict.fromkeys(name for name in begun[cut:] if _holds_state(model, name)))
    if both := [name for name in before if name in after]:
        raise ConfigError(
            f"{both[0]!r} runs before and after {layer!r}, so it belongs to neither side; choose a layer in front of "
            "all its calls or behind them"
        )
    return before, after


def run_batch(model: nn.Module, batch: Batch) -> Any:
    """Run a model on what loaders yield: a tensor, a tuple that begins with the input, or a mapping of arguments.

    On torch_geometric's batch by `x, edge_index, batch`, or by the batch itself if its forward names no `edge_index`.
    """
    if is_graph_object(batch):
        return run_graphs(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(batch[0])
    return model(batch)


def main_tensor(output: Any) -> Tensor | None:
    """The tensor that stands for an output: itself, or the first tensor of a tuple, mapping or dataclass.

    For a batch of graphs it is `x`.
    """
    if isinstance(output, Tensor):
        return output
    if holds_graphs(output) and (nodes := fed_with(output).get(NODE)) is not None:
        return nodes
    return next((found for part in _parts(output) if (found := main_tensor(part)) is not None), None)


def replace_main_tensor(output: Any, new: Tensor) -> Any:
    """The same structure with its main tensor replaced; the original is left as it was."""
    if isinstance(output, Tensor):
        return new
    if holds_graphs(output) and NODE in fed_with(output):
        return with_node_features(output, new)
    for position, part in enumerate(_parts(output)):
        if main_tensor(part) is not None:
            return _with_part(output, position, replace_main_tensor(part, new))
    raise ShapeError(f"a {type(output).__name__} without a tensor can't be augmented")


def call_names(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each distinct submodule with its dotted name, without the model itself."""
    return ((name, module) for name, module in model.named_modules() if name)


def module_of(model: nn.Module, layer: str) -> nn.Module:
    """The module behind a layer name."""
    return model.get_submodule(layer.partition("#")[0])


def _trace(model: nn.Module, batch: Batch, forward: Forward) -> list[Layer]:
    seen: list[Layer] = []

    def note(name: str, module: nn.Module, output: Any) -> None:
        out = main_tensor(output)
        if out is not None and out.ndim:
            seen.append(Layer(name=name, kind=type(module).__name__, shape=tuple(out.shape[1:])))

    with observed(model, note), trial_run(main_tensor(batch) if isinstance(batch, tuple | list) else batch):
        forward(model, batch)
    labels = call_labels([call.name for call in seen])
    return [replace(call, name=label) for call, label in zip(seen, labels, strict=True)]


def _timeline(model: nn.Module, batch: Batch, forward: Forward) -> tuple[list[str], dict[str, int]]:
    """Modules in the order in which they begin, and how many have begun as each layer is done."""
    begun = [name for name, _ in _lent(model, "")]
    ended: list[tuple[str, int]] = []
    with ExitStack() as stack:
        stack.enter_context(observed(model, lambda name, _m, _out: ended.append((name, len(begun)))))
        for name, module in call_names(model):
            begins = [lent for lent, _ in _lent(module, name)]
            stack.callback(module.register_forward_pre_hook(lambda _m, _a, b=begins: begun.extend(b)).remove)
        stack.enter_context(trial_run(main_tensor(batch) if isinstance(batch, tuple | list) else batch))
        forward(model, batch)
    return begun, dict(zip(call_labels([name for name, _ in ended]), (count for _, count in ended), strict=True))


def _lent(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """A module and those of its children whose parameters it uses without running them."""
    yield name, module
    for child_name, child in module.named_children():
        if isinstance(child, nn.ParameterList | nn.ParameterDict) or isinstance(module, nn.MultiheadAttention):
            yield from _lent(child, f"{name}.{child_name}" if name else child_name)


def _holds_state(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name)
    return any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))


def call_labels(names: Sequence[str]) -> list[str]:
    """Names of calls: `name`, or `name#k` where a module runs often."""
    total, count = Counter(names), Counter[str]()
    labels = []
    for name in names:
        count[name] += 1
        labels.append(name if total[name] == 1 else f"{name}#{count[name]}")
    return labels


def _blocks(model: nn.Module, names: Sequence[str]) -> list[str]:
    groups: defaultdict[type, list[str]] = defaultdict(list)
    for name in names:
        module = module_of(model, name)
        if any(True for _ in module.children()) and type(module) is not nn.Sequential:
            groups[type(module)].append(name)
    for kind, members in list(groups.items()):
        groups[kind] = [n for n in members if not any(_inside(n, other) for other in members)]
    repeated = [members for members in groups.values() if len(members) >= 2]
    if not repeated:
        repeated = [n for n in [_sequential_blocks(model, names)] if len(n) >= 2]
    return max(repeated, key=lambda members: (_parameters(model, members), len(members)), default=[])


def _sequential_blocks(model: nn.Module, names: Sequence[str]) -> list[str]:
    leaves = [n for n in names if type(module_of(model, n)) is nn.Sequential]
    return [n for n in leaves if not any(_inside(other, n) for other in leaves) and "." in n]


def _weighted_groups(model: nn.Module, names: Sequence[str]) -> list[str]:
    leaves = [n for n in names if not any(_inside(other, n) for other in names)]
    groups: list[str] = []
    for name in leaves:
        weighted = any(p.ndim >= 2 for p in module_of(model, name).parameters())
        if weighted or not groups:
            groups.append(name)
        elif not _passive(model, name):
            groups[-1] = name
    return groups


def _maximal(names: Sequence[str], units: Sequence[str]) -> list[str]:
    outside = [n for n in names if not any(_inside(unit, n) for unit in units)]
    return [n for n in outside if not any(_inside(n, other) for other in outside)]


def _notable(model: nn.Module, name: str) -> bool:
    module = module_of(model, name)
    return any(True for _ in module.parameters()) or "Pool" in type(module).__name__


def _passive(model: nn.Module, name: str) -> bool:
    return isinstance(module_of(model, name), _PASSIVE)


def _parameters(model: nn.Module, names: Sequence[str]) -> int:
    return sum(p.numel() for name in names for p in module_of(model, name).parameters())


def _inside(name: str, outer: str) -> bool:
    return name.startswith(outer.partition("#")[0] + ".")


def _related(name: str, unit: str) -> bool:
    return name == unit or _inside(name, unit) or _inside(unit, name)


def _unknown(model: nn.Module, pattern: str, found: Sequence[Layer]) -> str:
    names = [layer.name for layer in found]
    numbers = [layer.index for layer in found if layer.index is not None]
    if numbers and pattern.removeprefix("-").isdigit():
        return f"no layer number {pattern} in {type(model).__name__}; allowed: {min(numbers)} to {max(numbers)}"
    repeated = [n for n in names if n.partition("#")[0] == pattern]
    if repeated:
        return f"{pattern!r} runs {len(repeated)} times in a pass; name one call: {', '.join(repeated)}"
    if pattern in dict(call_names(model)):
        return f"{pattern!r} never runs in the forward pass; {closest(pattern, names)}"
    return (
        f"no layer {pattern!r} in {type(model).__name__}; {closest(pattern, names)}. `layerlens layers MODEL` lists all"
    )


def _parts(output: Any) -> Sequence[Any]:
    if isinstance(output, Mapping):
        return list(output.values())
    if isinstance(output, tuple | list):
        return output
    if is_dataclass(output) and not isinstance(output, type):
        return [getattr(output, field.name) for field in fields(output)]
    return []


def _with_part(output: Any, position: int, part: Any) -> Any:
    if isinstance(output, Mapping):
        key = list(output)[position]
        changed = {**output, key: part}
        return type(output)(**changed) if is_dataclass(output) else type(output)(changed)  # type: ignore[call-arg]
    if isinstance(output, tuple | list):
        items = [*output[:position], part, *output[position + 1 :]]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    return replace(output, **{fields(output)[position].name: part})
