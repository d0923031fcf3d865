"""Whatever ends a run early, the next one ends bit for bit like one that nothing disturbed; or it says why not."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from layerlens.data import Dataset, dataset_from_arrays
from layerlens.errors import ConfigError, DeviceMemoryError, NonFiniteError
from layerlens.files import read_json
from layerlens.training import loop, methods
from layerlens.training.checkpoint import load_state
from layerlens.training.config import RunConfig, make_config
from layerlens.training.loop import Progress, train

MLP = "mlp,width=8,depth=2"
STEPS = 9  # of a run of `config`: three epochs of three steps

SETTINGS: dict[str, dict[str, Any]] = {
    "simclr, Deep Augmentation": {
        "augment": {"layer": "blocks.0,blocks.1", "stop_gradient": True, "pairs": "one"}, "input_augment": "erasing",
    },
    "moco, two queues, mixup": {
        "objective": "moco", "model": "resnet20-cifar", "labels": 0.5, "input_augment": "mixup",
        "moco": {"queue": 32, "bn_splits": 2, "key_momentum": 0.9},
    },
    "moco, accumulate": {"objective": "moco", "accumulate": 2, "moco": {"queue": 24, "key_momentum": 0.5}},
    "supervised, AdaLASE on maps": {
        "objective": "supervised", "model": "resnet20-cifar", "adalase": {"kinds": ["cutout", "mixup"], "interval": 2},
    },
    "supervised, AdaLASE on rows": {
        "objective": "supervised", "adalase": {"kinds": ["mixup", "dropout"], "interval": 4}, "precision": "bf16-mixed",
    },
    "supcon, accumulate, lars": {
        "objective": "supcon", "accumulate": 2, "optimizer": "lars", "labels": 0.5, "augment": {"layer": "blocks.1"},
    },
    "two-pass dropout": {
        "objective": "supervised", "dropout": {"kind": "augmented", "rate": 0.4, "backward_rate": 0.2},
        "nesterov": True, "input_augment": "cutmix",
    },
    "freeze": {
        "model": "resnet20-cifar", "augment": {"layer": "layer1", "transform": "pca"}, "freeze": {"part": "before"},
    },
    "train_samples": {"train_samples": 26, "batch_size": 8, "knn_every": 2},
}  # fmt: skip
RICH = "supervised, AdaLASE on rows"


def tiny(n: int = 64, labels: bool = True) -> Dataset:
    """Four kinds of 8 × 8 pattern with noise."""
    rng = np.random.default_rng(0)
    y = np.arange(n + 16) % 4
    patterns = np.random.default_rng(7).random((4, 1, 8, 8)) * 180
    x = (patterns[y] + rng.random((n + 16, 1, 8, 8)) * 70).astype(np.uint8)
    known = (y[:n], y[n:]) if labels else (None, None)
    return dataset_from_arrays("tiny", x[:n], known[0], x[n:], known[1])


def config(**settings: Any) -> RunConfig:
    """58 training images (6 held out), so three steps an epoch."""
    return make_config({"model": MLP, "data": "tiny", "epochs": 3, "batch_size": 16, "keep_every": 2, **settings})


def run(folder: Path, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    return train(config(**(settings or {})), folder, dataset=tiny(), device="cpu", **options)


def interrupt_at(step: int) -> Callable[[Progress], None]:
    def watch(progress: Progress) -> None:
        if progress.step == step:
            raise KeyboardInterrupt

    return watch


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def kept(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of each kept checkpoint."""
    return {path.name: load_state(path)[0] for path in sorted((folder / "checkpoints").glob("epoch-*"))}


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """A log without its clock; what JSONL and CSV hold must be the same."""
    path = folder / f"{name}.jsonl"
    if not path.exists():
        return []
    whole = [json.loads(line) for line in path.read_text().splitlines()]
    with path.with_suffix(".csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert rows == [{k: "" if v is None else str(v) for k, v in line.items()} for line in whole]
    return [{k: v for k, v in line.items() if k != "wall_s"} for line in whole]


def assert_alike(found: Path, expected: Path) -> None:
    """Two finished runs differ in nothing but their clocks."""
    ours, theirs = kept(found), kept(expected)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert same(ours[name], theirs[name]), name
    for name in ("metrics", "ratios"):
        assert lines(found, name) == lines(expected, name)
    results = [read_json(folder / "result.json") for folder in (found, expected)]
    assert [results[0][key] for key in ("run", "epochs", "loss", "knn", "checkpoints")] == [
        results[1][key] for key in ("run", "epochs", "loss", "knn", "checkpoints")
    ]


# --- a process that trains in forks of itself, so that each killed run costs milliseconds ---

NURSERY = """
import json, os, signal, sys
import torch, lightning_fabric
import test_resume
from layerlens.training import loop

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def deadly(name, fatal):
    whole, count = getattr(os, name), 0
    def call(*args):
        nonlocal count
        count += 1
        if count == fatal:
            if name == "fsync":
                half = os.path.basename(os.readlink(f"/proc/self/fd/{args[0]}")).startswith(".")
                size = os.fstat(args[0]).st_size
                os.ftruncate(args[0], size // 2 if half else max(size - 5, 0))
            die()
        return whole(*args)
    setattr(os, name, call)

for order in sys.stdin:
    order = json.loads(order)
    child = os.fork()
    if not child:
        try:
            loop.SAVE_EVERY_S = order["save_every"]
            if order["deadly"]:
                deadly(*order["deadly"])
            def watch(progress):
                os.write(1, f"{progress.step}\\n".encode())
            os.write(1, f"{os.getpid()}\\n".encode())
            test_resume.run(test_resume.Path(order["folder"]), order["settings"], progress=watch)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\\n".encode())
            os._exit(1)
        os._exit(0)
    os.write(1, f"end {os.waitpid(child, 0)[1]}\\n".encode())
"""


class Nursery:
    """Trains in processes that may be killed at any moment."""

    def __init__(self) -> None:
        where = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, "PYTHONPATH": where},
        )  # fmt: skip

    def train(
        self,
        folder: Path,
        settings: dict[str, Any],
        *,
        save_every: float = -1.0,
        kill: tuple[int, float] | None = None,
        deadly: tuple[str, int] | None = None,
    ) -> tuple[bool, list[int]]:
        """Train, and kill so many seconds after so many steps, or inside the so-manieth call of an os function.

        Returns:
            Whether it died, and the steps it reported.
        """
        order = {"folder": str(folder), "settings": settings, "save_every": save_every, "deadly": deadly}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        child, steps = int(self.process.stdout.readline()), []
        while True:
            if kill is not None and len(steps) >= kill[0]:
                time.sleep(kill[1])
                with suppress(ProcessLookupError):  # it may have ended by itself
                    os.kill(child, signal.SIGKILL)
                kill = None
            words = self.process.stdout.readline().split()
            if words[0] == "end":
                break
            steps.append(int(words[0]))
        assert int(words[1]) in (0, signal.SIGKILL), "see the error above"
        return int(words[1]) == signal.SIGKILL, steps

    def close(self) -> None:
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Callable[[str], Path]:
    """The folder of an undisturbed run of a kind, trained once, in a process of its own."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            assert nursery.train(folder, SETTINGS[kind], save_every=60.0) == (False, list(range(1, STEPS + 1)))
            made[kind] = folder
        return made[kind]

    return of


def seeded(*words: Any) -> random.Random:
    return random.Random(repr(words))


def survive(
    nursery: Nursery, folder: Path, settings: dict[str, Any], kills: int, save_every: float, draws: random.Random
) -> int:
    """Kill a run at random moments and start it again until it is done; how often it was killed."""
    died = 0
    for _ in range(kills):
        moment = draws.randint(0, 3), draws.choice([0.0, draws.uniform(0, 0.002), draws.uniform(0, 0.01)])
        killed, _ = nursery.train(folder, settings, save_every=save_every, kill=moment)
        died += killed
        if not killed:
            return died
    nursery.train(folder, settings, save_every=save_every)
    return died


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_run_that_is_killed_again_and_again_ends_like_an_undisturbed_one(
    tmp_path: Path, nursery: Nursery, undisturbed: Callable[[str], Path], kind: str
):
    """Two or three kills each with a save after every step, one with saves at the ends of epochs."""
    died = 0
    for name, kills, save_every in (("each step", 3, -1.0), ("each epoch", 2, 60.0)):
        died += survive(nursery, tmp_path / name, SETTINGS[kind], kills, save_every, seeded(kind, name))
        assert_alike(tmp_path / name, undisturbed(kind))
    assert died >= 2, "a test that kills nothing shows nothing"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_run_that_is_killed_often_ends_like_an_undisturbed_one(
    tmp_path: Path, nursery: Nursery, undisturbed: Callable[[str], Path], kind: str, seed: int
):
    save_every = -1.0 if seed % 3 else 60.0
    survive(nursery, tmp_path / "run", SETTINGS[kind], 6, save_every, seeded(kind, seed))
    assert_alike(tmp_path / "run", undisturbed(kind))


def assert_nothing_half_written(folder: Path, expected: Path) -> None:
    """Each file that has its name is whole."""
    whole = kept(expected)
    for name, state in kept(folder).items():
        assert same(state, whole[name]), name
    for path in folder.glob("resume.pt"):
        assert torch.load(path, weights_only=True)["model"].keys() == whole["epoch-0003.safetensors"].keys()
    for path in folder.glob("*.json"):
        read_json(path)


def die_while_writing(
    nursery: Nursery, folder: Path, kind: str, expected: Path, function: str, draws: random.Random, kills: int
) -> int:
    died = 0
    for _ in range(kills):
        fatal = (function, draws.randint(1, 14))
        killed, _ = nursery.train(folder, SETTINGS[kind], deadly=fatal)
        assert_nothing_half_written(folder, expected)
        died += killed
        if not killed:
            return died
    nursery.train(folder, SETTINGS[kind])
    return died


@pytest.mark.parametrize("function", ["fsync", "replace", "unlink"])
def test_a_file_that_is_half_written_never_replaces_a_good_one(
    tmp_path: Path, nursery: Nursery, undisturbed: Callable[[str], Path], function: str
):
    """The process dies with half of a file on the disk, or the whole of it but under another name."""
    expected = undisturbed(RICH)
    assert die_while_writing(nursery, tmp_path / "run", RICH, expected, function, seeded(function), 5) >= 2
    assert_alike(tmp_path / "run", expected)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_run_may_die_in_each_of_its_first_writes(
    tmp_path: Path, nursery: Nursery, undisturbed: Callable[[str], Path], function: str
):
    expected = undisturbed(RICH)
    for call in range(1, 9):
        killed, _ = nursery.train(tmp_path / "run", SETTINGS[RICH], deadly=(function, call))
        assert killed, call
        assert_nothing_half_written(tmp_path / "run", expected)
    nursery.train(tmp_path / "run", SETTINGS[RICH])
    assert_alike(tmp_path / "run", expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("kind", [RICH, "moco, two queues, mixup"])
def test_a_run_may_die_in_any_of_its_writes(
    tmp_path: Path, nursery: Nursery, undisturbed: Callable[[str], Path], kind: str, function: str, seed: int
):
    expected = undisturbed(kind)
    die_while_writing(nursery, tmp_path / "run", kind, expected, function, seeded(kind, function, seed), 8)
    assert_alike(tmp_path / "run", expected)


def test_a_finished_run_leaves_nothing_of_its_killed_writes(tmp_path: Path, nursery: Nursery):
    for call in (3, 5, 7):
        assert nursery.train(tmp_path / "run", SETTINGS[RICH], deadly=("fsync", call))[0]
    nursery.train(tmp_path / "run", SETTINGS[RICH])
    hidden = {path.name for path in (tmp_path / "run").rglob(".*") if path.is_file()}
    assert hidden == {".lock"}


def test_a_run_that_dies_in_its_last_clean_up_leaves_no_resume_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    unlink = Path.unlink

    def dies(self: Path, missing_ok: bool = False) -> None:
        if self.name == "resume.pt":
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run")
    assert (tmp_path / "run" / "result.json").exists()
    run(tmp_path / "run")
    assert not (tmp_path / "run" / "resume.pt").exists()


# --- Ctrl-C ---


@pytest.mark.parametrize("save_every", [60.0, -1.0], ids=["saves each epoch", "saves each step"])
@pytest.mark.parametrize("steps", [(1,), (2, 4, 7, 8), (9,)])
@pytest.mark.parametrize("kind", SETTINGS)
def test_an_interrupted_run_ends_like_an_undisturbed_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[[str], Path],
    kind: str,
    steps: tuple[int, ...],
    save_every: float,
):
    monkeypatch.setattr(loop, "SAVE_EVERY_S", save_every)
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", SETTINGS[kind], progress=interrupt_at(step))
    seen: list[Progress] = []
    run(tmp_path / "run", SETTINGS[kind], progress=seen.append)
    done = steps[-1] - 1
    assert seen[0].step == 1 + (done if save_every < 0 else done // 3 * 3), "it goes on, and does not begin anew"
    assert_alike(tmp_path / "run", undisturbed(kind))
    assert not (tmp_path / "run" / "resume.pt").exists()


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_setting_has_a_say_in_the_weights(kind: str, undisturbed: Callable[[str], Path]):
    """Otherwise its tests here would show nothing: the weights move, and the ratios do."""
    folder = undisturbed(kind)
    states = list(kept(folder).values())
    assert len(states) == 3
    assert not same(states[0], states[1])
    assert not same(states[1], states[2])
    ratios = [[v for k, v in line.items() if k not in ("step", "arm")] for line in lines(folder, "ratios")]
    assert len(ratios) == (STEPS if "adalase" in SETTINGS[kind] else 0)
    assert not ratios or ratios[0] != ratios[-1]


# --- losses that break, memory that is not there ---


@pytest.mark.parametrize(
    ("bad", "place"), [(1, "step 1 of epoch 1"), (6, "step 3 of epoch 2"), (7, "step 1 of epoch 3")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_loss_that_breaks_names_its_step_and_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int, place: str, value: float
):
    whole, count = methods.SimCLR.loss, 0

    def breaks(*args: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return whole(*args) * (value if count == bad else 1.0)

    monkeypatch.setattr(methods.SimCLR, "loss", breaks)
    with pytest.raises(NonFiniteError, match=rf"NaN or infinite at {place}; the last good state is kept in .*run'"):
        run(tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
    for path in (tmp_path / "run").glob("resume.pt"):
        assert all(v.isfinite().all() for v in torch.load(path, weights_only=True)["model"].values())


def fails(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def raises(*_args: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(methods.SimCLR, "loss", raises)


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to …"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["device", "host"])
def test_memory_that_is_not_there_names_the_batch_and_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    fails(monkeypatch, error)
    with pytest.raises(
        DeviceMemoryError,
        match=r"^out of memory with batch_size=16, 16 images .* try batch_size=8 or .* with accumulate=2$",
    ):
        run(tmp_path / "run")


def test_a_batch_that_the_host_can_not_hold_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The host's own error, not our idea of its words."""
    monkeypatch.setattr(methods.SimCLR, "loss", lambda *_: torch.empty(2**58).sum())
    with pytest.raises(DeviceMemoryError, match="try batch_size=8"):
        run(tmp_path / "run")


@pytest.mark.parametrize("settings", [{"batch_size": 4}, {"batch_size": 18, "accumulate": 6}], ids=["4", "18 in 6"])
def test_what_out_of_memory_proposes_can_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
):
    fails(monkeypatch, NO_MEMORY[0])
    with pytest.raises(DeviceMemoryError) as caught:
        run(tmp_path / "run", settings)
    advice = str(caught.value).partition("; try ")[2]
    assert advice
    for name in ("batch_size", "accumulate"):
        proposal = [word for word in advice.split() if word.startswith(f"{name}=")]
        for text in proposal:
            value = int(text.removeprefix(f"{name}="))
            if name == "batch_size":
                assert value < settings["batch_size"]
            config(**{**settings, name: value})


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2"), ValueError("allocate memory"), ZeroDivisionError()])
def test_other_errors_pass_through_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception):
    fails(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        run(tmp_path / "run")
    assert caught.value is error
    assert caught.value.__cause__ is None


def test_supervised_training_with_few_labels_trains_or_is_refused(tmp_path: Path):
    try:
        run(tmp_path / "run", {"objective": "supervised", "labels": 0.5})
    except ConfigError as error:
        assert "labels" in str(error)  # noqa: PT017


def test_images_that_adalase_mixes_at_the_input_have_mixed_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mixes: list[Any] = []
    latent = loop._Trainer._latent_mix
    monkeypatch.setattr(loop._Trainer, "_latent_mix", lambda self: mixes.append(latent(self)) or mixes[-1])
    adalase = {"kinds": ["mixup"], "layers": "input,blocks.0", "ratios": [1.0, 0.0]}
    run(tmp_path / "run", {"objective": "supervised", "adalase": adalase, "epochs": 1})
    assert len(mixes) == 3
    assert all(mix is not None for mix in mixes)
