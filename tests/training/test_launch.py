"""Several ranks train as one would: the same weights, the same errors, and no process that stays."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_resume import assert_alike, config, kept, lines, same, tiny

from layerlens.augment import adalase
from layerlens.errors import ConfigError, LayerlensError, NonFiniteError
from layerlens.training import loop
from layerlens.training.launch import launch, launched
from layerlens.training.loop import Progress, train

STILL = {"scale": 1.0, "ratio": 1.0, "flip": 0.0, "jitter": [0, 0, 0, 0], "jitter_p": 0.0, "grey": 0.0}
MOCO = {"queue": 64, "key_momentum": 0.9}
EQUAL: dict[str, dict[str, Any]] = {
    "simclr": {},
    "supcon": {"objective": "supcon", "labels": 0.5},
    "supervised": {"objective": "supervised", "momentum": 0.5},
    "accumulate": {"objective": "supervised", "accumulate": 2},
    "moco": {"objective": "moco", "moco": MOCO},
    "moco with labels": {"objective": "moco", "labels": 0.5, "moco": MOCO},
    "adalase": {
        "objective": "supervised",
        "adalase": {"kinds": ["noise", "dropout"], "interval": 2, "eta": 5.0, "rotation": 0},
    },
}
RESUMED: dict[str, dict[str, Any]] = {
    "random": {"augment": {"layer": "blocks.0"}, "dropout": {"kind": "backward", "rate": 0.3}},
    "batch norm": {
        "objective": "moco", "model": "resnet20-cifar", "labels": 0.5, "input_augment": "mixup",
        "moco": {"queue": 32, "key_momentum": 0.5},
    },
}  # fmt: skip
SPLITS = {"objective": "moco", "model": "resnet20-cifar", "moco": {"queue": 32, "bn_splits": 2}, "epochs": 1}


def still(settings: dict[str, Any]) -> dict[str, Any]:
    """No random views, and steps large enough to see."""
    return {**settings, "views": STILL, "learning_rate": 0.2}


def run_rank(settings: dict[str, Any], folder: Path, **options: Any) -> Any:
    chosen, data = loop.resolve(config(**settings), tiny()), tiny()
    trainer = loop._Trainer(chosen, data, folder, "cpu", options.get("progress"))
    trainer.run()
    return trainer


def halve(h: torch.Tensor) -> torch.Tensor:
    return h * 0.5


def negate(h: torch.Tensor) -> torch.Tensor:
    return -h


def stop_at(calls: int) -> None:
    """The next training of this process is interrupted before its so-manieth step."""
    whole, count = loop._Trainer._train_step, 0

    def step(self: Any, rows: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == calls:
            loop._Trainer._train_step = whole
            raise KeyboardInterrupt
        return whole(self, rows)

    loop._Trainer._train_step = step


def everything(report: Callable[[Any], None], folder: Path) -> None:
    """One rank's share of all trainings that the tests compare, as each start of a process costs seconds."""
    rank = os.environ["RANK"]
    adalase.KINDS.update(noise=halve, dropout=negate)  # without a draw, so that ranks and rows make no difference
    for kind, settings in EQUAL.items():
        trainer = run_rank({**still(settings), "devices": 2}, folder / kind)
        torch.save(trainer.network.state_dict(), folder / f"{kind}-{rank}.pt")
        if trainer.adalase is not None:
            torch.save(trainer.adalase.ratios, folder / f"ratios-{rank}.pt")
    adalase.KINDS.update(KINDS)
    for kind, settings in RESUMED.items():
        run_rank({**settings, "devices": 2}, folder / f"{kind}, whole")
        for name, save_every in (("each step", -1.0), ("each epoch", 60.0)):
            loop.SAVE_EVERY_S = save_every
            for calls in (2, 4) if save_every < 0 else (5,):
                stop_at(calls)
                with contextlib.suppress(KeyboardInterrupt):
                    run_rank({**settings, "devices": 2}, folder / f"{kind}, {name}")
            run_rank({**settings, "devices": 2}, folder / f"{kind}, {name}")
        loop.SAVE_EVERY_S = 60.0
    try:
        run_rank({**SPLITS, "devices": 2}, folder / "splits")
    except RuntimeError as error:
        (folder / f"splits-{rank}.txt").write_text(str(error))
    report("done")


KINDS = dict(adalase.KINDS)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, reports = tmp_path_factory.mktemp("ranks"), []
    launch(everything, 2, (folder,), reports.append)
    assert reports == ["done", "done"]
    return folder


@pytest.mark.parametrize("kind", EQUAL)
def test_two_ranks_make_the_weights_of_one(tmp_path: Path, two_ranks: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(adalase.KINDS, "noise", halve)
    monkeypatch.setitem(adalase.KINDS, "dropout", negate)
    train(config(**still(EQUAL[kind])), tmp_path, dataset=tiny(), device="cpu")
    found, expected = kept(two_ranks / kind), kept(tmp_path)
    assert found.keys() == expected.keys()
    assert same(found["epoch-0000.safetensors"], expected["epoch-0000.safetensors"])
    for name in expected:
        for key, value in expected[name].items():
            torch.testing.assert_close(found[name][key], value, atol=1e-5, rtol=0)
    start, end = expected["epoch-0000.safetensors"], expected["epoch-0003.safetensors"]
    assert max((end[key] - start[key]).abs().max() for key in end) > 1e-2, "weights that stay would be equal too"
    for one, other in zip(lines(two_ranks / kind, "metrics"), lines(tmp_path, "metrics"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    for one, other in zip(lines(two_ranks / kind, "ratios"), lines(tmp_path, "ratios"), strict=True):
        assert one.pop("arm") == other.pop("arm")
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("kind", EQUAL)
def test_both_ranks_end_with_the_same_weights(two_ranks: Path, kind: str):
    assert same(*(torch.load(two_ranks / f"{kind}-{rank}.pt") for rank in (0, 1)))


def test_both_ranks_come_to_the_same_ratios(two_ranks: Path):
    first, second = (torch.load(two_ranks / f"ratios-{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    assert first.std() > 1e-3, "ratios that stay would be equal too"


@pytest.mark.parametrize("name", ["each step", "each epoch"])
@pytest.mark.parametrize("kind", RESUMED)
def test_two_ranks_that_are_interrupted_make_the_same_weights(two_ranks: Path, kind: str, name: str):
    found, expected = (kept(two_ranks / f"{kind}, {which}") for which in (name, "whole"))
    assert found.keys() == expected.keys()
    assert all(same(found[epoch], expected[epoch]) for epoch in expected)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            "each step",
        ),
        "each epoch",
    ],
)
@pytest.mark.parametrize("kind", RESUMED)
def test_two_ranks_that_are_interrupted_measure_the_same(two_ranks: Path, kind: str, name: str):
    assert_alike(two_ranks / f"{kind}, {name}", two_ranks / f"{kind}, whole")


def test_two_ranks_train_with_groups_of_batch_statistics(two_ranks: Path):
    assert not [path.read_text() for path in two_ranks.glob("splits-*.txt")]
    assert np.isfinite(lines(two_ranks / "splits", "metrics")[0]["loss"])


# --- train() itself ---


def children() -> set[int]:
    """Processes that this one has started and that still run."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid() and fields[0] != "Z":
                found.add(int(path.parent.name))
    return found


@pytest.fixture
def no_process_stays() -> Iterator[None]:
    before, threads = children(), threading.active_count()
    yield
    started = {child for child in children() - before if b"resource_tracker" not in commandline(child)}
    assert not started
    assert threading.active_count() == threads


def commandline(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b"resource_tracker"  # gone meanwhile


@pytest.mark.usefixtures("no_process_stays")
def test_a_run_on_two_ranks_learns_and_reports_to_the_parent(tmp_path: Path):
    seen: list[Progress] = []
    chosen = config(objective="supervised", devices=2, epochs=6, learning_rate=0.3, views=STILL)
    result = train(chosen, tmp_path / "run", dataset=tiny(), device="cpu", progress=seen.append)
    assert [(p.step, p.steps, p.epoch) for p in seen] == [(k + 1, 18, k // 3) for k in range(18)]
    losses = [line["loss"] for line in lines(tmp_path / "run", "metrics")]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.05
    assert result.loss == losses[-1]
    assert seen[-1].metrics["loss"] == losses[-2]
    assert not launched()
    assert train(chosen, tmp_path / "run", dataset=tiny(), device="cpu") == result


@pytest.mark.usefixtures("no_process_stays")
def test_an_error_of_a_rank_is_the_error_of_the_run(tmp_path: Path):
    chosen = config(devices=2, learning_rate=1e30, warmup_epochs=0)
    with pytest.raises(NonFiniteError, match=r"NaN or infinite at step 2 of epoch 1; .* learning_rate \(it was 1e\+30"):
        train(chosen, tmp_path / "run", dataset=tiny(), device="cpu")
    assert not (tmp_path / "run" / "result.json").exists()
    assert kept(tmp_path / "run").keys() == {"epoch-0000.safetensors"}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"batch_size": 60}, "batch_size=60 but only 58"),
        ({"augment": {"layer": "blocks.9"}}, "no layer"),
        pytest.param(
            {"dropout": {"layers": "blocks.9"}}, "no layer",
        ),
    ],
    ids=["batch", "augment", "dropout"],
)  # fmt: skip
def test_what_can_not_be_is_refused_before_anything_is_written(tmp_path: Path, settings: dict[str, Any], match: str):
    with pytest.raises(LayerlensError, match=match):
        train(config(devices=2, **settings), tmp_path / "run", dataset=tiny(), device="cpu")
    assert not (tmp_path / "run").exists()


# --- torchrun ---


@pytest.mark.parametrize(
    ("devices", "world"),
    [
        pytest.param(
            1, 2
        ),
        pytest.param(
            3, 2
        ),
        pytest.param(
            2, 3
        ),
    ],
)  # fmt: skip
def test_other_devices_than_torchrun_has_started_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: int, world: int
):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29533, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    place |= {"TORCHELASTIC_RUN_ID": "test", "RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    assert launched()
    with pytest.raises(ConfigError, match=rf"devices={devices} but torchrun started {world} processes"):
        train(config(devices=devices, batch_size=24), tmp_path / "run", dataset=tiny(), device="cpu")


def write_run(folder: Path, **settings: Any) -> Path:
    """The configuration file of a run, and its data."""
    data = tiny()
    arrays = {name: getattr(data, name).numpy() for name in ("x_train", "y_train", "x_test", "y_test")}
    np.savez(folder / "data.npz", **arrays)
    values = {"model": "mlp,width=8,depth=2", "data": f"npz:{folder / 'data.npz'}", "batch_size": 16, **settings}
    path = folder / "run.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return path


FAREWELL = """
import atexit, os
from layerlens.cli import main

atexit.register(os.abort)  # as threads of the process group do now and then to an interpreter that takes its leave
main()
"""


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a run that torchrun started, in processes that would not survive their farewell."""
    folder = tmp_path_factory.mktemp("torchrun")
    path, program = write_run(folder, epochs=2, devices=2, objective="supervised"), folder / "program.py"
    program.write_text(FAREWELL)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29577"]
    options = ["train", "--config", str(path), "--out", str(folder / "run"), "--device", "cpu", "--json"]
    made = subprocess.run(
        [*command, str(program), *options], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return folder, made.stdout


@pytest.mark.slow
def test_torchrun_makes_the_run_that_train_makes(tmp_path: Path, torchrun: tuple[Path, str]):
    from layerlens.training.config import make_config, read_config

    chosen = make_config(read_config(torchrun[0] / "run.toml"))
    train(chosen, tmp_path / "run", device="cpu")
    assert_alike(tmp_path / "run", torchrun[0] / "run")


@pytest.mark.slow
def test_torchrun_prints_one_result(torchrun: tuple[Path, str]):
    result = json.loads(torchrun[1])
    assert result["epochs"] == 2


# --- the parent goes, or fails ---

PARENT = """
import sys, time
from test_launch import launch, report_for_ever, train, config, tiny, Path, ConfigError
{body}
"""


def parent(body: str, *arguments: str) -> subprocess.Popen[str]:
    """A process that starts ranks; a file, as ranks import the main module again."""
    where = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    indented = "\n".join(f"    {line}" for line in body.strip().splitlines())
    path = Path(arguments[0]) / "parent.py"
    path.write_text(PARENT.format(body=f"if __name__ == '__main__':\n{indented}"))
    return subprocess.Popen(
        [sys.executable, "-u", str(path), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": where}, start_new_session=True,
    )  # fmt: skip


def ranks_of(process: int) -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            child = int(path.parent.name)
            if int(fields[3]) == process and child != process and b"spawn_main" in commandline(child):
                found.add(child)
    return found


def end_all(process: subprocess.Popen[str]) -> None:
    """The session of a process that a test started, with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


LONG = """
chosen = config(devices=2, epochs=2000, keep_every=2000, objective="supervised")
train(chosen, Path(sys.argv[1]) / "run", dataset=tiny(), device="cpu", progress=lambda p: print(p.step))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM),
        pytest.param(signal.SIGKILL),
    ],
)
def test_no_rank_outlives_its_parent(tmp_path: Path, number: signal.Signals):
    process = parent(LONG, str(tmp_path))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        assert len(ranks_of(process.pid)) == 2
        process.send_signal(number)
        until = time.monotonic() + 15
        while ranks_of(process.pid) and time.monotonic() < until:
            time.sleep(0.1)
        assert not ranks_of(process.pid)
    finally:
        end_all(process)


@pytest.mark.slow
def test_two_ranks_whose_parent_is_killed_go_on_to_the_same_weights(tmp_path: Path):
    chosen = config(devices=2, epochs=40, keep_every=10, augment={"layer": "blocks.0"})
    train(chosen, tmp_path / "whole", dataset=tiny(), device="cpu")
    body = LONG.replace(
        '2000, keep_every=2000, objective="supervised"', "40, keep_every=10, augment={'layer': 'blocks.0'}"
    )
    for step in (7, 50):
        process = parent(body, str(tmp_path))
        try:
            assert process.stdout is not None
            while int(process.stdout.readline()) < step:
                pass
            process.kill()
            until = time.monotonic() + 15
            while ranks_of(process.pid) and time.monotonic() < until:
                time.sleep(0.05)
        finally:
            end_all(process)
        assert not (tmp_path / "run" / "result.json").exists()
    train(chosen, tmp_path / "run", dataset=tiny(), device="cpu")
    assert_alike(tmp_path / "run", tmp_path / "whole")


def report_for_ever(report: Callable[[Any], None]) -> None:
    """The first rank reports without a pause; the second fails meanwhile."""
    if os.environ["RANK"] == "1":
        time.sleep(2)
        raise ConfigError("rank 1 has failed")
    while True:
        report("x" * 200)


FAILING = """
try:
    launch(report_for_ever, 2, (), {progress})
except ConfigError as error:
    print(error)
"""


@pytest.mark.slow
def test_an_error_arrives_although_another_rank_is_reporting(tmp_path: Path):
    process = parent(FAILING.format(progress="lambda _: time.sleep(0.01)"), str(tmp_path))
    try:
        assert process.communicate(timeout=40)[0] == "rank 1 has failed\n"
    finally:
        end_all(process)


PICKY = """
def picky(progress):
    if progress.step == 5:
        raise ZeroDivisionError("from progress")
chosen = config(devices=2, epochs=300, keep_every=300, objective="supervised")
try:
    train(chosen, Path(sys.argv[1]) / "run", dataset=tiny(), device="cpu", progress=picky)
except ZeroDivisionError as error:
    print(error)
"""


@pytest.mark.slow
def test_an_error_of_progress_ends_the_run_and_arrives(tmp_path: Path):
    process = parent(PICKY, str(tmp_path))
    try:
        assert process.communicate(timeout=60)[0] == "from progress\n"
        assert not ranks_of(process.pid)
    finally:
        end_all(process)
