"""A run's folder: whose it is, who works in it, what each epoch measured, how it ended."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from layerlens.errors import DiskFullError, FolderInUseError, RunFolderError
from layerlens.files import read_json, write_atomically, write_json
from layerlens.training.config import SCHEMA, RunConfig


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: Where it lies.
        run: The identity of its configuration.
        epochs: Epochs trained.
        loss: Mean training loss of the last epoch, in nats times the configuration's `loss_scale`.
        knn: Online k-NN accuracy on the held-out part of the training split, in [0, 1]; None without labels.
        wall_s: Seconds of training, interruptions not counted.
        checkpoints: Kept checkpoints, first to last.
        environment: Versions, commit, hardware.
        dev: Spearman correlation on the dev pairs of sentences after the last step, in [-1, 1]; None without them.
        best: `step` and `dev` of `checkpoints/best.safetensors`; None without dev pairs.
    """

    folder: str
    run: str
    epochs: int
    loss: float
    knn: float | None
    wall_s: float
    checkpoints: tuple[str, ...]
    environment: dict[str, Any]
    dev: float | None = None
    best: dict[str, Any] | None = None


def claim_folder(folder: Path, config: RunConfig) -> None:
    """Make the run's folder with its `config.json`, or see that it belongs to this run.

    Raises:
        RunFolderError: It holds another run (the first difference is named), other files, or can't be written.
    """
    wanted = {"schema": SCHEMA, "run": config.identity(), "config": config.model_dump(mode="json")}
    path = folder / "config.json"
    if path.exists():
        found = read_json(path)
        if found.get("run") != wanted["run"]:
            raise RunFolderError(
                f"{str(folder)!r} belongs to another run ({_difference(found, wanted)}); choose another --out"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(p.name[0] != "." for p in folder.iterdir())):
        raise RunFolderError(f"{str(folder)!r} exists and is no run folder; choose a new or empty one with --out")
    write_json(path, wanted)


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    old = found.get("config")
    if not isinstance(old, dict):
        return "its configuration is unreadable"
    if found.get("schema") != SCHEMA:
        return "another version of layerlens wrote it"
    for key, value in wanted["config"].items():
        if key not in ("init", "data") and old.get(key) != value:
            return f"{key} is {old.get(key)!r} there and {value!r} here"
    return "its settings are the same, but another version of layerlens wrote it"


def read_result(folder: Path) -> RunResult:
    """The result of a finished run."""
    content = read_json(folder / "result.json")
    try:
        made = RunResult(**{**content, "folder": str(folder), "checkpoints": tuple(content["checkpoints"])})
    except (TypeError, KeyError) as error:
        raise RunFolderError(f"{str(folder / 'result.json')!r} is damaged; delete it and run again") from error
    if not made.checkpoints or not all((folder / str(name)).is_file() for name in made.checkpoints):
        raise RunFolderError(f"{str(folder)!r} lacks checkpoints that its result.json names; train in a new folder")
    return made


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however it ends."""
    with ExitStack() as stack:
        try:
            stream = stack.enter_context((folder / ".lock").open("w"))
            _lock(stream)
        except BlockingIOError as error:
            raise FolderInUseError(
                f"another process is training in {str(folder)!r}; wait for it or choose another --out"
            ) from error
        except OSError as error:
            raise RunFolderError(f"can't write in {str(folder)!r}: {error.strerror}; choose another --out") from error
        yield


def _lock(stream: TextIO) -> None:
    """Take the lock; somebody who only looks whether it is held has it for a moment."""
    for wait_s in (0.05, 0.2):
        with suppress(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(wait_s)
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_leftovers(folder: Path) -> None:
    """Half-written files of processes that were killed; only for who holds the folder's lock."""
    for path in (*folder.glob(".?*.?*.*"), *folder.glob("checkpoints/.?*"), *folder.glob("analysis/.?*")):
        path.unlink(missing_ok=True)


class Log:
    """Lines of numbers, kept twice, as JSONL and as CSV, and only ever appended to.

    Args:
        folder: Where they lie.
        name: `metrics` makes `metrics.jsonl` and `metrics.csv`.
        key: The field that counts 1, 2, 3, …; a resumed run drops the lines behind its last saved state.
    """

    def __init__(self, folder: Path, name: str, key: str) -> None:
        self.jsonl, self.csv, self.key = folder / f"{name}.jsonl", folder / f"{name}.csv", key

    def rewind(self, last: int) -> list[dict[str, Any]]:
        """Keep the first `last` lines, drop what a killed process wrote behind them, and return them.

        Raises:
            RunFolderError: Fewer are there, or they are damaged.
        """
        lines = [line for line in self._whole_lines() if line[self.key] <= last]
        if [line[self.key] for line in lines] != list(range(1, last + 1)):
            raise RunFolderError(f"{str(self.jsonl)!r} is damaged: it lacks {self.key}s; train in a new folder")
        write_atomically(self.jsonl, "".join(_json(line) for line in lines).encode())
        write_atomically(self.csv, _csv(lines, header=True).encode())
        return lines

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Write more lines; the disk has them when this returns."""
        if not lines:
            return
        fresh = not self.csv.exists() or not self.csv.stat().st_size
        _append(self.jsonl, "".join(_json(line) for line in lines))
        _append(self.csv, _csv(lines, header=fresh))

    def read(self) -> list[dict[str, Any]]:
        """Every line of a finished run.

        Raises:
            RunFolderError: A line is damaged.
        """
        if not self.jsonl.exists():
            return []
        try:
            lines = [json.loads(line) for line in self.jsonl.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise RunFolderError(f"{str(self.jsonl)!r} is damaged: {error}") from error
        if not all(isinstance(line, dict) and isinstance(line.get(self.key), int) for line in lines):
            raise RunFolderError(f"{str(self.jsonl)!r} is damaged: a line without {self.key}; train in a new folder")
        return lines

    def _whole_lines(self) -> list[dict[str, Any]]:
        """All lines but the one that a killed process may have left half-written at the end."""
        if not self.jsonl.exists():
            return []
        text = self.jsonl.read_bytes()
        if not text.endswith(b"\n"):
            write_atomically(self.jsonl, text[: text.rfind(b"\n") + 1])
        return self.read()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """What each finished epoch of a run measured, in order."""
    lines = Log(folder, "metrics", "epoch").read()
    if not all("loss" in line for line in lines):
        raise RunFolderError(
            f"{str(folder / 'metrics.jsonl')!r} is damaged: a line without loss; train in a new folder"
        )
    return lines


def read_ratios(folder: Path) -> list[dict[str, Any]]:
    """AdaLASE's ratios at each step of a run, in order; empty for any other run."""
    return Log(folder, "ratios", "step").read()


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else RunFolderError
        raise kind(
            f"can't write {str(path)!r}: {error.strerror or error}; what was saved before is kept, and the same "
            "command goes on from there"
        ) from error


def _json(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _csv(lines: list[dict[str, Any]], *, header: bool) -> str:
    if not lines:
        return ""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()
