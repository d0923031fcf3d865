"""Text data sets: sentences read from a file of any size, scored pairs (STS), and pairs to train on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from layerlens.errors import DataError, UnknownNameError, check_known
from layerlens.lines import NEEDS, Lines, Starts, TextFile, scan
from layerlens.specs import Spec

TEXT_SOURCES = {"text": ("test",), "sts": ("split",), "pairs": ("positive", "split")}  # and their options
MOST_TESTS = 1000  # sentences set apart for analysis, unless more are asked for


@dataclass(frozen=True, kw_only=True)
class StsTask:
    """One semantic textual similarity task: pairs of sentences and how alike people find them.

    Attributes:
        name: `STS12` to `STS16`, `STS-B`, `SICK-R`, or the file's name.
        first, second: The sentences of each pair.
        scores: Gold scores in [0, 5], one per pair; 5 means the same.
    """

    name: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: tuple[float, ...]

    def __post_init__(self) -> None:
        counts = (len(self.first), len(self.second), len(self.scores))
        if len(set(counts)) > 1 or not counts[0]:
            raise DataError(f"{self.name}: {counts} first sentences, second ones and scores; allowed: as many of each")


@dataclass(frozen=True, kw_only=True, eq=False)
class TextDataset:
    """Sentences to train on, sentences for analysis, and scored pairs.

    Attributes:
        name: The specification that made it.
        columns: Training rows by column: single sentences, pairs, or pairs and a hard negative.
        test: Sentences for analysis, never trained on; but where none is set apart (`sts:`, `test=0`), the first
            column itself.
        tasks: Scored pairs; only of `sts:`.
        left_out: Why lines (of csv files, rows) were left out, and how many; counts above 0 only.

    >>> data = TextDataset(name="two", columns=(["A cat.", "A dog."], ["A tomcat.", "A puppy."]), test=["A cow."])
    >>> len(data), data.row(1)
    (2, ('A dog.', 'A puppy.'))
    """

    name: str
    columns: tuple[Sequence[str], ...]
    test: Sequence[str]
    tasks: tuple[StsTask, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    y_train: ClassVar[None] = None  # sentences have no classes
    y_test: ClassVar[None] = None
    classes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        counts = [len(column) for column in self.columns]
        if not 1 <= len(counts) <= 3 or len(set(counts)) > 1 or not counts[0]:
            raise DataError(f"{self.name}: columns of {counts} sentences; allowed: 1 to 3, equally long, not empty")

    def __len__(self) -> int:
        """Training rows."""
        return len(self.columns[0])

    def row(self, i: int) -> tuple[str, ...]:
        """Training row `i`, a sentence of each column."""
        return tuple(column[i] for column in self.columns)

    def split(self, name: str) -> Sequence[str]:
        """Sentences of `train` (the first column) or `test`."""
        if name not in ("train", "test"):
            raise UnknownNameError(f"no split {name!r}; allowed: train, test")
        return self.columns[0] if name == "train" else self.test

    def fingerprint(self) -> str:
        """SHA-256 over all sentences and scores, as hexadecimal digits; made once, as these never change.

        The file's name, its compression and the lines left out do not count.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        sides = [side for task in self.tasks for side in (task.first, task.second)]
        parts = (*self.columns, self.test, *sides)
        scores = [(task.name, task.scores) for task in self.tasks]
        digest = hashlib.sha256(repr(([len(part) for part in parts], scores)).encode())
        for part in parts:
            for sentence in part:
                content = sentence.encode()
                digest.update(b"%d:%b" % (len(content), content))
        return digest.hexdigest()


def load_text(spec: Spec) -> TextDataset:
    """Load sentences by their specification, see `parse_spec`.

    `text:PATH[,test=N]`: UTF-8 with a sentence per line, plain or gzip, of any size: 8 bytes of memory per line (and,
    for gzip, room in the temporary folder). Lines that are empty, invalid UTF-8, with NUL bytes or longer than 1 MiB
    are left out. N lines at even distances are for tests, the others for training; by default a tenth, at most 1,000.
    With `test=0` all are for training, and `test` gives these same sentences. Equal lines are not looked for.

    `sts:PATH[,split=test]`: csv with score (or relatedness), sentence1 and sentence2, or a folder of such files, of
    which those for training and development are passed over. A `year` makes a task of each year, all of its subsets
    together; where there is a `split`, its rows alone count, or with `split=all` every row. Training rows and test
    sentences are the distinct sentences of all tasks.

    `pairs:PATH[,positive=4][,split=train]`: csv with sentence1, sentence2 and perhaps negative (or sent0, sent1,
    hard_neg). Where there is a score, `positive` is the lowest of a pair to train on. Up to a tenth of the pairs, at
    most 1,000, is held out; `test` are sentences of these that no training row holds.

    Raises:
        UnknownNameError: No such kind of text.
        ConfigError: An option that this kind does not have.
        DataError: The file is missing, damaged or holds nothing of use, or an option is out of range.
        DiskFullError: No room to unpack a gzip file.
    """
    check_known("text data", spec.kind, TEXT_SOURCES)
    spec.check_options(TEXT_SOURCES[spec.kind])
    if not spec.argument:
        raise DataError(f"{spec.text!r} names no file; {spec.kind}:PATH needs {NEEDS[spec.kind]}")
    if spec.kind == "text":
        return _read_lines(spec)
    from layerlens.sentence_tables import read_pairs, read_sts  # which need the types above

    return read_sts(spec) if spec.kind == "sts" else read_pairs(spec)


def report(dataset: TextDataset) -> str:
    """What a text data set holds and what was left out, in one line.

    >>> report(TextDataset(name="text:x.txt", columns=(["A cat.", "A dog."],), test=["A cow."], left_out={"empty": 3}))
    'text:x.txt: 3 sentences, 1 of them for tests; left out: 3 empty'
    """
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in dataset.left_out.items())
    return f"{dataset.name}: {_content(dataset)}" + (f"; left out: {left_out}" if left_out else "")


def _content(data: TextDataset) -> str:
    if data.tasks:
        tasks = ", ".join(f"{task.name} {len(task.scores):,}" for task in data.tasks)
        return f"pairs of {_counted(len(data.tasks), 'task')} ({tasks}), {_counted(len(data), 'distinct sentence')}"
    apart = data.test is not data.columns[0]
    if len(data.columns) == 1:
        total = len(data) + (len(data.test) if apart else 0)
        return f"{_counted(total, 'sentence')}, {f'{len(data.test):,}' if apart else 'all'} of them for tests"
    negatives = " with hard negatives" if len(data.columns) == 3 else ""
    tests = f"{_counted(len(data.test), 'other sentence')} for tests" if apart else "none set apart for tests"
    return f"{_counted(len(data), 'pair')}{negatives}, {tests}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _read_lines(spec: Spec) -> TextDataset:
    file = TextFile(Path(spec.argument).absolute())
    starts, left_out = scan(file)
    if not len(starts):
        lines = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "no line at all"
        raise DataError(f"no sentence in {spec.argument!r}: {lines}; text:PATH needs {NEEDS['text']}")
    count = spec.options.get("test", held_out_count(len(starts)))
    if type(count) is not int or not 0 <= count < len(starts):
        raise DataError(f"test={count} of {_counted(len(starts), 'sentence')}; allowed: 0 to {len(starts) - 1}")
    train, test = (Lines(file, part) for part in _set_apart(starts, count))
    return TextDataset(name=spec.text, columns=(train,), test=test if count else train, left_out=left_out)


def held_out_count(count: int) -> int:
    """How many of `count` are for tests: a tenth, at most 1,000; of few, the 4 that an unbiased HSIC needs."""
    return min(MOST_TESTS, max(count // 10, min(4, count // 2)))


def even_places(count: int, total: int) -> list[int]:
    """`count` places at even distances in `total`, in order and all different.

    >>> even_places(3, 9)
    [1, 4, 7]
    """
    return [(2 * k + 1) * total // (2 * count) for k in range(count)]


def _set_apart(starts: Starts, count: int) -> tuple[Starts, Starts]:
    """All but `count` starts at even distances, and these; the first part takes the place of `starts`, not more."""
    places = even_places(count, len(starts))
    test = starts[places]
    for k, (place, following) in enumerate(pairwise([*places, len(starts)])):
        starts[place - k : following - k - 1] = starts[place + 1 : following]
    return starts[: len(starts) - count], test
