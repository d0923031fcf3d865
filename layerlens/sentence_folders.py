"""Folders of sentence-transformers: what one says about its model, and writing one that `SentenceTransformer` loads."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from torch import Tensor

from layerlens.errors import CheckpointError, ConfigError, DiskFullError, RunFolderError
from layerlens.tokenizers import quiet, write_tokenizer

if TYPE_CHECKING:
    from layerlens.encoders import SentenceEncoder

_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ORDERS = "allowed: Transformer, Pooling, at most one Dense with Tanh, and Normalize, which is ignored"


@dataclass(frozen=True, kw_only=True)
class SentenceFolder:
    """What a model's folder holds.

    Attributes:
        transformer: Where the Transformer and its tokenizer lie: the folder itself, or one inside it.
        pooling: The folder's own pooling, which need not be one of `POOLINGS`; None for a plain Transformer.
        max_length: Tokens at which it truncates; None where it doesn't say.
        lowercase: Whether text is folded to lower case before the tokenizer.
        head: Weight (out, in) and bias (out,) of its linear layer with Tanh, if any.
    """

    transformer: Path
    pooling: str | None = None
    max_length: int | None = None
    lowercase: bool = False
    head: tuple[Tensor, Tensor] | None = None


def read_folder(folder: Path, *, head: bool = True) -> SentenceFolder:
    """What a model's folder says, with or without sentence-transformers' `modules.json`.

    Args:
        folder: The model's.
        head: False leaves the folder's dense layer out, which then may be any.

    Raises:
        ConfigError: A kind of module that layerlens does not have.
        CheckpointError: Damaged files.
    """
    if not (folder / "modules.json").is_file():
        return SentenceFolder(transformer=folder)
    modules = _modules(folder)
    kinds = [kind for kind, _ in modules if kind != "Normalize" and (head or kind != "Dense")]
    weighted, dense = "WeightedLayerPooling" in kinds, "Dense" in kinds
    if kinds != ["Transformer", *["WeightedLayerPooling"] * weighted, "Pooling", *["Dense"] * dense]:
        raise ConfigError(
            f"{str(folder)!r} is made of {', '.join(kind for kind, _ in modules) or 'nothing'}; {_ORDERS}"
        )
    if _read(folder / "config_sentence_transformers.json", {}).get("default_prompt_name"):
        raise ConfigError(
            f"{str(folder)!r} puts a prompt before every sentence, which layerlens doesn't; "
            "unset its default_prompt_name"
        )
    paths = dict(modules)
    settings = _read(paths["Transformer"] / "sentence_bert_config.json", {})
    return SentenceFolder(
        transformer=paths["Transformer"],
        pooling=_pooling(paths),
        max_length=settings.get("max_seq_length"),
        lowercase=settings.get("do_lower_case") is True,
        head=_dense(paths["Dense"]) if dense else None,
    )


def _pooling(paths: dict[str, Path]) -> str:
    settings = _read(paths["Pooling"] / "config.json")
    named = settings.get("pooling_mode")  # a name, or several, since version 5.4; flags before
    if named is None:
        named = [mode for key, mode in _POOLINGS.items() if settings.get(key)] or ["mean"]
    modes = [named] if isinstance(named, str) else [str(mode) for mode in named]
    if "WeightedLayerPooling" not in paths:
        return " and ".join(modes)
    path = paths["WeightedLayerPooling"]
    weights, start = _tensors(path).get("layer_weights"), _read(path / "config.json").get("layer_start")
    ends = weights is not None and bool(weights[0] == weights[-1]) and not bool(weights[1:-1].any())
    return "first-last-mean" if ends and start == 0 and modes == ["mean"] else f"weighted layers, {' and '.join(modes)}"


def write_folder(encoder: SentenceEncoder, folder: str | Path) -> None:
    """Write a folder that `SentenceTransformer(folder)` loads and whose embeddings are those of `encoder.embed`.

    It is made under a hidden name beside the folder and renamed when complete, so whatever happens, no half folder
    bears that name.

    Raises:
        RunFolderError: Something lies there, or it can't be written.
        DiskFullError: No space left.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not _is_empty(folder):
        raise RunFolderError(f"{str(folder)!r} exists; give a new or empty folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
            new = Path(made) / "new"
            new.mkdir()
            _fill(encoder, new)
            os.rename(new, folder)  # also over an empty one
    except (OSError, _safetensor_error()) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        reason = getattr(error, "strerror", None) or error
        kind = DiskFullError if full else RunFolderError
        raise kind(f"can't write {str(folder)!r}: {reason}") from error


def _fill(encoder: SentenceEncoder, folder: Path) -> None:
    from safetensors.torch import save_file

    with quiet():
        encoder.backbone.save_pretrained(str(folder))  # type: ignore[operator]
    write_tokenizer(encoder.tokenizer, folder, max_length=encoder.max_length)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": encoder.max_length, "do_lower_case": False})
    modules = [("", "Transformer")]
    if encoder.pooling == "first-last-mean":
        modules.append(("1_WeightedLayerPooling", "WeightedLayerPooling"))
        _fill_first_and_last(encoder, folder, folder / modules[-1][0])
    modules.append((f"{len(modules)}_Pooling", "Pooling"))
    chosen = "cls" if encoder.pooling.startswith("cls") else "mean"
    modes = {key: mode == chosen for key, mode in _POOLINGS.items()}
    _write(folder / modules[-1][0] / "config.json", {"word_embedding_dimension": encoder.width, **modes})
    if encoder.head is not None and not encoder.head_layer:
        modules.append((f"{len(modules)}_Dense", "Dense"))
        linear, path = encoder.head[0], folder / modules[-1][0]
        sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
        _write(
            path / "config.json",
            {**sizes, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"},
        )
        state = {f"linear.{name}": value.detach().cpu().contiguous() for name, value in linear.named_parameters()}
        save_file(state, path / "model.safetensors")
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    _write(folder / "modules.json", entries)


def _fill_first_and_last(encoder: SentenceEncoder, folder: Path, path: Path) -> None:
    """A weighted mean over all layers in which only the embeddings and the last block have weight."""
    import torch
    from safetensors.torch import save_file

    config = _read(folder / "config.json")
    _write(folder / "config.json", {**config, "output_hidden_states": True})
    blocks = int(encoder.backbone.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    settings = {"word_embedding_dimension": encoder.width, "layer_start": 0, "num_hidden_layers": blocks}
    _write(path / "config.json", settings)
    weights = torch.zeros(blocks + 1)
    weights[0] = weights[-1] = 1.0
    save_file({"layer_weights": weights}, path / "model.safetensors")


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """Each module's class name and folder, in order."""
    found: list[tuple[str, Path]] = []
    listed = _read(folder / "modules.json", kind=list)
    for entry in listed:
        path = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(path, str) or not isinstance(entry.get("type"), str):
            raise CheckpointError(f"{str(folder / 'modules.json')!r} is damaged: an entry lacks its path or type")
        if ".." in PurePosixPath(path).parts or PurePosixPath(path).is_absolute():
            raise CheckpointError(f"{str(folder / 'modules.json')!r} points outside its folder: {path!r}")
        found.append((entry["type"].rpartition(".")[2], folder / path))
    return found


def _dense(path: Path) -> tuple[Tensor, Tensor]:
    settings, state = _read(path / "config.json"), _tensors(path)
    ends = {settings.get(f"module_{end}_name") or "sentence_embedding" for end in ("input", "output")}
    plain = not settings.get("use_residual") and ends == {"sentence_embedding"}
    tanh = str(settings.get("activation_function", "Tanh")).rpartition(".")[2] == "Tanh"
    if not (plain and tanh) or set(state) != {"linear.weight", "linear.bias"}:
        raise ConfigError(f"{str(path)!r} is no linear layer with bias and Tanh; add ,head=false to leave it out")
    weight, bias = state["linear.weight"].float(), state["linear.bias"].float()
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise CheckpointError(f"{str(path)!r}: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} don't fit")
    return weight, bias


def _tensors(path: Path) -> dict[str, Tensor]:
    from layerlens.training.checkpoint import load_state

    file = path / "model.safetensors"
    return load_state(file if file.is_file() else path / "pytorch_model.bin")[0]


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _safetensor_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError


def _read(path: Path, default: Any = None, kind: type = dict) -> Any:
    if default is not None and not path.is_file():
        return default
    return read_model_json(path, kind)


def read_model_json(path: Path, kind: type = dict) -> Any:
    """Read one of a model's JSON files.

    Raises:
        CheckpointError: Missing, damaged, or of another type.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"can't read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {error}") from error
    if not isinstance(content, kind):
        raise CheckpointError(f"{str(path)!r} is damaged: it holds no {'list' if kind is list else 'object'}")
    return content


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
