"""Who runs the jobs of a study: processes of this machine, a Ray cluster, SLURM. One contract for all."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any, Protocol

from layerlens.errors import ExtraMissingError, check_known
from layerlens.experiments.job import Ended, Job

ENGINES = ("local", "ray", "slurm")


class Engine(Protocol):
    """What a study asks of who runs its jobs: each only calls `job.perform`, once per `start`.

    Attributes:
        free: How many more jobs `start` takes now.
    """

    @property
    def free(self) -> int:
        """How many more jobs `start` takes now."""

    def start(self, job: Job) -> None:
        """Give a job to a worker, or to a queue."""

    def wait(self, timeout_s: float) -> list[Ended]:
        """Jobs that ended since the last call; waits for the first of them, at most that long."""

    def close(self) -> None:
        """End every worker, whatever it is doing, and hand back what the engine holds."""


def make_engine(name: str, *, workers: int | None = None, threads: int | None = None, **options: Any) -> Engine:
    """The engine of that name.

    Args:
        name: `local`, `ray` or `slurm`.
        workers: Jobs at once; by default as many as there are GPUs, or else CPU cores, or as a cluster has room for.
        threads: Of the CPU, for each worker; by default the cores divided by the workers, on a cluster 1.
        **options: Of that engine, see its class.

    Raises:
        ConfigError: An option that it does not have.
        UnknownNameError: No such engine.
        ExtraMissingError: Its extra is not installed; the message says which.
    """
    check_known("engine", name, ENGINES)
    if name == "ray":
        from layerlens.experiments.engines.ray import RayEngine

        return RayEngine(workers=workers, threads=threads, **options)
    if name == "slurm":
        from layerlens.experiments.engines.slurm import SlurmEngine

        return SlurmEngine(workers=workers, threads=threads, **options)
    from layerlens.experiments.engines.local import LocalEngine

    return LocalEngine(workers=workers, threads=threads, **options)


def load_extra(package: str, title: str, extra: str) -> Any:
    """The package that an engine needs; nothing of it is imported before the engine is made.

    Raises:
        ExtraMissingError: It is not installed, or broken; the message says what to install.
    """
    install = f'pip install "layerlens-torch[{extra}]"'
    if find_spec(package) is None:
        raise ExtraMissingError(f"--engine {extra} needs {title}: {install}")
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExtraMissingError(f"{title} is installed but broken ({error}); install it anew: {install}") from error
