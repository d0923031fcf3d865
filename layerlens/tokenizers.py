"""Tokenizers: training one on somebody's sentences, and all of one as plain data."""

from __future__ import annotations

import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from layerlens.errors import CheckpointError, ConfigError, DataError, ExtraMissingError, RunFolderError
from layerlens.files import write_atomically

# [PAD] is 1, as RoBERTa and MPNet have it (MPNet's code knows no other); the other families take any number.
SPECIAL_TOKENS = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")
ALPHABET = 1000  # characters kept, the most frequent first, as BERT's
POSITIONS = 512
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FILES = ("tokenizer_config.json", "tokenizer.json")  # the second one is what counts, so it is written last


def check_text_extra() -> None:
    """Refuse to go on without the extra `text`.

    Raises:
        ExtraMissingError: transformers or tokenizers is not installed.
    """
    for package in ("transformers", "tokenizers"):
        if find_spec(package) is None:
            raise ExtraMissingError(f"text needs {package}: pip install 'layerlens-torch[text]'")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, log lines or warnings of transformers inside the block; afterwards as before."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def train_tokenizer(
    sentences: Iterable[str], folder: str | Path, *, vocabulary: int = 8192, lowercase: bool = True
) -> None:
    """Train BERT's kind of tokenizer, WordPiece, and save it where `tokenizer=FOLDER` finds it.

    The same sentences give the same files, in any order, process and number of threads. Sentences are read once;
    memory grows with the number of distinct words. Pieces that occur once are left out, so a small corpus gives
    fewer than `vocabulary`.

    Args:
        sentences: Any number of sentences.
        folder: Gets `tokenizer.json` and `tokenizer_config.json`.
        vocabulary: Most entries that it may have, the five special tokens included.
        lowercase: Fold case and strip accents, as BERT's uncased models.

    Raises:
        DataError: No word in the sentences.
        ConfigError: A vocabulary too small for the characters of the sentences.
        RunFolderError: The folder holds another tokenizer, or can't be written.

    Source:
        Schuster and Nakajima 2012; Devlin et al. 2018, arXiv:1810.04805
    """
    check_text_extra()
    from tokenizers import Tokenizer
    from tokenizers.decoders import WordPiece as WordPieceDecoder
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing

    normalizer, splitter = BertNormalizer(lowercase=lowercase), BertPreTokenizer()
    words: Counter[str] = Counter()
    for sentence in sentences:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(sentence)))
    if not words:
        raise DataError("no word in the sentences, so there is nothing to train a tokenizer on")
    vocab = _word_pieces(words, vocabulary)
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = WordPieceDecoder(prefix="##")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    roles = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS}
    described = {"json": tokenizer.to_str(), "special_tokens": roles, "max_length": POSITIONS}
    content = _file_contents({**described, "inputs": ["input_ids", "attention_mask"]})
    _refuse_another(Path(folder), content["tokenizer.json"])
    for name in _FILES:
        write_atomically(Path(folder) / name, content[name])


def _word_pieces(words: Counter[str], vocabulary: int) -> dict[str, int]:
    """Pieces and their numbers, the special ones first.

    The trainer numbers a word's later characters in the order of a hash table, which differs between processes, and
    breaks ties by those numbers. So it is told them, as special tokens, which come first and in order.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.trainers import WordPieceTrainer

    counts: Counter[str] = Counter()
    for word, count in words.items():
        for letter in word:
            counts[letter] += count
    alphabet = sorted(sorted(counts), key=lambda letter: -counts[letter])[:ALPHABET]
    within = sorted({f"##{letter}" for word in words for letter in word[1:]} & {f"##{letter}" for letter in alphabet})
    fixed = [*SPECIAL_TOKENS, *within]
    if vocabulary < len(fixed) + len(alphabet):
        raise ConfigError(
            f"vocabulary={vocabulary}; allowed: from {len(fixed) + len(alphabet)}, the characters of these sentences"
        )
    trainer = WordPieceTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=fixed,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.train_from_iterator(_repeated(words), trainer)
    numbers: dict[str, int] = tokenizer.get_vocab()
    return {piece: i for i, piece in enumerate(sorted(numbers, key=lambda piece: numbers[piece]))}


def _repeated(words: Mapping[str, int], chunk: int = 1000) -> Iterator[str]:
    """Lines that hold each word as often as it was counted."""
    for word in sorted(words):
        whole, rest = divmod(words[word], chunk)
        for size in (*[chunk] * whole, rest):
            if size:
                yield " ".join([word] * size)


def _refuse_another(folder: Path, content: bytes) -> None:
    held = folder / "tokenizer.json"
    try:
        same = not held.exists() or held.read_bytes() == content
    except OSError as error:
        raise RunFolderError(f"can't read {str(held)!r}: {error.strerror}") from error
    if not same:
        raise RunFolderError(f"{str(folder)!r} holds another tokenizer; give a new folder, or delete it first")


def load_tokenizer(folder: str | Path, *, config: Any = None, lowercase: bool = False) -> Any:
    """The tokenizer in a folder, as a `PreTrainedTokenizerFast`; no network, and no code that lies in the folder.

    Args:
        folder: With `tokenizer.json`, or another form that transformers can turn into a fast tokenizer.
        config: The model's configuration, where there is one; some folders name the tokenizer's class only there.
        lowercase: Fold case first, as `do_lower_case` of a SentenceTransformer folder asks.

    Raises:
        ConfigError: No tokenizer there, or none that can pad.
        CheckpointError: A damaged one.
    """
    check_text_extra()
    from transformers import AutoTokenizer

    names = {path.name for path in Path(folder).iterdir()} if Path(folder).is_dir() else set()
    if not any(name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece", "bpe.codes")) for name in names):
        raise ConfigError(
            f"no tokenizer in {str(folder)!r}; add ,tokenizer=FOLDER (`layerlens tokenizer` makes one from sentences)"
        )
    try:
        with quiet():
            found = AutoTokenizer.from_pretrained(
                str(folder), config=config, local_files_only=True, trust_remote_code=False, use_fast=True
            )
    except Exception as error:  # what transformers and tokenizers raise on files is not documented
        raise CheckpointError(f"can't read the tokenizer in {str(folder)!r}: {reason_of(error)}") from error
    if not getattr(found, "is_fast", False):
        raise ConfigError(
            f"the tokenizer in {str(folder)!r} has no fast form; save one as tokenizer.json (tokenizers library)"
        )
    if lowercase:
        _lowercase(found.backend_tokenizer)
    if found.pad_token is None:
        if found.eos_token is None:
            raise ConfigError(f"the tokenizer in {str(folder)!r} has neither a padding nor an end token; add [PAD]")
        found.pad_token = found.eos_token  # attention masks say what is padding
    return tokenizer_from(describe_tokenizer(found))


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Everything about a fast tokenizer as JSON-able data; `tokenizer_from` makes it again."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # what the last call left there is no part of the tokenizer
    backend.no_padding()
    roles = {role: value for role in _ROLES if (value := getattr(tokenizer, role, None)) is not None}
    limit = tokenizer.model_max_length
    return {
        "json": backend.to_str(),
        "special_tokens": {role: str(value) for role, value in roles.items()},
        "max_length": int(limit) if limit < 10**9 else None,  # transformers writes 10^30 for "none"
        "inputs": list(tokenizer.model_input_names),
    }


def tokenizer_from(description: Mapping[str, Any]) -> Any:
    """The tokenizer that `describe_tokenizer` described. It pads on the right, so that a token keeps its place.

    Raises:
        CheckpointError: Damaged content.
    """
    check_text_extra()
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        roles = {
            role: str(description["special_tokens"][role]) for role in _ROLES if role in description["special_tokens"]
        }
        limit = description["max_length"]
        with quiet():
            made = PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer.from_str(description["json"]),
                padding_side="right",
                truncation_side="right",
                clean_up_tokenization_spaces=False,
                model_input_names=[str(name) for name in description["inputs"]],
                **({} if limit is None else {"model_max_length": int(limit)}),
                **roles,
            )
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"the description of a tokenizer is damaged: {reason_of(error)}") from error
    return made


def write_tokenizer(tokenizer: Any, folder: Path, *, max_length: int | None = None) -> None:
    """Write a fast tokenizer's two files, which every version of transformers reads."""
    described = describe_tokenizer(tokenizer)
    content = _file_contents({**described, "max_length": max_length or described["max_length"]})
    for name in _FILES:
        write_atomically(folder / name, content[name])


def _file_contents(described: Mapping[str, Any]) -> dict[str, bytes]:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **described["special_tokens"],
        **({} if described["max_length"] is None else {"model_max_length": described["max_length"]}),
        "model_input_names": described["inputs"],
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    pretty = json.dumps(json.loads(described["json"]), ensure_ascii=False, indent=1)
    return {
        "tokenizer_config.json": (json.dumps(settings, indent=1) + "\n").encode(),
        "tokenizer.json": (pretty + "\n").encode(),
    }


def _lowercase(backend: Any) -> None:
    from tokenizers.normalizers import Lowercase, Sequence

    backend.normalizer = Sequence([Lowercase(), *([backend.normalizer] if backend.normalizer is not None else [])])


def reason_of(error: BaseException) -> str:
    """What another library's error says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
