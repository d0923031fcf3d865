"""What a worker does: train one run, measure it, say how it ended. The same on every engine."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerlens.errors import (
    ConfigError,
    DamagedStateError,
    DeviceMemoryError,
    DiskFullError,
    FolderInUseError,
    LayerlensError,
    RunFolderError,
)
from layerlens.files import numbered, read_json

REFUSED, FAILED, BUSY, FULL, DONE, DIED, LATE = "refused", "failed", "busy", "disk full", "done", "died", "too long"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run as it travels to a worker; plain data.

    Attributes:
        key: Of the run.
        folder: Of the run.
        log: Where everything that the worker says meanwhile goes.
        settings: Of the run, as for `make_config`.
        start: Folder of the run from whose last checkpoint it starts.
        measured: (kind, data, file) of what is measured afterwards.
        measure: Settings of the measuring.
        device: `auto`, `cpu` or `cuda`.
        limit_s: Seconds after which the worker ends itself; 0 for none.
        threads: Of the CPU; 0 for as many as PyTorch chooses.
    """

    key: str
    folder: str
    log: str
    settings: dict[str, Any]
    start: str | None
    measured: tuple[tuple[str, str | None, str], ...]
    measure: dict[str, Any]
    device: str = "auto"
    limit_s: float = 0.0
    threads: int = 0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a job ended.

    Attributes:
        key: Of the run.
        kind: `done`; `busy` (another process works in the folder); `refused` (it would fail again); `failed` or
            `died` (it may not); `too long`; `disk full`.
        error: In one line; empty if done.
    """

    key: str
    kind: str
    error: str = ""


def perform(job: Job) -> Ended:
    """Train and measure one run, in the process that calls; finished work is not done again."""
    with _said_in(Path(job.log)), _ended_after(job.limit_s):
        try:
            _work(job)
        except FolderInUseError as error:
            return Ended(key=job.key, kind=BUSY, error=str(error))
        except DiskFullError as error:
            return Ended(key=job.key, kind=FULL, error=str(error))
        except Exception as error:  # whatever a model, its data or a device raises: the study goes on without it
            traceback.print_exc()
            again = isinstance(error, DeviceMemoryError | RunFolderError) or not isinstance(error, LayerlensError)
            text = str(error) if isinstance(error, LayerlensError) else f"{type(error).__name__}: {error}"
            return Ended(key=job.key, kind=FAILED if again else REFUSED, error=" ".join(text.split()))
    return Ended(key=job.key, kind=DONE)


def perform_there(job: Job, directory: str) -> Ended:
    """`perform`, in a process that began elsewhere: from a directory, and with the modules that lie there.

    Args:
        job: What to do.
        directory: In which the study was started; a node without it, or without the right to it, fails the job.
    """
    try:
        os.chdir(directory)
    except OSError as error:
        where = f"{socket.gethostname()!r} can't enter {directory!r}, where the study was started"
        return Ended(key=job.key, kind=FAILED, error=f"{where}: {error.strerror}; it must be shared by all nodes")
    if directory not in sys.path:
        sys.path.insert(0, directory)
    return perform(job)


def _work(job: Job) -> None:
    import torch

    from layerlens.devices import keep_freed_memory
    from layerlens.experiments.measuring import measure_run
    from layerlens.training.config import make_config
    from layerlens.training.loop import train
    from layerlens.training.run_folder import read_result

    if job.threads:
        torch.set_num_threads(job.threads)
    keep_freed_memory()
    folder, settings = Path(job.folder), dict(job.settings)
    spec, model = settings["data"], settings["model"]
    dataset = _dataset(spec)
    if dataset.fingerprint() != settings["data_sha256"]:
        raise ConfigError(f"the contents of {spec!r} changed since the study was planned; start it again")
    if not (folder / "result.json").exists():  # a finished run may have come without its start
        if job.start is not None:
            settings["init"] = str(Path(job.start) / read_result(Path(job.start)).checkpoints[-1])
        config = make_config(settings)
        _set_other_start_aside(folder, config.init)
        try:
            train(config, folder, dataset=dataset, device=job.device)
        except DamagedStateError:  # so that the next attempt begins anew
            state = folder / "resume.pt"
            os.replace(state, numbered(state.with_name(".resume.pt.aside")))
            raise
    for kind, data, file in job.measured:
        other = _dataset(data or spec)
        measure_run(folder, kind, file, dataset=other, model=model, measure=job.measure, device=job.device)


def _set_other_start_aside(folder: Path, init: str | None) -> None:
    """Move away an unfinished run that began from other weights: its start was trained anew since."""
    from layerlens.training.checkpoint import fingerprint

    if init is None or not (folder / "config.json").exists():
        return
    began = read_json(folder / "config.json").get("config")
    if isinstance(began, dict) and began.get("init_sha256") not in (None, fingerprint(init)):
        aside = numbered(folder.with_name(f".{folder.name}.aside"))
        print(f"its start was trained anew: the unfinished run is {aside.name!r} now, and begins again")
        os.replace(folder, aside)


_LOADED: dict[str, Any] = {}


def _dataset(spec: str) -> Any:
    """Data that this worker has loaded, or loads; only the last two are kept."""
    from layerlens.data import load_data

    if spec not in _LOADED:
        while len(_LOADED) > 1:
            del _LOADED[next(iter(_LOADED))]
        _LOADED[spec] = load_data(spec)
    return _LOADED[spec]


@contextmanager
def _said_in(log: Path) -> Iterator[None]:
    """Everything that this process prints inside the block, its libraries included, goes to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    try:
        with log.open("a", encoding="utf-8") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(kept, start=1):
            os.dup2(copy, number)
            os.close(copy)


@contextmanager
def _ended_after(limit_s: float) -> Iterator[None]:
    """The process writes where it hangs, and ends, once the block has taken that long; no lock can hold this up."""
    if limit_s:
        faulthandler.dump_traceback_later(limit_s, exit=True, file=2)
    try:
        yield
    finally:
        if limit_s:
            faulthandler.cancel_dump_traceback_later()
