"""Hugging Face encoders as one module that maps sentences to vectors, and whose layers bear the paper's numbers."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerlens.backbones import SIZES as SIZES
from layerlens.backbones import (
    config_from,
    dropout_keys,
    family_config,
    fit_to_tokenizer,
    fresh_backbone,
    harmless,
    is_decoder,
    local_folder,
    positions_of,
    pretrained_backbone,
    read_config,
    set_dropout,
)
from layerlens.devices import device_of
from layerlens.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LayerlensError,
    UnknownNameError,
    check_known,
    require,
)
from layerlens.files import sha256_of
from layerlens.layers import discover, main_tensor, select
from layerlens.models import ENCODERS
from layerlens.reduction import masked_mean
from layerlens.sentence_folders import SentenceFolder, read_folder, write_folder
from layerlens.specs import Spec, parse_spec
from layerlens.tokenizers import (
    POSITIONS,
    check_text_extra,
    describe_tokenizer,
    load_tokenizer,
    quiet,
    reason_of,
    tokenizer_from,
)
from layerlens.tokenizers import train_tokenizer as train_tokenizer
from layerlens.untouched import observed, untouched

POOLINGS = ("cls", "cls-before-head", "mean", "first-last-mean")
_SETTINGS = ("pooling", "max_length", "dropout", "head")
_MODEL_FILES = (".json", ".safetensors", ".bin", ".txt", ".model")
_EXAMPLE = ("a bird", "a dreary name, said the lord of the house")


class SentenceHead(nn.Sequential):
    """The layer that SimCSE puts behind the first token while it trains: Linear, Tanh.

    Args:
        width: Features that come in.
        out: Features that go out; `width` by default.

    Shape:
        (n, width) -> (n, out)

    Source:
        Gao, Yao, Chen 2021, arXiv:2104.08821; weights drawn as BERT's, N(0, 0.02²), and no bias to begin with.
    """

    def __init__(self, width: int, out: int | None = None) -> None:
        super().__init__(nn.Linear(width, out or width), nn.Tanh())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.normal_(self[0].weight, std=0.02)  # type: ignore[arg-type]
        nn.init.zeros_(self[0].bias)  # type: ignore[arg-type]


class SentenceEncoder(nn.Module):
    """A Transformer, a pooling and perhaps a head: sentences to vectors.

    `build_encoder` makes one; `from_description` makes it again.

    Args:
        backbone: A transformers model without pooler.
        tokenizer: A fast tokenizer that pads on the right.
        pooling: `cls` (the first token, through the head where there is one); `cls-before-head` (the head works in
            training only, as in SimCSE: embeddings are what goes into it); `mean` over tokens; `first-last-mean` (the
            mean over tokens of the mean of the embeddings and the last block's output).
        max_length: Tokens at which a sentence is truncated; by default all that tokenizer and positions allow.
        head: Behind the pooling.
        mlm_head: The masked-language-model head, as transformers' own model with `GivenStates` for its Transformer.

    Attributes:
        width: Features of a hidden state.
        layer_names: The paper's numbering: 0 = embeddings, k = the k-th block's output, then the head if any. Where
            no module puts out the embeddings (OPT), they are missing, and block 1 comes first.
        head_layer: `head` where embeddings at evaluation are what goes into it, else "".

    Raises:
        ConfigError: A pooling that this model can't have, or a `max_length` out of range.
        UnknownNameError: No such pooling.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: Any,
        *,
        pooling: str = "mean",
        max_length: int | None = None,
        head: SentenceHead | None = None,
        mlm_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.mlm_head, self.tokenizer = backbone, head, mlm_head, tokenizer
        check_known("pooling", pooling, POOLINGS)
        if pooling == "first-last-mean" and head is not None:
            raise ConfigError("pooling='first-last-mean' takes no head; add ,head=false or choose another pooling")
        if pooling.startswith("cls") and is_decoder(self.config):
            raise ConfigError(
                f"pooling={pooling!r}, but in {self.config.model_type}, a decoder, the first token sees only itself; "
                "allowed: mean, first-last-mean"
            )
        if mlm_head is not None and tokenizer.mask_token_id is None:
            raise ConfigError("the tokenizer has no mask token, which masked language modelling needs; leave mlm out")
        self.pooling, self.width = pooling, int(self.config.hidden_size)
        self.max_length = _checked_length(backbone, tokenizer, max_length)
        types = "token_type_ids" in tokenizer.model_input_names and "token_type_ids" in _arguments(backbone)
        self._inputs = ("input_ids", "attention_mask", *["token_type_ids"] * types)
        self.head_layer = "head" if pooling == "cls-before-head" and head is not None else ""
        with quiet():
            batch = {name: value.to(device_of(backbone)) for name, value in self.example().items()}
            _check_padding(backbone, batch)
            self._embeddings, blocks = _layer_names(backbone, batch)
        if pooling == "first-last-mean" and not self._embeddings:
            raise ConfigError(
                f"{self.config.model_type} adds its embeddings up outside of any module, so there is no "
                "first-last-mean of it; allowed: cls, mean"
            )
        around = [self._embeddings] if self._embeddings else [], ["head"] if head is not None else []
        self.layer_names: tuple[str, ...] = (*around[0], *blocks, *around[1])

    @property
    def config(self) -> Any:
        """The backbone's configuration, as transformers has it."""
        return self.backbone.config

    @property
    def has_dropout(self) -> bool:
        """Whether any dropout probability of the configuration is above 0."""
        return any(getattr(self.config, key) > 0 for key in dropout_keys(self.config))

    @property
    def embedding_width(self) -> int:
        """Features of an embedding at evaluation."""
        return self.width if self.head is None or self.head_layer else int(self.head[0].out_features)  # type: ignore[arg-type]

    def tokenize(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        """Tokens of a batch, on the CPU, padded to its longest sentence and truncated at `max_length`.

        Returns:
            `input_ids` and `attention_mask`, shape (n, t), and `token_type_ids` where tokenizer and model have them.

        Raises:
            DataError: No sentences, one that is no text, or one without any token.
        """
        encoded = self._encode(sentences, padding=True, truncation=True, max_length=self.max_length)
        filled = torch.tensor(encoded["attention_mask"]).any(1)  # (n,)
        if not filled.all():
            empty = sentences[int(filled.logical_not().nonzero()[0])]
            raise DataError(f"{empty!r} has no token for this tokenizer; leave empty sentences out")
        return {name: torch.tensor(encoded[name]) for name in self._inputs}

    def too_long(self, sentences: Iterable[str]) -> int:
        """How many sentences have more than `max_length` tokens, and so are truncated."""
        stream, count = iter(sentences), 0
        while batch := list(islice(stream, 1000)):
            encoded = self._encode(batch, padding=False, truncation=False)
            count += sum(len(tokens) > self.max_length for tokens in encoded["input_ids"])
        return count

    def example(self) -> dict[str, Tensor]:
        """A batch of two short sentences of different length, on the CPU."""
        return self.tokenize(_EXAMPLE)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Vectors of sentences, through the head where there is one, in training and evaluation alike.

        Args:
            input_ids: Token numbers, shape (n, t).
            attention_mask: 1 at tokens and 0 at padding, shape (n, t).
            token_type_ids: Shape (n, t); zeros by default.
            positions: True where the masked-language-model head's answer is wanted, shape (n, t).

        Returns:
            Shape (n, d); with `positions` instead the k wanted tokens' logits, shape (k, vocabulary), row by row.

        Raises:
            ConfigError: `positions` for an encoder without a masked-language-model head.
        """
        if positions is not None and self.mlm_head is None:
            raise ConfigError("this encoder has no masked-language-model head; build it with mlm=True")
        states, first = self._states(input_ids, attention_mask, token_type_ids)
        if positions is not None:
            return self.mlm_head(inputs_embeds=states[positions].unsqueeze(0)).logits.squeeze(0)  # type: ignore[misc]
        vectors = self._pooled(states, first, attention_mask)
        return vectors if self.head is None else self.head(vectors)  # type: ignore[no-any-return]

    def embed(self, sentences: Iterable[str], batch_size: int = 64) -> Tensor:
        """Embeddings as they count at evaluation: without dropout, and before the head for `cls-before-head`.

        Args:
            sentences: Any number of them.
            batch_size: Sentences per pass; those of like length go together.

        Returns:
            Shape (n, d), float32, on the CPU; row i is sentence i. The model is left as it was.
        """
        require(batch_size >= 1, "batch_size", batch_size, "a whole number from 1")
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # the longest first, so memory fails at once
        vectors = torch.empty(len(texts), self.embedding_width)
        with untouched(self), torch.no_grad():
            self.eval()
            for start in range(0, len(texts), batch_size):
                rows = order[start : start + batch_size]
                batch = self.tokenize([texts[i] for i in rows])
                vectors[rows] = self._evaluated(**{k: v.to(device_of(self)) for k, v in batch.items()}).float().cpu()
        return vectors

    def description(self) -> dict[str, Any]:
        """All that `from_description` needs to build this architecture and its tokenizer again, as JSON-able data."""
        return {
            "format": 1,
            "config": harmless(json.loads(self.config.to_json_string(use_diff=False))),
            "tokenizer": describe_tokenizer(self.tokenizer),
            "pooling": self.pooling,
            "head": None if self.head is None else [self.head[0].in_features, self.head[0].out_features],
            "mlm": self.mlm_head is not None,
            "max_length": self.max_length,
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> SentenceEncoder:
        """The encoder that `description()` described, with random weights of the global generator, in eval mode.

        No file is read, and nothing in the description is executed.

        Raises:
            CheckpointError: Damaged content, or a newer format.
        """
        check_text_extra()
        try:
            if description["format"] != 1:
                raise CheckpointError(f"an encoder of format {description['format']!r}; this layerlens reads format 1")
            tokenizer = tokenizer_from(description["tokenizer"])
            backbone, mlm_head = fresh_backbone(config_from(description["config"]), mlm=description["mlm"] is True)
            return cls(
                backbone,
                tokenizer,
                pooling=description["pooling"],
                max_length=description["max_length"],
                head=None if description["head"] is None else SentenceHead(*description["head"]),
                mlm_head=mlm_head,
            ).eval()
        except CheckpointError:
            raise
        except Exception as error:  # transformers checks little, so damage shows as any error at all
            raise CheckpointError(f"the description of an encoder is damaged: {reason_of(error)}") from error

    def save_sentence_transformer(self, folder: str | Path) -> None:
        """Write a folder that `SentenceTransformer(folder)` and `hf:FOLDER` load; embeddings agree with `embed`.

        A head that is left out at evaluation (`cls-before-head`), and a masked-language-model head, are not in it.

        Raises:
            RunFolderError: Something else lies there, or it can't be written.
        """
        write_folder(self, folder)

    def _encode(self, sentences: Sequence[str], **how: Any) -> Any:
        wrong = [text for text in sentences if not isinstance(text, str)]
        if isinstance(sentences, str) or wrong or not len(sentences):
            came = repr(sentences) if isinstance(sentences, str) else f"{type(wrong[0]).__name__}" if wrong else "none"
            raise DataError(f"tokenizers take a list of sentences; got {came}")
        try:
            return self.tokenizer(list(sentences), return_attention_mask=True, verbose=False, **how)
        except (TypeError, UnicodeEncodeError) as error:  # lone surrogates
            raise DataError(f"a sentence is no valid Unicode text: {reason_of(error)}") from error

    def _states(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The last hidden states, and the embeddings where the pooling needs them; both (n, t, width)."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        with self._kept_embeddings() as kept:
            out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **types)
        return out.last_hidden_state, kept[0] if kept else None

    @contextmanager
    def _kept_embeddings(self) -> Iterator[list[Tensor]]:
        """What the first layer puts out, other hooks' changes included.

        transformers' own `output_hidden_states` would leave hooks on the model for good, which then can't be pickled.
        """
        kept: list[Tensor] = []
        if self.pooling != "first-last-mean":
            yield kept
            return
        layer = self.get_submodule(self._embeddings)
        handle = layer.register_forward_hook(lambda _m, _i, out: kept.append(_tensor(out)))
        try:
            yield kept
        finally:
            handle.remove()

    def _pooled(self, states: Tensor, first: Tensor | None, attention_mask: Tensor) -> Tensor:
        if self.pooling.startswith("cls"):
            return states[:, 0]
        if first is not None:
            states = (first + states) / 2
        return masked_mean(states, attention_mask)  # (n, width)

    def _evaluated(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        if not self.head_layer:
            return self(input_ids, attention_mask, token_type_ids)  # type: ignore[no-any-return]
        states, first = self._states(input_ids, attention_mask, token_type_ids)
        return self._pooled(states, first, attention_mask)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    pooling: str | None
    max_length: int | None
    dropout: float | None
    head: bool | None
    mlm: bool


def build_encoder(
    spec: str,
    *,
    pooling: str | None = None,
    max_length: int | None = None,
    dropout: float | None = None,
    head: bool | None = None,
    mlm: bool = False,
) -> SentenceEncoder:
    """Build an encoder from its specification, in eval mode; the network is never used.

    Args:
        spec: `hf:PATH` (a folder of transformers or sentence-transformers), `hf:NAME` (in the local cache),
            `hf-config:FAMILY-SIZE,tokenizer=FOLDER` (random weights of the global generator; see `SIZES`; `layers`,
            `width` and `heads` change its size), or `hf-config:PATH` (a configuration's folder or file). The settings
            below may stand in it too, `hf:PATH,pooling=cls`; the arguments, where given, win.
        pooling: One of `POOLINGS`; by default the folder's own, else `mean`.
        max_length: Tokens at which sentences are truncated; by default all that model and tokenizer allow.
        dropout: Sets every dropout probability, in [0, 1); as the model says by default.
        head: True adds a fresh `SentenceHead` where the folder has none, False leaves the folder's out.
        mlm: Keep (or, for `hf-config`, draw) the masked-language-model head.

    Raises:
        UnknownNameError: No such kind, family, size or pooling.
        ConfigError: A setting out of range; a model that can't be run so (encoder-decoder, no tokenizer, no head).
        DownloadError: `hf:NAME` that is neither a folder nor in the cache.
        CheckpointError: Damaged files.
        ExtraMissingError: The extra `text` is not installed.
    """
    parsed = parse_spec(spec)
    if parsed.kind not in ENCODERS or not parsed.argument:
        raise UnknownNameError(
            f"unknown encoder {spec!r}; allowed: hf:PATH, hf:NAME, hf-config:FAMILY-SIZE, hf-config:PATH"
        )
    check_text_extra()
    given = {"pooling": pooling, "max_length": max_length, "dropout": dropout, "head": head}
    settings: dict[str, Any] = {k: parsed.options.get(k) if value is None else value for k, value in given.items()}
    wanted = _checked(_Settings(**settings, mlm=mlm))
    build = _from_folder if parsed.kind == "hf" else _from_config
    try:
        return build(parsed, wanted).eval()
    except (LayerlensError, MemoryError):
        raise
    except Exception as error:  # whatever transformers makes of a configuration
        raise ConfigError(f"{spec!r} can't be built: {reason_of(error)}") from error


def usual_settings(spec: str) -> dict[str, Any]:
    """Pooling and maximum length that a specification, or its folder, names itself; None where it names none.

    Raises:
        DownloadError, CheckpointError, ConfigError: As `build_encoder`.
    """
    parsed = parse_spec(spec)
    own: dict[str, Any] = {"pooling": None, "max_length": None}
    if parsed.kind == "hf":
        found = read_folder(local_folder(parsed.argument), head=False)
        own = {"pooling": found.pooling, "max_length": found.max_length}
    return {name: parsed.options.get(name, value) for name, value in own.items()}


def fingerprint_of(spec: str) -> str:
    """SHA-256 over the contents of the files behind an encoder's specification, and over its options.

    Where the files lie does not count, nor do files that are neither configuration, weights nor tokenizer.

    Raises:
        DownloadError: No such folder.
    """
    parsed = parse_spec(spec)
    options = {name: value for name, value in parsed.options.items() if name != "tokenizer"}
    places = [Path(str(parsed.options["tokenizer"]))] if "tokenizer" in parsed.options else []
    if parsed.kind == "hf":
        places.append(local_folder(parsed.argument))
    elif Path(parsed.argument).exists():
        places.append(Path(parsed.argument))
    else:
        options["family"] = parsed.argument
    digest = hashlib.sha256(json.dumps([parsed.kind, options], sort_keys=True).encode())
    for place in places:
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if file.is_file() and file.suffix in _MODEL_FILES:
                found = file.stat()
                name = str(file.relative_to(place)) if place.is_dir() else file.name
                digest.update(f"{name} {_unchanged_digest(str(file), found.st_size, found.st_mtime_ns)}".encode())
    return digest.hexdigest()


@lru_cache(maxsize=1000)
def _unchanged_digest(path: str, _size: int, _mtime_ns: int) -> str:
    """SHA-256 of a file, read again only if it has changed."""
    return sha256_of(path)


def same_tokens(encoder: SentenceEncoder, other: SentenceEncoder) -> bool:
    """Whether two encoders make the same tokens of every sentence, so that one batch fits both."""
    first, second = ((e.max_length, set(e.example()), describe_tokenizer(e.tokenizer)) for e in (encoder, other))
    return first == second


def _checked(wanted: _Settings) -> _Settings:
    if wanted.pooling is not None:
        check_known("pooling", str(wanted.pooling), POOLINGS)
    drop = wanted.dropout
    require(drop is None or (type(drop) in (int, float) and 0 <= drop < 1), "dropout", drop, "0 to below 1")
    require(wanted.head in (None, True, False), "head", wanted.head, "true, false")
    return wanted


def _from_folder(spec: Spec, wanted: _Settings) -> SentenceEncoder:
    spec.check_options([*_SETTINGS, "tokenizer"])
    folder = local_folder(spec.argument)
    found = read_folder(folder, head=wanted.head is not False)
    pooling = _pooling_of(spec.argument, found, wanted)
    config = read_config(found.transformer)
    set_dropout(config, wanted.dropout)
    source = Path(str(spec.options.get("tokenizer", found.transformer)))
    tokenizer = load_tokenizer(source, config=config, lowercase=found.lowercase)
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"the tokenizer in {str(source)!r} has {len(tokenizer)} tokens, the model {config.vocab_size}; give its own"
        )
    backbone, mlm_head = pretrained_backbone(found.transformer, config, mlm=wanted.mlm)
    own = None
    if found.head is not None:
        weight, bias = found.head
        own = SentenceHead(weight.shape[1], weight.shape[0])
        own[0].load_state_dict({"weight": weight, "bias": bias})
    limit = positions_of(backbone)
    shorter = found.max_length if limit is None or found.max_length is None else min(found.max_length, limit)
    length = shorter if wanted.max_length is None else wanted.max_length
    return _assembled(backbone, tokenizer, mlm_head, own, replace(wanted, pooling=pooling, max_length=length))


def _pooling_of(name: str, found: SentenceFolder, wanted: _Settings) -> str:
    own = found.pooling or "mean"
    if wanted.pooling is None:
        if own not in POOLINGS:
            raise ConfigError(f"{name!r} pools by {own}; allowed: {', '.join(POOLINGS)}. Choose one with ,pooling=")
        return own
    if found.head is not None and wanted.head is None and wanted.pooling.removesuffix("-before-head") != own:
        raise ConfigError(
            f"pooling={wanted.pooling!r}, but the head in {name!r} was trained behind {own}; add ,head=false to leave "
            "it out, or ,head=true to keep it"
        )
    return wanted.pooling


def _from_config(spec: Spec, wanted: _Settings) -> SentenceEncoder:
    path = Path(spec.argument)
    if path.exists():
        spec.check_options([*_SETTINGS, "tokenizer"])
        config, own = read_config(path), path if path.is_dir() else path.parent
    else:
        spec.check_options([*_SETTINGS, "tokenizer", "layers", "width", "heads"])
        config, own = family_config(spec), None
    folder = spec.options.get("tokenizer", own)
    if folder is None:
        raise ConfigError(
            f"{spec.text!r} has no tokenizer; add ,tokenizer=FOLDER (`layerlens tokenizer` makes one from sentences)"
        )
    tokenizer = load_tokenizer(str(folder), config=None if "tokenizer" in spec.options else config)
    fit_to_tokenizer(config, tokenizer)
    set_dropout(config, wanted.dropout)
    backbone, mlm_head = fresh_backbone(config, mlm=wanted.mlm)
    return _assembled(backbone, tokenizer, mlm_head, None, wanted)


def _assembled(
    backbone: nn.Module, tokenizer: Any, mlm_head: nn.Module | None, own: SentenceHead | None, wanted: _Settings
) -> SentenceEncoder:
    pooling = wanted.pooling or "mean"
    if wanted.head and own is None:
        if not pooling.startswith("cls"):
            raise ConfigError(
                f"head=True with pooling={pooling!r}; a fresh head goes with cls and cls-before-head only"
            )
        own = SentenceHead(int(backbone.config.hidden_size))  # type: ignore[union-attr, arg-type]
    return SentenceEncoder(
        backbone, tokenizer, pooling=pooling, max_length=wanted.max_length, head=own, mlm_head=mlm_head
    )


def _checked_length(backbone: nn.Module, tokenizer: Any, wanted: int | None) -> int:
    most = positions_of(backbone)
    if wanted is None:
        own = tokenizer.model_max_length
        limits = [limit for limit in (most, own if own < 10**9 else None) if limit is not None]
        return min(limits, default=POSITIONS)
    least = tokenizer.num_special_tokens_to_add() + 1
    fine = type(wanted) is int and least <= wanted and (most is None or wanted <= most)
    require(fine, "max_length", wanted, f"{least} to {most} tokens" if most else f"a whole number from {least}")
    return wanted


def _arguments(backbone: nn.Module) -> Iterable[str]:
    return inspect.signature(backbone.forward).parameters


def _check_padding(backbone: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Refuse a model in which a token's state depends on how far its sentence was padded (convolutions, FNet).

    Raises:
        ConfigError: It does, or the model takes no attention mask.
    """
    kind, count = backbone.config.model_type, int(batch["attention_mask"][0].sum())  # type: ignore[union-attr]
    same = "attention_mask" in _arguments(backbone)
    if same:
        with untouched(backbone), torch.no_grad():
            backbone.eval()
            padded = backbone(**batch).last_hidden_state[:1, :count]
            alone = backbone(**{name: value[:1, :count] for name, value in batch.items()}).last_hidden_state
        same = padded.shape == alone.shape and bool((padded - alone).abs().max() <= 1e-3 * alone.abs().max())
    if not same:
        raise ConfigError(f"{kind} lets padding into the states of real tokens, so no statistic of it would hold")


def _layer_names(backbone: nn.Module, batch: Mapping[str, Tensor]) -> tuple[str, list[str]]:
    """Embeddings and blocks of a Transformer, by what one pass shows.

    The blocks are the list of `num_hidden_layers` modules; the embeddings are the outermost module whose output goes
    into the first block, "" if there is none. Other architectures (blocks that share weights) get the block level of
    any network.

    Raises:
        ConfigError: A layer's output is not (n, t, d), so that nobody could tell which rows are padding.
    """
    count, tokens = int(backbone.config.num_hidden_layers), tuple(batch["input_ids"].shape)  # type: ignore[union-attr, arg-type]
    lists = [n for n, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        found = discover(backbone, batch)
        names = [f"backbone.{layer.name}" for layer in select(backbone, found, "auto")]
        return ("", names) if "#" in names[0] else (names[0], names[1:])
    outputs: list[tuple[str, Tensor | None]] = []
    entered: list[tuple[Tensor | None, int]] = []
    handle = backbone.get_submodule(f"{lists[0]}.0").register_forward_pre_hook(
        lambda _m, args, named: entered.append((main_tensor((*args, *named.values())), len(outputs))), with_kwargs=True
    )
    try:
        with observed(backbone, lambda name, _m, out: outputs.append((name, main_tensor(out)))):
            backbone(**batch)
    finally:
        handle.remove()
    source, done = entered[0]
    embeddings = [name for name, out in outputs[:done] if out is source][-1:]
    names = [*embeddings, *(f"{lists[0]}.{i}" for i in range(count))]
    shapes = {name: () if out is None else tuple(out.shape) for name, out in outputs}
    if odd := [name for name in names if shapes[name][:2] != tokens or len(shapes[name]) != 3]:
        raise ConfigError(
            f"{odd[0]!r} of {backbone.config.model_type} puts out {shapes[odd[0]]} for {tokens} tokens; allowed: one "  # type: ignore[union-attr]
            "row per token"
        )
    full = [f"backbone.{name}" for name in names]
    return (full[0], full[1:]) if embeddings else ("", full)


def _tensor(output: Any) -> Tensor:
    found = main_tensor(output)
    if found is None:
        raise ConfigError(f"the embeddings layer put out a {type(output).__name__}, so there is no first-last-mean")
    return found
