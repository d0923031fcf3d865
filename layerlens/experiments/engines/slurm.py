"""Jobs of a SLURM cluster, each submitted by itself; or the same on this machine, to try it out."""

from __future__ import annotations

import getpass
import importlib
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerlens.errors import ConfigError, WorkerError, check_known, closest, require
from layerlens.experiments.engines import load_extra
from layerlens.experiments.job import DIED, Ended, Job, perform_there

CLUSTERS = ("slurm", "local", "debug")
IN_QUEUE = 64  # jobs, where the user doesn't say
USUAL_MIN = 120  # of a job; a run that takes longer is requeued, and short jobs start sooner
ASK_S = 30.0  # between two looks at the queue; results show by themselves
LOST_S = 60.0  # a job that neither the queue nor the accounting knows for that long is gone
RESULT_S = 5.0  # that a shared folder may need to show what a node has written
REFUSALS = 20  # of submissions in a row, `ASK_S` apart, before the study stops
MARGIN_MIN = 5  # beyond a job's own limit, so that it says itself where it was before SLURM ends it


class SlurmEngine:
    """Each run is one SLURM job, which SLURM requeues when it is preempted or its time is up; it goes on from there.

    Args:
        workers: Jobs in the queue and at work at once; 64 by default, or the CPU cores on this machine.
        threads: CPU cores of each job; 1 by default.
        cluster: `slurm`; or `local` (processes of this machine) or `debug` (this process), to try a study out.
        log_folder: Where scripts, pickles and what SLURM says are kept, seen by all nodes; by default `slurm` beside
            the logs of the store.
        **options: Of the jobs, see `OPTIONS`; the words of a command line are understood.

    Raises:
        ConfigError: An unknown option, a wrong value.
        ExtraMissingError: Submitit is not installed.
        WorkerError: This machine can't submit SLURM jobs; at `start`, SLURM takes none.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        threads: int | None = None,
        cluster: str = "slurm",
        log_folder: str | None = None,
        **options: Any,
    ) -> None:
        require(workers is None or workers >= 1, "workers", workers, "1 or more")
        require(threads is None or threads >= 1, "threads", threads, "1 or more")
        check_known("cluster", cluster, CLUSTERS)
        self.threads, self.cluster, self.log_folder = threads or 1, cluster, log_folder
        self.options = _read(options)
        self._submitit = load_extra("submitit", "submitit", "slurm")
        if cluster == "slurm":
            _check_slurm()
        here = max(len(os.sched_getaffinity(0)) // self.threads, 1)
        self.workers = workers or (IN_QUEUE if cluster == "slurm" else here)
        self._executor: Any = None
        self._jobs: list[_Submitted] = []
        self._held: list[Job] = []
        self._refusals, self._taken, self._again, self._ask = 0, False, 0.0, 0.0

    @property
    def free(self) -> int:
        """How many more jobs fit in the queue; none while SLURM takes no more."""
        return 0 if self._held else max(self.workers - len(self._jobs), 0)

    def start(self, job: Job) -> None:
        """Submit a job; one that SLURM doesn't take now, as a user has a limit there, is tried again in `wait`.

        Raises:
            WorkerError: SLURM doesn't take the first job, as with a partition that is not there.
        """
        self._held.append(job)
        self._submit_held()

    def wait(self, timeout_s: float) -> list[Ended]:
        """Jobs that ended since the last call, in whatever way."""
        end = time.monotonic() + timeout_s
        while True:
            if self._held and time.monotonic() >= self._again:
                self._submit_held()
            self._ask_slurm()
            if ended := [found for entry in list(self._jobs) if (found := self._ended(entry)) is not None]:
                return ended
            if (left := end - time.monotonic()) <= 0 or not (self._jobs or self._held):
                return []
            time.sleep(min(left, 0.2))

    def close(self) -> None:
        """Cancel every job that is left, queued or at work."""
        self._held.clear()
        _cancel(self.cluster, [entry.handle for entry in self._jobs])
        self._jobs.clear()

    def _submit_held(self) -> None:
        while self._held:
            try:
                handle = self._submit(self._held[0])
            except Exception as error:  # submitit raises many kinds; they all mean that the queue did not take it
                self._refuse(error)
                return
            self._jobs.append(_Submitted(self._held.pop(0), handle))
            self._refusals, self._taken = 0, True

    def _refuse(self, error: Exception) -> None:
        self._refusals += 1
        self._again = time.monotonic() + ASK_S
        if not self._taken or self._refusals > REFUSALS:
            raise WorkerError(
                f"SLURM does not take the jobs: {_last_line(error)}. Mend it (partition, account, time_min, gpus, …) "
                "and start again; what is finished stays"
            ) from error

    def _submit(self, job: Job) -> Any:
        executor = self._executor = self._executor or self._make_executor(job)
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        executor.update_parameters(**self._parameters(job, threads))
        with self._submitit.helpers.environment_variables(**threads):
            return executor.submit(Attempt(replace(job, threads=self.threads), os.getcwd()))

    def _make_executor(self, job: Job) -> Any:
        folder = self.log_folder or str(Path(job.log).parent / "slurm")
        return self._submitit.AutoExecutor(folder=folder, cluster=self.cluster)

    def _parameters(self, job: Job, threads: dict[str, str]) -> dict[str, Any]:
        """What submitit is told of a job."""
        given = dict(self.options)
        minutes = math.ceil(job.limit_s / 60) + MARGIN_MIN if job.limit_s else USUAL_MIN
        minutes = given.pop("time_min", minutes)
        general = {"name": f"layerlens-{job.key[:8]}", "timeout_min": minutes, "cpus_per_task": self.threads}
        general |= {"gpus_per_node": given.pop("gpus", None), "mem_gb": given.pop("memory_gb", None)}
        extra = {name: given.pop(name) for name in _ADDED if name in given}
        setup = [f"export {name}={value}" for name, value in threads.items()] + given.pop("setup", [])
        special = {**given, "setup": setup, "additional_parameters": extra or None, "stderr_to_stdout": True}
        special["srun_args"] = [f"--cpus-per-task={self.threads}"]  # srun does not take it from sbatch in SLURM 22.05
        return general | {f"slurm_{name}": value for name, value in special.items()}

    def _ended(self, entry: _Submitted) -> Ended | None:
        handle, key = entry.handle, entry.job.key
        if self.cluster == "debug" or handle.paths.result_pickle.exists():
            self._jobs.remove(entry)
            try:
                ended: Ended = handle.result()
            except Exception as error:  # from the node: the job could not begin
                return Ended(key=key, kind=DIED, error=f"job {handle.job_id}: {_last_line(error)}")
            return ended
        if (error_line := self._death(entry)) is None:
            return None
        self._jobs.remove(entry)
        _cancel(self.cluster, [handle])  # so that SLURM does not bring back what is begun anew from here
        return Ended(key=key, kind=DIED, error=error_line)

    def _death(self, entry: _Submitted) -> str | None:
        """What SLURM says of a job that ended without a word of its own; None for one that may still say it."""
        handle = entry.handle
        if not handle.done():
            return f"SLURM has lost job {handle.job_id}" if entry.lost else None
        here = self.cluster == "local"
        if handle.paths.result_pickle.exists() or (not here and entry.late()):  # a last word since, or on its way
            return None
        return (
            f"the process of job {handle.job_id} died" if here else f"SLURM says {handle.state} of job {handle.job_id}"
        )

    def _ask_slurm(self) -> None:
        """Have the states of all jobs looked up, now and then, and note those that nobody knows."""
        if self.cluster != "slurm" or not self._jobs or time.monotonic() < self._ask:
            return
        self._ask = time.monotonic() + ASK_S
        self._jobs[0].handle.get_info(mode="force")  # of all jobs, by one call
        queued = _queued()
        for entry in self._jobs:
            entry.note(queued)


@dataclass
class _Submitted:
    """A job in the queue, and since when the queue has not shown it."""

    job: Job
    handle: Any
    missing: float | None = None
    over: float | None = None

    @property
    def lost(self) -> bool:
        return self.missing is not None and time.monotonic() - self.missing > LOST_S

    def late(self) -> bool:
        """Whether a result may still come, from the first such question on."""
        self.over = self.over or time.monotonic()
        return time.monotonic() - self.over < RESULT_S

    def note(self, queued: set[str] | None) -> None:
        if queued is None or self.handle.job_id in queued:
            self.missing = None
        elif self.missing is None:
            self.missing = time.monotonic()


@dataclass(frozen=True)
class Attempt:
    """What is pickled for a node: called there, and asked there for what to requeue when the node is taken away."""

    job: Job
    directory: str

    def __call__(self) -> Ended:
        """Do the job; an earlier attempt's checkpoints are found in its folder."""
        return perform_there(self.job, self.directory)

    def checkpoint(self) -> Any:
        """The same again: all that has been reached is in the run's folder already."""
        return importlib.import_module("submitit.helpers").DelayedSubmission(self)

    __submitit_checkpoint__ = checkpoint  # its name in newer versions of submitit


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def _positive(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        number = kind(text)
        if not 0 < number < math.inf:
            raise ValueError
        return number

    return read


def _commands(text: str) -> list[str]:
    return [text]


_count = _positive(int)
_ADDED = ("reservation", "licenses", "nice")
OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "partition": (str, "a name"),
    "account": (str, "a name"),
    "qos": (str, "a name"),
    "time_min": (_count, "whole minutes, from 1"),
    "memory_gb": (_positive(float), "a number above 0"),
    "gpus": (_natural, "a whole number, from 0"),
    "gres": (str, "as for sbatch, such as gpu:a100:1"),
    "constraint": (str, "as for sbatch"),
    "nodelist": (str, "as for sbatch"),
    "exclude": (str, "as for sbatch"),
    "reservation": (str, "a name"),
    "licenses": (str, "as for sbatch"),
    "nice": (int, "a whole number"),
    "comment": (str, "a text"),
    "mail_type": (str, "as for sbatch"),
    "mail_user": (str, "an address"),
    "signal_delay_s": (_count, "whole seconds, from 1"),
    "setup": (_commands, "a shell command, such as module load cuda"),
}  # name -> how its text is read, and what is allowed


def _read(options: dict[str, Any]) -> dict[str, Any]:
    """Options by their names, as what they mean.

    Raises:
        ConfigError: An unknown one, or a value that is not allowed.
    """
    read = {}
    for name, value in options.items():
        if name not in OPTIONS:
            raise ConfigError(
                f"unknown option {name!r} of the engine slurm; {closest(name, [*OPTIONS, 'cluster', 'log_folder'])}"
            )
        if value is None:
            continue
        reader, allowed = OPTIONS[name]
        try:
            read[name] = reader(str(value))
        except ValueError:
            raise ConfigError(f"{name}={value!r}; allowed: {allowed}") from None
        require(bool(str(value).strip()), name, value, allowed)
    return read


def _check_slurm() -> None:
    missing = [name for name in ("sbatch", "srun", "scancel") if shutil.which(name) is None]
    if missing:
        raise WorkerError(
            f"no {missing[0]} on this machine, so it can't submit SLURM jobs; start the study on a login node, or try "
            "it out here with cluster=local"
        )


def _queued() -> set[str] | None:
    """Jobs of this user that are queued or at work; None where SLURM doesn't say."""
    command = ["squeue", "--noheader", "--format=%i", f"--user={getpass.getuser()}"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return set(said.stdout.split())


def _cancel(cluster: str, handles: list[Any]) -> None:
    """End jobs; for those that have ended already, SLURM's word on that is kept off the screen."""
    if cluster == "slurm":
        for some in _portions([handle.job_id for handle in handles], 100):
            subprocess.run(["scancel", *some], capture_output=True, check=False, timeout=60)
    else:
        for handle in handles:
            handle.cancel()


def _portions(names: list[str], count: int) -> Iterator[list[str]]:
    for first in range(0, len(names), count):
        yield names[first : first + count]


def _last_line(error: BaseException) -> str:
    """What a program said last; of a traceback that submitit frames by dashes, its last line."""
    text = str(error).split("-" * 22)
    lines = [line.strip() for line in text[1 if len(text) > 2 else 0].splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
