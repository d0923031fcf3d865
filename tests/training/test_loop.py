"""The training loop: one folder per run, the same weights whatever interrupts it, and clear refusals."""

from __future__ import annotations

import fcntl
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from layerlens.data import Dataset, dataset_from_arrays
from layerlens.errors import (
    CheckpointError,
    ConfigError,
    LayerlensError,
    NonFiniteError,
    RunFolderError,
    UnknownLayerError,
)
from layerlens.files import read_json
from layerlens.training import loop, methods
from layerlens.training.checkpoint import fingerprint, load_state
from layerlens.training.config import RunConfig, make_config
from layerlens.training.loop import Progress, RunResult, train
from layerlens.training.network import build_network, load_network
from layerlens.training.run_folder import read_metrics, read_result

MLP = "mlp,width=8,depth=2"
MILD = {"scale": 0.6, "flip": 0.0, "grey": 0.0}


def tiny(n: int = 64, labels: bool = True, seed: int = 0) -> Dataset:
    """Four kinds of 8 × 8 pattern with noise."""
    rng = np.random.default_rng(seed)
    y = np.arange(n + 16) % 4
    patterns = np.random.default_rng(7).random((4, 1, 8, 8)) * 180
    x = (patterns[y] + rng.random((n + 16, 1, 8, 8)) * 70).astype(np.uint8)
    known = (y[:n], y[n:]) if labels else (None, None)
    return dataset_from_arrays("tiny", x[:n], known[0], x[n:], known[1])


def config(**settings: Any) -> RunConfig:
    """58 training images (6 held out), so three steps an epoch."""
    return make_config({"model": MLP, "data": "tiny", "epochs": 3, "batch_size": 16, "keep_every": 2, **settings})


def run(folder: Path, settings: dict[str, Any] | None = None, **options: Any) -> RunResult:
    return train(config(**(settings or {})), folder, dataset=tiny(), device="cpu", **options)


def weights(folder: Path, epoch: int = 3) -> dict[str, torch.Tensor]:
    return load_state(folder / "checkpoints" / f"epoch-{epoch:04d}.safetensors")[0]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def measured(folder: Path) -> list[dict[str, Any]]:
    """The metrics without the clock."""
    return [{k: v for k, v in line.items() if k != "wall_s"} for line in read_metrics(folder)]


def interrupt_at(step: int) -> Callable[[Progress], None]:
    def watch(progress: Progress) -> None:
        if progress.step == step:
            raise KeyboardInterrupt

    return watch


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# --- the folder of an undisturbed run ---


def test_a_finished_run_leaves_exactly_these_files(tmp_path: Path):
    result = run(tmp_path / "run")
    kept = {f"checkpoints/epoch-{e:04d}.safetensors" for e in (0, 2, 3)}
    assert files(tmp_path / "run") == {"config.json", "metrics.jsonl", "metrics.csv", "result.json", ".lock"} | kept
    assert result.checkpoints == tuple(sorted(kept))
    assert (result.epochs, result.folder) == (3, str(tmp_path / "run"))
    assert result.wall_s > 0
    assert result.environment["device"].startswith("cpu")


def test_metrics_have_one_line_per_epoch(tmp_path: Path):
    result = run(tmp_path / "run", {"knn_every": 2, "learning_rate": 0.5, "warmup_epochs": 0})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert all(set(line) == {"epoch", "loss", "learning_rate", "knn", "wall_s"} for line in lines)
    assert lines[0]["knn"] is None, "knn_every = 2"
    assert all(0 <= line["knn"] <= 1 for line in lines[1:]), "every second epoch, and the last"
    assert (result.loss, result.knn) == (lines[2]["loss"], lines[2]["knn"])
    last_steps = [2 / 3, 5 / 3, 8 / 3]  # three steps an epoch; the rate is that of an epoch's last step
    rates = [0.5 * 0.5 * (1 + np.cos(np.pi * e / 3)) for e in last_steps]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates, abs=1e-12)


def test_config_json_holds_what_was_filled_in(tmp_path: Path):
    run(tmp_path / "run")
    content = read_json(tmp_path / "run" / "config.json")
    assert content["config"]["data_sha256"] == tiny().fingerprint()
    assert content["config"]["views"]["scale"] == 0.2
    assert make_config(content["config"]).identity() == content["run"] == read_result(tmp_path / "run").run


def test_result_json_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, seen = tmp_path / "run", []
    write = loop.write_json

    def note(path: Path, content: Any) -> None:
        if path.name == "result.json":
            seen.append(files(folder))
        write(path, content)

    monkeypatch.setattr(loop, "write_json", note)
    run(folder)
    (before,) = seen
    assert {"metrics.jsonl", "resume.pt", "checkpoints/epoch-0003.safetensors"} <= before
    assert "result.json" not in before


def test_the_first_checkpoint_is_the_start_and_metadata_tells_the_epoch(tmp_path: Path):
    result = run(tmp_path / "run")
    assert [load_network(tmp_path / "run" / name)[1]["epoch"] for name in result.checkpoints] == [0, 2, 3]
    start = load_network(tmp_path / "run" / result.checkpoints[0])[0].state_dict()
    assert same(start, build_network(config(), tiny()).state_dict())
    assert not same(start, weights(tmp_path / "run"))


def test_the_default_folder_carries_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = train(config(epochs=1), dataset=tiny(), device="cpu")
    assert result.folder == f"runs/simclr-{result.run}"
    assert (tmp_path / result.folder / "result.json").exists()


def test_progress_counts_every_step(tmp_path: Path):
    seen: list[Progress] = []
    run(tmp_path / "run", progress=seen.append)
    assert [(p.step, p.steps, p.epoch) for p in seen] == [(k + 1, 9, k // 3) for k in range(9)]
    assert seen[2].metrics == {}
    assert [p.metrics["epoch"] for p in seen[3:]] == [1, 1, 1, 2, 2, 2]


def test_without_labels_there_is_no_knn_and_nothing_is_held_out(tmp_path: Path):
    data = tiny(labels=False)
    result = train(config(epochs=1), tmp_path / "run", dataset=data, device="cpu")
    assert result.knn is None
    trainer = loop._Trainer(loop.resolve(config(), data), data, tmp_path / "other", "cpu", None)
    assert (len(trainer.order.rows), len(trainer.order.held_out)) == (64, 0)


# --- determinism ---


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model": "resnet20-cifar"},
        {"objective": "supervised"},
        {"augment": {"layer": "blocks.0", "stop_gradient": True}},
        {"precision": "bf16-mixed"},
    ],
    ids=["mlp", "batch norm", "supervised", "augment", "bf16"],
)
def test_the_same_configuration_gives_bit_identical_weights(tmp_path: Path, settings: dict[str, Any]):
    with torch.random.fork_rng(devices=[]):
        for k in range(2):
            torch.manual_seed(k)  # the caller's state has no say
            run(tmp_path / str(k), settings)
    assert same(weights(tmp_path / "0"), weights(tmp_path / "1"))
    assert measured(tmp_path / "0") == measured(tmp_path / "1")


def test_another_seed_gives_other_weights(tmp_path: Path):
    run(tmp_path / "0")
    run(tmp_path / "1", {"seed": 1})
    assert not same(weights(tmp_path / "0", 0), weights(tmp_path / "1", 0))


def test_training_leaves_all_random_states_alone(tmp_path: Path):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    run(tmp_path / "run", {"augment": {"layer": "blocks.1"}})
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_an_interruption_leaves_all_random_states_alone(tmp_path: Path):
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", progress=interrupt_at(4))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_finished_run_is_read_and_not_trained_again(tmp_path: Path):
    first = run(tmp_path / "run")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in files(tmp_path / "run")}
    seen: list[Progress] = []
    assert run(tmp_path / "run", progress=seen.append) == first
    assert seen == []
    assert {name: (tmp_path / "run" / name).read_bytes() for name in files(tmp_path / "run")} == before


# --- interruptions ---


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an undisturbed run of a kind, trained once."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            run(folder, KINDS[kind])
            made[kind] = folder
        return made[kind]

    return of


KINDS: dict[str, dict[str, Any]] = {
    "batch norm": {"model": "resnet20-cifar"},
    "augment": {"augment": {"layer": "blocks.0"}},
    "supervised": {"objective": "supervised"},
}


@pytest.mark.parametrize("save_every", [60.0, -1.0], ids=["saves each epoch", "saves each step"])
@pytest.mark.parametrize("steps", [(1,), (3,), (5,), (9,), (2, 4, 7, 8)])
@pytest.mark.parametrize("kind", KINDS)
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
            run(tmp_path / "run", KINDS[kind], progress=interrupt_at(step))
    seen: list[Progress] = []
    result = run(tmp_path / "run", KINDS[kind], progress=seen.append)
    expected = undisturbed(kind)
    for epoch in (0, 2, 3):
        assert same(weights(tmp_path / "run", epoch), weights(expected, epoch))
    assert measured(tmp_path / "run") == measured(expected)
    assert files(tmp_path / "run") == files(expected)
    assert result.checkpoints == read_result(expected).checkpoints
    done = steps[-1] - 1
    assert seen[0].step == 1 + (done if save_every < 0 else done // 3 * 3), "it goes on, and does not begin anew"


def test_resuming_restores_what_the_last_epoch_measured(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", progress=interrupt_at(5))
    seen: list[Progress] = []
    run(tmp_path / "run", progress=seen.append)
    assert seen[0].metrics == read_metrics(tmp_path / "run")[0]


@pytest.mark.parametrize("victim", ["_keep", "_save", "_finish"])
def test_a_crash_while_writing_is_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[[str], Path], victim: str
):
    """The process dies before each of the writes at the end of an epoch, one after the other."""
    kind = KINDS["supervised"]
    whole = getattr(loop._Trainer, victim)
    for crash in range(1, 4):
        count = 0

        def dies(self: Any, *arguments: Any, crash: int = crash) -> Any:
            nonlocal count
            count += 1
            if count == crash:
                raise KeyboardInterrupt
            return whole(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(loop._Trainer, victim, dies)
            try:
                run(tmp_path / "run", kind)
            except KeyboardInterrupt:
                continue
    run(tmp_path / "run", kind)
    assert same(weights(tmp_path / "run"), weights(undisturbed("supervised")))
    assert measured(tmp_path / "run") == measured(undisturbed("supervised"))


CHILD = """
import sys, time
from layerlens.training import loop, methods
from layerlens.training.config import make_config
loop.SAVE_EVERY_S = -1.0
def watch(progress):
    print(progress.step, flush=True)
    time.sleep(0.01)
loop.train(make_config(eval(sys.argv[1])), sys.argv[2], device="cpu", progress=watch)
"""


def test_a_killed_process_is_resumed_to_bit_identical_weights(tmp_path: Path):
    data = tiny()
    arrays = {"x_train": data.x_train, "y_train": data.y_train, "x_test": data.x_test, "y_test": data.y_test}
    np.savez(tmp_path / "data.npz", **{name: value.numpy() for name, value in arrays.items()})
    settings = {
        "model": "resnet20-cifar", "data": f"npz:{tmp_path / 'data.npz'}", "epochs": 4, "batch_size": 16,
    }  # fmt: skip
    expected = train(make_config(settings), tmp_path / "whole", device="cpu")
    moments = random.Random(0)
    killed = tmp_path / "killed"
    for step in (1, 5, 8):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, repr(settings), str(killed)], stdout=subprocess.PIPE, text=True
        )
        with child:
            assert child.stdout is not None
            while int(child.stdout.readline()) < step:
                pass
            time.sleep(moments.uniform(0, 0.08))
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
        assert not (killed / "result.json").exists()
    seen: list[Progress] = []
    result = train(make_config(settings), killed, device="cpu", progress=seen.append)
    assert seen[0].step > 5
    assert same(weights(killed, 4), weights(tmp_path / "whole", 4))
    assert measured(killed) == measured(tmp_path / "whole")
    assert (result.loss, result.knn, result.checkpoints) == (expected.loss, expected.knn, expected.checkpoints)


def test_a_process_killed_before_its_first_file_was_whole_can_start_again(tmp_path: Path):
    """What `write_atomically` leaves when it is killed between its two steps."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.a1b2c3d4").write_text('{"sche')
    assert run(tmp_path / "run", {"epochs": 1}).epochs == 1


# --- folders that are not ours ---


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"seed": 5}, "seed is 0 there and 5 here"),
        ({"epochs": 4, "temperature": 0.1}, "epochs is 3 there and 4 here"),
        ({"augment": {"layer": "fc"}}, r"augment is None there and \{'layer': 'fc'"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_run_is_refused(tmp_path: Path, settings: dict[str, Any], difference: str, finished: bool):
    if finished:
        run(tmp_path / "run")
    else:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", progress=interrupt_at(2))
    before = files(tmp_path / "run")
    with pytest.raises(RunFolderError, match=rf"belongs to another run \({difference}.*choose another --out"):
        run(tmp_path / "run", settings)
    assert files(tmp_path / "run") == before


def test_other_contents_of_the_data_are_another_run(tmp_path: Path):
    run(tmp_path / "run")
    with pytest.raises(RunFolderError, match="data_sha256 is"):
        train(config(), tmp_path / "run", dataset=tiny(seed=1), device="cpu")


def test_a_folder_with_other_files_is_refused_and_unharmed(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunFolderError, match="exists and is no run folder; choose a new or empty one with --out"):
        run(tmp_path)
    assert files(tmp_path) == {"thesis.tex"}


def test_an_empty_folder_is_taken(tmp_path: Path):
    assert run(tmp_path, {"epochs": 1}).epochs == 1


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("precious")
    with pytest.raises(RunFolderError, match="exists and is no run folder"):
        run(tmp_path / "run")
    with pytest.raises(RunFolderError, match="can't write"):
        run(tmp_path / "run" / "below")
    assert (tmp_path / "run").read_text() == "precious"


def test_a_folder_in_use_is_refused(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", progress=interrupt_at(4))
    with (tmp_path / "run" / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(RunFolderError, match="another process is training in"):
            run(tmp_path / "run")
    assert run(tmp_path / "run").epochs == 3, "the lock goes with its holder"


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"config": null}', '{"run": 1, "config": {}}'])
def test_a_damaged_config_json_is_an_error_of_ours(tmp_path: Path, content: str):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", progress=interrupt_at(4))
    (tmp_path / "run" / "config.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"damaged|belongs to another run"):
        run(tmp_path / "run")


@pytest.mark.parametrize("content", ["{", "[]", "3", "{}", '{"checkpoints": []}', '{"checkpoints": 3}'])
def test_a_damaged_result_json_is_an_error_of_ours(tmp_path: Path, content: str):
    run(tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"result\.json' is damaged"):
        run(tmp_path / "run")


def test_a_damaged_metrics_file_is_an_error_of_ours(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", progress=interrupt_at(5))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"epoch": 1, "lo')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl' is damaged"):
        run(tmp_path / "run")


@pytest.mark.parametrize("damage", ["empty", "half", "noise", "other contents", "other model"])
def test_a_damaged_resume_file_is_refused_with_a_way_out(tmp_path: Path, damage: str):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", progress=interrupt_at(5))
    path = tmp_path / "run" / "resume.pt"
    whole = path.read_bytes()
    if damage == "other contents":
        torch.save({"model": {}}, path)
    elif damage == "other model":
        torch.save({**torch.load(path, weights_only=True), "model": {"w": torch.ones(1)}}, path)
    else:
        path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "noise": whole[::-1]}[damage])
    with pytest.raises(RunFolderError, match=r"resume\.pt' is damaged; delete it to start this run from the beginning"):
        run(tmp_path / "run")
    path.unlink()
    run(tmp_path / "run")
    run(tmp_path / "fresh")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "fresh"))
    assert measured(tmp_path / "run") == measured(tmp_path / "fresh")


# --- what can't be run ---


@pytest.mark.parametrize(
    ("settings", "options", "error", "match"),
    [
        ({"batch_size": 59}, {}, ConfigError, "batch_size=59 but only 58 training images; use a smaller batch"),
        ({}, {"device": "gpu"}, ConfigError, "unknown device 'gpu'; .*allowed: auto, cpu, cuda"),
        ({"augment": {"layer": "blocks.7"}}, {}, UnknownLayerError, r"no layer 'blocks\.7' in MLP; closest: blocks"),
        ({"init": "absent.pt"}, {}, CheckpointError, r"no checkpoint 'absent\.pt'"),
    ],
    ids=["batch", "device", "layer", "init"],
)
def test_a_run_that_can_not_be_is_refused(
    tmp_path: Path, settings: dict[str, Any], options: dict[str, Any], error: type[Exception], match: str
):
    with pytest.raises(error, match=match):
        train(config(**settings), tmp_path / "run", dataset=tiny(), **{"device": "cpu", **options})
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_device_that_is_not_there_is_an_error_of_ours(tmp_path: Path):
    absent = next(d for d, there in (("mps", torch.backends.mps.is_available()), ("cuda", False)) if not there)
    with pytest.raises(LayerlensError, match=absent):
        train(config(), tmp_path / "run", dataset=tiny(), device=absent)


def test_supervised_training_without_labels_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="supervised training needs labels; tiny has none"):
        train(config(objective="supervised"), tmp_path / "run", dataset=tiny(labels=False), device="cpu")


def test_a_batch_of_all_training_images_is_one_step(tmp_path: Path):
    seen: list[Progress] = []
    run(tmp_path / "run", {"batch_size": 58, "epochs": 2}, progress=seen.append)
    assert [p.steps for p in seen] == [2, 2]


# --- losses that break ---


def test_a_loss_that_explodes_stops_the_run_and_names_the_step(tmp_path: Path):
    with pytest.raises(NonFiniteError, match=r"NaN or infinite at step 2 of epoch 1; .* learning_rate \(it was 1e\+30"):
        run(tmp_path / "run", {"learning_rate": 1e30, "warmup_epochs": 0})
    assert not (tmp_path / "run" / "result.json").exists()
    load_network(tmp_path / "run" / "checkpoints" / "epoch-0000.safetensors")


def test_the_last_good_state_survives_a_loss_that_becomes_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(tmp_path / "whole")
    broken, count = methods.nt_xent, 0

    def breaks(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return broken(*args, **options) * (float("nan") if count == 8 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(methods, "nt_xent", breaks)
        patch.setattr(loop, "SAVE_EVERY_S", -1.0)
        with pytest.raises(NonFiniteError, match="at step 2 of epoch 3"):
            run(tmp_path / "run")
    state = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (2, 1)
    assert all(v.isfinite().all() for v in state["model"].values())
    assert same(weights(tmp_path / "run", 2), weights(tmp_path / "whole", 2))
    run(tmp_path / "run")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("epochs", [1, 2])
def test_weights_that_break_after_a_finite_loss_are_no_result(tmp_path: Path, epochs: int):
    """One step an epoch: the loss is finite, the update that follows it is not."""
    settings = {"learning_rate": 1e38, "loss_scale": 1e5, "warmup_epochs": 0, "batch_size": 58, "epochs": epochs}
    with pytest.raises(NonFiniteError):
        run(tmp_path / "run", settings)
    assert not (tmp_path / "run" / "result.json").exists()
    for path in (tmp_path / "run").glob("resume.pt"):
        state = torch.load(path, weights_only=True)["model"]
        assert all(value.isfinite().all() for value in state.values()), "the last good state is kept"


# --- what training does ---


def test_loss_falls_over_training(tmp_path: Path):
    data = tiny(128)
    for objective in ("simclr", "supervised"):
        chosen = config(
            objective=objective, model="resnet20-cifar", epochs=8, learning_rate=0.1, batch_size=32, views=MILD
        )
        train(chosen, tmp_path / objective, dataset=data, device="cpu")
        losses = [line["loss"] for line in read_metrics(tmp_path / objective)]
        assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.03


def test_the_loss_of_an_epoch_is_the_mean_over_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen, plain = [], methods.nt_xent

    def note(*args: Any, **options: Any) -> torch.Tensor:
        loss = plain(*args, **options)
        seen.append(loss.item())
        return loss

    monkeypatch.setattr(methods, "nt_xent", note)
    run(tmp_path / "run")
    expected = np.array(seen).reshape(3, 3).mean(1)
    assert [line["loss"] for line in read_metrics(tmp_path / "run")] == pytest.approx(expected, abs=1e-12)


def test_temperature_and_loss_scale_reach_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen, plain = [], methods.nt_xent
    monkeypatch.setattr(methods, "nt_xent", lambda z, **options: seen.append(options) or plain(z, **options))
    run(tmp_path / "run", {"temperature": 0.2, "loss_scale": 3.0, "epochs": 1})
    assert seen == [{"temperature": 0.2, "scale": 3.0}] * 3


def test_each_training_image_is_seen_once_an_epoch_and_held_out_ones_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = tiny()
    trainer = loop._Trainer(loop.resolve(config(holdout=0.25), data), data, tmp_path / "other", "cpu", None)
    rows, held_out = set(trainer.order.rows.tolist()), set(trainer.order.held_out.tolist())
    assert (len(rows), len(held_out)) == (48, 16)
    assert rows | held_out == set(range(64))
    seen: list[list[int]] = []
    step = loop._Trainer._train_step
    monkeypatch.setattr(
        loop._Trainer, "_train_step", lambda self, rows: seen.append(rows.flatten().tolist()) or step(self, rows)
    )
    run(tmp_path / "run", {"holdout": 0.25})
    epochs = [sorted(row for step_rows in seen[3 * e : 3 * e + 3] for row in step_rows) for e in range(3)]
    assert epochs == [sorted(rows)] * 3
    assert seen[:3] != seen[3:6], "each epoch has an order of its own"


def test_held_out_images_have_no_influence_on_the_weights(tmp_path: Path):
    data = tiny()
    held_out = loop._Trainer(loop.resolve(config(), data), data, tmp_path / "other", "cpu", None).order.held_out
    changed = tiny()
    changed.x_train[held_out] = 255 - changed.x_train[held_out]
    for name, images in (("plain", data), ("changed", changed)):
        train(config(), tmp_path / name, dataset=images, device="cpu")
    assert read_result(tmp_path / "plain").run != read_result(tmp_path / "changed").run
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "changed"))


def test_warm_up_rises_to_the_peak_and_the_cosine_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """4 steps an epoch, 20 epochs, 2 of them warm-up."""
    rates: list[float] = []
    step = loop._Trainer._train_step

    def note(self: Any, rows: torch.Tensor) -> torch.Tensor:
        loss = step(self, rows)
        rates.append(self.optimizer.param_groups[0]["lr"])
        return loss

    monkeypatch.setattr(loop._Trainer, "_train_step", note)
    run(tmp_path / "run", {"epochs": 20, "warmup_epochs": 2, "learning_rate": 0.4, "batch_size": 14, "keep_every": 20})
    assert len(rates) == 80
    assert rates[:9] == pytest.approx([0.4 * (k + 1) / 9 for k in range(9)])
    assert max(rates) == pytest.approx(0.4)
    assert (np.diff(rates[8:]) < 0).all()
    assert rates[-1] < 0.4 * 0.01


def test_stop_gradient_changes_the_result_and_the_checkpoint_loads_like_any(tmp_path: Path):
    kinds = {"none": None, "pass": False, "stop": True}
    for name, stop in kinds.items():
        augment = None if stop is None else {"layer": "blocks.1", "stop_gradient": stop}
        run(tmp_path / name, {"augment": augment})
    results = [weights(tmp_path / name) for name in kinds]
    assert not same(results[0], results[1])
    assert not same(results[1], results[2])
    network, _ = load_network(tmp_path / "stop" / "checkpoints" / "epoch-0003.safetensors")
    assert same(network.state_dict(), results[2])
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    network.train()
    assert torch.equal(network(x), network(x)), "the operator is no part of the model"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("transform", ["dropout", "pca"])
def test_every_transform_trains_in_every_precision(tmp_path: Path, transform: str, precision: str):
    augment = {"layer": "blocks.1", "transform": transform, "components": -1}
    result = run(tmp_path / "run", {"augment": augment, "precision": precision, "epochs": 1})
    assert np.isfinite(result.loss)


def test_bf16_mixed_keeps_weights_in_full_precision(tmp_path: Path):
    run(tmp_path / "run", {"precision": "bf16-mixed"})
    run(tmp_path / "full")
    found, full = weights(tmp_path / "run"), weights(tmp_path / "full")
    assert all(value.dtype == torch.float32 for value in found.values())
    assert not same(found, full)
    for name, value in full.items():
        torch.testing.assert_close(found[name], value, atol=0.05, rtol=0.1)


@pytest.mark.gpu
def test_an_interrupted_16_mixed_run_ends_like_an_undisturbed_one(tmp_path: Path):
    """The scale of the gradients is part of the state: here it starts far too high and must fall first."""
    chosen = config(precision="16-mixed", loss_scale=1e4)
    train(chosen, tmp_path / "whole", dataset=tiny(), device="cuda")
    with pytest.raises(KeyboardInterrupt):
        train(chosen, tmp_path / "run", dataset=tiny(), device="cuda", progress=interrupt_at(5))
    train(chosen, tmp_path / "run", dataset=tiny(), device="cuda")
    assert not same(weights(tmp_path / "whole", 0), weights(tmp_path / "whole"))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


# --- starting from a checkpoint ---


def test_a_run_starts_from_the_weights_of_init(tmp_path: Path):
    run(tmp_path / "first")
    start = tmp_path / "first" / "checkpoints" / "epoch-0003.safetensors"
    settings = {"init": str(start), "seed": 9}
    run(tmp_path / "second", settings)
    assert same(weights(tmp_path / "second", 0), weights(tmp_path / "first", 3))
    assert not same(weights(tmp_path / "second"), weights(tmp_path / "first"))
    assert read_json(tmp_path / "second" / "config.json")["config"]["init_sha256"] == fingerprint(start)


def test_another_content_of_init_is_another_run_and_another_place_is_not(tmp_path: Path):
    run(tmp_path / "first")
    last, first = (tmp_path / "first" / "checkpoints" / f"epoch-000{e}.safetensors" for e in (3, 0))
    result = run(tmp_path / "second", {"init": str(last)})
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(last.read_bytes())
    assert run(tmp_path / "second", {"init": str(moved)}) == result
    with pytest.raises(RunFolderError, match="init_sha256 is"):
        run(tmp_path / "second", {"init": str(first)})


def test_init_of_another_architecture_is_refused(tmp_path: Path):
    run(tmp_path / "first", {"epochs": 1})
    start = tmp_path / "first" / "checkpoints" / "epoch-0001.safetensors"
    with pytest.raises(CheckpointError, match="another architecture"):
        run(tmp_path / "second", {"init": str(start), "model": "mlp,width=9,depth=2"})
