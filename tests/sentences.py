"""A tiny corpus that is the same everywhere, scored pairs of its sentences, and runs over it: for tests on text."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layerlens.data import load_data
from layerlens.text import StsTask, TextDataset
from layerlens.training.config import RunConfig, make_config

WHO = ["a bird", "the old king", "my sister", "every soldier", "the lord of the house", "nobody", "a young sailor"]
DID = ["sings", "flew away", "lost a coin", "reads the long letter", "waits", "is making a fire", "found two dogs"]
WHERE = ["in the rain", "over the hills", "near the river", "at night", "behind a wall", "", "on the way to the sea"]
SAID = ["", "", "they say", "as far as I know,", "yesterday it was told that"]
LAYERS = ("backbone.embeddings", "backbone.encoder.layer.0", "backbone.encoder.layer.1", "head")


@dataclass(frozen=True)
class Corpus:
    """Files of one folder.

    Attributes:
        folder: Where they lie.
        text: 200 sentences, one per line.
        dev: 40 scored pairs, score, sentence1 and sentence2.
        pairs: 60 triples, sentence1, sentence2 and negative.
        tokenizer: Folder of one trained on them.
    """

    folder: Path

    @property
    def text(self) -> Path:
        return self.folder / "sentences.txt"

    @property
    def dev(self) -> Path:
        return self.folder / "dev.csv"

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs.csv"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    def model(self, options: str = "") -> str:
        """A BERT of two blocks of width 16."""
        return f"hf-config:bert-tiny,tokenizer={self.tokenizer},layers=2,width=16,heads=2{options}"

    def data(self, kind: str = "text") -> TextDataset:
        """The sentences, or the triples, or the scored pairs."""
        found = load_data(self.spec(kind))
        assert isinstance(found, TextDataset)
        return found

    def spec(self, kind: str = "text") -> str:
        return f"{kind}:{ {'text': self.text, 'pairs': self.pairs, 'sts': self.dev}[kind] }"

    def config(self, text: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
        """SimCSE with steps large enough to see: 180 sentences in five batches of 32."""
        table = {"max_length": 16, **(text or {})}
        usual: dict[str, Any] = {"objective": "simcse", "model": self.model(), "batch_size": 32, "learning_rate": 5e-3}
        usual["data"] = self.spec("pairs" if settings.get("objective") == "pairs" else "text")
        return make_config({**usual, **settings, "text": table})

    def scored(self, **text: Any) -> dict[str, Any]:
        """[text] with the scored pairs as dev."""
        return {"dev": self.spec("sts"), **text}


def make_corpus(folder: Path) -> Corpus:
    """Write the corpus's files, and train its tokenizer."""
    from layerlens.encoders import train_tokenizer

    corpus, draws = Corpus(folder), random.Random(0)
    sentences = [sentence(parts) for parts in places(draws, 200)]
    corpus.text.write_text("\n".join(sentences) + "\n")
    write_csv(corpus.dev, ["score", "sentence1", "sentence2"], scored_pairs(draws))
    triples = [(sentence(p), sentence(near(p, draws, 1)), sentence(near(p, draws, 3))) for p in places(draws, 60)]
    write_csv(corpus.pairs, ["sentence1", "sentence2", "negative"], triples)
    train_tokenizer(sentences * 2, corpus.tokenizer, vocabulary=300)
    return corpus


def places(draws: random.Random, count: int) -> list[tuple[int, ...]]:
    """So many different choices of a sentence's four parts."""
    every = [(a, b, c, d) for a in range(7) for b in range(7) for c in range(7) for d in range(1, 5)]
    return draws.sample(every, count)


def sentence(parts: Sequence[int]) -> str:
    who, did, where, said = parts
    return " ".join(word for word in (SAID[said], WHO[who], DID[did], WHERE[where]) if word)


def near(parts: tuple[int, ...], draws: random.Random, changes: int) -> tuple[int, ...]:
    """The same sentence with so many of its parts exchanged."""
    changed = list(parts)
    for place in draws.sample(range(3), changes):
        changed[place] = (changed[place] + draws.randrange(1, 7)) % 7
    return tuple(changed)


def scored_pairs(draws: random.Random) -> list[tuple[float, str, str]]:
    """Pairs of sentences that differ in 0 to 3 parts: the more, the lower the score."""
    rows = []
    for k, parts in enumerate(places(draws, 40)):
        other = (*near(parts, draws, k % 4)[:3], draws.randrange(1, 5))
        rows.append((round(5 - 1.4 * (k % 4) - 0.01 * k, 2), sentence(parts), sentence(other)))
    return rows


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def cosines(encoder: Any, task: StsTask) -> np.ndarray[Any, Any]:
    """Cosine of each pair, in float64, a pair at a time."""
    found = []
    for one, other in zip(task.first, task.second, strict=True):
        a, b = encoder.embed([one, other]).double().numpy()
        found.append(float(a @ b / np.sqrt((a @ a) * (b @ b))))
    return np.array(found)


def spearman(encoder: Any, task: StsTask) -> float:
    """Spearman's correlation as it is defined: Pearson's of the ranks, ties at their mean rank."""
    a, b = (mean_ranks(values) for values in (cosines(encoder, task), np.array(task.scores)))
    return float(np.corrcoef(a, b)[0, 1])


def mean_ranks(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    below = (values[None] < values[:, None]).sum(1)
    return below + ((values[None] == values[:, None]).sum(1) - 1) / 2
