"""Checkpoints: written atomically, read without executing anything that is in them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from layerlens.errors import CheckpointError
from layerlens.files import sha256_of, write_atomically

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def save_checkpoint(path: Path, model: nn.Module, metadata: Mapping[str, Any]) -> None:
    """Write weights as safetensors with JSON metadata, atomically."""
    state = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, save(state, {"layerlens": json.dumps(metadata, sort_keys=True)}))


def load_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and metadata of a checkpoint; nothing in the file is executed.

    Args:
        path: safetensors, or what `torch.save` wrote: a state dict, or a dict that holds one.

    Returns:
        Tensors by name, and layerlens' metadata (empty for other people's files).

    Raises:
        CheckpointError: Missing, truncated, a pickle with code in it, or without tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {str(path)!r}; give a .safetensors or .pt file")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged, or a pickle that holds more than tensors, which layerlens never executes; "
            "save `model.state_dict()` alone"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{str(path)!r} is truncated or no torch checkpoint: {reason}") from error
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{str(path)!r} holds no state dict of tensors; save `model.state_dict()`")
    return {str(k): v for k, v in content.items()}, {}


def load_into(model: nn.Module, path: str | Path, *, fresh: str | Sequence[str] = "") -> dict[str, Any]:
    """Load a checkpoint's weights into a model of the same architecture; return its metadata.

    Args:
        model: Gets the weights.
        path: The checkpoint.
        fresh: Names of parts, such as a head, that keep their own weights where the file's do not fit them. The
            metadata that come back then have `fresh`: whether one did.

    Raises:
        CheckpointError: Another architecture; the first keys that differ are named, and the model is unchanged.
    """
    state, metadata = load_state(path)
    own = model.state_dict()
    state = _without_prefix(state, own)
    parts = [fresh] if isinstance(fresh, str) else fresh
    kept = [part for part in parts if part and _differ(_within(state, part), _within(own, part))]
    for part in kept:
        state = {name: value for name, value in state.items() if name not in _within(state, part)}
        own = {name: value for name, value in own.items() if name not in _within(own, part)}
    if problems := _differ(state, own):
        raise CheckpointError(
            f"{str(path)!r} is of another architecture: {'; '.join(problems[:3])} ({len(problems)} in all)"
        )
    bad = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise CheckpointError(f"{str(path)!r} holds NaN or infinity in {', '.join(bad[:3])}; use an earlier checkpoint")
    model.load_state_dict(state, strict=False)
    return {**metadata, "fresh": bool(kept)} if fresh else metadata


def _within(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith(f"{part}.")}


def _differ(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """What keeps a file's tensors from being the model's."""
    wrong = [
        f"{name} is {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    missing = [
        f"{name} is missing in the file" for name in own if name not in state and "num_batches_tracked" not in name
    ]
    return [*wrong, *missing, *(f"{name} is only in the file" for name in state if name not in own)]


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    try:
        return sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"no checkpoint {str(path)!r}; give a .safetensors or .pt file") from error


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = json.loads((file.metadata() or {}).get("layerlens", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is truncated or no safetensors file: {error}") from error
    if not state:
        raise CheckpointError(f"{str(path)!r} holds no tensors")
    return state, metadata if isinstance(metadata, dict) else {}


def _without_prefix(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo the prefixes that DataParallel, compile or Lightning put before every name, unless the model has them."""
    for prefix in (*_PREFIXES, *_PREFIXES):
        if not state.keys() & own.keys() and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
