"""Runs whatever of a study is missing, on any engine: in order, with retries, beside others, past failures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerlens.errors import DiskFullError, require
from layerlens.experiments.engines import Engine, make_engine
from layerlens.experiments.grid import Plan, PlannedRun, make_plan
from layerlens.experiments.job import BUSY, DIED, DONE, FULL, LATE, REFUSED, Ended, Job
from layerlens.experiments.results import StudyResult, collect, label
from layerlens.experiments.store import Store
from layerlens.experiments.study import Study

LOOK_AGAIN_S = 2.0  # at a run that another process works on


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a study's runs.

    Attributes:
        done: Keys of all finished runs.
        fresh: Of those, the ones that this call finished.
        failed: Key -> the last error, of those that were given up or whose start was.
    """

    done: tuple[str, ...]
    fresh: tuple[str, ...]
    failed: dict[str, str]


def run_study(
    study: Study,
    store: str | Path = "studies",
    *,
    engine: str | Engine = "local",
    workers: int | None = None,
    retries: int = 2,
    limit_s: float = 0.0,
    device: str = "auto",
    progress: Callable[[int, int, str], None] | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> StudyResult:
    """Do what is missing of a study, and read what all its runs found.

    Finished runs are never done again; the same call goes on where an interrupted one stopped, and two calls at the
    same time share the work. A script that calls this needs the guard `if __name__ == "__main__":`.

    Args:
        study: From `read_study` or `make_study`, at the scale that is meant (`Study.at_scale`).
        store: Folder of the runs of all studies.
        engine: `local`, `ray` or `slurm`, or an engine made by hand.
        workers, **options: As for `make_engine`.
        retries, limit_s, device, progress, say: As for `run_plan`.

    Raises:
        ConfigError: The study asks for a run that can't be.
        RunFolderError: The folder is no store, or was written by a newer layerlens.
        ExtraMissingError: The engine's extra is not installed.
    """
    plan, place = make_plan(study), Store(store)
    if not isinstance(engine, str):
        require(workers is None and not options, "workers and options", {"workers": workers, **options}, "with a name")
    made = make_engine(engine, workers=workers, **options) if isinstance(engine, str) else engine
    run_plan(plan, place, made, retries=retries, limit_s=limit_s, device=device, progress=progress, say=say)
    return collect(place, study.name, plan=manifest(plan))


def run_plan(
    plan: Plan,
    store: Store,
    engine: Engine,
    *,
    retries: int = 2,
    limit_s: float = 0.0,
    device: str = "auto",
    progress: Callable[[int, int, str], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Outcome:
    """Do what is missing of a plan; what is finished is never done again, what failed before is tried anew.

    Args:
        plan: From `make_plan`.
        store: Where the runs lie; other processes may work on the same ones at the same time.
        engine: Who does the work. It is closed at the end, whatever happens.
        retries: Attempts after the first that may fail without a further finished epoch, before a run is given up.
        limit_s: Seconds that one attempt may take; 0 for no limit.
        device: `auto`, `cpu` or `cuda`.
        progress: Called with the runs done, all of them, and a line about the last one.
        say: Takes what a user should know.

    Raises:
        DiskFullError: No space left; everything finished is kept.
    """
    try:
        check_patience(retries, limit_s)
        store.write_plan(plan.study.name, manifest(plan))
        return _Runner(plan, store, engine, retries, limit_s, device, progress, say or _silent).run()
    finally:
        engine.close()


def check_patience(retries: int, limit_s: float) -> None:
    """Refuse numbers that can't be.

    Raises:
        ConfigError: Fewer than no retries, or a limit below 0.
    """
    require(retries >= 0, "retries", retries, "0 or more")
    require(0 <= limit_s < 10**8, "limit_s", limit_s, "0 (none) to 10**8 seconds")


def manifest(plan: Plan) -> dict[str, Any]:
    """What a store keeps of a plan: enough for `status` and for tables, without configurations."""
    runs = [
        {
            "key": run.key, "arm": run.arm, "baseline": run.baseline, "start": run.start, "values": run.values,
            "seed": run.seed, "data": run.config.data, "epochs": run.config.epochs,
            "augment": run.config.augment and run.config.augment.model_dump(include={"layer", "stop_gradient", "rate"}),
            "files": list(run.files),
            "measured": [[m.kind, m.data, m.file] for m in run.measured],
        }
        for run in plan.runs
    ]  # fmt: skip
    return {"study": plan.study.model_dump(mode="json"), "runs": runs}


class _Runner:
    """The runs that are left, those at work, and what became of the others."""

    def __init__(
        self, plan: Plan, store: Store, engine: Engine, retries: int, limit_s: float, device: str,
        progress: Callable[[int, int, str], None] | None, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.plan, self.store, self.engine = plan, store, engine
        self.retries, self.limit_s, self.device, self.progress, self.say = retries, limit_s, device, progress, say
        self.runs = plan.distinct
        self.waiting: dict[str, float] = {}  # key -> when to look at it
        self.working: set[str] = set()
        self.done: dict[str, bool] = {}  # key -> whether this call did it
        self.failed: dict[str, str] = {}
        self.spent: dict[str, int] = {}  # attempts without a further epoch
        self.epochs: dict[str, int] = {}
        self.log_size: dict[str, int] = {}  # at the start of the present attempt

    def run(self) -> Outcome:
        for key, run in self.runs.items():
            self.store.set_damage_aside(key, self.say)
            if self._is_done(run):
                self._finish(key, fresh=False)
            else:
                self.waiting[key] = 0.0
                self.epochs[key] = self.store.epochs_done(key)
        while self.waiting or self.working:
            self._start_what_can()
            for ended in self.engine.wait(LOOK_AGAIN_S):
                self._take(ended)
            if not self.working:  # others have the rest
                time.sleep(0.1)
        fresh = tuple(key for key, mine in self.done.items() if mine)
        return Outcome(done=tuple(self.done), fresh=fresh, failed=self.failed)

    def _is_done(self, run: PlannedRun) -> bool:
        return self.store.is_done(run.key, run.files)

    def _start_what_can(self) -> None:
        free = self.engine.free
        for key, when in list(self.waiting.items()):
            run = self.runs[key]
            if run.start in self.failed:
                self._give_up(key, f"the run that it starts from, {run.start}, failed")
            elif free > 0 and when <= time.monotonic() and (run.start is None or run.start in self.done):
                self._start(key, run)
                free = self.engine.free

    def _start(self, key: str, run: PlannedRun) -> None:
        if self.store.is_running(key):
            self.waiting[key] = time.monotonic() + LOOK_AGAIN_S
            return
        del self.waiting[key]
        if self._is_done(run):  # by another process, since the last look
            self._finish(key, fresh=False)
        else:
            self.working.add(key)
            log = self.store.log(key)
            self.log_size[key] = log.stat().st_size if log.exists() else 0
            self.engine.start(self._job(run))

    def _job(self, run: PlannedRun) -> Job:
        folder = self.store.run_folder(run.key).absolute()
        return Job(
            key=run.key, folder=str(folder), log=str(self.store.log(run.key).absolute()),
            settings=run.config.model_dump(mode="json"),
            start=None if run.start is None else str(self.store.run_folder(run.start).absolute()),
            measured=tuple((m.kind, m.data, m.file) for m in run.measured),
            measure=self.plan.study.measure.model_dump(mode="json"), device=self.device, limit_s=self.limit_s,
        )  # fmt: skip

    def _take(self, ended: Ended) -> None:
        key = ended.key
        self.working.discard(key)
        if ended.kind == BUSY:
            self.waiting[key] = time.monotonic() + LOOK_AGAIN_S
        elif ended.kind == FULL:
            raise DiskFullError(ended.error)
        elif self._is_done(self.runs[key]):  # also one that died after its last word
            self._finish(key, fresh=True)
        elif ended.kind == DONE:
            self._fail(replace(ended, kind=DIED, error="the worker ended, but its results are not there"))
        else:
            self._fail(ended)

    def _fail(self, ended: Ended) -> None:
        key, epochs = ended.key, self.store.epochs_done(ended.key)
        if ended.kind == DIED and self._hung(key):
            ended = replace(ended, kind=LATE, error=f"took longer than {self.limit_s:g} s; its log says where it was")
        further = epochs > self.epochs.get(key, 0)
        self.epochs[key] = epochs
        self.spent[key] = 0 if further else self.spent.get(key, 0) + 1
        final = ended.kind == REFUSED or self.spent[key] > self.retries
        self.store.add_failure(key, ended.kind, ended.error, given_up=final, since=self.log_size[key])
        what = f"{self._label(key)}: {ended.kind}: {ended.error}"
        if final:
            self.say(f"{what}; given up, the study goes on without it (log: {str(self.store.log(key))!r})")
            self._close(key, ended.error)
        else:
            self.say(f"{what}; it goes on from epoch {epochs}")
            self.waiting[key] = 0.0

    def _hung(self, key: str) -> bool:
        said = self.store.last_lines(key, 1000, since=self.log_size[key])
        return bool(self.limit_s) and any(line.startswith("Timeout (") for line in said)

    def _give_up(self, key: str, error: str) -> None:
        del self.waiting[key]
        self.store.add_failure(key, REFUSED, error, given_up=True)
        self._close(key, error)

    def _close(self, key: str, error: str) -> None:
        self.failed[key] = error
        self._tell(f"failed {self._label(key)}")

    def _finish(self, key: str, *, fresh: bool) -> None:
        self.done[key] = fresh
        self._tell(self._label(key))

    def _label(self, key: str) -> str:
        run = self.runs[key]
        return label(run.arm, run.values, run.seed)

    def _tell(self, line: str) -> None:
        if self.progress is not None:
            self.progress(len(self.done) + len(self.failed), len(self.runs), line)


def _silent(_line: str) -> None:
    """Say nothing."""
