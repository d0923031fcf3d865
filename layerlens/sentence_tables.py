"""Tables of sentences: scored pairs (STS), and pairs to train on, from csv files."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from layerlens.errors import DataError
from layerlens.lines import readable
from layerlens.specs import Spec
from layerlens.text import MOST_TESTS, StsTask, TextDataset, even_places, held_out_count

_STS_ORDER = ("STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R")
_SCORE = ("score", "relatedness")
_PAIRS = (("sentence1", "sentence2", "negative"), ("sent0", "sent1", "hard_neg"))


def _fields(path: Path, kind: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each row of a csv file, first those of the header; blank lines are no rows."""
    line = 1
    with readable(path, kind) as stream:
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


def read_sts(spec: Spec) -> TextDataset:
    """Scored pairs from a file or a folder, see `load_text`."""
    path, left_out = Path(spec.argument), Counter[str]()
    tasks: dict[str, StsTask] = {}
    sources: dict[str, str] = {}
    for file in _scored_files(path) if path.is_dir() else [path]:
        for task in _tasks(spec, file, left_out):
            if task.name in tasks:
                both = f"{sources[task.name]!r} and {file.name!r}"
                raise DataError(f"{both} in {spec.argument!r} both hold {task.name}; name one file, or remove one")
            tasks[task.name], sources[task.name] = task, file.name
    if flat := [task.name for task in tasks.values() if len(task.scores) > 1 and len(set(task.scores)) == 1]:
        raise DataError(f"{spec.argument!r}: all pairs of {flat[0]} have the same score, so nothing can be ranked")
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


def has_splits(path: Path) -> bool:
    """Whether a csv file says of each row to which split it belongs."""
    return path.is_file() and "split" in _header(path, "sts")


def read_pairs(spec: Spec) -> TextDataset:
    """Pairs to train on, see `load_text`."""
    path, left_out = Path(spec.argument), Counter[str]()
    rows = list(_training_rows(spec, path, left_out))
    if not rows:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        raise DataError(f"{str(path)!r} has no pair to train on: {reasons}")
    held_out = set(even_places(held_out_count(len(rows)), len(rows)))
    train = [row for i, row in enumerate(rows) if i not in held_out]
    trained_on = {sentence for row in train for sentence in row}
    fresh = list(dict.fromkeys(s for i in sorted(held_out) for s in rows[i] if s not in trained_on))
    test = tuple(fresh[i] for i in even_places(min(MOST_TESTS, len(fresh)), len(fresh)))
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
