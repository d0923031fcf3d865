"""Jobs as tasks of a Ray cluster: one that runs already, or one started here for the study."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

from layerlens.errors import ConfigError, WorkerError, closest, require
from layerlens.experiments.engines import load_extra
from layerlens.experiments.job import DIED, FAILED, Ended, Job, perform_there

OPTIONS = ("address", "gpus", "autoscaling")
QUEUED = 2  # tasks per place: the next one waits at the cluster, and an autoscaler sees what is wanted
LOOK_AGAIN_S = 2.0  # at the nodes
REACHED_S = 5.0
GONE_S = 10.0  # for the workers to end at the close
OBJECT_STORE = 80 * 2**20  # bytes; a job and how it ended are all that passes through it


class RayEngine:
    """Ray places the jobs, and says when one died; which run is done when, and again, stays with the runner.

    Args:
        workers: Jobs at once; by default what the nodes have room for, as they come and go, and as many in the queue.
        threads: CPU cores of each job; 1 by default.
        address: `HOST:PORT` of a running cluster, or `auto` for one of this machine; by default what RAY_ADDRESS says,
            or else a cluster is started here and ended with the study.
        gpus: Of each job, also a part of one such as 0.5; by default 1 where the cluster has any.
        autoscaling: Whether the cluster adds nodes when they are wanted, so that jobs may wait for larger ones.
        **unknown: Refused.

    Raises:
        ConfigError: An unknown option, a wrong value.
        ExtraMissingError: Ray is not installed.
        WorkerError: No cluster at that address, or none of its nodes is large enough for a job.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        threads: int | None = None,
        address: str | None = None,
        gpus: float | str | None = None,
        autoscaling: bool | str = False,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            raise ConfigError(f"unknown option {name!r} of the engine ray; {closest(name, OPTIONS)}")
        require(workers is None or workers >= 1, "workers", workers, "1 or more")
        require(threads is None or threads >= 1, "threads", threads, "1 or more")
        self.workers, self.threads, wanted = workers, threads or 1, _gpus(gpus)
        waits = _yes_or_no("autoscaling", autoscaling)
        self._ray = _load()
        self._jobs: dict[Any, Job] = {}
        self._seen, self._places = float("-inf"), 0
        self._usual = signal.getsignal(signal.SIGTERM)
        self._mine = not self._ray.is_initialized()
        try:
            if self._mine:
                _connect(self._ray, address or os.environ.get("RAY_ADDRESS") or "local", _cores(workers, self.threads))
            self.gpus = wanted if wanted is not None else float(any(node.get("GPU", 0) for node in self._nodes()))
            if not waits:
                self._check_fits()
            self._task = self._make_task()
        except BaseException:
            self.close()
            raise

    @property
    def free(self) -> int:
        """How many more jobs the cluster is given now; more nodes, more jobs."""
        if self.workers is not None:
            return max(self.workers - len(self._jobs), 0)
        if time.monotonic() - self._seen > LOOK_AGAIN_S:
            self._seen, self._places = time.monotonic(), sum(map(self._fitting, self._nodes()))
        return max(QUEUED * max(self._places, 1) - len(self._jobs), 0)

    def start(self, job: Job) -> None:
        """Queue one task; Ray finds a node for it."""
        self._jobs[self._task.remote(replace(job, threads=self.threads), os.getcwd())] = job

    def wait(self, timeout_s: float) -> list[Ended]:
        """Jobs that ended since the last call, those of dead workers and nodes among them."""
        if not self._jobs:
            return []
        ready, rest = self._ray.wait(list(self._jobs), num_returns=1, timeout=timeout_s)
        if ready and rest:
            ready += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return [self._ended(reference) for reference in ready]

    def close(self) -> None:
        """End all tasks, and the cluster if it was started here; from another one, take leave."""
        try:
            for reference in self._jobs:
                self._ray.cancel(reference, force=True)
            if self._jobs:
                self._ray.wait(list(self._jobs), num_returns=len(self._jobs), timeout=GONE_S)
        finally:
            self._jobs.clear()
            if self._mine:
                self._ray.shutdown()
            _handle_terminate(self._usual)

    def _ended(self, reference: Any) -> Ended:
        job, errors = self._jobs.pop(reference), self._ray.exceptions
        try:
            ended: Ended = self._ray.get(reference)
        except errors.OutOfMemoryError:
            return Ended(key=job.key, kind=DIED, error="Ray ended the worker, because memory ran out on its node")
        except errors.NodeDiedError:
            return Ended(key=job.key, kind=DIED, error="the Ray node that worked on it is gone")
        except errors.WorkerCrashedError:
            return Ended(key=job.key, kind=DIED, error="the Ray worker died, or its node did")
        except errors.RayTaskError as error:
            text = f"{type(error.cause).__name__}: {error.cause}"
            return Ended(key=job.key, kind=FAILED, error=f"the Ray worker could not begin: {_line(text)}")
        except errors.RayError as error:
            return Ended(key=job.key, kind=DIED, error=f"Ray says {type(error).__name__}: {_line(str(error))}")
        return ended

    def _make_task(self) -> Any:
        """What every job is: no retries of Ray's own, since the runner knows which are worth it."""
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        place = {"num_cpus": self.threads, "num_gpus": self.gpus, "runtime_env": {"env_vars": threads}}
        return self._ray.remote(perform_there).options(name="layerlens", max_retries=0, **place)

    def _nodes(self) -> list[dict[str, float]]:
        """What each node has."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _fitting(self, node: dict[str, float]) -> int:
        """How many jobs a node has room for."""
        by_cpu, gpus = int(node.get("CPU", 0) // self.threads), int(node.get("GPU", 0))
        if not self.gpus:
            return by_cpu
        return min(by_cpu, gpus * int(1 / self.gpus + 1e-9) if self.gpus < 1 else gpus // int(self.gpus))

    def _check_fits(self) -> None:
        nodes = self._nodes()
        if not any(map(self._fitting, nodes)):
            sizes = ", ".join(sorted({f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes}))
            raise WorkerError(
                f"no node of the Ray cluster has {self.threads} CPUs and {self.gpus:g} GPUs for a job; there are nodes "
                f"of {sizes}. Lower threads or gpus, or set autoscaling=yes if such nodes will come"
            )


def _load() -> Any:
    """The package, told what it should not do."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    return load_extra("ray", "Ray", "ray")


def _connect(ray: Any, address: str, cores: int) -> None:
    """Join a cluster, or start one.

    Raises:
        WorkerError: There is none, it doesn't answer, or it can't be started.
    """
    settings: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        settings |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    elif address != "auto":
        _check_reached(address)
    try:
        ray.init(**settings)
        _hush()
    except (Exception, SystemExit) as error:  # Ray ends the process where a server doesn't speak its language
        with suppress(Exception):
            ray.shutdown()
        what = "a Ray cluster could not be started here" if address == "local" else f"no Ray cluster at {address!r}"
        text = "it does not answer as one" if isinstance(error, SystemExit) else _line(str(error))
        raise WorkerError(f"{what}: {text}") from error


def _hush() -> None:
    """Keep what raylets say of dying nodes off stdout, where tables go; Ray has no setting for that, only this flag."""
    importlib.import_module("ray._private.worker")._worker_logs_enabled = False  # type: ignore[attr-defined]


def _check_reached(address: str) -> None:
    """Whether something listens there; Ray itself takes a minute and many lines to find out."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise WorkerError(f"address={address!r}; allowed: auto, local or HOST:PORT as `ray start --head` prints it")
    try:
        socket.create_connection((host, int(port)), timeout=REACHED_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise WorkerError(
            f"no Ray cluster at {address!r}: {reason}. Start one with `ray start --head --port={port}`, or leave "
            "address (and RAY_ADDRESS) out to work on this machine"
        ) from error


def _gpus(given: float | str | None) -> float | None:
    if given is None:
        return None
    try:
        count = float(given)
    except ValueError:
        count = -1.0
    require(0 <= count <= 1 or (count.is_integer() and count > 1), "gpus", given, "0, a part of 1, 1, 2, …")
    return count


def _yes_or_no(name: str, given: bool | str) -> bool:
    words = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
    text = str(given).lower()
    require(text in words, name, given, "yes or no")
    return words[text]


def _cores(workers: int | None, threads: int) -> int:
    """CPUs that a cluster of this machine counts; a number that only says how many jobs it takes at once."""
    return workers * threads if workers is not None else max(len(os.sched_getaffinity(0)), threads)


def _line(text: str, longest: int = 300) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= longest else joined[: longest - 1] + "…"


def _handle_terminate(handler: Any) -> None:
    """Put the handler back that Ray has replaced by its own; only a main thread may, and only there did it."""
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGTERM, handler)
