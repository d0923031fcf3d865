import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from layerlens.cli import cli, main


def run(capsys, *words, code=0):
    """Output of one command in this process; stderr must be one line if it failed."""
    try:
        main([str(word) for word in words])
        left = 0
    except SystemExit as done:
        left = done.code
    out, err = capsys.readouterr()
    assert left == code, err
    if code == 2:
        err = err.split("\r")[-1]  # what a terminal still shows once the bars are gone
        assert err.startswith("layerlens: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Forty 1×8×8 images in four classes that differ in brightness, twelve for the test."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"

    def split(count):
        labels = np.arange(count) % 4
        noise = generator.integers(0, 60, (count, 8, 8))
        return (noise + 45 * labels[:, None, None]).astype(np.uint8), labels

    (x_train, y_train), (x_test, y_test) = split(40), split(24)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images):
    """A finished run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    words = ["train", "--objective", "simclr", "--model", "resnet20-cifar", "--data", f"npz:{images}", "--epochs", "2"]
    main([*words, "--batch-size", "16", "--device", "cpu", "--out", str(folder)])
    return folder


@pytest.mark.parametrize("command", ["", *cli.commands])
def test_help_opens_without_torch_in_half_a_second(command):
    code = (
        "import sys; from layerlens.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    words = [sys.executable, "-c", code, *([command] if command else []), "--help"]
    start = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "Usage: layerlens" in done.stdout
    assert time.perf_counter() - start < 0.5


def test_layers_lists_in_execution_order_with_input_first(capsys):
    rows = json.loads(run(capsys, "layers", "resnet18-cifar,width=8", "--json"))
    assert rows[0] == {
        "index": -1,
        "name": "input",
        "kind": "Input",
        "shape": [3, 32, 32],
        "neurons": 3072,
        "default": False,
    }
    targets = [(row["index"], row["name"], row["neurons"]) for row in rows if row["default"]]
    assert targets == [
        (0, "relu", 8192), (1, "layer1", 8192), (2, "layer2", 4096), (3, "layer3", 2048), (4, "layer4", 1024),
        (5, "avgpool", 64), (6, "fc", 10),
    ]  # fmt: skip


def test_layers_prints_a_table(capsys):
    lines = run(capsys, "layers", "mlp").splitlines()
    assert lines[0].split() == ["index", "name", "kind", "shape", "neurons", "default"]
    assert lines[1].split() == ["-1", "input", "Input", "3×32×32", "3072"]


def test_layers_of_a_factory_need_an_input_shape(capsys, tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "--input-shape" in run(capsys, "layers", "mynet:make", code=2)
    rows = json.loads(run(capsys, "layers", "mynet:make", "--input-shape", "1,2,2", "--json"))
    assert [row["name"] for row in rows] == ["input", "0", "1"]


def test_train_writes_a_run_and_a_second_call_finds_it_finished(capsys, images, trained):
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [m["epoch"] for m in metrics] == [1, 2]
    assert {p.name for p in (trained / "checkpoints").iterdir()} == {"epoch-0000.safetensors", "epoch-0002.safetensors"}
    before = (trained / "result.json").stat().st_mtime_ns
    words = ["--objective", "simclr", "--model", "resnet20-cifar", "--data", f"npz:{images}", "--epochs", 2]
    found = json.loads(run(capsys, "train", *words, "--batch-size", 16, "--device", "cpu", "--out", trained, "--json"))
    assert found["epochs"] == 2
    assert found["loss"] == metrics[-1]["loss"]
    assert (trained / "result.json").stat().st_mtime_ns == before


def test_options_win_over_the_configuration_file(capsys, images, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        f'model = "mlp,width=16,depth=2"\ndata = "npz:{images}"\nepochs = 5\nbatch_size = 16\n'
        'objective = "supervised"\n[augment]\nlayer = "blocks.1"\nrate = 0.25\n'
    )
    out = tmp_path / "run"
    run(capsys, "train", "--config", file, "--epochs", 1, "--stop-gradient", "--device", "cpu", "--out", out)
    config = json.loads((out / "config.json").read_text())["config"]
    assert (config["epochs"], config["objective"], config["batch_size"]) == (1, "supervised", 16)
    assert config["augment"] == {
        "layer": "blocks.1", "transform": "dropout", "rate": 0.25, "fraction": 0.5, "stop_gradient": True,
        "components": 1, "per_token": False, "pairs": "independent",
    }  # fmt: skip


def test_analyze_writes_json_and_figures_beside_the_run(capsys, images, trained):
    checkpoint = trained / "checkpoints" / "epoch-0002.safetensors"
    look = ["--checkpoint", checkpoint, "--data", f"npz:{images}", "--batch-size", 6, "--device", "cpu"]
    found = json.loads(run(capsys, "analyze", *look, "--json"))
    folder = trained / "analysis" / "epoch-0002"
    assert json.loads((folder / "analysis.json").read_text()) == found
    assert found["cka"]["layers"] == ["relu", "layer1", "layer2", "layer3", "avgpool", "linear"]
    assert (folder / "similarity.png").stat().st_size > 1000
    assert (folder / "effective_rank.svg").exists()
    table = run(capsys, "analyze", *look)
    assert "alignment" in table
    assert table.splitlines()[0].split() == ["layer", *found["cka"]["layers"]]
    assert "other settings" in run(capsys, "analyze", *look, "--layers", "blocks", code=2)


def test_recommend_prints_targets_or_says_why_not(capsys, images, trained):
    look = [
        "--checkpoint",
        trained / "checkpoints" / "epoch-0002.safetensors",
        "--data",
        f"npz:{images}",
        "--batch-size",
        6,
    ]
    found = json.loads(run(capsys, "recommend", *look, "--json", "--device", "cpu"))
    assert found["verdict"] in ("supported", "no supported choice")
    assert "LL003" in [c["code"] for c in found["cautions"]]  # 24 images are too few
    assert run(capsys, "recommend", *look, "--no-twin", "--device", "cpu").startswith(found["verdict"].split()[0])


def test_recommend_draws_what_it_says(capsys, images, trained, tmp_path):
    look = ["--checkpoint", trained / "checkpoints" / "epoch-0002.safetensors", "--data", f"npz:{images}"]
    said = run(capsys, "recommend", *look, "--batch-size", 6, "--out", tmp_path, "--json", "--device", "cpu")
    kept = json.loads((tmp_path / "recommendation.json").read_text())
    assert kept["recommendation"] == json.loads(said)
    assert kept["similarity"]["layers"]
    assert (tmp_path / "recommendation.png").stat().st_size > 1000


def test_evaluate_scores_the_embedding_and_any_layer(capsys, images, trained):
    words = [
        "--checkpoint",
        trained / "checkpoints" / "epoch-0002.safetensors",
        "--data",
        f"npz:{images}",
        "--device",
        "cpu",
    ]
    found = json.loads(run(capsys, "evaluate", *words, "--json"))
    assert found["layer"] == "input of linear"
    assert set(found) == {"layer", "k", "knn", "knn10", "probe"}  # a projection head is no classifier
    inner = json.loads(run(capsys, "evaluate", *words, "--layer", "layer1", "--json"))
    assert inner["layer"] == "layer1"


def test_report_shows_one_run_or_several(capsys, images, trained, tmp_path):
    other = tmp_path / "second"
    words = ["--model", "resnet20-cifar", "--data", f"npz:{images}", "--epochs", 1, "--batch-size", 16, "--seed", 1]
    run(capsys, "train", *words, "--device", "cpu", "--out", other)
    out = tmp_path / "report"
    assert "report:" in run(capsys, "report", trained, other, "--batch-size", 6, "--out", out)
    page = (out / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 3 + 2 * 5
    assert all(word in page for word in ("first", "second", "All runs"))
    assert "http" not in page.replace("http://www.w3.org", "")
    held = json.loads((out / "report.json").read_text())
    assert [r["name"] for r in held["runs"]] == ["first", "second"]


MISTAKES = {
    "unknown command": (["trian"], "Did you mean 'train'"),
    "unknown option": (["train", "--objectiv", "simclr"], "--objective"),
    "unknown model": (["layers", "resnet18"], "closest: resnet18-cifar"),
    "unknown torchvision model": (["layers", "torchvision:resnet51"], "resnet50"),
    "unknown data": (["train", "--data", "digit"], "closest: digits"),
    "unknown objective": (["train", "--objective", "simclar"], "closest: simclr"),
    "unknown transform": (["train", "--augment-layer", "layer1", "--transform", "dropuot"], "closest: dropout"),
    "unknown layer": (["train", "--augment-layer", "layr4", "--data", "digits", "--out", "{tmp}/x"], "closest: layer4"),
    "unknown split": (["analyze", "--model", "mlp", "--data", "digits", "--split", "valid"], "allowed: train, test"),
    "unknown estimator": (["analyze", "--model", "mlp", "--data", "digits", "--estimator", "unbiased"], "debiased"),
    "unknown kernel": (["analyze", "--model", "mlp", "--data", "digits", "--kernel", "rfb"], "closest: rbf"),
    "unknown device": (["analyze", "--model", "mlp", "--data", "digits", "--device", "gpu"], "allowed: auto, cpu"),
    "rate out of range": (["train", "--augment-layer", "layer1", "--rate", "1.5"], "augment.rate=1.5"),
    "rate without layer": (["train", "--rate", ".5"], "needs --augment-layer"),
    "missing configuration": (["train", "--config", "{tmp}/none.toml"], "none.toml"),
    "missing checkpoint": (["evaluate", "--checkpoint", "{tmp}/none.pt", "--data", "digits"], "no checkpoint"),
    "neither model nor checkpoint": (["analyze", "--data", "digits"], "--checkpoint, --model, or both"),
    "missing data set": (["train", "--data", "cifar10:{tmp}"], "--download"),
    "missing npz": (["train", "--data", "npz:{tmp}/none.npz"], "x_train"),
    "not a run": (["report", "{tmp}"], "no config.json"),
    "batch too large": (
        ["train", "--data", "digits", "--batch-size", "5000", "--out", "{tmp}/y"],
        "use a smaller batch",
    ),
    "batch too small": (["analyze", "--model", "mlp", "--data", "digits", "--batch-size", "3"], "4 or more"),
    "a negative seed": (["recommend", "--model", "mlp", "--data", "digits", "--seed", "-1"], "allowed: 0 to"),
    "a huge seed": (["train", "--data", "digits", "--seed", "9" * 30], "seed="),
    "unknown criterion": (["recommend", "--model", "mlp", "--data", "digits", "--criterion", "mod"], "modularity"),
    "images of another shape": (["recommend", "--model", "resnet20-cifar,channels=3", "--data", "digits"], "can't run"),
    "a kind of data with a typo": (["train", "--data", "cifar11:data"], "closest: cifar1"),
    "a pattern of no layer": (["train", "--augment-layer", "lyr*", "--data", "digits"], "lyr*"),
    "wrong shape text": (["layers", "mlp", "--input-shape", "3x32"], "such as 3,32,32"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_clear_line_and_exit_code_2(case, capsys, tmp_path):
    words, expected = MISTAKES[case]
    assert expected in run(capsys, *(word.replace("{tmp}", str(tmp_path)) for word in words), code=2)


def test_an_augment_table_that_is_no_table_is_refused(capsys, tmp_path):
    (tmp_path / "run.toml").write_text('augment = "layer4"\n')
    assert "[augment]" in run(capsys, "train", "--config", tmp_path / "run.toml", "--rate", ".5", code=2)
    assert "augment" in run(capsys, "train", "--config", tmp_path / "run.toml", code=2)


def test_a_pattern_that_means_several_layers_gets_no_score(capsys, images, trained):
    checkpoint = trained / "checkpoints" / "epoch-0002.safetensors"
    words = ["--checkpoint", checkpoint, "--data", f"npz:{images}", "--layer", "layer?", "--device", "cpu"]
    assert "means 3 layers (layer1, layer2, layer3); name one" in run(capsys, "evaluate", *words, code=2)


def test_a_dead_network_is_a_finding_and_no_error(capsys, images, tmp_path):
    from layerlens import build_model

    dead = build_model("mlp,width=4,depth=2,classes=4", input_shape=(1, 8, 8))
    with torch.no_grad():
        dead.blocks[1][0].weight.zero_()
        dead.blocks[1][0].bias.fill_(-1.0)
    torch.save(dead.state_dict(), tmp_path / "dead.pt")
    words = ["--model", "mlp,width=4,depth=2", "--checkpoint", tmp_path / "dead.pt", "--data", f"npz:{images}"]
    found = json.loads(run(capsys, "recommend", *words, "--batch-size", 6, "--json"))
    codes = {caution["code"] for caution in found["cautions"]}
    assert {"LL005", "LL006"} <= codes
    assert found["verdict"] == "no supported choice"


def test_a_report_of_two_runs_of_one_name_is_refused_before_the_work(capsys, trained, tmp_path):
    import shutil

    shutil.copytree(trained, tmp_path / trained.name)
    assert "different folder names" in run(capsys, "report", trained, tmp_path / trained.name, code=2)


def test_damaged_run_files_are_one_clear_line(capsys, trained, tmp_path):
    import shutil

    for name, content in (("metrics.jsonl", "{}"), ("metrics.jsonl", "1"), ("result.json", "[]"), ("config.json", "3")):
        folder = tmp_path / f"{name}-{len(content)}-{content.strip('{}[]')}"
        shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("analysis"))
        (folder / name).write_text(content)
        assert "is damaged" in run(capsys, "report", folder, "--batch-size", 6, code=2)


def test_a_checkpoint_of_another_architecture_names_the_first_keys(capsys, tmp_path):
    from layerlens import build_model

    torch.save(build_model("resnet32-cifar").state_dict(), tmp_path / "other.pt")
    words = ["--model", "resnet18-cifar", "--checkpoint", tmp_path / "other.pt", "--data", "digits"]
    assert "conv1.weight" in run(capsys, "evaluate", *words, code=2)


def test_an_output_folder_of_another_run_is_left_alone(capsys, images, trained):
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file() and "analysis" not in p.parts}
    words = [
        "--model",
        "resnet20-cifar",
        "--data",
        f"npz:{images}",
        "--epochs",
        3,
        "--batch-size",
        16,
        "--out",
        trained,
    ]
    assert "epochs is 2 there and 3 here" in run(capsys, "train", *words, code=2)
    assert {p: p.read_bytes() for p in before} == before


def test_an_output_path_that_is_a_file_is_refused(capsys, images, tmp_path):
    (tmp_path / "taken").write_text("mine")
    words = ["--data", f"npz:{images}", "--batch-size", 16, "--out", tmp_path / "taken" / "run"]
    assert "--out" in run(capsys, "train", *words, code=2)
    assert (tmp_path / "taken").read_text() == "mine"
