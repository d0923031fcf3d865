"""Where the runs of all studies lie: one folder per run, named by its key; what is finished is never done again."""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from layerlens.errors import RunFolderError, UnknownNameError, closest
from layerlens.files import numbered, read_json, write_json

SCHEMA = 1
STATES = ("done", "running", "failed", "missing")
LOG_LINES = 20
RESULT_KEYS = {"run", "epochs", "loss", "knn", "wall_s", "checkpoints", "environment"}
NO_FAILURES: dict[str, Any] = {"attempts": [], "given_up": False}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run as `status` sees it.

    Attributes:
        key: Its folder's name.
        arm: Whose it is.
        values: Of the axes, and the seed.
        state: done, running, failed (given up) or missing.
        epochs: Finished ones.
        of: All of them.
        wall_s: Seconds of training, of a finished run.
        problem: What went wrong last.
    """

    key: str
    arm: str
    values: dict[str, Any]
    state: str
    epochs: int
    of: int
    wall_s: float | None
    problem: str | None


class Store:
    """A folder of runs.

    It holds `runs/KEY/` (what `train` writes, and what was measured afterwards), `logs/KEY.txt`, `failures/KEY.json`
    and `studies/NAME/`. Run folders may be copied from one store into another. Nothing here imports torch, so that
    `layerlens study status` answers at once.

    Args:
        folder: Made by the first study that is run in it.

    Raises:
        RunFolderError: A newer layerlens wrote it, it holds other things, or it can't be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        about = self.folder / "store.json"
        if about.exists():
            schema = read_json(about).get("schema")
            if not isinstance(schema, int) or schema > SCHEMA:
                raise RunFolderError(
                    f"{str(folder)!r} was written by a newer layerlens (store schema {schema!r}, this one knows "
                    f"{SCHEMA}); update layerlens, or choose another --store"
                )
        elif self.folder.exists() and not _can_be_store(self.folder):
            raise RunFolderError(f"{str(folder)!r} exists and is no store; choose a new or empty one with --store")

    # --- runs ---

    def run_folder(self, key: str) -> Path:
        """Where a run lies, or will."""
        return self.folder / "runs" / key

    def log(self, key: str) -> Path:
        """What a run and its workers said."""
        return self.folder / "logs" / f"{key}.txt"

    def is_done(self, key: str, files: tuple[str, ...] = ()) -> bool:
        """Whether a run is finished and everything asked for is measured."""
        folder = self.run_folder(key)
        return self._result(key) is not None and all((folder / name).exists() for name in files)

    def is_running(self, key: str) -> bool:
        """Whether some process works in a run's folder now."""
        try:
            with (self.run_folder(key) / ".lock").open("r+") as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        except OSError:  # a copied store may be read-only
            return False
        return False

    def epochs_done(self, key: str) -> int:
        """Epochs that an unfinished run has behind it."""
        with suppress(OSError):
            return (self.run_folder(key) / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    def set_damage_aside(self, key: str, say: Callable[[str], None]) -> None:
        """Move a result that can't be read out of the way, so that the run is done again."""
        path = self.run_folder(key) / "result.json"
        if path.exists() and self._result(key) is None:
            aside = numbered(path.with_name("result.json.damaged"))
            try:
                os.replace(path, aside)
            except FileNotFoundError:  # another process was quicker
                return
            say(f"{str(path)!r} was damaged; it is {aside.name!r} now and the run is done again")
            self._forget_measures(key)

    def _forget_measures(self, key: str) -> None:
        """What was measured before a result was damaged is measured again."""
        for path in (self.run_folder(key) / "analysis").glob("study-*.json"):
            path.unlink()

    def _result(self, key: str) -> dict[str, Any] | None:
        """What a finished run says; None for one that is unfinished or damaged."""
        try:
            content = json.loads((self.run_folder(key) / "result.json").read_bytes())
        except (OSError, ValueError):
            return None
        return content if self._is_result(key, content) else None

    def _is_result(self, key: str, content: Any) -> bool:
        """Whether `read_result` would take it; that one imports torch."""
        if not isinstance(content, dict) or not content.keys() >= RESULT_KEYS:
            return False
        seconds, names = content["wall_s"], content["checkpoints"]
        fine = isinstance(seconds, int | float) and not isinstance(seconds, bool) and math.isfinite(seconds)
        kept = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
        return bool(fine and kept and all((self.run_folder(key) / name).is_file() for name in names))

    # --- what went wrong ---

    def failures(self, key: str) -> dict[str, Any]:
        """The attempts at a run that failed, and whether it was given up."""
        try:
            known = read_json(self.folder / "failures" / f"{key}.json")
        except RunFolderError:  # there are none; or the history is damaged, which is no result, and starts anew
            return NO_FAILURES
        attempts = known.get("attempts")
        fine = isinstance(attempts, list) and all(isinstance(a, dict) and "error" in a for a in attempts)
        return {"attempts": attempts, "given_up": known.get("given_up") is True} if fine else NO_FAILURES

    def add_failure(self, key: str, kind: str, error: str, *, given_up: bool, since: int = 0) -> None:
        """Note a failed attempt with the last lines of its log, which begins at so many bytes."""
        known = self.failures(key)
        attempt = {
            "at": datetime.now(timezone.utc).isoformat(timespec="seconds"), "host": socket.gethostname(), "kind": kind,
            "error": error, "log": self.last_lines(key, since=since),
        }  # fmt: skip
        content = {"attempts": [*known["attempts"], attempt][-50:], "given_up": given_up}
        write_json(self.folder / "failures" / f"{key}.json", content)

    def last_lines(self, key: str, count: int = LOG_LINES, *, since: int = 0) -> list[str]:
        """The end of a run's log, or of what was added to it behind `since` bytes."""
        try:
            return self.log(key).read_bytes()[since:].decode(errors="replace").splitlines()[-count:]
        except OSError:
            return []

    # --- studies ---

    def study_folder(self, name: str) -> Path:
        """Where a study's plan, table and figures lie."""
        return self.folder / "studies" / name

    def studies(self) -> list[str]:
        """Names of the studies that were begun here."""
        return sorted(path.parent.name for path in self.folder.glob("studies/*/plan.json"))

    def write_plan(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep what a study wants, for `status` and for its tables; the store begins here."""
        if not (self.folder / "store.json").exists():
            write_json(self.folder / "store.json", {"schema": SCHEMA})
        write_json(self.study_folder(name) / "plan.json", {"schema": SCHEMA, **content})

    def read_plan(self, name: str) -> dict[str, Any]:
        """What a study wants.

        Raises:
            UnknownNameError: No such study was begun here.
        """
        path = self.study_folder(name) / "plan.json"
        if not path.exists():
            known = self.studies()
            hint = closest(name, known) if known else "none was begun here"
            raise UnknownNameError(f"no study {name!r} in {str(self.folder)!r}; {hint}")
        return read_json(path)

    def status(self, name: str) -> list[Row]:
        """Each run of a study and how far it is."""
        folder = self.folder / "failures"
        failed = {path.stem for path in folder.glob("*.json")}
        return [self._row(run, run["key"] in failed) for run in self.read_plan(name)["runs"]]

    def _row(self, run: dict[str, Any], failed: bool) -> Row:
        key, of = run["key"], run["epochs"]
        result = self._result(key)
        problems = self.failures(key) if failed else NO_FAILURES
        problem = str(problems["attempts"][-1]["error"]) if problems["attempts"] else None
        done = result is not None and all((self.run_folder(key) / file).exists() for file in run["files"])
        if done:
            assert result is not None
            state, epochs = "done", of
        else:
            epochs = self.epochs_done(key) if result is None else of
            state = "running" if self.is_running(key) else "failed" if problems["given_up"] else "missing"
        return Row(
            key=key, arm=run["arm"], values={**run["values"], "seed": run["seed"]}, state=state, epochs=epochs, of=of,
            wall_s=result["wall_s"] if result else None, problem=None if done else problem,
        )  # fmt: skip


def _can_be_store(folder: Path) -> bool:
    """Whether a folder is empty, or holds what a store does."""
    names = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.is_dir() else {"a file"}
    return not names or bool(names & {"store.json", "runs", "studies"})


def time_left_s(rows: list[Row], workers: int | None = None) -> float | None:
    """Seconds of training until a study is done, measuring left out.

    That is the remaining epochs at the mean pace of its finished runs, shared among workers.

    Args:
        rows: From `Store.status`.
        workers: At work; as many as are running now by default. None comes back where nothing is finished yet.
    """
    once = {row.key: row for row in rows}.values()
    finished = [row for row in once if row.wall_s is not None]
    epochs = sum(row.of for row in finished)
    if not epochs:
        return None
    pace = sum(row.wall_s or 0.0 for row in finished) / epochs
    left = sum(row.of - row.epochs for row in once if row.state in ("running", "missing"))
    at_work = workers or max(sum(row.state == "running" for row in once), 1)
    return pace * left / at_work
