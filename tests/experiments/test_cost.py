"""What a study will cost: counts that are right, times and sizes that are about right, and nothing left behind."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from here import Here

from layerlens.errors import ConfigError, LayerlensError
from layerlens.experiments.cost import Cost, estimate
from layerlens.experiments.grid import Plan, make_plan
from layerlens.experiments.runner import run_plan
from layerlens.experiments.store import Store
from layerlens.experiments.study import make_study

TINY = {"model": "resnet18-cifar,width=4", "data": "digits", "epochs": 4, "train_samples": 128, "batch_size": 32}
SCORED = {"samples": 50, "batch_size": 25, "k": 5}
QUICK = {**SCORED, "scores": False}


def plan(base: dict[str, Any] | None = None, **content: Any) -> Plan:
    return make_plan(make_study({"name": "s", "measure": QUICK, **content, "base": {**TINY, **(base or {})}}))


def cost(of: Plan, store: Path, workers: int = 1) -> Cost:
    return estimate(of, Store(store), workers=workers, device="cpu")


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with 1×8×8 images of three classes that differ in brightness, with labels, without, and sorted."""
    folder = tmp_path_factory.mktemp("blobs")
    generator = np.random.default_rng(0)

    def split(count: int, order: bool = False) -> tuple[Any, Any]:
        labels = np.sort(np.arange(count) % 3) if order else np.arange(count) % 3
        noise = generator.integers(0, 60, (count, 8, 8))
        return (noise + 60 * labels[:, None, None]).astype(np.uint8), labels

    (x, y), (tx, ty) = split(72), split(24)
    np.savez(folder / "tiny.npz", x_train=x, y_train=y, x_test=tx, y_test=ty)
    np.savez(folder / "plain.npz", x_train=x, x_test=tx)
    (x, y), (tx, ty) = split(6300, order=True), split(60, order=True)
    np.savez(folder / "sorted.npz", x_train=x, y_train=y, x_test=tx, y_test=ty)
    return folder


MLP = {"model": "mlp,width=16,depth=2", "train_samples": None, "batch_size": 16}
SMALL = {**SCORED, "samples": 16, "batch_size": 8}


def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Measuring that takes 0.1 ms per image and does nothing; images of each call."""
    seen: list[int] = []

    def measure_run(*_: Any, dataset: Any, **__: Any) -> None:
        seen.append(len(dataset.x_train))
        time.sleep(1e-4 * len(dataset.x_train))

    monkeypatch.setattr("layerlens.experiments.cost.measure_run", measure_run)
    return seen


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


# --- counts ---

SWEEP = {
    "seeds": 2,
    "starts": {"begin": {}},
    "arms": [
        {"name": "plain", "baseline": True},  # the same runs as those of the start
        {"name": "late", "start": "begin", "settings": {"augment": {"rate": 0.5}},
         "axes": {"augment.layer": ["layer1", "layer4"]}},
    ],
}  # fmt: skip


def test_runs_that_are_the_same_are_counted_once(tmp_path: Path):
    """Two starts, which are the plain runs as well, and two layers of two seeds."""
    of = plan(**SWEEP)
    assert len(of.runs) == 8
    found = cost(of, tmp_path / "store", workers=4)
    assert (found.runs, found.done, found.workers) == (6, 0, 4)


def test_only_what_is_missing_is_timed_and_added(tmp_path: Path):
    store = tmp_path / "store"
    before = cost(plan(seeds=3), store)
    run_plan(plan(seeds=2), Store(store), Here(), device="cpu")
    after = cost(plan(seeds=3), store)
    assert (before.runs, before.done, after.runs, after.done) == (3, 0, 3, 2)
    assert after.train_s < before.train_s
    assert after.disk_mib < before.disk_mib
    nothing = cost(plan(seeds=2), store)
    assert (nothing.runs, nothing.done, nothing.timed) == (2, 2, ())
    assert nothing.train_s == nothing.measure_s == nothing.wall_s == nothing.disk_mib == 0.0


def test_a_run_without_all_its_measurements_is_missing_but_need_not_be_trained(tmp_path: Path):
    store = tmp_path / "store"
    run_plan(plan(measure={"scores": False, "cka": False}), Store(store), Here(), device="cpu")
    found = cost(plan(measure=SCORED), store)
    assert (found.runs, found.done, found.train_s) == (1, 0, 0.0)
    assert found.measure_s > 0


def test_time_is_shared_among_workers_but_not_among_more_than_there_are_runs(tmp_path: Path):
    for workers, at_work in ((1, 1), (2, 2), (16, 3)):
        found = cost(plan(seeds=3), tmp_path / "store", workers)
        assert found.workers == at_work
        assert found.wall_s == pytest.approx((found.train_s + found.measure_s) / at_work, abs=0.11)


def test_runs_of_one_kind_are_timed_once(tmp_path: Path):
    said: list[str] = []
    axes = {"axes": {"augment.layer": ["layer1", "layer2"], "learning_rate": [0.1, 0.2]}, "seeds": 2}
    arms = [{"name": "deep", "settings": {"augment": {}}, **{k: v for k, v in axes.items() if k == "axes"}}]
    found = estimate(plan(arms=arms, seeds=2), Store(tmp_path / "s"), workers=1, device="cpu", say=said.append)
    assert found.runs == 8
    assert said == ["timing resnet18-cifar,width=4, digits, simclr, batch 32, 32-true"]
    assert len(found.timed) == 1
    assert found.timed[0].endswith("s per step")


def test_more_epochs_and_images_cost_more(tmp_path: Path):
    few, many = (cost(plan({"epochs": n, "train_samples": 1280}), tmp_path / "s") for n in (10, 1000))
    assert 30 < many.train_s / few.train_s < 300


def test_a_cost_survives_json(tmp_path: Path):
    found = cost(plan(), tmp_path / "store")
    assert Cost.from_json(found.to_json()).to_dict() == found.to_dict()


def test_a_cost_from_json_equals_the_one_that_was_written():
    found = Cost(runs=1, done=0, train_s=1.0, measure_s=1.0, wall_s=2.0, disk_mib=1.0, workers=1, timed=("a",))
    assert Cost.from_json(found.to_json()) == found


# --- any kind of run ---

KINDS: dict[str, dict[str, Any]] = {
    "moco": {"objective": "moco"},
    "moco with a longer queue than the timed images": {"objective": "moco", "moco": {"queue": 512},
                                                       "train_samples": 1200},
    "moco with some labels": {"objective": "moco", "labels": 0.25},
    "supcon": {"objective": "supcon", "labels": 0.5},
    "supervised": {"objective": "supervised", "input_augment": "mixup"},
    "adalase": {"objective": "supervised", "adalase": {"interval": 2}},
    "dropout": {"objective": "supervised", "dropout": {"kind": "augmented", "backward_rate": 0.2}},
    "pca": {"augment": {"layer": "layer2", "transform": "pca"}},
    "freeze": {"freeze": {"part": "before"}, "augment": {"layer": "layer3"}},
    "less than a multiple of the batch": {"train_samples": 100, "batch_size": 64},
    "one step": {"train_samples": 33, "batch_size": 32},
    "one epoch": {"epochs": 1, "keep_every": 1, "knn_every": 1},
    "accumulated": {"accumulate": 4, "optimizer": "lars"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_is_timed(kind: str, tmp_path: Path, temporary: Path):
    found = cost(plan(KINDS[kind]), tmp_path / "store")
    assert (found.runs, found.done) == (1, 0)
    assert found.disk_mib > 0
    assert float(found.timed[0].split(": ")[-1].split()[0]) > 0
    assert not (tmp_path / "store").exists()
    assert [path for path in temporary.iterdir() if not path.name.startswith("torchinductor")] == []  # PyTorch's own


@pytest.mark.parametrize("file", ["tiny", "plain"])
def test_arrays_with_and_without_labels_are_timed(blobs: Path, file: str, tmp_path: Path):
    base = {"model": "mlp,width=16,depth=2", "data": f"npz:{blobs / file}.npz", "train_samples": None, "batch_size": 16}
    found = cost(plan(base, measure={**SCORED, "samples": 16, "batch_size": 8}), tmp_path / "store")
    assert (found.runs, found.done, len(found.timed)) == (1, 0, 1)
    assert found.disk_mib > 0


def test_other_data_are_timed_as_well(blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The run's own 72 images for CKA and for scores, and the 48 of two of three classes."""
    seen = clock(monkeypatch)
    arms = [{"name": "a", "transfer": [f"npz:{blobs / 'tiny'}.npz,classes=0-1"]}]
    cost(plan({**MLP, "data": f"npz:{blobs / 'tiny'}.npz"}, measure=SMALL, arms=arms), tmp_path / "store")
    assert sorted(seen) == [48, 72, 72]


def test_larger_other_data_cost_in_proportion(blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A clock of 0.1 ms per image, for its own 72 images twice (CKA, scores) and for 6,300 others, by hand."""
    clock(monkeypatch)
    arms = [{"name": "a", "transfer": [f"npz:{blobs / 'sorted'}.npz"]}]
    found = cost(plan({**MLP, "data": f"npz:{blobs / 'tiny'}.npz"}, measure=SMALL, arms=arms), tmp_path / "store")
    assert found.measure_s == pytest.approx(1e-4 * (72 + 72 + 6300), rel=0.4)


@pytest.mark.parametrize("where", ["own", "other"])
def test_data_in_the_order_of_their_classes_are_timed(blobs: Path, where: str, tmp_path: Path):
    """As every image folder is; the study itself runs."""
    own, other = ("sorted", "tiny") if where == "own" else ("tiny", "sorted")
    arms = [{"name": "a", "transfer": [f"npz:{blobs / other}.npz"]}]
    of = plan({**MLP, "data": f"npz:{blobs / own}.npz"}, measure=SMALL, arms=arms)
    assert len(cost(of, tmp_path / "store").timed) == 1


# --- what is left behind, and what is refused ---


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"base": {"augment": {"layer": "layer9"}}}, "layer9"),
        ({"base": {"batch_size": 256}}, "256"),
        ({"base": {"train_samples": 5000}}, "5000"),
        ({"measure": {**SCORED, "protocol": "linaer"}}, "linaer"),
    ],
)
def test_what_the_runs_would_refuse_is_refused(content: dict[str, Any], words: str, tmp_path: Path, temporary: Path):
    with pytest.raises(LayerlensError, match=words):
        cost(plan(**content), tmp_path / "store")
    assert [path for path in temporary.iterdir() if not path.name.startswith("torchinductor")] == []  # PyTorch's own


@pytest.mark.parametrize("workers", [0, -1])
def test_fewer_than_one_worker_is_refused(workers: int, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"workers=.*allowed: 1 or more"):
        cost(plan(), tmp_path / "store", workers)


# --- against what really happens ---


def size_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def test_the_disk_is_right_within_a_factor_of_two(tmp_path: Path):
    of = plan({"keep_every": 2, "model": "resnet18-cifar,width=8"}, seeds=3)
    found = cost(of, tmp_path / "store")
    assert run_plan(of, Store(tmp_path / "store"), Here(), device="cpu").failed == {}
    held = size_mib(tmp_path / "store")
    assert 0.5 <= found.disk_mib / held <= 2, f"{found.disk_mib} MiB estimated, {held:.1f} held"


@pytest.mark.slow
@pytest.mark.parametrize("base", [{}, {"objective": "supervised"}], ids=["simclr", "supervised"])
def test_the_time_is_right_within_a_factor_of_three(base: dict[str, Any], tmp_path: Path):
    of = plan({**base, "epochs": 20, "train_samples": 1024, "keep_every": 5}, seeds=2, measure=SCORED)
    found = cost(of, tmp_path / "store")
    begin = time.perf_counter()
    assert run_plan(of, Store(tmp_path / "store"), Here(), device="cpu").failed == {}
    took = time.perf_counter() - begin
    assert 1 / 3 <= found.wall_s / took <= 3, f"{found.wall_s} s estimated, {took:.1f} s taken"
