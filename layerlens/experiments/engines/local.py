"""Worker processes on this machine, each with its share of the threads and a GPU of its own."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import connection
from typing import Any

from layerlens.errors import ConfigError, require
from layerlens.experiments.job import DIED, LATE, Ended, Job, perform
from layerlens.training.launch import end_with_parent, interrupts_held

GRACE_S = 15.0  # a worker past its limit ends itself; one that can't, such as a stopped one, is ended


class LocalEngine:
    """Processes that live as long as the study and take one job after another, so that torch is imported once.

    Args:
        workers: How many; one per GPU, or else one per CPU core by default.
        threads: Of each; the cores divided among them by default.

    Raises:
        ConfigError: Fewer than one worker or thread, or another option.
    """

    def __init__(self, *, workers: int | None = None, threads: int | None = None, **unknown: Any) -> None:
        for name in unknown:
            raise ConfigError(f"unknown option {name!r} of the engine local; it has none but workers and threads")
        gpus, cores = _gpus(), len(os.sched_getaffinity(0))
        count = workers if workers is not None else len(gpus) or cores
        require(count >= 1, "workers", workers, "1 or more")
        require(threads is None or threads >= 1, "threads", threads, "1 or more")
        self.threads = share = threads or max(cores // count, 1)
        self.workers = [_Worker(share, gpus[k % len(gpus)] if gpus else None) for k in range(count)]

    @property
    def free(self) -> int:
        """Workers without a job."""
        return sum(worker.job is None for worker in self.workers)

    def start(self, job: Job) -> None:
        """Give a job to a worker that has none."""
        next(worker for worker in self.workers if worker.job is None).start(job)

    def wait(self, timeout_s: float) -> list[Ended]:
        """Jobs that ended since the last call, those of dead workers among them."""
        busy = [worker for worker in self.workers if worker.job is not None]
        if busy:
            connection.wait([part for worker in busy for part in worker.signs], timeout=timeout_s)
        return [ended for worker in busy if (ended := worker.ended()) is not None]

    def pids(self) -> list[int]:
        """Of the workers that have a job now."""
        return [worker.process.pid for worker in self.workers if worker.job is not None]

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            worker.stop()


class _Worker:
    """One process, its pipe, and the job that it has."""

    def __init__(self, threads: int, gpu: str | None) -> None:
        self.threads, self.gpu = threads, gpu
        self.process: Any = None
        self.pipe: Any = None
        self.job: Job | None = None
        self.due = float("inf")

    @property
    def signs(self) -> list[Any]:
        return [self.pipe, self.process.sentinel]

    def start(self, job: Job) -> None:
        if self.process is None or not self.process.is_alive():
            self._spawn()
        self.job = replace(job, threads=self.threads)
        self.due = time.monotonic() + job.limit_s + GRACE_S if job.limit_s else float("inf")
        with suppress(BrokenPipeError):  # it died this moment; `ended` will find out
            self.pipe.send(self.job)

    def ended(self) -> Ended | None:
        """How the job ended, if it did."""
        job = self.job
        assert job is not None
        with suppress(EOFError, OSError):
            if self.pipe.poll():
                found: Ended = self.pipe.recv()
                self.job = None
                return found
        if self.process.is_alive():
            if time.monotonic() < self.due:
                return None
            self.stop()
            return Ended(key=job.key, kind=LATE, error=f"took longer than {job.limit_s:g} s, and did not end itself")
        self.process.join()
        self.job = None
        return Ended(key=job.key, kind=DIED, error=_last_words(self.process.exitcode))

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process, self.job = None, None

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other,), name="layerlens-worker")
        settings = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        if self.gpu is not None:
            settings["CUDA_VISIBLE_DEVICES"] = self.gpu
        with interrupts_held(), _environment(settings):
            self.process.start()
        other.close()


def _serve(pipe: Any) -> None:
    """Take jobs until the parent is gone."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    faulthandler.enable()  # a crash says where, in the log of its run
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(perform(job))


def _last_words(code: int | None) -> str:
    if code is not None and code < 0:
        hint = ", as the system does when memory runs out" if code == -9 else ""
        return f"the worker was killed by signal {-code}{hint}"
    return f"the worker ended with exit code {code}"


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Processes started inside the block see these variables."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to, one GPU at a time."""
    import torch

    named, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(k) for k in range(count)]
