"""Text data sets: sentences read from a file of any size, scored pairs (STS), and pairs to train on."""

from __future__ import annotations

import csv
import errno
import gzip
import hashlib
import math
import os
import re
import shutil
import tempfile
import weakref
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from io import BufferedIOBase
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, ClassVar, overload

import numpy as np
import numpy.typing as npt

from layerlens.errors import DataError, DiskFullError, UnknownNameError, check_known
from layerlens.specs import Spec

Starts = npt.NDArray[np.int64]

MOST_TESTS = 1000  # sentences set apart for analysis, unless more are asked for
LONGEST = 1 << 20  # bytes; a longer line is no sentence, and must not fill the memory
_BOM = b"\xef\xbb\xbf"
_STS_ORDER = ("STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R")
_SCORE = ("score", "relatedness")
_PAIRS = (("sentence1", "sentence2", "negative"), ("sent0", "sent1", "hard_neg"))
_NEEDS = {
    "text": "UTF-8 text with a sentence per line, plain or .gz",
    "sts": "a csv file (or .csv.gz) with score, sentence1 and sentence2, or a folder of such files",
    "pairs": "a csv file (or .csv.gz) with sentence1 and sentence2, and perhaps negative",
}


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
    read, options = _READERS[spec.kind]
    spec.check_options(options)
    if not spec.argument:
        raise DataError(f"{spec.text!r} names no file; {spec.kind}:PATH needs {_NEEDS[spec.kind]}")
    return read(spec)


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


# --- a sentence per line -------------------------------------------------------------------------------------------


class Lines(Sequence[str]):
    """Lines of a file, stripped, each read when it is asked for; only where they start is kept.

    Any number of threads and processes may read at once. When pickled, the file's path goes along, not its content.
    """

    def __init__(self, file: _TextFile, starts: Starts) -> None:
        self._file, self._starts = file, starts

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Lines: ...

    def __getitem__(self, index: int | slice) -> str | Lines:
        if isinstance(index, slice):
            return Lines(self._file, self._starts[index])
        block = self._file.block(int(self._starts[index]), 1 << 10)
        return self._file.sentence(block.partition(b"\n")[0])

    def __iter__(self) -> Iterator[str]:
        block, base = b"", 0
        for begin in range(0, len(self), 4096):  # in parts, as a list of all starts would be long
            for start in self._starts[begin : begin + 4096].tolist():
                end = block.find(b"\n", start - base) if start >= base else -1
                if end < 0:
                    block, base = self._file.block(start, 1 << 16), start
                    end = block.find(b"\n")
                yield self._file.sentence(block[start - base : end if end >= 0 else None])


class _TextFile:
    """An open file of text, unpacked if it was gzip; pickled as its path, and opened again where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _readable(path, "text") as stream:
            self._stamp = _stamp(path)
            packed = isinstance(stream, gzip.GzipFile)
            self.stream = _unpacked(stream, path) if packed else open(path, "rb")  # noqa: SIM115
        weakref.finalize(self, self.stream.close)

    def block(self, start: int, size: int) -> bytes:
        """At least `size` bytes from `start` on, and the whole of the line there, as far as the file goes."""
        found = b""
        while more := os.pread(self.stream.fileno(), max(size, len(found)), start + len(found)):  # shares no position
            found += more
            if b"\n" in more:
                break
        return found

    def sentence(self, line: bytes) -> str:
        """The text of a line that the scan found good."""
        try:
            if text := line.decode().strip():
                return text
        except UnicodeDecodeError:
            pass
        raise self._changed()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.path, self._stamp)

    def check(self, stamp: tuple[int, int]) -> None:
        """Refuse a file that is not the one of which this was the stamp."""
        if stamp != self._stamp:
            raise self._changed()

    def _changed(self) -> DataError:
        return DataError(f"{str(self.path)!r} has changed since it was loaded; load it again, and leave it as it is")


def _reopened(path: Path, stamp: tuple[int, int]) -> _TextFile:
    file = _TextFile(path)
    file.check(stamp)
    return file


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[BufferedIOBase]:
    """The bytes of a file, unpacked as they are read if it is gzip; what fails in the block ends as one line."""
    try:
        if not path.is_file():  # asked first, as opening a pipe would wait
            came = "is a folder" if path.is_dir() else "is no file but a device" if path.exists() else "is not there"
            raise DataError(f"{str(path)!r} {came}; {kind}:PATH needs {_NEEDS[kind]}")
        with open(path, "rb") as raw:
            packed = path.suffix == ".gz" or raw.peek(2)[:2] == b"\x1f\x8b"
            with gzip.GzipFile(fileobj=raw) if packed else raw as stream:
                yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{str(path)!r} is not a whole gzip file ({error}); fetch or pack it again") from error
    except OSError as error:
        raise DataError(f"can't read {str(path)!r}: {error.strerror or error}") from error


def _unpacked(stream: BufferedIOBase, path: Path) -> IO[bytes]:
    """All of a stream in a temporary file that has no name, so that it goes with the process whatever happens."""
    try:
        with ExitStack() as undo:
            plain = undo.enter_context(tempfile.TemporaryFile(prefix="layerlens-"))
            shutil.copyfileobj(stream, plain, 1 << 20)
            plain.flush()
            undo.pop_all()
            return plain
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"no room in the temporary folder {tempfile.gettempdir()!r} to unpack {str(path)!r}"
        raise DiskFullError(f"{where}; set TMPDIR to a larger disk, or unpack it yourself") from error


def _text(spec: Spec) -> TextDataset:
    file = _TextFile(Path(spec.argument).absolute())
    starts, left_out = _scan(file)
    if not len(starts):
        lines = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "no line at all"
        raise DataError(f"no sentence in {spec.argument!r}: {lines}; text:PATH needs {_NEEDS['text']}")
    count = spec.options.get("test", _tests_of(len(starts)))
    if type(count) is not int or not 0 <= count < len(starts):
        raise DataError(f"test={count} of {_counted(len(starts), 'sentence')}; allowed: 0 to {len(starts) - 1}")
    train, test = (Lines(file, part) for part in _set_apart(starts, count))
    return TextDataset(name=spec.text, columns=(train,), test=test if count else train, left_out=left_out)


def _scan(file: _TextFile) -> tuple[Starts, dict[str, int]]:
    """Where each usable line starts, and why how many others are left out."""
    stream, starts, left_out = file.stream, array("q"), Counter[str]()
    stream.seek(0)
    head = stream.read(len(_BOM))
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{str(file.path)!r} is UTF-16; write it anew: iconv -f UTF-16 -t UTF-8 OLD > NEW")
    place = stream.seek(len(_BOM) if head == _BOM else 0)
    while line := stream.readline(LONGEST):
        if fault := _fault(line):
            left_out[fault] += 1
        else:
            starts.append(place)
        place += len(line)
        while _is_cut(line):  # the rest of a line that is too long belongs to it
            line = stream.readline(LONGEST)
            place += len(line)
    return np.frombuffer(starts, dtype=np.int64), dict(left_out)


def _is_cut(line: bytes) -> bool:
    return len(line) == LONGEST and not line.endswith(b"\n")


def _fault(line: bytes) -> str:
    """Why a line can't be used; nothing if it can."""
    if _is_cut(line):
        return f"longer than {LONGEST >> 20} MiB"
    if b"\0" in line:
        return "with NUL bytes"
    try:
        return "" if line.decode().strip() else "empty"
    except UnicodeDecodeError:
        return "invalid UTF-8"


def _tests_of(count: int) -> int:
    """How many of `count` are for tests: a tenth, at most 1,000; of few, the 4 that an unbiased HSIC needs."""
    return min(MOST_TESTS, max(count // 10, min(4, count // 2)))


def _even_places(count: int, total: int) -> list[int]:
    """`count` places at even distances in `total`, in order and all different.

    >>> _even_places(3, 9)
    [1, 4, 7]
    """
    return [(2 * k + 1) * total // (2 * count) for k in range(count)]


def _set_apart(starts: Starts, count: int) -> tuple[Starts, Starts]:
    """All but `count` starts at even distances, and these; the first part takes the place of `starts`, not more."""
    places = _even_places(count, len(starts))
    test = starts[places]
    for k, (place, following) in enumerate(pairwise([*places, len(starts)])):
        starts[place - k : following - k - 1] = starts[place + 1 : following]
    return starts[: len(starts) - count], test


# --- csv -----------------------------------------------------------------------------------------------------------


def _fields(path: Path, kind: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each row of a csv file, first those of the header; blank lines are no rows."""
    line = 1
    with _readable(path, kind) as stream:
        reader = csv.reader(_decoded(stream, path), strict=True)
        try:
            for fields in reader:
                if fields:
                    yield line, fields
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{str(path)!r}, line {line}: {error}; write it as comma-separated values") from error


def _decoded(stream: Iterable[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{str(path)!r}, line {number}: invalid UTF-8; write the file anew as UTF-8") from error
        if "\0" in text:  # Python 3.10's csv refuses it too, later ones do not
            raise DataError(f"{str(path)!r}, line {number}: a NUL byte; write the file anew as UTF-8")
        yield text.removeprefix("\ufeff") if number == 1 else text


def _header(path: Path, kind: str) -> list[str]:
    return next((fields for _, fields in _fields(path, kind)), [])


def _rows(path: Path, kind: str, split: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and fields by name of each row of a split; of each row, where the file has no splits."""
    fields = _fields(path, kind)
    _, header = next(fields)
    seen: set[str] = set()
    found = False
    for line, values in fields:
        if len(values) != len(header):
            raise DataError(
                f"{str(path)!r}, line {line}: {len(values)} fields; allowed: {len(header)}, as in its header"
            )
        row = dict(zip(header, values, strict=True))
        seen.add(row.get("split", ""))
        if split in ("all", row.get("split", split)):
            found = True
            yield line, row
    if not seen:
        raise DataError(f"{str(path)!r} has no rows below its header")
    if not found:
        raise DataError(f"{str(path)!r} has no rows with split={split}; allowed: {', '.join(sorted(seen)[:10])}, all")


def _split(spec: Spec, path: Path, header: list[str], default: str) -> str:
    """The split asked for; only the default, or all, of a file without splits."""
    split = str(spec.options.get("split", default))
    if "split" not in header and split not in (default, "all"):
        raise DataError(f"split={split} of {str(path)!r}, which has no column split; leave the option away")
    return split


def _score(path: Path, line: int, text: str, highest: float | None = None) -> float:
    """A finite number; in [0, highest], where there is a highest."""
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score) or (highest is not None and not 0 <= score <= highest):
        allowed = "finite numbers" if highest is None else f"numbers from 0 to {highest:g}"
        raise DataError(f"{str(path)!r}, line {line}: score {text!r}; allowed: {allowed}. Mend or remove that row")
    return score


def _sentences(row: Mapping[str, str], columns: Sequence[str], left_out: Counter[str]) -> tuple[str, ...]:
    """The sentences of a row, stripped; none, and counted, if one of them is empty."""
    found = tuple(row[column].strip() for column in columns)
    if all(found):
        return found
    left_out["empty"] += 1
    return ()


# --- scored pairs --------------------------------------------------------------------------------------------------


def _sts(spec: Spec) -> TextDataset:
    path, left_out = Path(spec.argument), Counter[str]()
    tasks: dict[str, StsTask] = {}
    sources: dict[str, str] = {}
    for file in _scored_files(path) if path.is_dir() else [path]:
        for task in _tasks(spec, file, left_out):
            if task.name in tasks:
                both = f"{sources[task.name]!r} and {file.name!r}"
                raise DataError(f"{both} in {spec.argument!r} both hold {task.name}; name one file, or remove one")
            tasks[task.name], sources[task.name] = task, file.name
    ordered = tuple(sorted(tasks.values(), key=_task_order))
    sentences = tuple(dict.fromkeys(s for task in ordered for side in (task.first, task.second) for s in side))
    left = dict(left_out)
    return TextDataset(name=spec.text, columns=(sentences,), test=sentences, tasks=ordered, left_out=left)


def _task_order(task: StsTask) -> tuple[int, str]:
    return _STS_ORDER.index(task.name) if task.name in _STS_ORDER else len(_STS_ORDER), task.name


def _scored_files(folder: Path) -> list[Path]:
    """The csv files of a folder that hold scored pairs, but those for training and development."""
    files = (path for pattern in ("*.csv", "*.csv.gz") for path in folder.glob(pattern))
    named = sorted(path for path in files if path.name[0] != "." and path.is_file())
    tests = [path for path in named if not re.search(r"[_-](train|dev)", path.name.lower())]
    found = [path for path in tests if not _missing(_header(path, "sts"))]
    if not found:
        names = ", ".join(path.name for path in named) or "none"
        wanted = "score, sentence1 and sentence2 as columns, and no train or dev in the name"
        raise DataError(f"{str(folder)!r} has no file of scored pairs; its csv files: {names}; allowed: {wanted}")
    return found


def _missing(header: Sequence[str]) -> list[str]:
    score = [] if set(_SCORE) & set(header) else [" or ".join(_SCORE)]
    return [*score, *(name for name in _PAIRS[0][:2] if name not in header)]


def _tasks(spec: Spec, path: Path, left_out: Counter[str]) -> list[StsTask]:
    """The tasks of one file."""
    header = _header(path, "sts")
    if missing := _missing(header):
        raise DataError(f"{str(path)!r} lacks the columns {', '.join(missing)}; it has {', '.join(header) or 'none'}")
    scored_by = next(name for name in _SCORE if name in header)
    whole = _task_name(path, header)
    pairs: dict[str, list[tuple[str, str, float]]] = {}
    for line, row in _rows(path, "sts", _split(spec, path, header, "test")):
        name = whole or _year(path, line, row["year"])
        score = _score(path, line, row[scored_by], highest=5)
        if sentences := _sentences(row, _PAIRS[0][:2], left_out):
            pairs.setdefault(name, []).append((sentences[0], sentences[1], score))
    if not pairs:
        raise DataError(f"{str(path)!r} has no pair of sentences, both with text")
    return [_task(name, rows) for name, rows in pairs.items()]


def _task(name: str, rows: Sequence[tuple[str, str, float]]) -> StsTask:
    first, second, scores = zip(*rows, strict=True)
    return StsTask(name=name, first=first, second=second, scores=scores)


def _task_name(path: Path, header: Sequence[str]) -> str:
    """The task that a file's name tells; nothing if its years do."""
    stem = path.name.removesuffix(".gz").removesuffix(".csv")
    for name, pattern in (("STS-B", r"sts-?b"), ("SICK-R", "sick")):
        if re.match(pattern, stem.lower()):
            return name
    return "" if "year" in header else stem


def _year(path: Path, line: int, text: str) -> str:
    if not re.fullmatch(r"20\d\d", text.strip()):
        raise DataError(f"{str(path)!r}, line {line}: year {text!r}; allowed: four digits, such as 2012")
    return f"STS{text.strip()[2:]}"


# --- pairs to train on ---------------------------------------------------------------------------------------------


def _pairs(spec: Spec) -> TextDataset:
    path, left_out = Path(spec.argument), Counter[str]()
    rows = list(_training_rows(spec, path, left_out))
    if not rows:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        raise DataError(f"{str(path)!r} has no pair to train on: {reasons}")
    held_out = set(_even_places(_tests_of(len(rows)), len(rows)))
    train = [row for i, row in enumerate(rows) if i not in held_out]
    trained_on = {sentence for row in train for sentence in row}
    fresh = list(dict.fromkeys(s for i in sorted(held_out) for s in rows[i] if s not in trained_on))
    test = tuple(fresh[i] for i in _even_places(min(MOST_TESTS, len(fresh)), len(fresh)))
    kept = train if test else rows
    columns = tuple(tuple(row[k] for row in kept) for k in range(len(kept[0])))
    return TextDataset(name=spec.text, columns=columns, test=test or columns[0], left_out=dict(left_out))


def _training_rows(spec: Spec, path: Path, left_out: Counter[str]) -> Iterator[tuple[str, ...]]:
    header = _header(path, "pairs")
    columns = _pair_columns(path, header)
    scored_by = next((name for name in _SCORE if name in header), None)
    positive = _lowest_positive(spec, path, scored_by)
    for line, row in _rows(path, "pairs", _split(spec, path, header, "train")):
        if scored_by is not None and _score(path, line, row[scored_by]) < positive:
            left_out[f"with a score below {positive:g}"] += 1
        elif sentences := _sentences(row, columns, left_out):
            yield sentences


def _pair_columns(path: Path, header: Sequence[str]) -> list[str]:
    for names in _PAIRS:
        if set(names[:2]) <= set(header):
            return [name for name in names if name in header]
    allowed = ", or ".join(f"{first}, {second}[, {negative}]" for first, second, negative in _PAIRS)
    raise DataError(f"{str(path)!r} has the columns {', '.join(header) or 'none'}; allowed: {allowed}")


def _lowest_positive(spec: Spec, path: Path, scored_by: str | None) -> float:
    positive = spec.options.get("positive")
    if scored_by is None and positive is not None:
        raise DataError(f"positive={positive} of {str(path)!r}, which has no scores; leave the option away")
    if scored_by is not None and (isinstance(positive, bool) or not isinstance(positive, int | float)):
        came = "" if positive is None else f", not {positive!r}"
        say = f"say from which score on a pair is a positive one{came}"
        raise DataError(f"{str(path)!r} has a column {scored_by}; {say}: pairs:{spec.argument},positive=4")
    return 0.0 if positive is None else float(positive)


_READERS: dict[str, tuple[Callable[[Spec], TextDataset], tuple[str, ...]]] = {
    "text": (_text, ("test",)),
    "sts": (_sts, ("split",)),
    "pairs": (_pairs, ("positive", "split")),
}
TEXT_SOURCES = tuple(_READERS)
