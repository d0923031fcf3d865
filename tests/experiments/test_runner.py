"""What is missing is done, once; what fails is tried again, given up, and does not hold up the rest."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest

from layerlens.data import Dataset, dataset_from_arrays
from layerlens.errors import ConfigError, DiskFullError
from layerlens.experiments import runner
from layerlens.experiments.grid import Plan, make_plan
from layerlens.experiments.job import BUSY, DIED, DONE, FAILED, FULL, LATE, REFUSED, Ended, Job, perform
from layerlens.experiments.runner import Outcome, run_plan
from layerlens.experiments.store import Store
from layerlens.experiments.study import make_study
from layerlens.files import write_json

EPOCHS = 4
RESULT: dict[str, Any] = {
    "run": "x", "epochs": EPOCHS, "loss": 1.0, "knn": None, "wall_s": 4.0,
    "checkpoints": ["checkpoints/epoch-0004.safetensors"], "environment": {},
}  # fmt: skip
Act = Callable[["Played", Job], Ended]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits two seconds for a play."""
    monkeypatch.setattr(runner, "LOOK_AGAIN_S", 0.05)


def load(spec: str) -> Dataset:
    x = np.random.default_rng(len(spec)).integers(0, 256, (48, 1, 8, 8)).astype(np.uint8)
    y = np.arange(48) % 4
    return dataset_from_arrays("tiny", x[:32], y[:32], x[32:], y[32:])


def plan(seeds: Any = 2, name: str = "s", **content: Any) -> Plan:
    base = {"model": "mlp,width=8,depth=2", "data": "tiny", "epochs": EPOCHS, "batch_size": 16}
    return make_plan(make_study({"name": name, "seeds": seeds, "base": base, **content}), load=load)


STARTED: dict[str, Any] = {
    "starts": {"pre": {"epochs": EPOCHS, "momentum": 0.5}},
    "arms": [{"name": "free"}, {"name": "late", "start": "pre"}],
}


# --- an engine that plays what workers may do ---


def train_epochs(job: Job, count: int) -> None:
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps({"epoch": 1, "loss": 1.0}) + "\n" for _ in range(count))


def finish(folder: Path, files: tuple[str, ...]) -> None:
    for file in files:
        write_json(folder / file, {})
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / RESULT["checkpoints"][0]).touch()
    write_json(folder / "result.json", RESULT)


def does_it(_engine: Played, job: Job) -> Ended:
    assert not (Path(job.folder) / "result.json").exists() or job.measured, "finished work is done again"
    train_epochs(job, EPOCHS)
    finish(Path(job.folder), tuple(file for _, _, file in job.measured))
    return Ended(key=job.key, kind=DONE)


def ends(kind: str, error: str = "it went wrong", *, epochs: int = 0, log: str = "") -> Act:
    def act(_engine: Played, job: Job) -> Ended:
        train_epochs(job, epochs)
        path = Path(job.log)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as stream:
            stream.write(log)
        return Ended(key=job.key, kind=kind, error=error)

    return act


class Played:
    """Each job takes its next act; without one it is done."""

    def __init__(self, acts: dict[str, list[Act]] | None = None, *, workers: int = 2, usually: Act = does_it) -> None:
        self.acts, self.workers, self.usually = (
            {key: list(some) for key, some in (acts or {}).items()},
            workers,
            usually,
        )
        self.jobs: list[Job] = []
        self.started: list[str] = []
        self.closed = 0

    @property
    def free(self) -> int:
        return self.workers - len(self.jobs)

    def start(self, job: Job) -> None:
        assert self.free > 0, "more jobs than the engine takes"
        assert job.key not in {other.key for other in self.jobs}, "twice at once"
        assert job.start is None or (Path(job.start) / "result.json").exists(), "before its start is done"
        self.jobs.append(job)
        self.started.append(job.key)

    def wait(self, timeout_s: float) -> list[Ended]:
        assert timeout_s >= 0
        if not self.jobs:
            return []
        job = self.jobs.pop()
        acts = self.acts.get(job.key)
        return [(acts.pop(0) if acts else self.usually)(self, job)]

    def close(self) -> None:
        self.closed += 1


def go(made: Plan, store: Store, engine: Played | None = None, **options: Any) -> tuple[Outcome, Played]:
    engine = engine or Played()
    out = run_plan(made, store, engine, **options)
    assert engine.closed == 1
    return out, engine


def key_of(made: Plan, arm: str, seed: int = 0) -> str:
    [found] = [run.key for run in made.runs if run.arm == arm and run.seed == seed]
    return found


# --- what is done is done ---


def test_what_is_missing_is_done_and_what_is_finished_is_never_done_again(store: Store):
    made = plan(3, **STARTED)
    out, engine = go(made, store)
    assert sorted(engine.started) == sorted(made.distinct)
    assert set(out.done) == set(out.fresh) == set(made.distinct)
    assert out.failed == {}
    again, idle = go(made, store)
    assert idle.started == []
    assert set(again.done) == set(made.distinct)
    assert again.fresh == ()


def test_a_study_that_is_extended_by_one_seed_runs_only_that_seed(store: Store):
    go(plan(2, **STARTED), store)
    more = plan(3, **STARTED)
    out, engine = go(more, store)
    assert sorted(engine.started) == sorted(key for key, run in more.distinct.items() if run.seed == 2)
    assert set(out.fresh) == set(engine.started)
    assert set(out.done) == set(more.distinct)


def test_two_studies_share_the_runs_that_they_share(store: Store):
    first, second = plan(2, name="one"), plan(3, name="two", axes={"momentum": [0.9, 0.5]})
    go(first, store)
    out, engine = go(second, store)
    assert len(engine.started) == 4
    assert set(engine.started) == set(second.distinct) - set(first.distinct)
    assert set(out.done) == set(second.distinct)
    assert store.studies() == ["one", "two"]


def test_a_run_that_two_arms_share_is_done_once_with_what_both_measure(store: Store):
    made = plan(1, arms=[{"name": "a"}, {"name": "b", "transfer": ["other"]}])
    _, engine = go(made, store)
    assert engine.started == [made.runs[0].key]
    assert len(list(store.run_folder(made.runs[0].key).glob("analysis/*"))) == 3


def test_a_finished_run_of_which_more_is_asked_is_measured_again_alone(store: Store):
    go(plan(1), store)
    more = plan(1, measure={"k": 5})
    assert not store.is_done(more.runs[0].key, tuple(m.file for m in more.runs[0].measured))
    out, engine = go(more, store)
    assert engine.started == list(out.fresh) == [more.runs[0].key]


def test_a_damaged_result_is_told_and_its_run_is_done_again(store: Store):
    made, said = plan(2), []
    go(made, store)
    bad = made.runs[0].key
    (store.run_folder(bad) / "result.json").write_text('{"wall_s": 4.')
    out, engine = go(made, store, say=said.append)
    assert engine.started == [bad] == list(out.fresh)
    assert len(said) == 1
    assert "damaged" in said[0]


def test_starts_are_done_before_what_starts_from_them(store: Store):
    made = plan(3, **STARTED)
    _, engine = go(made, store, Played(workers=6))
    for run in made.runs:
        if run.start is not None:
            assert engine.started.index(run.start) < engine.started.index(run.key)


def test_a_job_says_all_that_a_worker_must_know(store: Store):
    made = plan(1, **STARTED)
    seen: dict[str, Job] = {}

    def watch(engine: Played, job: Job) -> Ended:
        seen[job.key] = job
        return does_it(engine, job)

    go(made, store, Played(usually=watch), limit_s=7.0, device="cpu")
    late = seen[key_of(made, "late")]
    assert late.folder == str(store.run_folder(late.key).absolute())
    assert late.start == str(store.run_folder(key_of(made, "pre")).absolute())
    assert late.log == str(store.log(late.key).absolute())
    assert (late.device, late.limit_s) == ("cpu", 7.0)
    assert [kind for kind, _, _ in late.measured] == ["cka", "scores"]
    assert json.loads(json.dumps(late.settings)) == late.settings
    assert seen[key_of(made, "free")].start is None


def test_progress_counts_every_run_once(store: Store):
    made, told = plan(2, **STARTED), []
    go(made, store)
    go(plan(3, **STARTED), store, progress=lambda *line: told.append(line))
    assert [(done, of) for done, of, _ in told] == [(n + 1, 9) for n in range(9)]
    assert {line for _, _, line in told} == {f"{arm} seed={s}" for arm in ("pre", "free", "late") for s in range(3)}


# --- other processes ---


def test_a_run_that_another_process_works_on_is_waited_for_and_taken_over_when_done(store: Store):
    made = plan(2)
    mine, theirs = (run.key for run in made.runs)
    folder = store.run_folder(theirs)
    folder.mkdir(parents=True)
    held: list[TextIO] = [(folder / ".lock").open("w")]
    fcntl.flock(held[0], fcntl.LOCK_EX)

    def other_is_done(engine: Played, job: Job) -> Ended:
        finish(folder, tuple(m.file for m in made.distinct[theirs].measured))
        held[0].close()
        return does_it(engine, job)

    out, engine = go(made, store, Played({mine: [other_is_done]}))
    assert engine.started == [mine]
    assert set(out.done) == {mine, theirs}
    assert out.fresh == (mine,)


def test_a_run_that_another_process_leaves_is_done_here(store: Store):
    made = plan(2)
    mine, theirs = (run.key for run in made.runs)
    folder = store.run_folder(theirs)
    folder.mkdir(parents=True)
    stream = (folder / ".lock").open("w")
    fcntl.flock(stream, fcntl.LOCK_EX)

    def other_dies(engine: Played, job: Job) -> Ended:
        stream.close()
        return does_it(engine, job)

    out, engine = go(made, store, Played({mine: [other_dies]}))
    assert engine.started == [mine, theirs]
    assert set(out.fresh) == {mine, theirs}


def test_busy_is_no_failure_however_often(store: Store):
    made = plan(1)
    key = made.runs[0].key
    out, engine = go(made, store, Played({key: [ends(BUSY)] * 6}), retries=0)
    assert engine.started == [key] * 7
    assert out.done == (key,)
    assert store.failures(key)["attempts"] == []


def test_between_two_looks_at_a_busy_run_the_others_go_on(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner, "LOOK_AGAIN_S", 0.3)
    made = plan(3)
    first = made.runs[0].key
    began = time.monotonic()
    _, engine = go(made, store, Played({first: [ends(BUSY)]}, workers=1))
    assert engine.started[0] == engine.started[-1] == first
    assert len(engine.started) == 4
    assert time.monotonic() - began >= 0.3


# --- failures ---


def test_what_would_fail_again_is_given_up_at_once_and_the_study_goes_on(store: Store):
    made, said = plan(2, **STARTED), []
    bad, late = key_of(made, "pre"), key_of(made, "late")
    log = "".join(f"line {n}\n" for n in range(30))
    told: list[tuple[int, int, str]] = []
    out, engine = go(
        made, store, Played({bad: [ends(REFUSED, "no layer 'x'", log=log)]}), say=said.append,
        progress=lambda *line: told.append(line),
    )  # fmt: skip
    assert Counter(engine.started)[bad] == 1
    assert late not in engine.started
    assert out.failed == {bad: "no layer 'x'", late: f"the run that it starts from, {bad}, failed"}
    assert set(out.done) == set(made.distinct) - {bad, late}
    known = store.failures(bad)
    assert known["given_up"]
    assert known["attempts"][-1]["log"] == [f"line {n}" for n in range(10, 30)]
    assert store.failures(late)["given_up"]
    assert said[0] == (
        f"pre seed=0: refused: no layer 'x'; given up, the study goes on without it (log: {str(store.log(bad))!r})"
    )
    assert [done for done, _, _ in told] == list(range(1, 7))
    assert {row.key: row.state for row in store.status("s")}[bad] == "failed"


def test_what_was_done_before_its_start_failed_stays_done(store: Store):
    made = plan(1, **STARTED)
    go(made, store)
    pre, late = key_of(made, "pre"), key_of(made, "late")
    (store.run_folder(pre) / "result.json").write_text("")
    out, _ = go(made, store, Played({pre: [ends(REFUSED)]}))
    assert set(out.failed) == {pre}
    assert late in out.done


@pytest.mark.parametrize("kind", [DIED, FAILED, LATE])
@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_run_that_dies_is_tried_again_and_then_given_up(store: Store, kind: str, retries: int):
    made = plan(2)
    bad, good = (run.key for run in made.runs)
    out, engine = go(made, store, Played({bad: [ends(kind)] * 9}), retries=retries, limit_s=5.0)
    assert Counter(engine.started) == {bad: 1 + retries, good: 1}
    assert out.failed == {bad: "it went wrong"}
    attempts = store.failures(bad)["attempts"]
    assert [a["kind"] for a in attempts] == [kind] * (1 + retries)
    assert store.failures(bad)["given_up"]


def test_a_run_that_dies_and_then_does_it_is_done(store: Store):
    made, said = plan(1), []
    key = made.runs[0].key
    out, engine = go(made, store, Played({key: [ends(DIED), ends(FAILED, epochs=2)]}), retries=2, say=said.append)
    assert (out.done, out.fresh, out.failed) == ((key,), (key,), {})
    assert engine.started == [key] * 3
    assert said == [
        "runs seed=0: died: it went wrong; it goes on from epoch 0",
        "runs seed=0: failed: it went wrong; it goes on from epoch 2",
    ]
    assert store.status("s")[0].problem is None


def test_attempts_that_finish_an_epoch_do_not_count(store: Store):
    """Preempted after each epoch, with no retry at all; two without one then are one too many."""
    made = plan(1)
    key = made.runs[0].key
    out, engine = go(made, store, Played({key: [ends(DIED, epochs=1)] * 5}), retries=0)
    assert engine.started == [key] * 6
    assert out.done == (key,)


def test_an_epoch_gives_back_all_retries(store: Store):
    made = plan(1)
    key = made.runs[0].key
    acts = [ends(DIED), ends(DIED), ends(DIED, epochs=1), ends(DIED), ends(DIED), ends(DIED), ends(DIED)]
    out, engine = go(made, store, Played({key: acts}), retries=2)
    assert engine.started == [key] * 6
    assert set(out.failed) == {key}


def test_epochs_of_an_earlier_call_are_no_progress_of_this_one(store: Store):
    made = plan(1)
    key = made.runs[0].key
    folder = store.run_folder(key)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n{}\n")
    out, engine = go(made, store, Played({key: [ends(DIED)] * 9}), retries=0)
    assert engine.started == [key]
    assert set(out.failed) == {key}


def test_a_worker_that_dies_after_its_last_word_is_done(store: Store):
    made = plan(1)
    key = made.runs[0].key

    def dies_late(engine: Played, job: Job) -> Ended:
        does_it(engine, job)
        return Ended(key=job.key, kind=DIED, error="signal 9")

    out, _ = go(made, store, Played({key: [dies_late]}))
    assert out.fresh == (key,)
    assert store.failures(key)["attempts"] == []


def test_a_worker_that_says_done_and_leaves_nothing_has_failed(store: Store):
    made = plan(1)
    key = made.runs[0].key
    out, _ = go(made, store, Played({key: [ends(DONE, "")] * 9}), retries=1)
    assert out.failed == {key: "the worker ended, but its results are not there"}


def test_what_failed_before_is_tried_anew_with_all_its_retries(store: Store):
    made = plan(1, **STARTED)
    pre = key_of(made, "pre")
    go(made, store, Played({pre: [ends(DIED)] * 9}), retries=1)
    assert {row.state for row in store.status("s")} == {"failed", "done"}
    out, engine = go(made, store, Played({pre: [ends(DIED)]}), retries=1)
    assert Counter(engine.started) == {pre: 2, key_of(made, "late"): 1}
    assert set(out.done) == set(made.distinct)
    assert {row.state for row in store.status("s")} == {"done"}


def test_a_worker_that_ended_itself_at_its_limit_was_too_long(store: Store):
    made = plan(1)
    key = made.runs[0].key
    log = 'Timeout (0:00:05)!\nThread 0x1:\n  File "loop.py", line 1 in run\n'
    out, _ = go(made, store, Played({key: [ends(DIED, "exit code 1", log=log)] * 9}), retries=0, limit_s=5.0)
    assert out.failed == {key: "took longer than 5 s; its log says where it was"}
    assert store.failures(key)["attempts"][0]["kind"] == LATE


def test_a_worker_that_died_after_an_earlier_one_was_too_long_died(store: Store):
    made = plan(1)
    key = made.runs[0].key
    acts = [ends(DIED, "exit code 1", log="Timeout (0:00:05)!\n"), ends(DIED, "signal 11", log="Fatal Python error\n")]
    go(made, store, Played({key: acts}), retries=1, limit_s=5.0)
    assert [a["kind"] for a in store.failures(key)["attempts"]] == [LATE, DIED]


# --- a full disk ---


def test_a_full_disk_stops_the_study_and_the_next_call_goes_on(store: Store):
    made = plan(4)
    done, full = made.runs[0].key, made.runs[1].key
    engine = Played({full: [ends(FULL, "can't write 'x': No space left on device; make room")]}, workers=1)
    with pytest.raises(DiskFullError, match="No space left on device; make room"):
        run_plan(made, store, engine)
    assert engine.closed == 1
    assert engine.started == [done, full]
    assert store.failures(full)["attempts"] == [], "it is not the run's fault"
    out, second = go(made, store)
    assert sorted(second.started) == sorted(run.key for run in made.runs[1:])
    assert set(out.done) == set(made.distinct)


def test_the_engine_is_closed_whatever_happens(store: Store):
    made = plan(1)

    def breaks(_engine: Played, _job: Job) -> Ended:
        raise KeyboardInterrupt

    engine = Played(usually=breaks)
    with pytest.raises(KeyboardInterrupt):
        run_plan(made, store, engine)
    assert engine.closed == 1


@pytest.mark.parametrize("what", ["retries", "limit_s", "no room for the plan"])
def test_the_engine_is_closed_also_where_nothing_began(store: Store, monkeypatch: pytest.MonkeyPatch, what: str):
    engine, made = Played(), plan(1)

    def full(*_args: Any) -> None:
        raise DiskFullError("no space")

    options: dict[str, Any] = {what: -1}
    if what == "no room for the plan":
        monkeypatch.setattr(store, "write_plan", full)
        options = {}
    with pytest.raises((ConfigError, DiskFullError)):
        run_plan(made, store, engine, **options)
    assert engine.closed == 1


@pytest.mark.parametrize(("name", "value"), [("retries", -1), ("limit_s", -1.0), ("limit_s", float("nan"))])
def test_options_that_can_not_be_are_refused_before_anything_runs(store: Store, name: str, value: float):
    engine = Played()
    with pytest.raises(ConfigError, match=f"^{name}={value!r}; allowed: 0"):
        run_plan(plan(1), store, engine, **{name: value})
    assert engine.started == []
    assert not store.folder.exists()


# --- what a job does, in this process ---


def npz(path: Path, seed: int = 0) -> str:
    x = np.random.default_rng(seed).integers(0, 256, (48, 1, 8, 8)).astype(np.uint8)
    y = np.arange(48) % 4
    np.savez(path, x_train=x[:32], y_train=y[:32], x_test=x[32:], y_test=y[32:])
    return f"npz:{path}"


def real(tmp_path: Path, data: str, **settings: Any) -> tuple[Plan, Job, Store]:
    base = {"model": "mlp,width=8,depth=2", "data": data, "epochs": 1, "batch_size": 16, **settings}
    made = make_plan(make_study({"name": "s", "base": base, "measure": {"scores": False, "cka": False}}))
    store, [run] = Store(tmp_path / "store"), made.runs
    job = Job(
        key=run.key, folder=str(store.run_folder(run.key)), log=str(store.log(run.key)),
        settings=run.config.model_dump(mode="json"), start=None, measured=(), measure={}, device="cpu",
    )  # fmt: skip
    return made, job, store


def test_a_job_is_done_once_and_keeps_what_it_says_in_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    _, job, store = real(tmp_path, npz(tmp_path / "a.npz"))
    assert perform(job) == Ended(key=job.key, kind=DONE)
    before = (store.run_folder(job.key) / "result.json").stat()
    assert perform(job) == Ended(key=job.key, kind=DONE)
    assert (store.run_folder(job.key) / "result.json").stat() == before
    print("still heard")
    assert capfd.readouterr() == ("still heard\n", "")
    assert store.log(job.key).exists()


def test_a_job_in_a_folder_where_another_process_works_is_busy(tmp_path: Path):
    _, job, _ = real(tmp_path, npz(tmp_path / "a.npz"))
    Path(job.folder).mkdir(parents=True)
    with (Path(job.folder) / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert perform(job).kind == BUSY
    assert perform(job).kind == DONE


def test_a_layer_that_is_not_there_is_refused_with_its_traceback_in_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """The plan refuses it already; a job made by hand does so too."""
    _, job, store = real(tmp_path, npz(tmp_path / "a.npz"), augment={"layer": "blocks.0"})
    job = dataclasses.replace(job, settings={**job.settings, "augment": {"layer": "layer9"}})
    with capfd.disabled():  # pytest's own stderr is none of the process's
        ended = perform(job)
    assert ended.kind == REFUSED
    assert "layer9" in ended.error
    assert "\n" not in ended.error
    assert "Traceback" in store.log(job.key).read_text()
    assert not Path(job.folder).exists(), "it is refused before anything is written"


def no_memory() -> None:
    raise MemoryError("Unable to allocate 20.0 GiB")


def test_data_that_found_no_memory_are_tried_again(tmp_path: Path):
    _, job, _ = real(tmp_path, npz(tmp_path / "a.npz"))
    assert perform(replace(job, settings={**job.settings, "data": "test_runner:no_memory"})).kind == FAILED


def test_half_a_measurement_that_a_killed_worker_left_is_removed(tmp_path: Path):
    _, job, store = real(tmp_path, npz(tmp_path / "a.npz"))
    half = store.run_folder(job.key) / "analysis" / ".study-cka-0.json.x7a"
    perform(job)
    half.parent.mkdir()
    half.write_text("{")
    measure = {"samples": 16, "batch_size": 16}
    assert perform(replace(job, measured=(("cka", None, "analysis/study-cka-0.json"),), measure=measure)).kind == DONE
    assert not half.exists()


def test_data_that_changed_since_the_plan_are_not_trained_on_under_the_old_key(tmp_path: Path):
    _, job, store = real(tmp_path, npz(tmp_path / "b.npz"))
    npz(tmp_path / "b.npz", seed=1)
    assert perform(job).kind == REFUSED
    assert not store.is_done(job.key)


# --- what a second reading found ---


def test_an_unfinished_run_whose_start_was_trained_anew_is_set_aside(tmp_path: Path):
    _, job, _ = real(tmp_path, npz(tmp_path / "a.npz"))
    assert perform(job).kind == DONE
    start = tmp_path / "start"
    shutil.copytree(job.folder, start)
    child = dataclasses.replace(job, key="child", folder=str(tmp_path / "child"), start=str(start))
    assert perform(child).kind == DONE
    first = (Path(child.folder) / "config.json").read_text()
    (Path(child.folder) / "result.json").unlink()
    weights = sorted(start.glob("checkpoints/*.safetensors"))
    shutil.copy(weights[0], weights[-1])  # another start: its last checkpoint has other weights now
    assert perform(child).kind == DONE
    assert (Path(child.folder) / "config.json").read_text() != first
    (aside,) = tmp_path.glob(".child.aside-*")
    assert (aside / "config.json").read_text() == first


def test_a_finished_run_is_measured_without_its_start(tmp_path: Path):
    """As after copying its folder alone into another store."""
    _, job, _ = real(tmp_path, npz(tmp_path / "a.npz"))
    start = tmp_path / "start"
    assert perform(job).kind == DONE
    shutil.copytree(job.folder, start)
    child = dataclasses.replace(job, key="child", folder=str(tmp_path / "child"), start=str(start))
    assert perform(child).kind == DONE
    shutil.rmtree(start)
    for path in Path(child.folder).glob("analysis/*.json"):
        path.unlink()
    assert perform(child).kind == DONE
    assert all((Path(child.folder) / file).exists() for _, _, file in child.measured)


def test_a_damaged_state_is_set_aside_and_the_next_attempt_begins_anew(tmp_path: Path):
    _, job, _ = real(tmp_path, npz(tmp_path / "a.npz"))
    assert perform(job).kind == DONE
    folder = Path(job.folder)
    (folder / "result.json").unlink()
    (folder / "resume.pt").write_bytes(b"no state")
    assert perform(job).kind == FAILED
    assert perform(job).kind == DONE
    assert len(list(folder.glob(".resume.pt.aside-*"))) <= 1  # `train` clears what killed processes leave
