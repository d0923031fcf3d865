"""What a study will cost, before it runs: its missing runs, their time from a few measured steps, their disk."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layerlens.analysis.results import Result
from layerlens.batch_sizes import fixed_choice
from layerlens.data import AnyDataset
from layerlens.errors import require
from layerlens.experiments.grid import Plan, PlannedRun
from layerlens.experiments.measuring import measure_run
from layerlens.experiments.store import Store
from layerlens.graphs import GraphDataset
from layerlens.text import TextDataset
from layerlens.training.config import RunConfig
from layerlens.training.loop import train
from layerlens.training.order import Order

STEPS = 6  # that are timed, of each kind of run
SCORED_IMAGES = 2000  # on which the measuring is timed; it grows with the images


@dataclass(frozen=True, kw_only=True)
class Cost(Result):
    """What is left of a study to do.

    Attributes:
        runs: Different runs of the study.
        done: Of those, the finished ones.
        train_s: Seconds of training that are left, on one worker.
        measure_s: Seconds of measuring that are left, on one worker.
        wall_s: Both, shared among the workers.
        disk_mib: Space that the missing runs will take, with the states of those in progress.
        workers: At once.
        timed: What was timed: one line per kind of run, with its seconds per step.
    """

    runs: int
    done: int
    train_s: float
    measure_s: float
    wall_s: float
    disk_mib: float
    workers: int
    timed: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "timed", tuple(self.timed))


@dataclass(frozen=True, kw_only=True)
class _Timed:
    """Of a kind of run: seconds per step and of measuring a checkpoint (by kind and data), bytes of one, of a state."""

    step_s: float
    measure_s: dict[tuple[bool, str | None], float]
    checkpoint: int
    state: int


def estimate(
    plan: Plan,
    store: Store,
    *,
    workers: int,
    threads: int = 0,
    device: str = "auto",
    say: Callable[[str], None] | None = None,
) -> Cost:
    """Time a few steps of each kind of run (model, data, objective, batch, operators), and add up what is missing.

    Runs of a kind differ in layer, rate, seed and the like, which change a step by a few percent.

    Args:
        plan: From `make_plan`.
        store: Finished runs there cost nothing.
        workers: That share the work.
        threads: Of each, on a CPU; 0 for as many as PyTorch uses here.
        device: Where the steps are timed.
        say: Takes a line about each kind that is timed.

    Raises:
        ConfigError: Fewer than one worker.
    """
    require(workers >= 1, "workers", workers, "1 or more")
    runs = plan.distinct
    missing = [run for run in runs.values() if not store.is_done(run.key, run.files)]
    kinds: dict[str, _Timed] = {}
    train_s = measure_s = 0.0
    disk = 0
    for run in missing:
        kind = _kind(run.config)
        if kind not in kinds:
            if say is not None:
                say(f"timing {kind}")
            with _threads(threads):
                kinds[kind] = _time(run, plan.datasets, plan.study.measure.model_dump(mode="json"), device)
        timed, config = kinds[kind], run.config
        left = config.epochs - min(store.epochs_done(run.key), config.epochs)
        kept = len({0, config.epochs, *range(0, config.epochs, config.keep_every)})
        train_s += left * Order(config, plan.datasets[config.data]).steps * timed.step_s
        for m in run.measured:
            seconds = timed.measure_s.get((m.kind == "cka", m.data), timed.measure_s.get((False, None), 0.0))
            measure_s += seconds * (1 if m.kind == "last-scores" else kept)
        disk += kept * timed.checkpoint
    at_work = min(workers, max(len(missing), 1))
    disk += at_work * max((t.state for t in kinds.values()), default=0)
    return Cost(
        runs=len(runs), done=len(runs) - len(missing), train_s=round(train_s, 1),
        measure_s=round(measure_s, 1), wall_s=round((train_s + measure_s) / at_work, 1),
        disk_mib=round(disk / 2**20, 1), workers=at_work,
        timed=tuple(f"{kind}: {t.step_s:.4g} s per step" for kind, t in kinds.items()),
    )  # fmt: skip


def _kind(config: RunConfig) -> str:
    """What decides the time of a step, in words."""
    parts = [config.model, config.data, config.objective, f"batch {config.batch_size}", config.precision]
    if config.dropout is not None:
        parts.append(f"dropout {config.dropout.kind}")
    if config.augment is not None and config.augment.transform == "pca":
        parts.append("pca")
    if config.adalase is not None:
        parts.append("adalase")
    if config.freeze is not None:
        parts.append(f"frozen {config.freeze.part}")
    return ", ".join(parts)


def _time(run: PlannedRun, datasets: dict[str, AnyDataset], measure: dict[str, Any], device: str) -> _Timed:
    """Train a few steps of a run on a part of its data, in a folder that is thrown away, and measure what it kept."""
    whole = datasets[run.config.data]
    small, moments = _cut(whole, max(SCORED_IMAGES, 2 * run.config.batch_size)), list[float]()
    config = run.config.model_copy(update={"holdout": 0.0, "epochs": 2, "keep_every": 2, "knn_every": 2})
    images = min(STEPS * config.batch_size, len(small))
    config = config.model_copy(update={"train_samples": images // config.batch_size * config.batch_size or images})
    with tempfile.TemporaryDirectory(prefix="layerlens-cost-") as place:
        folder = Path(place) / "run"
        result = train(
            config, folder, dataset=small, device=device, progress=lambda _: moments.append(time.perf_counter())
        )
        checkpoint = (folder / result.checkpoints[-1]).stat().st_size
        measure_s = {}
        for m in run.measured:
            data = small if m.data is None else _cut(datasets[m.data], SCORED_IMAGES)
            begin = time.perf_counter()
            measure_run(folder, m.kind, m.file, dataset=data, model=config.model, measure=measure, device=device)
            share = 1.0 if m.kind == "cka" else len(datasets[m.data or config.data]) / len(data)
            share = share**2 if isinstance(data, GraphDataset) else share  # an SVM's time, which is most of it
            seen = 1 if m.kind == "last-scores" else len(result.checkpoints)
            measure_s[m.kind == "cka", m.data] = share * (time.perf_counter() - begin) / seen
    return _Timed(
        step_s=_step_s(moments), measure_s=measure_s, checkpoint=checkpoint,
        state=3 * checkpoint,  # weights, momentum, and what is being written
    )  # fmt: skip


def _step_s(moments: list[float]) -> float:
    """Seconds per step from the moments after each of two epochs' steps.

    The second epoch counts, as a whole: only at the end of an epoch does the host wait for a GPU.
    """
    second = moments[len(moments) // 2 - 1 :]
    return (second[-1] - second[0]) / (len(second) - 1)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """PyTorch uses so many threads inside the block."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cut(dataset: AnyDataset, count: int) -> AnyDataset:
    """Some samples of both splits, in the proportion of the whole; at random, as data may be sorted by class.

    Of sentences the first ones.
    """
    if count >= len(dataset):
        return dataset
    if isinstance(dataset, TextDataset):
        return replace(dataset, columns=tuple([column[i] for i in range(count)] for column in dataset.columns))
    if isinstance(dataset, GraphDataset):
        chosen = fixed_choice(len(dataset), count, seed=0)
        y = None if dataset.y is None else dataset.y[chosen]
        return replace(dataset, graphs=dataset.graphs.part(chosen), y=y)
    rows = fixed_choice(len(dataset.x_train), count, seed=0)
    other = max(count * len(dataset.x_test) // len(dataset.x_train), 8)
    queries = fixed_choice(len(dataset.x_test), other, seed=0)
    return replace(
        dataset, x_train=dataset.x_train[rows], x_test=dataset.x_test[queries],
        y_train=None if dataset.y_train is None else dataset.y_train[rows],
        y_test=None if dataset.y_test is None else dataset.y_test[queries],
    )  # fmt: skip
