from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from here import Here, content

from layerlens.errors import ConfigError, ExtraMissingError, WorkerError
from layerlens.experiments.engines import make_engine
from layerlens.experiments.engines.ray import RayEngine
from layerlens.experiments.grid import make_plan
from layerlens.experiments.runner import run_plan
from layerlens.experiments.store import Store
from layerlens.experiments.study import make_study

EPOCHS = 24  # so many that the node dies in the midst of a run
STUDY = {
    "name": "small",
    "base": {
        "model": "resnet18-cifar,width=4", "data": "digits", "epochs": EPOCHS, "train_samples": 128, "batch_size": 64,
        "keep_every": EPOCHS,
    },
    "arms": [
        {"name": "SimCLR", "baseline": True},
        {"name": "deep", "settings": {"augment": {}}, "axes": {"augment.layer": ["layer2", "layer3"]}},
    ],
    "measure": {"samples": 100, "scores": False},
}  # fmt: skip

BEGIN = """
import json, sys, threading, time

import ray
from ray.cluster_utils import Cluster

from layerlens.experiments.engines.ray import RayEngine
from layerlens.experiments.grid import make_plan
from layerlens.experiments.job import Job
from layerlens.experiments.runner import run_plan
from layerlens.experiments.store import Store
from layerlens.experiments.study import make_study


def until(true):
    end = time.monotonic() + 90
    while not true():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)


store, said = Store(sys.argv[1]), []
size = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=size)
plan = make_plan(make_study(json.loads(sys.argv[2])))
"""

KILL_A_NODE = """
def kill():  # once both nodes are in the midst of a run
    until(lambda: sum(store.is_running(k) and store.epochs_done(k) >= 2 for k in plan.distinct) == 2)
    cluster.remove_node(node, allow_graceful=False)


node = cluster.add_node(**size)
killer = threading.Thread(target=kill)
killer.start()
outcome = run_plan(plan, store, RayEngine(address=cluster.address), say=said.append)
killer.join()
report = {"done": outcome.done, "failed": outcome.failed, "said": said, "left": not ray.is_initialized()}
cluster.shutdown()
print(json.dumps(report))
"""

GROW_AND_CLOSE = """
ray_engine = RayEngine(address=cluster.address)
report = {"free": [ray_engine.free]}
node = cluster.add_node(**size)
until(lambda: ray_engine.free == 4)
cluster.remove_node(node)
until(lambda: ray_engine.free == 2)
folder = store.run_folder("long")
run = next(iter(plan.distinct.values()))
settings = {**run.config.model_dump(mode="json"), "epochs": 9999, "keep_every": 9999}
log = str(store.log("long"))
ray_engine.start(Job(
    key="long", folder=str(folder), log=log, settings=settings, start=None, measured=(), measure={}
))
until(lambda: store.epochs_done("long") > 0)
report["free"].append(ray_engine.free)
ray_engine.close()
report["epochs"] = [store.epochs_done("long")]
report["running"] = store.is_running("long")
time.sleep(1)
report["epochs"].append(store.epochs_done("long"))
cluster.shutdown()
print(json.dumps(report))
"""


def _driven(script: str, folder: Path) -> Any:
    """What a script in a process of its own reports; Ray warns in more ways than a test could name."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script, str(folder), json.dumps(STUDY)],
        capture_output=True, text=True, timeout=240,
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)  # Ray itself says nothing there, not even of a dead node


def test_a_study_survives_the_death_of_a_node(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    report = _driven(KILL_A_NODE, tmp_path / "cluster")
    plan = make_plan(make_study(STUDY))
    assert sorted(report["done"]) == sorted(plan.distinct)
    assert not report["failed"]
    (said,) = report["said"]
    assert "died: the Ray node that worked on it is gone; it goes on from epoch" in said
    assert int(said.rpartition(" ")[2]) >= 1
    assert report["left"]
    undisturbed = Store(tmp_path / "undisturbed")
    run_plan(plan, undisturbed, Here())
    assert content(Store(tmp_path / "cluster"), plan) == content(undisturbed, plan)


@pytest.mark.slow
def test_what_ray_is_given_follows_its_nodes_and_a_closed_engine_leaves_nothing_running(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    report = _driven(GROW_AND_CLOSE, tmp_path / "cluster")
    assert report["free"] == [2, 1]
    assert report["epochs"][0] == report["epochs"][1]
    assert not report["running"]


def test_ray_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExtraMissingError, match=r'pip install "layerlens-torch\[ray\]"'):
        make_engine("ray")


def test_an_address_without_a_cluster_is_one_line() -> None:
    pytest.importorskip("ray")
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(WorkerError, match=f"no Ray cluster at '{address}': Connection refused. Start one") as error:
            RayEngine(address=address)
    assert time.monotonic() - began < 10
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "127.0.0.1", "127.0.0.1:port", ":6379"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(WorkerError, match="allowed: auto, local or HOST:PORT"):
        RayEngine(address=address)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adress": "auto"}, "unknown option 'adress' of the engine ray; closest: address"),
        ({"gpus": "many"}, "gpus='many'; allowed: 0, a part of 1, 1, 2"),
        ({"gpus": "1.5"}, "gpus='1.5'; allowed"),
        ({"gpus": "-1"}, "gpus='-1'; allowed"),
        ({"autoscaling": "perhaps"}, "autoscaling='perhaps'; allowed: yes or no"),
        ({"workers": 0}, "workers=0; allowed: 1 or more"),
        ({"threads": 0}, "threads=0; allowed: 1 or more"),
    ],
)
def test_ray_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_engine("ray", **options)


class _Cluster:
    """As much of Ray as `free` and the check of sizes look at."""

    def __init__(self, *sizes: dict[str, float]) -> None:
        self.sizes = sizes

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": size} for size in self.sizes] + [{"Alive": False, "Resources": {"CPU": 9}}]

    def remote(self, function: Any) -> Any:
        return self

    def options(self, **settings: Any) -> Any:
        self.settings = settings
        return self


@pytest.mark.parametrize(
    ("sizes", "options", "places", "gpus"),
    [
        ([{"CPU": 4.0}, {"CPU": 3.0}], {"threads": 2}, 3, 0),
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}], {}, 2, 1),
        ([{"CPU": 8.0, "GPU": 2.0}], {"gpus": "0.4"}, 4, 0.4),
        ([{"CPU": 8.0, "GPU": 2.0}], {"gpus": 0}, 8, 0),
        ([{"CPU": 1.0}], {"gpus": 1, "autoscaling": "yes"}, 1, 1),  # one is asked for, so that the cluster grows
    ],
)
def test_ray_is_given_twice_what_its_nodes_take(
    monkeypatch: pytest.MonkeyPatch, sizes: list[dict[str, float]], options: dict[str, Any], places: int, gpus: float
) -> None:
    cluster = _Cluster(*sizes)
    monkeypatch.setattr("layerlens.experiments.engines.ray._load", lambda: cluster)
    engine = RayEngine(**options)
    assert engine.free == 2 * places
    assert cluster.settings["num_gpus"] == gpus
    assert cluster.settings["max_retries"] == 0
    assert cluster.settings["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == str(options.get("threads", 1))


def test_a_job_that_no_node_has_room_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerlens.experiments.engines.ray._load", lambda: _Cluster({"CPU": 4.0}))
    with pytest.raises(WorkerError, match=r"no node of the Ray cluster has 8 CPUs and 0 GPUs .* of 4 CPUs and 0 GPUs"):
        RayEngine(threads=8)
