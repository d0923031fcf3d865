"""Transformers by folder, name or configuration, with weights or without: what stands inside an encoder."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerlens.errors import CheckpointError, ConfigError, DownloadError, UnknownNameError, closest, require
from layerlens.sentence_folders import read_model_json
from layerlens.specs import Spec
from layerlens.tokenizers import POSITIONS, quiet, reason_of

SIZES = {  # blocks, width, heads; BERT's as in Turc et al. 2019, the others' base as published
    "bert": {"tiny": (2, 128, 2), "mini": (4, 256, 4), "small": (4, 512, 8), "base": (12, 768, 12)},
    "roberta": {"tiny": (2, 128, 2), "mini": (4, 256, 4), "small": (4, 512, 8), "base": (12, 768, 12)},
    "distilbert": {"tiny": (2, 128, 2), "mini": (2, 256, 4), "small": (3, 512, 8), "base": (6, 768, 12)},
    "minilm": {"tiny": (2, 96, 3), "mini": (4, 192, 6), "small": (6, 384, 12), "base": (12, 384, 12)},
    "mpnet": {"tiny": (2, 128, 2), "mini": (4, 256, 4), "small": (4, 512, 8), "base": (12, 768, 12)},
    "modernbert": {"tiny": (2, 128, 2), "mini": (4, 256, 4), "small": (4, 512, 8), "base": (22, 768, 12)},
}
_HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
# What a configuration could use to make transformers fetch code, quantize, or keep more than the last states.
_DROPPED = {"auto_map", "attn_implementation", "experts_implementation", "quantization_config", "custom_pipelines"}
_DROPPED |= {"output_hidden_states", "output_attentions", "torchscript", "use_bfloat16", "transformers_version"}
_OTHER_HEADS = ("classif", "summary", "qa_", "layerdrop")  # dropout of parts that aren't built here


class GivenStates(nn.Module):
    """Stands where a masked language model has its Transformer, and hands on the hidden states it is given."""

    def forward(self, *_args: Any, inputs_embeds: Tensor, **_settings: Any) -> Any:
        """(n, t, width) -> the same, as a Transformer's output; each family passes other settings along."""
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=inputs_embeds)


def local_folder(name: str) -> Path:
    """The folder of a name, or its snapshot in the Hugging Face cache."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        with quiet():
            return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # of several libraries
        hub = _HUB_NAME.fullmatch(name)
        target = name.rpartition("/")[2] if hub else name
        raise DownloadError(
            f"no folder {name!r}, and no model of that name in the local cache; where there is a network, "
            f"`hf download {name if hub else 'NAME'} --local-dir {target}`, then give hf:{target}"
        ) from error


def family_config(spec: Spec) -> Any:
    """The configuration of FAMILY-SIZE, with the numbers that options change."""
    names = [f"{family}-{size}" for family, sizes in SIZES.items() for size in sizes]
    if spec.argument not in names:
        hint = closest(spec.argument, names)
        raise UnknownNameError(
            f"no file {spec.argument!r}, and no such family and size; {hint}; families: {', '.join(SIZES)}; "
            f"sizes: {', '.join(SIZES['bert'])}"
        )
    family, _, size = spec.argument.rpartition("-")
    layers, width, heads = SIZES[family][size]
    each = width // heads
    numbers = {"layers": layers, "width": width, **spec.options}
    if "heads" not in numbers:
        numbers["heads"] = max(1, numbers["width"] // each) if isinstance(numbers["width"], int) else heads
    for key in ("layers", "width", "heads"):
        fine = type(numbers[key]) is int and numbers[key] >= 1
        require(fine, key, numbers[key], "a whole number from 1")
    layers, width, heads = (numbers[key] for key in ("layers", "width", "heads"))
    even = 2 if family == "modernbert" else 1  # its rotary positions turn pairs of features
    if width % (heads * even):
        raise ConfigError(f"width={width} with heads={heads}; allowed: a multiple of {heads * even}")
    return config_from(_family_numbers(family, layers, width, heads))


def _family_numbers(family: str, layers: int, width: int, heads: int) -> dict[str, Any]:
    if family == "distilbert":
        own = {"n_layers": layers, "dim": width, "n_heads": heads, "hidden_dim": 4 * width}
        return {"model_type": family, "max_position_embeddings": POSITIONS, **own}
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    if family == "modernbert":
        return {
            "model_type": family,
            **sizes,
            "intermediate_size": 3 * width // 2,  # gated, so half as wide again as it is deep
            "max_position_embeddings": POSITIONS,
        }
    offset = 2 if family in ("roberta", "mpnet") else 0  # their positions count from the padding's number on
    return {
        "model_type": "bert" if family == "minilm" else family,  # MiniLM is a BERT, only narrow
        **sizes,
        "intermediate_size": 4 * width,
        "max_position_embeddings": POSITIONS + offset,
    }


def read_config(path: Path) -> Any:
    """A folder's or a file's configuration, see `config_from`."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"no config.json in {str(path)!r}, so there is no model; give a folder that has one")
    return config_from(read_model_json(file))


def config_from(content: Mapping[str, Any]) -> Any:
    """A transformers configuration of a model that layerlens can run.

    Raises:
        ConfigError: Of another kind.
    """
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    numbers: dict[str, Any] = harmless(content)
    kind = numbers.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"transformers has no model of type {kind!r} itself; layerlens never runs code that comes with a model"
        )
    with quiet():
        config = CONFIG_MAPPING[kind].from_dict(numbers)
    if config.is_encoder_decoder:
        raise ConfigError(f"{kind} is an encoder-decoder; allowed: encoders (BERT and the like) and decoders (GPT-2)")
    if type(config) not in MODEL_MAPPING or not all(hasattr(config, key) for key in ("vocab_size", "hidden_size")):
        raise ConfigError(
            f"{kind} is no Transformer of text; allowed: encoders (BERT and the like) and decoders (GPT-2)"
        )
    config.use_cache = False
    return config


def harmless(content: Any) -> Any:
    """A configuration without what could run or fetch code, private entries and paths, at any depth."""
    if isinstance(content, Mapping):
        kept = {k: v for k, v in content.items() if k not in _DROPPED and not str(k).startswith("_")}
        return {k: harmless(v) for k, v in kept.items() if k != "name_or_path"}
    return [harmless(item) for item in content] if isinstance(content, list) else content


def fit_to_tokenizer(config: Any, tokenizer: Any) -> None:
    """Give a configuration the tokenizer's numbers; for random weights only."""
    if config.model_type == "mpnet" and tokenizer.pad_token_id != 1:
        raise ConfigError(
            f"MPNet pads with token 1, this tokenizer with {tokenizer.pad_token_id}; `layerlens tokenizer` makes one "
            "that fits"
        )
    config.vocab_size = len(tokenizer)
    roles = {"pad": "pad", "bos": "cls", "eos": "sep", "cls": "cls", "sep": "sep"}
    for role, own in roles.items():
        number = getattr(tokenizer, f"{own}_token_id", None) if own != "pad" else tokenizer.pad_token_id
        if role == "pad" or getattr(config, f"{role}_token_id", None) is not None:
            setattr(config, f"{role}_token_id", number)


def dropout_keys(config: Any) -> list[str]:
    """The entries of a configuration that are dropout probabilities of the Transformer itself."""
    return [
        key
        for key, value in config.to_dict().items()
        if ("dropout" in key or key.endswith("pdrop"))
        and type(value) in (int, float)
        and not any(part in key for part in _OTHER_HEADS)
    ]


def set_dropout(config: Any, rate: float | None) -> None:
    """Every dropout probability of a configuration; None leaves them as they are."""
    for key in dropout_keys(config) if rate is not None else ():
        setattr(config, key, float(rate))  # type: ignore[arg-type]


def fresh_backbone(config: Any, *, mlm: bool) -> tuple[nn.Module, nn.Module | None]:
    """A backbone with random weights, and its masked-language-model head if wanted."""
    from transformers import AutoModel, AutoModelForMaskedLM

    config = copy.deepcopy(config)
    with quiet():
        if mlm:
            _check_mlm(config)
            return _parted(AutoModelForMaskedLM.from_config(config, dtype=torch.float32))
        return AutoModel.from_config(config, dtype=torch.float32, **_no_pooler(config)), None


def pretrained_backbone(folder: Path, config: Any, *, mlm: bool) -> tuple[nn.Module, nn.Module | None]:
    """A folder's backbone with its weights, and its masked-language-model head if wanted."""
    from transformers import AutoModel, AutoModelForMaskedLM

    if mlm:
        _check_mlm(config)
    kind, more = (AutoModelForMaskedLM, {}) if mlm else (AutoModel, _no_pooler(config))
    try:
        with quiet():
            model, report = kind.from_pretrained(
                str(folder),
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
                **more,
            )
    except Exception as error:  # of safetensors, pickle's restricted reader, transformers
        raise CheckpointError(f"can't read the weights in {str(folder)!r}: {reason_of(error)}") from error
    if missing := sorted(report["missing_keys"]):
        prefix = f"{model.base_model_prefix}."
        if mlm and not any(name.startswith(prefix) for name in missing):
            raise ConfigError(
                f"{str(folder)!r} has no weights for its masked-language-model head ({missing[0]}); "
                "use a checkpoint that was saved with it"
            )
        raise CheckpointError(f"{str(folder)!r} lacks {len(missing)} weights of the model, such as {missing[0]}")
    bad = [name for name, value in model.named_parameters() if not value.isfinite().all()]
    if bad:
        raise CheckpointError(f"{str(folder)!r} holds NaN or infinity in {bad[0]}")
    return _parted(model) if mlm else (model, None)


def _parted(model: Any) -> tuple[nn.Module, nn.Module]:
    """A masked language model as backbone and head; what they share stays shared."""
    backbone = model.base_model
    if backbone is model:
        raise ConfigError(f"{type(model).__name__} has no part that could be its backbone, so there is no mlm for it")
    setattr(model, model.base_model_prefix, GivenStates())
    return backbone, model


def _check_mlm(config: Any) -> None:
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    if is_decoder(config) or type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise ConfigError(f"{config.model_type} has no masked-language-model head; leave mlm out, or take a BERT")


def is_decoder(config: Any) -> bool:
    """Whether a token sees only what stands before it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    only_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    return bool(getattr(config, "is_decoder", False)) or only_causal


def _no_pooler(config: Any) -> dict[str, bool]:
    from transformers import MODEL_MAPPING

    kind: Any = MODEL_MAPPING[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind).parameters else {}


def positions_of(backbone: nn.Module) -> int | None:
    """Tokens for which the model has positions; None where any number goes."""
    for name, module in backbone.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    limit = getattr(backbone.config, "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None
