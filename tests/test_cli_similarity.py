"""The commands that measure, compare and film: what they print, what they keep, and what they refuse."""

import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from layerlens import build_model, figures
from layerlens.analysis.measures import MEASURES
from layerlens.analysis.results import CrossSimilarity, FilmStrip, SimilarityMatrix
from layerlens.cli import main

MLP = "mlp,width=12,depth=2"
SQUARE = ["blocks.0", "blocks.1", "fc"]


def run(capsys, *words, code=0):
    """Output of one command in this process; stderr must be one line if it failed."""
    try:
        main([str(word) for word in words])
        left = 0
    except SystemExit as done:
        left = done.code
    out, err = capsys.readouterr()
    assert left == code, err
    assert "Traceback" not in err
    if code == 2:
        err = err.split("\r")[-1]  # what a terminal still shows once the bars are gone
        assert err.startswith("layerlens: ")
        assert err.count("\n") == 1
        return err
    return out


def strict(text):
    """JSON without NaN and infinity."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def table(text):
    """The first table of an output: header and rows as lists of cells."""
    lines = [line.split() for line in text.split("\n\n")[0].splitlines()]
    start = next(i for i, line in enumerate(lines) if line[0] in ("layer", "checkpoint", "sample"))
    return lines[start], [line for line in lines[start + 1 :] if len(line) == len(lines[start])]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Sixty 8 × 8 images in four patterns with noise, forty-eight of them for the test."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    labels = np.arange(100) % 4
    patterns = generator.random((4, 8, 8)) * 180
    pixels = (patterns[labels] + generator.random((100, 8, 8)) * 70).astype(np.uint8)
    np.savez(path, x_train=pixels[:52], y_train=labels[:52], x_test=pixels[52:], y_test=labels[52:])
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, images):
    """A finished run with the checkpoints of epochs 0, 1 and 2."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    words = ["train", "--objective", "simclr", "--model", MLP, "--data", f"npz:{images}", "--epochs", "2"]
    main([*words, "--keep-every", "1", "--batch-size", "16", "--device", "cpu", "--out", str(folder)])
    return folder


@pytest.fixture(autouse=True)
def _png_alone(monkeypatch):
    """One format of each figure, for speed."""
    monkeypatch.setattr(figures, "save_figure", partial(figures.save_figure, formats=["png"]))


@pytest.fixture
def look(images, tmp_path):
    """Options of every look at the tiny images."""
    return ["--data", f"npz:{images}", "--batch-size", 8, "--device", "cpu", "--out", tmp_path / "out"]


def test_measures_tells_name_range_direction_and_source_of_each(capsys):
    out = run(capsys, "measures")
    blocks = out.strip().split("\n\n")
    assert [block.split(":")[0] for block in blocks] == list(MEASURES)
    for block, measure in zip(blocks, MEASURES.values(), strict=True):
        for words in (
            measure.about,
            measure.higher,
            measure.cost,
            measure.source,
            measure.oracle,
            *measure.invariances,
        ):
            assert words in block
        assert all(f"{name}={value}" in block for name, value in measure.options.items())
    assert "from 0 to 1.571; higher is less alike" in blocks[list(MEASURES).index("procrustes")]
    assert "from 1; higher is more directions" in blocks[list(MEASURES).index("rankme")]


def test_measures_as_json_has_null_where_there_is_no_bound(capsys):
    rows = {row["name"]: row for row in strict(run(capsys, "measures", "--json"))}
    assert list(rows) == list(MEASURES)
    assert (rows["rankme"]["low"], rows["rankme"]["high"]) == (1, None)
    assert (rows["cka"]["low"], rows["cka"]["high"]) == (-1, 1)
    assert rows["svcca"]["options"] == {"variance": 0.99}
    assert rows["procrustes"]["higher_is_alike"] is False


@pytest.mark.parametrize("name", MEASURES)
def test_analyze_takes_every_measure_that_measures_lists(capsys, look, tmp_path, name):
    found = strict(run(capsys, "analyze", "--model", MLP, *look, "--measure", name, "--groups", 2, "--json"))
    assert found["type"] == ("SimilarityMatrix" if MEASURES[name].over == "pairs" else "LayerProfile")
    assert (found["measure"], found["layers"], found["samples"]) == (name, SQUARE, 48)
    assert strict((tmp_path / "out" / f"{name}.json").read_text()) == found
    assert (tmp_path / "out" / f"{name}.png").stat().st_size > 1000


def test_a_matrix_prints_as_a_table_with_its_intervals(capsys, look, tmp_path):
    out = run(capsys, "analyze", "--model", MLP, *look, "--measure", "mutual_knn,k=5", "--groups", 4)
    header, rows = table(out)
    found = SimilarityMatrix.from_json((tmp_path / "out" / "mutual_knn_k=5.json").read_text())
    assert header == ["layer", *SQUARE]
    assert [row[0] for row in rows] == SQUARE
    assert [[float(cell) for cell in row[1:]] for row in rows] == found.values.round(4).tolist()
    assert out.startswith("mutual_knn (48 rows")
    reach = np.max(found.high - found.low) / 2
    assert f"95% intervals reach up to ±{reach:.3f}" in out
    assert str(tmp_path / "out") in out.splitlines()[-1]


def test_a_profile_prints_as_a_table_with_its_intervals(capsys, look, tmp_path):
    out = run(capsys, "analyze", "--model", MLP, *look, "--measure", "participation_ratio")
    header, rows = table(out)
    found = strict((tmp_path / "out" / "participation_ratio.json").read_text())
    assert header == ["layer", "participation_ratio", "low", "high"]
    expected = zip(found["values"], found["low"], found["high"], strict=True)
    assert [tuple(map(float, row[1:])) for row in rows] == [tuple(round(v, 4) for v in line) for line in expected]


def test_several_measures_come_in_the_order_asked_for_each_once(capsys, look):
    words = ["--measure", "rankme", "--measure", "cka", "--measure", "rankme", "--measure", "alignment"]
    found = strict(run(capsys, "analyze", "--model", MLP, *look, *words, "--json"))
    assert [result["measure"] for result in found] == ["rankme", "cka", "alignment"]


def test_permutations_add_a_null_and_what_lies_beyond_it(capsys, look):
    words = ["analyze", "--model", MLP, *look, "--measure", "cka", "--permutations", 20]
    found = strict(run(capsys, *words, "--json"))
    assert found["null"]["permutations"] == 20
    bound, values = (np.array(found["null"]["bound"]), np.array(found["values"]))
    assert (values > bound).all()
    assert "100% of the entries are more alike than 95% of" in run(capsys, *words)
    assert "wrong pairings" not in run(capsys, *words[:-2])


def test_kernel_estimator_and_reduce_reach_the_measure(capsys, look):
    words = ["--measure", "cka", "--kernel", "rbf", "--estimator", "debiased", "--reduce", "pool"]
    found = strict(run(capsys, "analyze", "--model", "resnet20-cifar", "--layers", "layer?", *look, *words, "--json"))
    assert found["options"] == {"kernel": "rbf", "estimator": "debiased", "rbf_factor": 1.0}
    assert found["reduce"] == "pool"
    assert found["layers"] == ["layer1", "layer2", "layer3"]


def test_positions_on_a_grid_compare_layers_of_different_resolution(capsys, look):
    words = ["--model", "resnet20-cifar", "--layers", "layer?", "--measure", "cka", "--reduce", "positions,grid=2"]
    found = strict(run(capsys, "analyze", *words, *look, "--json"))
    assert (found["samples"], found["reduce"]) == (48 * 4, "positions,grid=2")


def test_influence_names_the_images_that_move_the_matrix_most(capsys, look, tmp_path):
    header, rows = table(run(capsys, "analyze", "--model", MLP, *look, "--influence"))
    found = strict((tmp_path / "out" / "influence.json").read_text())
    assert found["type"] == "SampleInfluence"
    assert header == ["sample", "largest_change", "z_score"]
    order = np.argsort(-np.array(found["largest"]), kind="stable")[:10]
    assert [int(row[0]) for row in rows] == order.tolist()
    assert [row[1] for row in rows] == [f"{found['largest'][i]:.4f}" for i in order]


def test_tolerance_stops_before_the_last_image(capsys, look):
    words = ["analyze", "--model", MLP, *look, "--measure", "cka", "--json", "--tolerance"]
    early, late = (strict(run(capsys, *words, tolerance)) for tolerance in (0.9, 0.0001))
    assert (early["samples"], late["samples"]) == (32, 48)


def test_settle_stops_once_the_advice_is_settled(capsys, look, monkeypatch):
    asked = []

    def settled(level, *, seed):
        return lambda matrix: asked.append((level, seed, matrix.samples)) or len(asked) == 2

    monkeypatch.setattr("layerlens.recommendation.settled", settled)
    words = ["--measure", "cka", "--settle", "recommendation", "--seed", 3]
    found = strict(run(capsys, "analyze", "--model", MLP, *look, *words, "--json"))
    assert asked == [(0.95, 3, 32), (0.95, 3, 40)]
    assert found["samples"] == 40


def test_a_checkpoint_of_a_run_keeps_its_measures_beside_the_run(capsys, images, trained):
    checkpoint = trained / "checkpoints" / "epoch-0002.safetensors"
    words = ["--checkpoint", checkpoint, "--data", f"npz:{images}", "--batch-size", 8, "--measure", "pwcca"]
    run(capsys, "analyze", *words, "--device", "cpu", "--groups", 0)
    assert (trained / "analysis" / "epoch-0002" / "pwcca.json").exists()


def test_compare_shows_the_layers_of_a_by_those_of_b(capsys, look, trained, tmp_path):
    first = trained / "checkpoints" / "epoch-0002.safetensors"
    words = ["compare", first, "resnet20-cifar", *look, "--other-layers", "layer?"]
    found = strict(run(capsys, *words, "--json"))
    assert found["type"] == "CrossSimilarity"
    assert found["first"][:2] == ["blocks.0", "blocks.1"]
    assert found["second"] == ["layer1", "layer2", "layer3"]
    assert found["labels"] == ["epoch-0002", "resnet20-cifar"]
    kept = CrossSimilarity.from_json((tmp_path / "out" / "cka.json").read_text())
    assert kept.to_dict() == {key: value for key, value in found.items() if key != "facts"}
    assert found["facts"]["sha256"].keys() == {first.name}
    header, rows = table(run(capsys, *words))
    assert header == ["layer", *found["second"]]
    assert [row[0] for row in rows] == found["first"]
    assert [[float(cell) for cell in row[1:]] for row in rows] == kept.values.round(4).tolist()


def test_compare_finds_epochs_of_one_run_more_alike_than_strangers(capsys, look, trained):
    checkpoints = [trained / "checkpoints" / f"epoch-000{k}.safetensors" for k in (0, 2)]
    near = strict(run(capsys, "compare", *checkpoints, *look, "--layers", "blocks.1", "--json"))
    words = [checkpoints[0], "resnet20-cifar", *look, "--layers", "blocks.1", "--other-layers", "layer3"]
    far = strict(run(capsys, "compare", *words, "--out", trained.parent / "far", "--json"))
    assert near["values"][0][0] > far["values"][0][0] + 0.1


def test_compare_by_a_distance_with_its_null(capsys, look):
    words = ["--measure", "procrustes", "--permutations", 20, "--groups", 0, "--json"]
    found = strict(run(capsys, "compare", MLP, "mlp,width=6,depth=2", *look, *words))
    assert (found["measure"], found["null"]["permutations"]) == ("procrustes", 20)
    assert (np.array(found["values"]) < np.array(found["null"]["bound"])).all()
    assert found["low"] == [[None] * 3] * 3


@pytest.mark.parametrize("case", ["two runs", "one file", "one model"])
def test_two_networks_of_one_name_are_told_apart(capsys, look, trained, tmp_path, case):
    own = trained / "checkpoints" / "epoch-0002.safetensors"
    copy = tmp_path / "second" / "checkpoints" / own.name
    copy.parent.mkdir(parents=True)
    shutil.copy(own, copy)
    pair = {"two runs": (own, copy), "one file": (own, own), "one model": (MLP, MLP)}[case]
    one, two = strict(run(capsys, "compare", *pair, *look, "--layers", "fc,blocks.0", "--json"))["labels"]
    assert one != two
    if case == "two runs":
        assert "first" in one
        assert "second" in two


def test_film_prints_a_row_per_checkpoint_and_keeps_matrices_and_figure(capsys, trained, tmp_path):
    words = ["film", trained, "--batch-size", 8, "--device", "cpu", "--out", tmp_path]
    out = run(capsys, *words)
    strip = FilmStrip.from_json((tmp_path / "film.json").read_text())
    header, *lines = out.split("\n\n")[0].splitlines()
    assert header.split()[0] == "checkpoint"
    assert [" ".join(line.split()[:2]) for line in lines] == list(strip.labels) == ["epoch 0", "epoch 1", "epoch 2"]
    changed = []
    for line, frame in zip(lines, strip.frames, strict=True):
        neighbours, everything = (float(cell) for cell in line.split()[2:4])
        assert neighbours == pytest.approx(frame.values.diagonal(1).mean(), abs=1e-4)
        assert everything == pytest.approx(frame.values[np.triu_indices(len(frame.layers), 1)].mean(), abs=1e-4)
        changed.append(line.split()[-1])
    upper = np.triu_indices(len(strip.frames[0].layers), 1)
    assert changed == ["-", *(str((change.adjusted[upper] < 0.05).sum()) for change in strip.changes)]
    assert (tmp_path / "film.png").stat().st_size > 1000
    printed = strict(run(capsys, *words, "--json"))
    assert printed.pop("facts")["measure"] == "cka"
    assert printed == strip.to_dict()


def test_film_lies_beside_the_run_unless_told_otherwise(capsys, trained):
    run(capsys, "film", trained, "--batch-size", 8, "--device", "cpu", "--measure", "procrustes")
    strip = FilmStrip.from_json((trained / "analysis" / "film.json").read_text())
    assert {frame.measure for frame in strip.frames} == {"procrustes"}


@pytest.mark.parametrize("command", ["analyze", "compare", "film"])
def test_the_same_command_twice_keeps_the_same_bytes(capsys, trained, look, tmp_path, monkeypatch, command):
    monkeypatch.undo()  # all formats
    words = {
        "analyze": ["--model", MLP, *look, "--measure", "cka"],
        "compare": [MLP, "mlp,width=6,depth=2", *look],
        "film": [trained, *look],
    }[command]
    names = {"analyze": "cka", "compare": "cka", "film": "film"}
    files = [tmp_path / "out" / f"{names[command]}.{ending}" for ending in ("json", "png", "svg", "pdf")]
    kept = []
    for _ in range(2):
        run(capsys, command, *words)
        kept.append([file.read_bytes() for file in files])
    assert kept[0] == kept[1]


def test_a_dead_layer_is_a_dash_in_the_table_and_a_caution_below_it(capsys, look, tmp_path):
    dead = build_model(MLP, input_shape=(1, 8, 8), classes=4)
    with torch.no_grad():
        dead.blocks[1][0].weight.zero_()
        dead.blocks[1][0].bias.fill_(-1.0)
    torch.save(dead.state_dict(), tmp_path / "dead.pt")
    words = ["compare", tmp_path / "dead.pt", MLP, "--model", MLP, *look]
    out = run(capsys, *words)
    header, rows = table(out)
    assert header == ["layer", *SQUARE]
    assert [set(row[1:]) == {"-"} for row in rows] == [False, True, True]
    assert re.search(r"^LL006 .*dead:blocks\.1", out, re.M)
    assert strict(run(capsys, *words, "--json"))["values"][1] == [None] * 3
    profile = run(capsys, "analyze", "--checkpoint", tmp_path / "dead.pt", "--model", MLP, *look, "--measure", "rankme")
    assert re.search(r"^blocks\.1\s+-\s+-\s+-$", profile, re.M)
    assert "LL006" in profile


TINY = ["--data", "npz:{npz}", "--batch-size", "8", "--device", "cpu", "--out", "{tmp}/out"]
ANALYZE = ["analyze", "--model", MLP, *TINY]
COMPARE = ["compare", MLP, "resnet20-cifar", *TINY]
FILM = ["film", "{run}", "--batch-size", "8", "--out", "{tmp}/out"]
MISTAKES = {
    "unknown measure": ([*ANALYZE, "--measure", "svca"], "closest: svcca"),
    "unknown measure points to the list": ([*ANALYZE, "--measure", "similarity"], "`layerlens measures`"),
    "unknown option": ([*ANALYZE, "--measure", "svcca,varience=.9"], "closest: variance"),
    "option of a measure without any": ([*ANALYZE, "--measure", "pwcca,k=3"], "it takes none"),
    "option out of range": ([*ANALYZE, "--measure", "svcca,variance=2"], "variance=2; allowed: above 0, at most 1"),
    "more neighbours than images": ([*ANALYZE, "--measure", "mutual_knn,k=48"], "allowed: 1 to 47"),
    "unknown kernel of a measure": ([*ANALYZE, "--measure", "cka,kernel=rfb"], "closest: rbf"),
    "unknown distance": ([*ANALYZE, "--measure", "rsa_pearson,distance=far"], "correlation, euclidean, cosine"),
    "colon for comma": ([*ANALYZE, "--measure", "cka:rbf"], "with commas, such as"),
    "tolerance without a measure": ([*ANALYZE, "--tolerance", ".1"], "go with --measure"),
    "permutations without a measure": ([*ANALYZE, "--permutations", "5"], "go with --measure"),
    "tolerance of single layers": ([*ANALYZE, "--measure", "rankme", "--tolerance", ".1"], "need a measure of pairs"),
    "unknown settle": ([*ANALYZE, "--measure", "cka", "--settle", "advice"], "recommendation"),
    "negative permutations": ([*ANALYZE, "--measure", "cka", "--permutations", "-1"], "permutations=-1; allowed: 0"),
    "one group": ([*ANALYZE, "--measure", "pwcca", "--groups", "1"], "groups=1; allowed: 0 for no intervals, or 2"),
    "more groups than images": ([*ANALYZE, "--measure", "pwcca", "--groups", "40"], "48 samples for 40 groups"),
    "no memory": ([*ANALYZE, "--measure", "cka", "--memory-mib", "0"], "memory_mib=0.0; allowed: above 0"),
    "too little memory": ([*ANALYZE, "--measure", "pwcca", "--memory-mib", ".001"], "raise memory"),
    "unknown reduction": ([*ANALYZE, "--measure", "cka", "--reduce", "poll"], "closest: pool"),
    "grid without positions": ([*ANALYZE, "--measure", "cka", "--reduce", "pool,grid=2"], "with positions"),
    "positions of vectors": ([*ANALYZE, "--measure", "cka", "--reduce", "positions"], "has no positions"),
    "positions of other resolutions": (
        ["analyze", "--model", "resnet20-cifar", *TINY, "--measure", "cka", "--reduce", "positions"],
        "average the maps to one grid",
    ),
    "neither model nor checkpoint": (["analyze", *TINY, "--measure", "cka"], "--checkpoint, --model, or both"),
    "missing checkpoint": (["analyze", "--checkpoint", "{tmp}/none.pt", *TINY, "--measure", "cka"], "no checkpoint"),
    "a file in the way": ([*ANALYZE[:-1], "{tmp}/taken/out", "--measure", "cka"], "another folder with --out"),
    "unknown layer": ([*ANALYZE, "--measure", "cka", "--layers", "blocks.9"], "closest: blocks"),
    "compare: one network": (["compare", MLP, *TINY], "'B'"),
    "compare: unknown model": (["compare", MLP, "resnet18", *TINY], "closest: resnet18-cifar"),
    "compare: missing checkpoint": (["compare", "{tmp}/none.safetensors", MLP, *TINY], "no checkpoint"),
    "compare: a run folder": (["compare", "{run}", MLP, *TINY], "give a .safetensors or .pt file"),
    "compare: layers of A alone": ([*COMPARE, "--layers", "blocks.0"], "no layer 'blocks.0' in CifarResNet"),
    "compare: a file in the way": ([*COMPARE[:-1], "{tmp}/taken/out"], "another folder with --out"),
    "film: no run": (["film", "{tmp}"], "no config.json"),
    "film: unknown measure": ([*FILM, "--measure", "svca"], "closest: svcca"),
    "film: measure of single layers": ([*FILM, "--measure", "rankme"], "measure of single layers"),
    "film: other model": ([*FILM, "--model", "resnet20-cifar"], "another architecture"),
    "film: missing data": ([*FILM, "--data", "npz:{tmp}/none.npz"], "x_train"),
    "film: a file in the way": ([*FILM[:-1], "{tmp}/taken/out"], "another folder with --out"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_clear_line_and_exit_code_2(case, capsys, images, trained, tmp_path):
    words, expected = MISTAKES[case]
    (tmp_path / "taken").write_text("mine")
    places = {"{tmp}": tmp_path, "{npz}": images, "{run}": trained}
    for mark, place in places.items():
        words = [word.replace(mark, str(place)) for word in words]
    assert expected in run(capsys, *words, code=2)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("lost", ["all", "one"])
def test_a_run_without_its_checkpoints_makes_no_film(capsys, trained, tmp_path, lost):
    shutil.copytree(trained, tmp_path / "run")
    for k in range(3) if lost == "all" else (1,):
        (tmp_path / "run" / "checkpoints" / f"epoch-000{k}.safetensors").unlink()
    assert "lacks checkpoints" in run(capsys, "film", tmp_path / "run", "--batch-size", 8, code=2)


def test_a_truncated_checkpoint_makes_no_film(capsys, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    broken = tmp_path / "run" / "checkpoints" / "epoch-0001.safetensors"
    broken.write_bytes(broken.read_bytes()[:200])
    assert "epoch-0001.safetensors' is truncated" in run(capsys, "film", tmp_path / "run", "--batch-size", 8, code=2)


def test_the_memory_that_a_message_asks_for_is_enough(capsys, look):
    words = ["analyze", "--model", MLP, *look, "--measure", "procrustes", "--groups", 2, "--memory-mib"]
    short = int(re.search(r"raise \S+ by (\d+)", run(capsys, *words, 0.001, code=2))[1])
    assert run(capsys, *words, 0.001 + short)


@pytest.mark.parametrize("command", ["compare", "film", "analyze"])
def test_an_interrupt_leaves_no_traceback_and_exit_code_130(command, capsys, look, trained, tmp_path, monkeypatch):
    def stop(*_words, **_options):
        raise KeyboardInterrupt

    name = {"compare": "compare", "film": "film_strip", "analyze": "measure_network"}[command]
    monkeypatch.setattr(f"layerlens.pipeline.{name}", stop)
    words = {"compare": [MLP, MLP], "film": [trained], "analyze": ["--model", MLP, "--measure", "cka"]}[command]
    assert run(capsys, command, *words, *look, code=130) == ""
    assert not (tmp_path / "out").exists()
