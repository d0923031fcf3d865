"""Real worker processes: killed, stopped, hung, crashed, orphaned; the study's result is that of an undisturbed one."""

from __future__ import annotations

import ctypes
import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from layerlens.errors import ConfigError, DiskFullError, UnknownNameError
from layerlens.experiments.engines import ENGINES, local, make_engine
from layerlens.experiments.engines.local import LocalEngine
from layerlens.experiments.grid import Plan, make_plan
from layerlens.experiments.job import DIED, LATE, REFUSED, Ended, Job
from layerlens.experiments.runner import run_plan
from layerlens.experiments.store import Store
from layerlens.experiments.study import make_study
from layerlens.files import read_json
from layerlens.training import loop
from layerlens.training.checkpoint import load_state

PATIENCE_S = 90.0  # for what takes seconds on an idle machine
RESNET, MLP = "resnet18-cifar,width=4", "mlp,width=8,depth=2"
MEASURE = {"samples": 32, "batch_size": 32, "k": 5}


# --- data that workers load; some do harm, and only to workers ---


def images(kind: str = "plain", flag: str = "") -> tuple[Any, ...]:
    """Four patterns with noise; `kind` says what happens to a worker that loads them."""
    if multiprocessing.parent_process() is not None:
        visible, omp = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"]
        print(f"loading {kind}: {torch.get_num_threads()} threads, OMP {omp}, GPU {visible}", flush=True)
        _note_trainings()
        HARM.get(kind, lambda _: None)(flag)
    draws = np.random.default_rng(list(kind.encode()))
    y = np.arange(160) % 4
    x = (draws.random((4, 8, 8))[y] * 180 + draws.random((160, 8, 8)) * 70).astype(np.uint8)
    return x[:96], y[:96], x[96:], y[96:]


def _note_trainings() -> None:
    """Each training that begins or goes on leaves a line in the store: its key and the worker."""
    whole = loop._Trainer.run
    if whole.__name__ == "noting":
        return

    def noting(self: Any) -> Any:
        with (self.folder.parents[1] / "trained.txt").open("a") as stream:
            stream.write(f"{self.folder.name} {os.getpid()}\n")
        return whole(self)

    loop._Trainer.run = noting  # type: ignore[method-assign]


def _hang(_flag: str) -> None:
    time.sleep(600)


def _no_space(flag: str) -> None:
    """The sixth write and all further ones, as long as the flag is there."""
    whole, count = os.fsync, 0

    def fsync(number: int) -> None:
        nonlocal count
        count += 1
        if count >= 6 and Path(flag).exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(number)

    os.fsync = fsync


def _breaks(_flag: str) -> None:
    raise RuntimeError("the network drive is away")


HARM: dict[str, Callable[[str], Any]] = {
    "exits": lambda _: os._exit(3), "segfaults": lambda _: ctypes.string_at(0), "breaks": _breaks, "hangs": _hang,
    "stops": lambda _: os.kill(os.getpid(), signal.SIGSTOP), "no-space": _no_space,
}  # fmt: skip


def data(kind: str = "plain", flag: Path | None = None) -> str:
    return f"test_local_engine:images,kind={kind}" + (f",flag={flag}" if flag else "")


def plan(seeds: int = 1, *, epochs: int = 2, model: str = MLP, kind: str = "plain", **content: Any) -> Plan:
    base = {
        "model": model,
        "data": data(kind),
        "epochs": epochs,
        "batch_size": 32,
        "keep_every": 1000,
        **content.pop("base", {}),
    }
    return make_plan(make_study({"name": "s", "seeds": seeds, "base": base, "measure": MEASURE, **content}))


def trained(store: Store) -> list[tuple[str, int]]:
    """(key, worker) of each training that began or went on."""
    path = store.folder / "trained.txt"
    rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [(key, int(worker)) for key, worker in rows]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def until(what: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


# --- what a finished study is ---


def timeless(content: Any) -> Any:
    """Without clocks, and without where it was made."""
    if isinstance(content, dict):
        return {k: timeless(v) for k, v in content.items() if k not in ("wall_s", "environment")}
    return [timeless(part) for part in content] if isinstance(content, list) else content


def assert_complete(store: Store, made: Plan) -> None:
    """Every run is there, once, with as many lines as epochs, and nothing beside."""
    assert {path.name for path in (store.folder / "runs").iterdir()} == set(made.distinct)
    for key, run in made.distinct.items():
        folder = store.run_folder(key)
        epochs = [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert epochs == list(range(1, run.config.epochs + 1))
        assert read_json(folder / "result.json")["epochs"] == run.config.epochs
        assert len(list(folder.glob("result.json*"))) == 1
        assert {str(p.relative_to(folder)) for p in folder.glob("analysis/*")} == {m.file for m in run.measured}
        assert not (folder / "resume.pt").exists()
    assert {row.state for row in store.status("s")} == {"done"}


def assert_alike(found: Store, expected: Store, made: Plan) -> None:
    """Bit for bit the same weights, and the same numbers in every JSON."""
    for key in made.distinct:
        ours, theirs = found.run_folder(key), expected.run_folder(key)
        names = sorted(p.name for p in theirs.glob("checkpoints/*"))
        assert sorted(p.name for p in ours.glob("checkpoints/*")) == names
        for name in names:
            (one, _), (other, _) = (load_state(folder / "checkpoints" / name) for folder in (ours, theirs))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[part], other[part]) for part in one), (key, name)
        for file in ("result.json", *(m.file for m in made.distinct[key].measured)):
            assert timeless(read_json(ours / file)) == timeless(read_json(theirs / file)), (key, file)
        lines = [
            [timeless(json.loads(x)) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (ours, theirs)
        ]
        assert lines[0] == lines[1]


EPOCHS = 4


def disturbed_plan() -> Plan:
    """Six runs: two starts, two that go on from them with a part frozen, two with Deep Augmentation."""
    return plan(
        2, epochs=EPOCHS, model=RESNET, starts={"pre": {"momentum": 0.5}},
        arms=[
            {"name": "frozen", "start": "pre", "settings": {"freeze": {"part": "before", "layer": "layer1"}}},
            {"name": "deep", "settings": {"augment": {"layer": "layer2", "stop_gradient": True}}},
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The study of `disturbed_plan`, with nothing in its way."""
    made, store = disturbed_plan(), Store(tmp_path_factory.mktemp("undisturbed") / "store")
    out = run_plan(made, store, LocalEngine(workers=2, threads=1), device="cpu")
    assert set(out.fresh) == set(made.distinct)
    assert not out.failed
    return store


def test_an_undisturbed_study_trains_each_run_once_in_two_workers_that_live_as_long(undisturbed: Store):
    made = disturbed_plan()
    assert_complete(undisturbed, made)
    rows = trained(undisturbed)
    assert sorted(key for key, _ in rows) == sorted(made.distinct)
    assert len({worker for _, worker in rows}) == 2
    assert not any(alive(worker) for _, worker in rows)
    logs = [undisturbed.log(key).read_text() for key in made.distinct]
    assert sum("loading plain: 1 threads, OMP 1" in text for text in logs) == 2, "each worker loads the data once"


# --- killed again and again ---


class Hunted(LocalEngine):
    """Kills its own workers: while they load, after an epoch, between training and measuring, or while measuring."""

    def __init__(self, kills: int, draws: random.Random, *, most: int) -> None:
        super().__init__(workers=2, threads=1)
        self.left, self.draws, self.most = kills, draws, most  # of one run
        self.deaths: Counter[str] = Counter()
        self.moments: dict[str, tuple[Callable[[], bool], float]] = {}  # key -> from when on, and how long after
        self.due: dict[str, float] = {}

    def start(self, job: Job) -> None:
        before = {worker.process for worker in self.workers}
        super().start(job)
        new = any(worker.process not in before for worker in self.workers)
        metrics, log, result = Path(job.folder) / "metrics.jsonl", Path(job.log), Path(job.folder) / "result.json"
        lines, size = _lines(metrics), _size(log)
        moments: dict[str, tuple[Callable[[], bool], float]] = {
            "at once": (lambda: True, 0.5), "loading": (lambda: _size(log) > size, 0.1),
            "training": (lambda: _lines(metrics) > lines, 0.05), "measuring": (result.exists, 0.1),
        }  # fmt: skip
        choices = ["at once"] + ["loading"] * new  # a worker that has loaded the data does not do so again
        if not result.exists():
            choices += ["at once"] + ["training"] * (lines < EPOCHS - 1)
            if self.deaths[job.key] >= self.most - 2:  # one missed ends the run
                choices += ["measuring"] * 2
        choice = self.draws.choice(choices)
        self.moments[job.key] = moments[choice][0], self.draws.uniform(0, moments[choice][1])
        self.due.pop(job.key, None)

    def wait(self, timeout_s: float) -> list[Ended]:
        found = super().wait(min(timeout_s, 0.01))
        for worker in self.workers:
            if worker.job is not None and self.left and self.deaths[worker.job.key] < self.most:
                self._strike(worker.job.key, worker.process.pid)
        return found

    def _strike(self, key: str, pid: int) -> None:
        when, delay = self.moments[key]
        if key not in self.due and when():
            self.due[key] = time.monotonic() + delay
        if time.monotonic() >= self.due.get(key, float("inf")):
            os.kill(pid, signal.SIGKILL)
            self.left -= 1
            self.deaths[key] += 1
            self.due[key] = float("inf")


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def hunt(tmp_path: Path, undisturbed: Store, kills: int, seed: int) -> None:
    made, store = disturbed_plan(), Store(tmp_path / "store")
    engine = Hunted(kills, random.Random(seed), most=kills // len(made.distinct) + 3)
    out = run_plan(made, store, engine, retries=1000, device="cpu")
    assert engine.left == 0, "a test that kills too little shows too little"
    assert set(out.done) == set(out.fresh) == set(made.distinct)
    assert out.failed == {}
    attempts = [a for key in made.distinct for a in store.failures(key)["attempts"]]
    assert {a["kind"] for a in attempts} == {DIED}
    assert all("signal 9" in a["error"] for a in attempts)
    assert kills - len(made.distinct) <= len(attempts) <= kills, "but for those that had just said their last word"
    assert_complete(store, made)
    assert_alike(store, undisturbed, made)


def test_a_study_whose_workers_are_killed_ends_like_an_undisturbed_one(tmp_path: Path, undisturbed: Store):
    hunt(tmp_path, undisturbed, 6, seed=1)


@pytest.mark.slow
def test_a_study_whose_workers_are_killed_fifty_times_ends_like_an_undisturbed_one(tmp_path: Path, undisturbed: Store):
    hunt(tmp_path, undisturbed, 50, seed=2)


# --- workers that hang, stop, crash or raise ---


def test_workers_past_their_limit_are_ended_and_said_to_be_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """One sleeps and ends itself with a traceback in its log; one is stopped, and ended from here."""
    monkeypatch.setattr(local, "GRACE_S", 8.0)
    monkeypatch.setattr(local, "_gpus", lambda: ["5", "6"])
    made = plan(arms=[{"name": kind, "settings": {"data": data(kind)}} for kind in ("hangs", "stops")])
    store, before, said = Store(tmp_path / "store"), dict(os.environ), []
    engine = LocalEngine(threads=2)
    out = run_plan(made, store, engine, retries=0, limit_s=12.0, say=said.append)
    keys = {run.arm: run.key for run in made.runs}
    assert out.failed == {
        keys["hangs"]: "took longer than 12 s; its log says where it was",
        keys["stops"]: "took longer than 12 s, and did not end itself",
    }
    assert [store.failures(key)["attempts"][0]["kind"] for key in keys.values()] == [LATE, LATE]
    log = store.log(keys["hangs"]).read_text()
    assert "Timeout (0:00:12)!" in log
    assert "in _hang" in log
    assert any("in _hang" in line for line in store.failures(keys["hangs"])["attempts"][0]["log"])
    assert len(said) == 2
    assert {row.state for row in store.status("s")} == {"failed"}
    heads = [store.log(key).read_text().splitlines()[0] for key in keys.values()]
    assert heads == ["loading hangs: 2 threads, OMP 2, GPU 5", "loading stops: 2 threads, OMP 2, GPU 6"]
    assert dict(os.environ) == before
    assert capfd.readouterr() == ("", ""), "what workers say is for their logs"


def test_workers_that_crash_or_raise_are_told_and_the_study_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    kinds = ("exits", "segfaults", "breaks", "plain")
    made = plan(arms=[{"name": kind, "settings": {"data": data(kind)}} for kind in kinds])
    store, said = Store(tmp_path / "store"), []
    out = run_plan(made, store, LocalEngine(workers=2, threads=1), retries=0, device="cpu", say=said.append)
    keys = {run.arm: run.key for run in made.runs}
    assert out.done == (keys["plain"],)
    attempts = {kind: store.failures(keys[kind])["attempts"] for kind in kinds}
    assert [(a["kind"], a["error"]) for a in attempts["exits"]] == [(DIED, "the worker ended with exit code 3")]
    assert [(a["kind"], a["error"]) for a in attempts["segfaults"]] == [(DIED, "the worker was killed by signal 11")]
    [broken] = attempts["breaks"]
    assert broken["kind"] == REFUSED
    assert broken["error"].endswith("failed: RuntimeError: the network drive is away")
    assert any("RuntimeError: the network drive is away" in line for line in broken["log"])
    assert attempts["plain"] == []
    assert Counter(line.partition(" ")[0] for line in said) == {"exits": 1, "segfaults": 1, "breaks": 1}
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_ends_the_study_and_the_next_start_finishes_it(tmp_path: Path):
    flag = tmp_path / "full"
    flag.touch()
    made = plan(2, base={"data": data("no-space", flag)})
    store = Store(tmp_path / "store")
    with pytest.raises(DiskFullError, match=r"^can't write '.*': No space left on device; [^\n]+$"):
        run_plan(made, store, LocalEngine(workers=1, threads=1), device="cpu")
    assert not any(store.is_done(key) for key in made.distinct)
    assert not any(alive(worker) for _, worker in trained(store))
    flag.unlink()
    out = run_plan(made, store, LocalEngine(workers=1, threads=1), device="cpu")
    assert set(out.fresh) == set(made.distinct)
    assert_complete(store, made)


# --- several processes, and parents that end ---

START = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_local_engine as here
made, store = here.plan(**json.loads(sys.argv[3])), here.Store(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
out = here.run_plan(made, store, here.LocalEngine(workers=1, threads=1), device="cpu")
print(json.dumps([out.done, out.fresh, out.failed]), flush=True)
"""


@contextmanager
def started(store: Store, **content: Any) -> Iterator[subprocess.Popen[str]]:
    """A process of its own, with a session of its own, that is ready to run a study and waits for a word."""
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(Path(__file__).parent), str(store.folder), json.dumps(content)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with process:
            pass


def say(process: subprocess.Popen[str], word: str = "go\n") -> None:
    assert process.stdin is not None
    process.stdin.write(word)
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr.read() if process.stderr else ""
    return line


def test_two_processes_on_one_store_share_the_work_and_do_each_run_once(tmp_path: Path):
    content: dict[str, Any] = {"seeds": 4, "model": RESNET}
    made, store = plan(**content), Store(tmp_path / "store")
    with started(store, **content) as one, started(store, **content) as other:
        for process in (one, other):
            assert hear(process) == "ready\n"
        for process in (one, other):
            say(process)
        outcomes = [json.loads(hear(process)) for process in (one, other)]
        for process in (one, other):
            assert process.wait(PATIENCE_S) == 0
            assert process.stderr is not None
            assert process.stderr.read() == ""
    for done, _, failed in outcomes:
        assert set(done) == set(made.distinct)
        assert failed == {}
    assert set(outcomes[0][1]) | set(outcomes[1][1]) == set(made.distinct)
    assert_complete(store, made)
    rows = trained(store)
    assert Counter(key for key, _ in rows) == dict.fromkeys(made.distinct, 1), "none is trained twice"
    assert len({worker for _, worker in rows}) == 2, "they share the work"


def begun(process: subprocess.Popen[str], store: Store, key: str) -> int:
    """Let it run until some epochs are done; the worker."""
    assert hear(process) == "ready\n"
    say(process)
    until(lambda: store.epochs_done(key) >= 3 or process.poll() is not None)
    assert process.poll() is None
    [(_, worker)] = trained(store)
    assert alive(worker)
    return worker


def test_a_parent_that_is_killed_leaves_no_worker(tmp_path: Path):
    content: dict[str, Any] = {"epochs": 20_000}
    store, [key] = Store(tmp_path / "store"), plan(**content).distinct
    with started(store, **content) as process:
        worker = begun(process, store, key)
        assert store.is_running(key)
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: not alive(worker), 15.0)
    assert not store.is_running(key)
    assert [row.state for row in store.status("s")] == ["missing"]


def test_ctrl_c_ends_a_study_promptly_and_the_next_start_goes_on(tmp_path: Path):
    content: dict[str, Any] = {"epochs": 200}
    made, store = plan(**content), Store(tmp_path / "store")
    [key] = made.distinct
    with started(store, **content) as process:
        worker = begun(process, store, key)
        os.killpg(process.pid, signal.SIGINT)
        struck = time.monotonic()
        process.wait(PATIENCE_S)
        assert time.monotonic() - struck < 10.0
        assert process.returncode in (-signal.SIGINT, 130)
        assert not alive(worker)
        assert process.stderr is not None
        said = process.stderr.read()
    assert said.count("Traceback") == 1, "of the parent, and of no worker"
    assert "Traceback" not in store.log(key).read_text()
    first = store.run_folder(key) / "checkpoints" / "epoch-0000.safetensors"
    written = first.stat().st_mtime_ns
    epochs = store.epochs_done(key)
    assert 3 <= epochs < 200
    out = run_plan(made, store, LocalEngine(workers=1, threads=1), device="cpu")
    assert out.fresh == (key,)
    assert_complete(store, made)
    assert first.stat().st_mtime_ns == written, "it does not begin anew"


# --- how workers are set up ---


@pytest.mark.parametrize(("cores", "workers", "threads"), [(8, 2, 4), (8, 3, 2), (2, 4, 1), (1, 1, 1)])
def test_the_cores_are_divided_among_the_workers(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: int, threads: int
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(local, "_gpus", list)
    engine = LocalEngine(workers=workers)
    assert [worker.threads for worker in engine.workers] == [threads] * workers
    assert engine.free == workers
    assert [worker.threads for worker in LocalEngine(workers=workers, threads=5).workers] == [5] * workers


def test_there_is_one_worker_per_gpu_or_else_per_core(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(local, "_gpus", list)
    assert len(LocalEngine().workers) == 6
    monkeypatch.setattr(local, "_gpus", lambda: ["0", "1"])
    assert [(w.gpu, w.threads) for w in LocalEngine().workers] == [("0", 3), ("1", 3)]
    assert [w.gpu for w in LocalEngine(workers=3).workers] == ["0", "1", "0"]


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [(None, 2, ["0", "1"]), ("3,1", 2, ["3", "1"]), ("", 0, []), ("-1", 0, []), ("GPU-a,GPU-b", 2, ["GPU-a", "GPU-b"])],
)
def test_only_gpus_that_the_study_may_use_are_handed_out(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int, names: list[str]
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local._gpus() == names


@pytest.mark.parametrize("name", ["workers", "threads"])
@pytest.mark.parametrize("value", [0, -1])
def test_fewer_than_one_is_refused(name: str, value: int):
    with pytest.raises(ConfigError, match=f"^{name}={value}; allowed: 1 or more"):
        make_engine("local", **{name: value})


def test_an_engine_that_does_not_exist_names_the_closest():
    with pytest.raises(UnknownNameError, match=r"unknown engine 'locl'; closest: local \(allowed: local, ray, slurm\)"):
        make_engine("locl")
    assert ENGINES == ("local", "ray", "slurm")


def test_an_engine_without_jobs_waits_for_nothing_and_starts_nothing():
    engine = LocalEngine(workers=2, threads=1)
    began = time.monotonic()
    assert engine.wait(5.0) == []
    assert time.monotonic() - began < 1.0
    assert engine.pids() == []
    engine.close()
    engine.close()
    assert all(worker.process is None for worker in engine.workers)
