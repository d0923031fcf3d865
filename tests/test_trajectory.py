"""Checkpoints scored one after the other, on their own data and on others, and fine-tuned."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from layerlens import figures
from layerlens.cli import main
from layerlens.data import Dataset, dataset_from_arrays
from layerlens.errors import ConfigError, RunFolderError, ShapeError, UnknownNameError
from layerlens.pipeline import Settings, evaluate, measure_geometry
from layerlens.training.checkpoint import fingerprint
from layerlens.training.config import make_config
from layerlens.training.loop import train
from layerlens.training.network import load_network
from layerlens.training.run_folder import read_ratios
from layerlens.trajectory import Trajectory, evaluate_run, finetune

SETTINGS = Settings(samples=24, batch_size=8)


def arrays(seed: int, classes: int = 4) -> dict[str, np.ndarray]:
    """Patterns with noise: 64 images to train on, 32 to test."""
    rng, y = np.random.default_rng(seed), np.arange(96) % classes
    patterns = np.random.default_rng(7 + classes).random((classes, 8, 8)) * 180
    x = (patterns[y] + rng.random((96, 8, 8)) * 70).astype(np.uint8)
    return {"x_train": x[:64], "y_train": y[:64], "x_test": x[64:], "y_test": y[64:]}


def dataset(seed: int = 0, classes: int = 4, labels: bool = True) -> Dataset:
    made = arrays(seed, classes)
    known = (made["y_train"], made["y_test"]) if labels else (None, None)
    return dataset_from_arrays(f"tiny{classes}", made["x_train"], known[0], made["x_test"], known[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished SimCLR run with the checkpoints of epochs 0, 1 and 2."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    settings = {"model": "mlp,width=12,depth=2", "data": "tiny", "epochs": 2, "batch_size": 16, "keep_every": 1}
    train(make_config(settings), folder, dataset=dataset(), device="cpu")
    return folder


def checkpoint(run: Path, epoch: int = 2) -> Path:
    return run / "checkpoints" / f"epoch-{epoch:04d}.safetensors"


def test_each_row_is_what_evaluate_and_geometry_say_of_that_checkpoint(run: Path):
    data = dataset()
    found = evaluate_run(run, dataset=data, settings=SETTINGS, protocol="deep-augmentation")
    assert [row["epoch"] for row in found.rows] == [0, 1, 2]
    for row in found.rows:
        network, _ = load_network(checkpoint(run, row["epoch"]), dataset=data)
        scores = evaluate(network, data, protocol="deep-augmentation")
        assert set(scores) == {"knn", "knn10", "probe", "linear"}
        assert {name: row[name] for name in scores} == scores
        for split in ("train", "test"):
            seen = measure_geometry(network, data, replace(SETTINGS, split=split))
            assert (row[f"alignment_{split}"], row[f"uniformity_{split}"]) == (seen.alignment, seen.uniformity)
    assert found.rows[0]["alignment_test"] != found.rows[2]["alignment_test"]


def test_scoring_leaves_every_checkpoint_as_it_was(run: Path):
    before = {path.name: fingerprint(path) for path in (run / "checkpoints").iterdir()}
    weights = load_network(checkpoint(run), dataset=dataset())[0]
    state = {name: value.clone() for name, value in weights.state_dict().items()}
    evaluate(weights, dataset(), protocol="moco")
    assert all(torch.equal(value, state[name]) for name, value in weights.state_dict().items())
    evaluate_run(run, dataset=dataset(), settings=SETTINGS)
    assert {path.name: fingerprint(path) for path in (run / "checkpoints").iterdir()} == before


def test_transfer_scores_the_other_datas_classes(run: Path):
    other = dataset(seed=3, classes=2)
    found = evaluate_run(run, dataset=other, settings=SETTINGS)
    network, _ = load_network(checkpoint(run), dataset=other)
    assert (found.data, found.rows[2]["probe"]) == ("tiny2", evaluate(network, other)["probe"])
    assert found.facts["data_sha256"] == other.fingerprint()


def test_a_trajectory_survives_json_and_has_a_row_per_checkpoint(run: Path):
    found = evaluate_run(run, dataset=dataset(), settings=SETTINGS)
    again = Trajectory.from_json(found.to_json())
    assert list(again.rows) == list(found.rows)
    frame = found.to_frame()
    assert len(frame) == 3
    assert {"epoch", "knn", "uniformity_train", "run", "data"} <= set(frame.columns)


@pytest.mark.parametrize("epochs", [1, 2])
def test_fine_tuning_is_supervised_training_from_the_checkpoint(run: Path, tmp_path: Path, epochs: int):
    data, before = dataset(), fingerprint(checkpoint(run))
    score = finetune(checkpoint(run), data, tmp_path / "tuned", epochs=epochs, batch_size=16, device="cpu")
    start = load_network(tmp_path / "tuned" / "checkpoints" / "epoch-0000.safetensors", dataset=data)[0].state_dict()
    source = load_network(checkpoint(run), dataset=data)[0].state_dict()
    assert all(torch.equal(value, source[name]) for name, value in start.items() if name.startswith("blocks."))
    tuned, _ = load_network(tmp_path / "tuned" / "checkpoints" / f"epoch-{epochs:04d}.safetensors", dataset=data)
    assert score == evaluate(tuned, data)["top1"]
    assert fingerprint(checkpoint(run)) == before


def test_fine_tuning_learns(run: Path, tmp_path: Path):
    options = {"batch_size": 16, "learning_rate": 0.1, "views": {"scale": 1.0, "ratio": 1.0, "flip": 0.0, "grey": 0.0}}
    score = finetune(checkpoint(run), dataset(), tmp_path / "tuned", epochs=30, device="cpu", **options)
    assert score > 0.9


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda run: evaluate_run(run / "checkpoints", dataset=dataset()), RunFolderError, "no run folder"),
        (lambda run: evaluate_run(run, dataset=dataset(labels=False)), ConfigError, "has no labels"),
        (lambda run: evaluate_run(run, dataset=dataset(), protocol="mocco"), UnknownNameError, "closest: moco"),
        (lambda run: finetune(checkpoint(run), dataset(labels=False), run / "x"), ConfigError, "has no labels"),
        (lambda run: finetune(checkpoint(run), dataset(), run / "x", epoch=3), ConfigError, "closest: epochs"),
    ],
    ids=["folder", "labels", "protocol", "fine-tune labels", "setting"],
)
def test_what_can_not_be_scored_says_so(run: Path, call, error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        call(run)
    assert not (run / "x").exists()


# --- figures ---


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    yield
    plt.close("all")


def test_score_curves_draw_each_checkpoint(run: Path):
    found = evaluate_run(run, dataset=dataset(), settings=SETTINGS)
    axes = figures.score_curves({"first": found}, key="probe")
    assert axes.lines[0].get_xdata().tolist() == [0, 1, 2]
    assert axes.lines[0].get_ydata().tolist() == [row["probe"] for row in found.rows]
    assert axes.get_ylabel() == "logistic regression, test accuracy"


def ratio_lines(steps: int = 10) -> list[dict]:
    return [{"step": k + 1, "arm": "a", "a": 0.5 - 0.01 * k, "b": 0.5 + 0.01 * k} for k in range(steps)]


@pytest.mark.parametrize("window", [1, 5])
def test_ratio_areas_are_stacked_to_one_and_average_their_window(window: int):
    axes = figures.ratio_areas(ratio_lines(), window=window)
    low, high = (band.get_paths()[0].vertices for band in axes.collections)
    assert high[:, 1].max() == pytest.approx(1.0)
    firsts = [0.5 - 0.01 * k for k in range(10)]
    expected = np.array(firsts).reshape(-1, window).mean(1)
    assert low[:, 1].max() == pytest.approx(expected.max())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["b", "a"], "as the bands lie"


def test_ratio_areas_need_a_line():
    with pytest.raises(ShapeError, match="0 lines of ratios"):
        figures.ratio_areas([])


# --- command line ---


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with two data sets and a run of AdaLASE."""
    monkeypatch.chdir(tmp_path)
    np.savez("own.npz", **arrays(0))
    np.savez("other.npz", **arrays(3, 2))
    config = 'model = "mlp,width=12,depth=2"\ndata = "npz:own.npz"\nobjective = "supervised"\nepochs = 2\n'
    Path("run.toml").write_text(config + 'batch_size = 16\n[adalase]\nkinds = ["mixup", "noise"]\ninterval = 1\n')
    main_of("train", "--config", "run.toml", "--out", "runs/ada", "--device", "cpu", "--tensorboard")
    return tmp_path


def main_of(*words: str) -> None:
    with contextlib.suppress(SystemExit):
        main(list(words))


def test_adalase_leaves_ratios_their_figure_and_tensorboard_events(stored: Path):
    lines = read_ratios(stored / "runs" / "ada")
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert all(sum(v for k, v in line.items() if k not in ("step", "arm")) == pytest.approx(1) for line in lines)
    assert {p.suffix for p in (stored / "runs" / "ada").glob("ratios_over_training.*")} == {
        ".png", ".svg", ".pdf", ".json",
    }  # fmt: skip
    assert list((stored / "runs" / "ada" / "tensorboard").glob("events.*"))


def test_evaluate_run_prints_a_row_per_checkpoint_and_keeps_it(stored: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    main_of("evaluate", "--run", "runs/ada", "--json")
    printed = json.loads(capsys.readouterr().out)
    assert [row["epoch"] for row in printed["rows"]] == [0, 2]
    assert "top1" in printed["rows"][0]
    assert json.loads((stored / "runs/ada/analysis/scores.json").read_text())["rows"] == printed["rows"]
    main_of("evaluate", "--run", "runs/ada", "--data", "npz:other.npz")
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:3] == ["epoch", "knn", "knn10"]
    assert (stored / "runs/ada/analysis/scores_npz_other.npz.png").exists()


def test_evaluate_can_fine_tune(stored: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    last = "runs/ada/checkpoints/epoch-0002.safetensors"
    words = ["--checkpoint", last, "--data", "npz:other.npz", "--finetune", "1", "--protocol", "deep-augmentation"]
    main_of("evaluate", *words, "--json", "--out", "tuned")
    assert {"finetuned", "linear", "knn"} <= set(json.loads(capsys.readouterr().out))
    assert (stored / "tuned" / "result.json").exists()
