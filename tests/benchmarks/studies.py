"""What a study costs beyond its training: overhead per run, two workers against one, a status of 10,000 runs, 50 kills.

    python tests/benchmarks/studies.py

On an idle machine, single-threaded runs. Writes tests/benchmarks/results/studies.json.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from safetensors.torch import load_file

from layerlens.experiments.engines.local import LocalEngine
from layerlens.experiments.grid import make_plan
from layerlens.experiments.runner import run_plan
from layerlens.experiments.store import Store
from layerlens.experiments.study import make_study
from layerlens.provenance import provenance

BASE = {"model": "resnet18-cifar,width=8", "data": "digits", "batch_size": 128, "knn_every": 100}
RUNS, KILLS, ROWS, REPEATS = 12, 50, 10_000, 3


def study(runs: int, epochs: int, *, measured: bool, keep_every: int = 1000) -> object:
    """As many runs, which differ in their seed."""
    base = {**BASE, "epochs": epochs, "keep_every": keep_every}
    measure = {"scores": measured, "cka": measured, "samples": 360, "batch_size": 36}
    return make_plan(make_study({"name": "bench", "seeds": runs, "base": base, "measure": measure}))


def run(plan: object, folder: Path, workers: int) -> tuple[float, list[float]]:
    """Seconds of the whole study, and of the training of each run."""
    store, engine = Store(folder), LocalEngine(workers=workers, threads=1)
    begin = time.perf_counter()
    outcome = run_plan(plan, store, engine)
    wall = time.perf_counter() - begin
    assert len(outcome.fresh) == len(plan.distinct), outcome
    return wall, [json.loads((store.run_folder(k) / "result.json").read_text())["wall_s"] for k in outcome.fresh]


def overhead(place: Path) -> dict:
    """Seconds per run beyond its training, on one worker: with the start of the worker, and without."""
    found = {}
    for label, measured in (("training alone", False), ("with scores and CKA of two checkpoints", True)):
        wall, train = run(study(RUNS, 4, measured=measured), place / f"overhead-{measured}", 1)
        one, first = run(study(1, 4, measured=measured), place / f"start-{measured}", 1)
        start = one - first[0]
        found[label] = {
            "per_run_s": round((wall - sum(train)) / RUNS, 3),
            "per_further_run_s": round((wall - sum(train) - start) / (RUNS - 1), 3),
            "train_s": round(statistics.mean(train), 3),
        }
    return found


def scaling(place: Path) -> dict:
    """Time of one worker over that of two, for the same runs, repeated in alternation."""
    plan = study(RUNS, 12, measured=False)
    ratios, walls = [], []
    for k in range(REPEATS):
        pair = [run(plan, place / f"scaling-{workers}-{k}", workers)[0] for workers in (1, 2)]
        walls.append([round(w, 2) for w in pair])
        ratios.append(pair[0] / pair[1])
    return {"wall_s": walls, "ratio": round(statistics.median(ratios), 3), "ratios": [round(r, 3) for r in ratios]}


def status(place: Path) -> dict:
    """Seconds of `layerlens study status` over many finished runs, from the shell, Python's start included."""
    store, rows = Store(place / "status"), []
    result = {
        "run": "x", "epochs": 30, "loss": 1.0, "knn": 0.5, "wall_s": 1.0, "environment": provenance(),
        "checkpoints": [f"checkpoints/epoch-{epoch:04d}.safetensors" for epoch in (0, 15, 30)],
    }  # fmt: skip
    for k in range(ROWS):
        key = f"{k:016x}"
        folder = store.run_folder(key)
        for part in ("analysis", "checkpoints"):
            (folder / part).mkdir(parents=True)
        for name in result["checkpoints"]:
            (folder / name).touch()
        (folder / "result.json").write_text(json.dumps(result))
        files = ["analysis/study-cka-0.json", "analysis/study-scores-0.json"]
        for file in files:
            (folder / file).write_text("{}")
        values = {"layer": "layer4", "stop_gradient": True}
        rows.append(
            {"key": key, "arm": "a", "baseline": False, "start": None, "values": values, "seed": k, "data": "digits",
             "epochs": 30, "files": files, "measured": []}
        )  # fmt: skip
    store.write_plan("many", {"study": {}, "runs": rows})
    words = [sys.executable, "-m", "layerlens", "study", "status", "--store", str(place / "status")]
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        times.append(time.perf_counter() - begin)
    assert str(ROWS) in said, said
    return {"runs": ROWS, "seconds": [round(t, 2) for t in times], "median_s": round(statistics.median(times), 2)}


def kills(place: Path) -> dict:
    """SIGKILL to a random worker, again and again during one study, against the same study left in peace."""
    plan = study(16, 6, measured=True, keep_every=3)
    run(plan, place / "calm", 2)
    store, engine, dice = Store(place / "killed"), LocalEngine(workers=2, threads=1), random.Random(0)
    killed: list[int] = []
    over = threading.Event()

    def blows() -> None:
        while len(killed) < KILLS and not over.is_set():
            time.sleep(dice.uniform(0.2, 1.5))
            pids = engine.pids()
            if pids:
                victim = dice.choice(pids)
                os.kill(victim, 9)
                killed.append(victim)

    thread = threading.Thread(target=blows)
    thread.start()
    outcome = run_plan(plan, store, engine, retries=KILLS)
    over.set()
    thread.join()
    calm = Store(place / "calm")
    same = all(_alike(store.run_folder(key), calm.run_folder(key)) for key in plan.distinct)
    lines = {key: store.epochs_done(key) for key in plan.distinct}
    return {
        "kills": len(killed), "runs": len(plan.distinct), "done": len(outcome.done), "failed": len(outcome.failed),
        "epochs_logged_once": all(count == 6 for count in lines.values()), "weights_and_scores_identical": same,
    }  # fmt: skip


def _alike(one: Path, other: Path) -> bool:
    """Whether two folders hold bit-identical weights and the same scores."""
    weights = sorted(path.name for path in other.glob("checkpoints/*.safetensors"))
    if weights != sorted(path.name for path in one.glob("checkpoints/*.safetensors")):
        return False
    for name in weights:
        a, b = (load_file(folder / "checkpoints" / name) for folder in (one, other))
        if a.keys() != b.keys() or not all(a[k].equal(b[k]) for k in a):
            return False
    scores = [json.loads(next(f.glob("analysis/study-scores-*.json")).read_text())["rows"] for f in (one, other)]
    return scores[0] == scores[1]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        found: dict = {}
        for part in (overhead, scaling, status, kills):
            found[part.__name__] = part(place)
            print(part.__name__, json.dumps(found[part.__name__]), flush=True)
    found["environment"] = provenance()
    path = Path(__file__).parent / "results" / "studies.json"
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
