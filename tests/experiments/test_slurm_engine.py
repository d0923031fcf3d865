from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from here import Here, content

from layerlens.errors import ConfigError, ExtraMissingError, UnknownNameError, WorkerError
from layerlens.experiments.engines import make_engine, slurm
from layerlens.experiments.engines.slurm import OPTIONS, Attempt, SlurmEngine
from layerlens.experiments.grid import make_plan
from layerlens.experiments.job import DIED, FAILED, REFUSED, Ended, Job
from layerlens.experiments.runner import run_plan
from layerlens.experiments.store import Store
from layerlens.experiments.study import make_study

EPOCHS = 8
STUDY = {
    "name": "small",
    "base": {
        "model": "resnet18-cifar,width=4", "data": "digits", "epochs": EPOCHS, "train_samples": 128, "batch_size": 64,
        "keep_every": EPOCHS,
    },
    "arms": [{"name": "SimCLR", "baseline": True}, {"name": "deep", "settings": {"augment": {"layer": "layer2"}}}],
    "measure": {"samples": 100, "scores": False},
}  # fmt: skip
JOB = Job(key="0123456789abcdef", folder="f", log="l", settings={}, start=None, measured=(), measure={})

FAKE = {
    "sbatch": """
[ -e "$FAKE/full" ] && { echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }
id=$(($(ls "$FAKE" | grep -c script) + 101))
cp "$1" "$FAKE/$id.script"
echo PENDING > "$FAKE/$id.state"
if [ ! -e "$FAKE/idle" ]; then "$FAKE/bin/node" $id > "$FAKE/$id.out" 2>&1 < /dev/null & fi
echo "Submitted batch job $id"
""",
    "node": """
export SLURM_JOB_ID=$1
while :; do
    rm -f "$FAKE/$1.again"
    echo RUNNING > "$FAKE/$1.state"
    bash "$FAKE/$1.script"
    code=$?
    [ -e "$FAKE/$1.again" ] || break
done
grep -q CANCELLED "$FAKE/$1.state" && exit
case $code in 0) echo COMPLETED;; 137) echo OUT_OF_MEMORY;; *) echo FAILED;; esac > "$FAKE/$1.state"
""",
    "srun": """
while [ "${1#-}" != "$1" ]; do [ "$1" = --output ] && shift; shift; done
echo $$ > "$FAKE/$SLURM_JOB_ID.pid"
exec "$@"
""",
    "scontrol": """
touch "$FAKE/$2.again"
echo "$2" >> "$FAKE/requeued"
""",
    "scancel": """
for id in "$@"; do
    grep -qE "PENDING|RUNNING" "$FAKE/$id.state" || continue
    echo "CANCELLED by 0" > "$FAKE/$id.state"
    kill -9 $(cat "$FAKE/$id.pid")
done
""",
    "sacct": """
echo "JobID|State|NodeList"
[ -e "$FAKE/forgetful" ] && exit
for file in "$FAKE"/*.state; do echo "$(basename "$file" .state)|$(cat "$file")|node"; done
""",
    "squeue": """
[ -e "$FAKE/mute" ] && exit 1
cd "$FAKE" && grep -lE "PENDING|RUNNING" *.state | sed s/.state//
""",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A SLURM of scripts that does what it is told on this machine; files in its folder change how it behaves."""
    pytest.importorskip("submitit").SlurmJob.watcher.clear()  # it remembers jobs by their numbers
    folder = tmp_path / "slurm"
    (folder / "bin").mkdir(parents=True)
    for name, text in FAKE.items():
        (folder / "bin" / name).write_text("#!/bin/bash\n" + text)
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setattr(slurm, "ASK_S", 0.3)
    monkeypatch.setattr(slurm, "RESULT_S", 0.3)
    monkeypatch.setattr(slurm, "LOST_S", 1.0)
    yield folder
    for path in folder.glob("*.pid"):
        _kill(int(path.read_text()), signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    plan, store = make_plan(make_study(STUDY)), Store(tmp_path_factory.mktemp("undisturbed") / "store")
    run_plan(plan, store, Here())
    return content(store, plan)


def _until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def _kill(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _trainer(store: Store, key: str) -> int:
    """The process that holds a run's folder, once it has two epochs behind it."""
    _until(lambda: store.is_running(key) and store.epochs_done(key) >= 2)
    lock = (store.run_folder(key) / ".lock").stat()
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] == "FLOCK" and words[5].endswith(f":{lock.st_ino}"):
            return int(words[4])
    raise AssertionError(f"nobody holds {key}")


def _during(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


# --- whole studies ---


def test_a_slurm_study_goes_on_after_preemption_and_death(cluster: Path, tmp_path: Path, undisturbed: Any) -> None:
    plan, store, said = make_plan(make_study(STUDY)), Store(tmp_path / "store"), []

    def disturb() -> None:
        preempted, killed = plan.distinct
        _kill(_trainer(store, preempted), signal.SIGUSR2)
        _kill(_trainer(store, killed), signal.SIGKILL)

    disturber = _during(disturb)
    outcome = run_plan(plan, store, SlurmEngine(workers=2, partition="gpu"), say=said.append)
    disturber.join()
    assert sorted(outcome.done) == sorted(plan.distinct)
    (line,) = said
    assert "died: SLURM says OUT_OF_MEMORY of job 10" in line
    assert "; it goes on from epoch" in line
    assert len((cluster / "requeued").read_text().split()) == 1
    assert len(list(cluster.glob("*.script"))) == 3  # the preempted job came back by itself, the dead one anew
    assert content(store, plan) == undisturbed


@pytest.mark.slow  # the scripts above do the same, and more
def test_a_study_is_tried_out_on_this_machine(tmp_path: Path, undisturbed: Any) -> None:
    pytest.importorskip("submitit")
    plan = make_plan(make_study({**STUDY, "arms": [{"name": "SimCLR"}]}))
    (key,), store, said = plan.distinct, Store(tmp_path / "store"), []
    killer = _during(lambda: _kill(_trainer(store, key), signal.SIGKILL))
    outcome = run_plan(plan, store, make_engine("slurm", workers=1, cluster="local"), say=said.append)
    killer.join()
    assert outcome.done == (key,)
    (line,) = said
    assert "died: the process of job" in line
    assert content(store, plan)[key] == undisturbed[key]
    assert list((tmp_path / "store" / "logs" / "slurm").glob("*_log.out"))


# --- what SLURM is told ---


def _script(cluster: Path, job: Job, **options: Any) -> list[str]:
    """The lines of the script that SLURM is given for a job."""
    (cluster / "idle").touch()
    engine = SlurmEngine(log_folder=str(cluster / "logs"), **options)
    engine.start(job)
    (path,) = cluster.glob("*.script")
    return path.read_text().splitlines()


def test_the_script_asks_for_what_the_options_say(cluster: Path) -> None:
    lines = _script(
        cluster, JOB, threads=4, partition="gpu", account="lab", time_min="90", memory_gb="12.5", gpus="2", qos="long",
        reservation="mine", setup="module load cuda", constraint="a100&big",
    )  # fmt: skip
    wanted = {
        "job-name=layerlens-01234567", "partition=gpu", "account=lab", "time=90", "mem=12800MB", "gpus-per-node=2",
        "cpus-per-task=4", "qos=long", "reservation=mine", "constraint='a100&big'", "signal=USR2@90", "nodes=1",
    }  # fmt: skip
    assert {f"#SBATCH --{each}" for each in wanted} <= set(lines)
    assert [line for line in lines if line.startswith(("export", "module"))] == [
        "export OMP_NUM_THREADS=4", "export MKL_NUM_THREADS=4", "module load cuda", "export SUBMITIT_EXECUTOR=slurm",
    ]  # fmt: skip
    (command,) = (line for line in lines if line.startswith("srun"))
    assert "--cpus-per-task=4" in command
    assert f"{sys.executable} -u -m submitit" in command


@pytest.mark.parametrize(
    ("limit_s", "options", "minutes"),
    [(0.0, {}, 120), (3600.0, {}, 65), (61.0, {}, 7), (3600.0, {"time_min": 30}, 30)],
)
def test_slurm_ends_a_job_after_its_own_limit(
    cluster: Path, limit_s: float, options: dict[str, Any], minutes: int
) -> None:
    job = Job(**{**vars(JOB), "limit_s": limit_s})
    assert f"#SBATCH --time={minutes}" in _script(cluster, job, **options)


def test_a_node_without_the_folder_of_the_study_fails_the_job(tmp_path: Path) -> None:
    ended = Attempt(JOB, str(tmp_path / "elsewhere"))()
    assert ended.kind == FAILED
    assert "can't enter" in ended.error
    assert "No such file or directory; it must be shared by all nodes" in ended.error


def test_a_requeued_job_is_the_same_again() -> None:
    pytest.importorskip("submitit")
    attempt = Attempt(JOB, "/somewhere")
    again = attempt.checkpoint()
    assert again.function == attempt
    assert attempt.__submitit_checkpoint__().function == attempt


# --- the queue ---


def _queued_job(cluster: Path, **options: Any) -> SlurmEngine:
    (cluster / "idle").touch()
    engine = SlurmEngine(log_folder=str(cluster / "logs"), **options)
    engine.start(JOB)
    return engine


@pytest.mark.parametrize("state", ["CANCELLED by 1000", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "COMPLETED"])
def test_a_job_without_a_result_died(cluster: Path, state: str) -> None:
    engine = _queued_job(cluster)
    assert engine.wait(0.5) == []
    (cluster / "101.state").write_text(state)
    assert _wait(engine) == [Ended(key=JOB.key, kind=DIED, error=f"SLURM says {state} of job 101")]
    assert engine.wait(0) == []


def _wait(engine: SlurmEngine) -> list[Ended]:
    found: list[Ended] = []
    _until(lambda: found.extend(engine.wait(0.2)) or found)
    return found


def test_a_job_that_nobody_knows_is_lost(cluster: Path) -> None:
    engine = _queued_job(cluster)
    (cluster / "101.state").write_text("PREEMPTED")  # which SLURM may or may not bring back
    (ended,) = _wait(engine)
    assert (ended.kind, ended.error) == (DIED, "SLURM has lost job 101")


@pytest.mark.parametrize("file", ["forgetful", "mute"])
def test_a_job_that_one_of_two_knows_is_waited_for(cluster: Path, file: str) -> None:
    (cluster / file).touch()
    engine = _queued_job(cluster)
    assert engine.wait(2.0) == []
    assert engine.free == 63


def test_a_partition_that_is_not_there_ends_the_study(cluster: Path) -> None:
    (cluster / "full").touch()
    with pytest.raises(WorkerError, match=r"SLURM does not take the jobs: .*QOSMaxSubmitJobPerUserLimit\. Mend it"):
        _queued_job(cluster)


def test_a_full_queue_is_waited_for(cluster: Path) -> None:
    engine = _queued_job(cluster, workers=5)
    assert engine.free == 4
    (cluster / "full").touch()
    engine.start(JOB)
    assert engine.free == 0
    assert engine.wait(0.5) == []
    (cluster / "full").unlink()
    _until(lambda: engine.wait(0.1) == [] and engine.free == 3)


def test_what_is_left_is_cancelled_at_the_end(cluster: Path) -> None:
    engine = _queued_job(cluster)
    (cluster / "101.pid").write_text("999999999")
    engine.close()
    assert (cluster / "101.state").read_text() == "CANCELLED by 0\n"
    assert engine.free == 64


# --- what is said at once ---


def test_a_machine_without_slurm_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WorkerError, match=r"no sbatch on this machine, .* cluster=local"):
        make_engine("slurm")


def test_submitit_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ExtraMissingError, match=r'pip install "layerlens-torch\[slurm\]"'):
        make_engine("slurm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particion": "gpu"}, "unknown option 'particion' of the engine slurm; closest: partition"),
        ({"log_foldr": "x"}, "unknown option 'log_foldr' of the engine slurm; closest: log_folder"),
        ({"time_min": "soon"}, "time_min='soon'; allowed: whole minutes, from 1"),
        ({"time_min": 0}, "time_min=0; allowed: whole minutes"),
        ({"memory_gb": "nan"}, "memory_gb='nan'; allowed: a number above 0"),
        ({"gpus": -1}, "gpus=-1; allowed: a whole number, from 0"),
        ({"partition": " "}, "partition=' '; allowed: a name"),
        ({"workers": 0}, "workers=0; allowed: 1 or more"),
        ({"threads": 0}, "threads=0; allowed: 1 or more"),
    ],
)
def test_slurm_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_engine("slurm", **options)


def test_an_unknown_cluster_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown cluster 'slrm'; closest: slurm"):
        SlurmEngine(cluster="slrm")


def test_every_option_is_known_to_submitit() -> None:
    submitit = pytest.importorskip("submitit")
    ours = {"time_min", "memory_gb", "gpus", *slurm._ADDED}  # under other names there
    assert set(OPTIONS) - ours <= submitit.SlurmExecutor._valid_parameters()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit leaves its log files open
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_job_done_here_ends_like_any_other(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    engine = SlurmEngine(cluster="debug", log_folder=str(tmp_path))
    folders = {"log": str(tmp_path / "log.txt"), "folder": str(tmp_path / "run")}
    engine.start(Job(**{**vars(JOB), **folders, "settings": {"model": "mlp", "data": "no such"}}))
    (ended,) = engine.wait(1.0)
    assert ended.kind == REFUSED
    assert "no such" in ended.error
