"""The command line on graphs: from TU's text files to a report, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import write_tu

pytest.importorskip("torch_geometric")

from layerlens.cli import main
from layerlens.experiments.results import StudyResult
from layerlens.training.network import load_network

DATA, MODEL = "tu:TINY@data", "gin,layers=2,width=8"
LOOK = ["--samples", "40", "--batch-size", "8", "--device", "cpu"]
START, END = (f"run/checkpoints/epoch-000{epoch}.safetensors" for epoch in (0, 3))
TRAIN = ["--objective", "graphcl", "--model", MODEL, "--batch-size", "16", "--epochs", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 graphs and a finished run of nine steps; tests write elsewhere."""
    folder = tmp_path_factory.mktemp("graphs")
    write_tu(folder / "data", "TINY", 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["train", *TRAIN, "--data", DATA, "--keep-every", "3", "--out", "run"])
    return folder


@pytest.fixture(autouse=True)
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that must fail as a user's mistake; what is said before it does not count."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("layerlens: ")
    return line


def names(folder: Path, suffix: str) -> set[str]:
    return {path.stem for path in folder.glob(f"*{suffix}")}


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    main(arguments)
    found = capsys.readouterr()
    return found.out, found.err


# --- each command ---


def test_layers_numbers_nodes_pool_and_their_widths(capsys: pytest.CaptureFixture[str]):
    out, _ = said(["layers", "gin,layers=2", "--input-shape", "7", "--json"], capsys)
    default = [(row["index"], row["name"], row["shape"]) for row in json.loads(out) if row["index"] is not None]
    assert default == [(-1, "input", [7]), (0, "layer1", [32]), (1, "layer2", [32]), (2, "pool", [64])]


def test_train_says_what_the_graphs_are_and_a_second_start_finds_it_done(
    place: Path, capsys: pytest.CaptureFixture[str]
):
    result = json.loads((place / "run" / "result.json").read_text())
    out, _ = said(["train", *TRAIN, "--data", DATA, "--keep-every", "3", "--out", "run", "--json"], capsys)
    assert json.loads(out)["loss"] == result["loss"]
    config = json.loads((place / "run" / "config.json").read_text())["config"]
    assert config["graph"] == {"kinds": ["node-drop", "subgraph"], "ratio": 0.1, "keep": 0.2}
    assert "torch-geometric" in result["environment"]["versions"]


def test_graph_views_and_a_layer_reach_the_settings(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    more = ["--graph-views", "none", "--augment-layer", "1", "--stop-gradient", "--out", str(tmp_path / "run")]
    _, err = said(["train", *TRAIN, "--data", DATA, *more], capsys)
    assert "40 graphs of" in err
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["graph"]["kinds"] == []
    assert (config["augment"]["layer"], config["augment"]["stop_gradient"]) == ("1", True)


@pytest.mark.parametrize(
    ("reduce", "layers", "kept"),
    [
        ([], ["layer1", "layer2", "pool", "head"], "graphs"),
        (["--reduce", "graphs,pool=mean"], ["layer1", "layer2", "pool", "head"], "graphs,pool=mean"),
        (["--reduce", "nodes"], ["layer1", "layer2"], "nodes"),
    ],
)
def test_analyze_compares_graphs_or_nodes_as_it_is_told(
    reduce: list[str], layers: list[str], kept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    asked = ["analyze", "--checkpoint", END, "--data", DATA, *LOOK, *reduce, "--out", str(tmp_path), "--json"]
    found = json.loads(said(asked, capsys)[0])
    assert (found["cka"]["layers"], found["cka"]["reduce"]) == (layers, kept)
    nodes = sum(int(line) > 0 for line in (Path("data/TINY/raw/TINY_graph_indicator.txt")).read_text().split())
    assert found["cka"]["samples"] == (nodes if kept == "nodes" else 40)
    assert names(tmp_path, ".json") == {"analysis", "similarity", "effective_rank"}
    again = json.loads(said(asked, capsys)[0])
    assert again["cka"]["values"] == found["cka"]["values"]


@pytest.mark.parametrize("measure", ["svcca", "rankme", "alignment", "diversity,views=3"])
def test_analyze_takes_the_other_measures(measure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    asked = ["analyze", "--checkpoint", END, "--data", DATA, *LOOK, "--measure", measure, "--out", str(tmp_path)]
    found = json.loads(said([*asked, "--json"], capsys)[0])
    assert found["layers"] == ["layer1", "layer2", "pool", "head"]
    assert np.isfinite(np.array(found["values"], dtype=float)).any()


def test_recommend_film_compare_and_report_work_on_graphs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    advice = json.loads(said(["recommend", "--checkpoint", END, "--data", DATA, *LOOK, "--json"], capsys)[0])
    assert advice["verdict"] in ("supported", "no supported choice")
    strip = json.loads(said(["film", "run", *LOOK, "--out", str(tmp_path / "film"), "--json"], capsys)[0])
    assert strip["labels"] == ["epoch 0", "epoch 3"]
    both = ["compare", START, END, "--data", DATA, *LOOK, "--out", str(tmp_path / "both"), "--json"]
    across = json.loads(said(both, capsys)[0])
    assert across["first"] == across["second"] == ["layer1", "layer2", "pool", "head"]
    said(["report", "run", *LOOK, "--out", str(tmp_path / "report")], capsys)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "SVM" in page


def test_evaluate_scores_by_cross_validation_and_leaves_the_weights(capsys: pytest.CaptureFixture[str]):
    before = {name: value.clone() for name, value in load_network(END)[0].state_dict().items()}
    asked = ["evaluate", "--checkpoint", END, "--data", DATA, "--folds", "4", "--splits", "2", "--json"]
    row = json.loads(said(asked, capsys)[0])
    assert (row["layer"], row["folds"], row["splits"]) == ("input of head", 4, 2)
    assert {"svm", "probe", "svm_std", "probe_std"} <= set(row)
    assert row["svm"] > 0.6  # rings and stars differ in their degrees; half would be chance
    after = load_network(END)[0].state_dict()
    assert all(value.equal(after[name]) for name, value in before.items())
    node = json.loads(said([*asked, "--layer", "layer1"], capsys)[0])
    assert node["layer"] == "layer1"


def test_evaluate_run_scores_every_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = json.loads(said(["evaluate", "--run", "run", "--out", str(tmp_path), "--json"], capsys)[0])
    assert [row["epoch"] for row in found["rows"]] == [0, 3]
    assert all(0 <= row["svm"] <= 1 and 0 <= row["probe"] <= 1 for row in found["rows"])
    assert names(tmp_path, ".png") == {"scores"}


def test_a_study_of_graphs_scores_the_untrained_network_once_per_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = f"""
seeds = 2
[base]
objective = "graphcl"
model = "{MODEL}"
data = "{DATA}"
epochs = 2
batch_size = 16
keep_every = 2
[[arms]]
name = "plain"
baseline = true
[[arms]]
name = "deep"
[arms.settings.augment]
rate = 0.5
[arms.axes]
"augment.layer" = ["layer1", "pool"]
"augment.stop_gradient" = [true, false]
[measure]
samples = 40
batch_size = 8
untrained = "baseline"
[[figures]]
kind = "sweep"
name = "svm_by_layer"
metric = "svm"
lines = ["stop_gradient"]
"""
    (tmp_path / "tiny.toml").write_text(text)
    asked = ["study", "run", str(tmp_path / "tiny.toml"), "--store", str(tmp_path / "store"), "--workers", "1"]
    said([*asked, "--device", "cpu", "--threads", "1"], capsys)
    found = StudyResult.from_json((tmp_path / "store" / "studies" / "tiny" / "result.json").read_text())
    assert (len(found.runs), found.missing, found.failed) == (10, 0, {})
    epochs = {run["arm"]: [row["epoch"] for row in run["scores"][""]] for run in found.runs}
    assert epochs == {"plain": [0, 2], "deep": [2]}
    assert {line.score.n for line in found.lines("svm")} == {2}
    assert all(s["last"]["reduce"] == "graphs" for s in found.similarity)


def test_a_dry_run_of_a_study_of_graphs_counts_its_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    small = ["--data", DATA, "--epochs", "1", "--seeds", "1", "--workers", "1", "--device", "cpu"]
    asked = [
        "study",
        "run",
        "graph-layers",
        "--scale",
        "smoke",
        *small,
        "--store",
        str(tmp_path),
        "--dry-run",
        "--json",
    ]
    found = json.loads(said(asked, capsys)[0])
    assert (found["runs"], found["done"]) == (5, 0)
    assert found["disk_mib"] > 0
    assert found["measure_s"] > 0


# --- one line for each mistake ---


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["layers", "gin,depth=3"], "has no option 'depth'; closest: width"),
        (["layers", "gin,layers=0"], "layers=0; allowed: a whole number from 1"),
        (["train", *TRAIN, "--data", "digits"], "trains on graphs; digits has images"),
        (["train", "--objective", "simclr", "--data", DATA], "trains on images; tu:TINY@data has graphs. Use graphcl"),
        (["train", "--objective", "graphcl", "--model", "mlp", "--data", DATA], "reads no graphs"),
        (["train", "--model", "gin", "--data", "digits"], "model='gin' reads graphs; digits holds images"),
        (
            ["train", *TRAIN, "--data", DATA, "--augment-layer", "9"],
            "no layer number 9 in GraphEncoder; allowed: -1 to 3",
        ),
        (["train", *TRAIN, "--data", DATA, "--augment-layer", "layer7"], "no layer 'layer7' in GraphEncoder; closest"),
        (["train", *TRAIN, "--data", DATA, "--graph-views", "node-drops"], "closest: node-drop"),
        (["train", *TRAIN, "--data", DATA, "--graph-views", "none"], "both views of a graph are the same"),
        (["train", *TRAIN, "--data", "tu:GONE@data"], "no GONE_A.txt in"),
        (["train", *TRAIN, "--data", "tu:TINY"], "allowed: tu:NAME@ROOT"),
        (["train", *TRAIN, "--data", "graphs-npz:gone.npz"], "no file 'gone.npz'"),
        (["analyze", "--checkpoint", END, "--data", DATA, "--reduce", "positions"], "allowed: 'graphs'"),
        (
            ["analyze", "--checkpoint", END, "--data", DATA, "--reduce", "nodes", "--layers", "layer1,pool"],
            "layer 'pool': a row per graph, which has no nodes",
        ),
        (["analyze", "--checkpoint", END, "--data", "digits"], "reads graphs; digits holds none"),
        (["analyze", "--model", "mlp", "--data", DATA], "'mlp' reads no graphs"),
        (["evaluate", "--checkpoint", END, "--data", DATA, "--folds", "30"], "has only 20 graphs; allowed: at most 20"),
        (["evaluate", "--checkpoint", END, "--data", DATA, "--folds", "41"], "folds=41 of 40 graphs"),
        (["evaluate", "--checkpoint", END, "--data", DATA, "-k", "3"], "-k and --finetune are for images"),
        (["evaluate", "--checkpoint", END, "--data", DATA, "--protocol", "moco"], "is for images; graphs are scored"),
        (["evaluate", "--checkpoint", END, "--data", DATA, "--layer", "layer9"], "no layer 'layer9'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    more = ["--out", str(tmp_path / "out")] if arguments[0] in ("train", "analyze") else []
    assert line in refused([*arguments, *more], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"edge_index": np.array([[0, 5], [1, 0]])}, "graph 1 has 2 nodes and an edge [5, 0]"),
        ({"node_ptr": np.array([0, 2, 2]), "edge_ptr": np.array([0, 2, 2])}, "graph 1 has no node"),
        ({"edge_ptr": np.array([0, 2, 2])}, "graph 1 has no edge"),
        ({"node_attr": np.ones((3, 2))}, "node features have shape (3, 2); allowed: (4, features)"),
        ({"graph_label": np.array([0])}, "graph_label has shape (1,)"),
        ({"node_ptr": np.array([0.5, 1.0, 4.0])}, "node_ptr holds float64; allowed: whole numbers"),
    ],
)
def test_a_damaged_file_of_graphs_is_one_line(
    change: dict[str, np.ndarray], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ends = np.array([[0, 1, 0, 1], [1, 0, 1, 0]])
    good = {"node_ptr": np.array([0, 2, 4]), "edge_ptr": np.array([0, 2, 4]), "edge_index": ends}
    arrays = {**good, **change}
    arrays["edge_index"] = arrays["edge_index"][:, : int(arrays["edge_ptr"][-1])]
    if arrays["edge_index"].shape[1] < arrays["edge_ptr"][-1]:
        arrays["edge_ptr"] = np.array([0, 1, 2])
    np.savez(tmp_path / "bad.npz", **arrays)
    assert line in refused(["train", *TRAIN, "--data", f"graphs-npz:{tmp_path / 'bad.npz'}"], capsys)


def test_a_checkpoint_of_other_features_is_one_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ends = np.array([[0, 1] * 40, [1, 0] * 40])
    places = np.arange(41) * 2
    np.savez(tmp_path / "two.npz", node_ptr=places, edge_ptr=places, edge_index=ends, node_label=np.arange(80) % 2)
    line = refused(["analyze", "--checkpoint", END, "--data", f"graphs-npz:{tmp_path / 'two.npz'}"], capsys)
    assert "was trained on nodes with 3 features" in line


def test_without_torch_geometric_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("layerlens.graph_batches.find_spec", lambda name: None)
    assert "pip install 'layerlens-torch[graph]'" in refused(["layers", "gin"], capsys)


def test_a_second_run_gives_the_same_weights(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    said(["train", *TRAIN, "--data", DATA, "--keep-every", "3", "--out", str(tmp_path / "run")], capsys)
    said(["train", *TRAIN, "--data", DATA, "--keep-every", "3", "--out", str(tmp_path / "other" / "run")], capsys)
    first, second = (load_network(folder / END)[0].state_dict() for folder in (tmp_path, tmp_path / "other"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
