"""Recipes: published settings that validate, say what they should reach, and train."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import rings_and_stars
from sentences import Corpus, make_corpus

from layerlens import cli
from layerlens.data import Dataset, dataset_from_arrays
from layerlens.errors import ConfigError, UnknownNameError
from layerlens.training.checkpoint import load_state
from layerlens.training.config import make_config
from layerlens.training.loop import train
from layerlens.training.recipes import list_recipes, read_recipe, recipe_names, recipe_text

OF_SENTENCES = [name for name in recipe_names() if "bert" in name]
OF_GRAPHS = [name for name in recipe_names() if "graph" in name]
OF_IMAGES = [name for name in recipe_names() if name not in (*OF_SENTENCES, *OF_GRAPHS)]
FIELDS = ["Command", "Expected", "Source", "Hardware/time", "Measured"]
UNQUOTED = "not published as a number that we can quote"
PUBLISHED = {  # typed from methods.md, sections 1, 6 and 7: what the header must say, in this order
    "deep-augmentation-full-batch-stop": ["1 %", "CIFAR100", "61.38 %"],
    "simclr-1000-reference": ["CIFAR10", "91-92 % linear", "90-91 % k-NN", "CIFAR100 about 66 %"],
    "dropout-standard-resnet20": [".9193", ".9143", ".9163/.9176/.9193/.9174/.9141/.9154"],
    "dropout-forward-resnet20": [".9169", ".9143", ".9007/.9093/.9169/.9171/.9141/.9142"],
    "dropout-backward-resnet20": [".9140", ".9143", ".9109/.9130/.9140/.9142/.9147/.9146"],
    "dropout-augmented-resnet20": [".9196", ".9193", ".9143"],
    "simcse-bert": ["66.59/81.05/73.82/81.08/79.05/77.55/71.91", "mean 75.86"],
    "simcse-mlm-bert": ["49.15/68.76/54.65/69.64/72.49/58.02/63.71", "mean 62.35"],
    "deep-augmentation-bert-stop": ["70.35/81.66/74.11/82.13/78.20/78.59/72.03", "mean 76.72"],
    "deep-augmentation-bert-no-stop": ["68.50/82.45/73.70/81.32/78.32/78.15/72.12", "mean 76.37"],
    "deep-augmentation-bert-mlm-stop": ["63.56/76.75/68.22/79.02/77.00/73.84/69.47", "mean 72.55"],
    "deep-augmentation-bert-mlm-no-stop": ["65.25/80.44/70.65/79.63/76.75/76.94/70.58", "mean 74.32"],
    "graphcl-mutag": ["86.80 %"],
    "graphcl-proteins": ["74.39 %"],
    "graphcl-nci1": ["77.87 %"],
    "dropout-standard-convnet-quick": [".7657", ".7579", ".7523/.7617/.7657/.7647/.7626/.7608"],
    "dropout-forward-convnet-quick": [".7482", ".7579", ".6908/.7211/.7482/.7627/.7612/.7578"],
    "dropout-backward-convnet-quick": [".7585", ".7579", ".7433/.7557/.7585/.7593/.7583/.7599"],
}


def header(name: str) -> dict[str, str]:
    """The fields of a recipe's header; a line that is indented goes on with the one before."""
    lines = [line for line in recipe_text(name).splitlines() if line.startswith("#")]
    text = re.sub(r"(?: \\)?\n#     ", " ", "\n".join(lines))
    return dict(re.findall(r"^# ([A-Z][\w/]+): (.+)$", text, flags=re.MULTILINE))


def tiny() -> Dataset:
    """32 noisy colour images of 8 × 8 pixels, of four kinds."""
    rng = np.random.default_rng(0)
    y = np.arange(48) % 4
    x = (rng.random((4, 3, 8, 8))[y] * 180 + rng.random((48, 3, 8, 8)) * 70).astype(np.uint8)
    return dataset_from_arrays("tiny", x[:32], y[:32], x[32:], y[32:])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def scaled_down(settings: dict[str, Any]) -> dict[str, Any]:
    """The same method in one epoch of two steps; only sizes change."""
    narrow = {"resnet18-cifar": "resnet18-cifar,width=2", "resnet50-cifar": "resnet50-cifar,width=2"}
    small = {
        **settings,
        "epochs": 1,
        "batch_size": 16,
        "train_samples": None,
        "model": narrow.get(settings["model"], settings["model"]),
    }
    return {**small, "moco": {**settings["moco"], "queue": 64}} if "moco" in settings else small


# --- what stands in the files ---


@pytest.mark.parametrize("name", OF_SENTENCES)
def test_recipes_of_sentences_are_simcse_as_published(name: str):
    config = make_config(read_recipe(name))
    assert config.text is not None
    assert (config.batch_size, config.learning_rate, config.temperature) == (64, 3e-5, 0.05)
    assert config.epoch_samples is not None
    assert config.epochs * config.epoch_samples == 10**6, "one pass over a million sentences"
    assert (config.text.pooling, config.text.max_length, config.text.dev_every) == ("cls-before-head", 32, 125)
    assert config.text.mlm_weight == (0.1 if "mlm" in name else 0)
    layer = {"stop": "8", "no-stop": "10"}.get(name.partition("bert-")[2].removeprefix("mlm-"))
    assert (config.augment and config.augment.layer) == layer
    assert (config.augment is not None and config.augment.stop_gradient) == (layer == "8")


@pytest.mark.parametrize("name", OF_GRAPHS)
def test_recipes_of_graphs_are_graphcl_as_published(name: str):
    config = make_config(read_recipe(name))
    assert (config.model, config.epochs, config.batch_size, config.learning_rate) == ("gin", 20, 128, 0.01)
    assert (config.temperature, config.optimizer, config.weight_decay, config.schedule) == (0.2, "adamw", 0, "constant")
    assert config.graph == make_config({"objective": "graphcl"}).graph
    assert (config.augment is not None) == name.startswith("deep")
    assert config.augment is None or config.augment.stop_gradient == (not name.endswith("no-stop"))


@pytest.mark.parametrize("name", OF_IMAGES)
def test_every_recipe_is_a_configuration_that_says_what_defines_it(name: str):
    settings = read_recipe(name)
    config = make_config(settings)
    assert {"objective", "model", "data", "epochs", "batch_size", "learning_rate", "holdout", "views"} <= set(settings)
    assert config.objective == "supervised" or {"temperature", "projection"} <= set(settings)
    assert config.holdout == 0  # published figures come from the whole training split


@pytest.mark.parametrize("name", recipe_names())
def test_the_header_has_every_field_and_a_title(name: str):
    first, found = recipe_text(name).splitlines()[0], header(name)
    assert re.fullmatch(r"# [A-Z].+[^.]", first)
    assert [field for field in found if field != "Note"] == FIELDS
    assert found["Measured"].endswith(("docs/measurements.md", "not measured"))


@pytest.mark.parametrize("name", recipe_names())
def test_the_command_of_the_header_runs_this_recipe_on_its_data(name: str):
    _, command, *words = header(name)["Command"].split()
    options = {option for parameter in cli.cli.commands[command].params for option in parameter.opts}
    assert command == "train"
    assert words[:2] == ["--recipe", name]
    assert words[words.index("--data") + 1] == read_recipe(name)["data"]
    assert {word for word in words if word.startswith("--")} <= options


@pytest.mark.parametrize("name", recipe_names())
def test_expected_figures_are_the_published_ones_and_no_others(name: str):
    expected = header(name)["Expected"]
    if name not in PUBLISHED:
        assert expected in (UNQUOTED, "not in our list of published figures")
        return
    assert re.fullmatch(".*".join(map(re.escape, ["", *PUBLISHED[name], ""])), expected)
    numbers = re.findall(r"\d*\.\d+", " ".join(PUBLISHED[name]))
    rates = [".3", ".2", ".1", ".05", ".01", ".005"]
    assert set(re.findall(r"\d*\.\d+", expected)) <= {*numbers, *rates}


def test_the_settings_of_the_paper_are_the_published_ones():
    simclr, moco, supcon = (
        make_config(read_recipe(name)) for name in ("simclr-cifar", "moco-v2-cifar", "supcon-cifar")
    )
    assert (simclr.epochs, simclr.batch_size, simclr.learning_rate, simclr.temperature) == (1500, 1024, 0.5, 0.5)
    assert (simclr.warmup_epochs, simclr.warmup_from, simclr.weight_decay) == (10, 0.01, 1e-4)
    assert simclr.loss_scale == pytest.approx(0.5 / 0.07)
    assert supcon.loss_scale == pytest.approx(0.1 / 0.07)
    assert simclr.views is not None
    assert simclr.views.blur == 0
    assert simclr.views.ratio == 4 / 3
    assert moco.moco is not None
    assert moco.views is not None
    assert (moco.moco.queue, moco.moco.key_momentum, moco.temperature, moco.views.blur) == (65536, 0.999, 0.2, 0.5)
    assert (moco.learning_rate, moco.batch_size, moco.epochs, moco.warmup_epochs) == (0.03, 256, 200, 0)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("adalase")])
def test_adalase_recipes_have_the_published_optimiser(name: str):
    config = make_config(read_recipe(name))
    assert config.adalase is not None
    assert config.nesterov
    assert config.learning_rate == (0.01 if name.endswith("transfer") else 0.1)
    assert (config.momentum, config.batch_size, config.epochs, config.weight_decay) == (0.9, 128, 200, 1e-4)
    assert (config.adalase.rotation, config.adalase.floor) == (10, 0.1)


@pytest.mark.parametrize(
    ("name", "layer", "stop", "fraction", "pairs"),
    [
        ("deep-augmentation-layer4-stop", "layer4", True, 0.5, "independent"),
        ("deep-augmentation-layer5-no-stop", "avgpool", False, 0.5, "independent"),
        ("deep-augmentation-everywhere", "all", False, 1.0, "independent"),
        ("deep-augmentation-full-batch-stop", "layer4", True, 1.0, "independent"),
        ("deep-augmentation-lower-to-higher", "layer4", True, 0.5, "one"),
    ],
)
def test_names_say_where_deep_augmentation_acts(name: str, layer: str, stop: bool, fraction: float, pairs: str):
    augment = make_config(read_recipe(name)).augment
    assert augment is not None
    assert (augment.layer, augment.stop_gradient, augment.fraction, augment.pairs) == (layer, stop, fraction, pairs)


# --- finding them ---


def test_an_unknown_recipe_names_the_closest():
    with pytest.raises(UnknownNameError, match=r"unknown recipe 'simclr-cifr'; closest: simclr-cifar"):
        read_recipe("simclr-cifr")


def test_recipes_lists_every_name_with_its_title(capsys: pytest.CaptureFixture[str]):
    cli.main(["recipes", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert rows == list_recipes()
    assert [row["name"] for row in rows] == recipe_names()
    cli.main(["recipes"])
    table = capsys.readouterr().out
    assert all(row["about"] in table for row in rows)


def test_recipes_with_a_name_prints_the_file(capsys: pytest.CaptureFixture[str]):
    cli.main(["recipes", "simclr-cifar"])
    assert capsys.readouterr().out == recipe_text("simclr-cifar")


@pytest.mark.parametrize("arguments", [["recipes", "simclr"], ["train", "--recipe", "simclr"]])
def test_an_unknown_recipe_on_the_command_line_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "simclr-cifar" in capsys.readouterr().err


def test_options_win_over_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images = tiny()
    arrays = {key: getattr(images, key).numpy() for key in ("x_train", "y_train", "x_test", "y_test")}
    np.savez(tmp_path / "tiny.npz", **arrays)
    small = ["--epochs", "1", "--batch-size", "16", "--model", "resnet18-cifar,width=2"]
    data = ["--data", f"npz:{tmp_path / 'tiny.npz'}", "--device", "cpu", "--out", str(tmp_path / "run"), "--json"]
    chosen = ["--augment-layer", "layer3", "--no-stop-gradient"]
    cli.main(["train", "--recipe", "deep-augmentation-layer4-stop", *data, *small, *chosen])
    assert json.loads(capsys.readouterr().out)["epochs"] == 1
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (kept["augment"]["layer"], kept["augment"]["stop_gradient"], kept["augment"]["rate"]) == (
        "layer3",
        False,
        0.5,
    )
    assert (kept["batch_size"], kept["learning_rate"]) == (16, 0.5)


def test_the_package_holds_the_recipes():
    assert {f"{name}.toml" for name in recipe_names()} == {
        path.name for path in (Path(cli.__file__).parent / "recipes").iterdir()
    }


# --- running them ---


@pytest.mark.parametrize("name", OF_SENTENCES)
def test_every_recipe_of_sentences_trains(name: str, corpus: Corpus, tmp_path: Path):
    settings = read_recipe(name)
    small = {
        "model": f"hf-config:bert-tiny,tokenizer={corpus.tokenizer},layers=12,width=16,heads=2",
        "data": corpus.spec(),
        "batch_size": 60,
        "epochs": 1,
        "epoch_samples": None,
    }
    text = {**settings["text"], "dev": corpus.spec("sts"), "dev_every": 2}
    result = train(make_config({**settings, **small, "text": text}), tmp_path / "run", device="cpu")
    assert np.isfinite(result.loss)
    assert result.loss > 0
    assert result.best is not None
    assert result.best["step"] in (2, 3)


@pytest.mark.parametrize("name", OF_GRAPHS)
def test_every_recipe_of_graphs_trains(name: str, tmp_path: Path):
    config = make_config({**read_recipe(name), "epochs": 2, "batch_size": 12})
    result = train(config, tmp_path / "run", dataset=rings_and_stars(), device="cpu")
    assert result.epochs == 2
    assert np.isfinite(result.loss)


@pytest.mark.parametrize("name", OF_IMAGES)
def test_every_recipe_trains(name: str, tmp_path: Path):
    result = train(make_config(scaled_down(read_recipe(name))), tmp_path / "run", dataset=tiny(), device="cpu")
    assert result.epochs == 1
    assert np.isfinite(result.loss)
    assert result.loss > 0


@pytest.mark.parametrize("name", ["freeze-before", "adalase-transfer"])
def test_recipes_that_start_from_a_checkpoint_take_its_weights(name: str, tmp_path: Path):
    model = {"model": "resnet18-cifar,width=2", "epochs": 1, "batch_size": 16, "data": "tiny"}
    start = train(make_config(model), tmp_path / "start", dataset=tiny(), device="cpu")
    init = tmp_path / "start" / start.checkpoints[-1]
    settings = {**scaled_down(read_recipe(name)), "init": str(init)}
    result = train(make_config(settings), tmp_path / "run", dataset=tiny(), device="cpu")
    before, first, last = (
        load_state(path)[0]["layer1.0.conv1.weight"]
        for path in (init, *(tmp_path / "run" / name for name in result.checkpoints))
    )
    assert before.equal(first)
    assert first.equal(last) == (name == "freeze-before")


def test_a_recipe_can_not_be_mixed_up_with_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["train", "--recipe", "simclr-cifar", "--config", str(tmp_path / "run.toml")])
    assert "exclude each other" in capsys.readouterr().err


def test_a_batch_that_does_not_divide_a_recipes_queue_is_refused_with_one_that_does():
    with pytest.raises(ConfigError, match="65536 is not a multiple of the 100 keys of a step; try 65500"):
        make_config({**read_recipe("moco-v2-cifar"), "batch_size": 100})
