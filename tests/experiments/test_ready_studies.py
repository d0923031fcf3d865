"""The ready studies: each can be planned at each of its sizes, and nothing in it would be refused half-way."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch
from graphs import write_tu
from sentences import places, scored_pairs, sentence, write_csv

from layerlens.data import AnyDataset, dataset_from_arrays, load_data
from layerlens.encoders import train_tokenizer
from layerlens.experiments.engines.local import LocalEngine
from layerlens.experiments.grid import Plan, make_plan
from layerlens.experiments.results import collect
from layerlens.experiments.runner import run_plan
from layerlens.experiments.store import Store
from layerlens.experiments.study import SCALES, axis_name, read_study, study_names
from layerlens.graphs import GraphDataset, Graphs
from layerlens.study_figures import draw_all
from layerlens.text import TextDataset
from layerlens.training.config import RunConfig, make_config
from layerlens.training.order import Order
from layerlens.training.recipes import read_recipe

RUNS = {  # smoke, hour, published
    "adalase-sample-size": (20, 200, 270),
    "alignment-uniformity": (6, 35, 35),
    "checkpoints": (6, 35, 35),
    "cka-heat-maps": (10, 130, 130),
    "dropout-everywhere": (10, 65, 65),
    "dropout-passes-convnet-quick": (18, 110, 110),
    "dropout-passes-resnet20": (18, 110, 110),
    "freeze-ablation": (22, 280, 280),
    "full-batch-stop": (6, 45, 45),
    "graph-layers": (10, 85, 85),
    "layer-sweep": (10, 85, 85),
    "layer-sweep-pretrained": (8, 90, 90),
    "lower-to-higher": (10, 85, 85),
    "mixing-masking": (12, 75, 75),
    "rates": (10, 205, 205),
    "sentence-embeddings": (14, 81, 135),
    "sentence-rates": (16, 144, 240),
    "supervised": (10, 75, 75),
    "transfer": (12, 170, 170),
}
SETTINGS_STUDIED = {  # the rows of the design's table of arXiv:2303.14537
    "dropout everywhere against dropout at one layer": "dropout-everywhere",
    "100 % of the batch with stop-gradient": "full-batch-stop",
    "50 % of the batch, stop / no stop": "layer-sweep",
    "the same from a SimCLR checkpoint, SimCLR twice": "layer-sweep-pretrained",
    "freeze before / freeze after": "freeze-ablation",
    "lower-to-higher pairs only": "lower-to-higher",
    "transfer CIFAR100 to CIFAR10 and back": "transfer",
    "downstream accuracy over checkpoints": "checkpoints",
    "CKA heat maps": "cka-heat-maps",
    "alignment and uniformity over checkpoints": "alignment-uniformity",
    "supervised training": "supervised",
    "SimCSE with and without MLM": "sentence-embeddings",
    "SimCSE, rates, with and without BERT's own dropout": "sentence-rates",
    "graphs: contrastive GIN": "graph-layers",
}
OTHER_STUDIES = {
    "rates", "adalase-sample-size", "dropout-passes-resnet20", "dropout-passes-convnet-quick", "mixing-masking",
}  # fmt: skip
WITHOUT_RECIPE = {  # published settings that are a recipe's without one table, as the baseline lacks that table
    "supervised": ("supervised-deep-augmentation", "augment", {}),
    "adalase-sample-size": ("adalase-resnet18", "adalase", {"batch_size": 100}),
    "dropout-passes-resnet20": ("dropout-standard-resnet20", "dropout", {}),
    "dropout-passes-convnet-quick": ("dropout-standard-convnet-quick", "dropout", {}),
}
METRICS = {
    "probe", "knn", "knn10", "top1", "alignment_train", "alignment_test", "uniformity_train", "uniformity_test",
    "STS-B", "mean", "svm",
}  # fmt: skip
OWN_DATA = {"graph-layers": "tu:MUTAG@data"}
HUNG = ("augment", "freeze", "adalase", "dropout")
IMAGES = {"digits": 1437, "cifar10": 50_000, "cifar100": 50_000}
GRAPHS = {"tu:MUTAG@data": 188, "tu:NCI1@data": 4110}
SENTENCES = {"text:sentences.txt": 52_594}

every_study = pytest.mark.parametrize("name", sorted(RUNS))
every_scale = pytest.mark.parametrize("scale", SCALES)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that studies of sentences ask for."""
    folder, draws = tmp_path_factory.mktemp("files"), random.Random(0)
    written = [sentence(parts) for parts in places(draws, 400)]
    (folder / "sentences.txt").write_text("\n".join(written))
    write_csv(folder / "stsb_dev.csv", ["score", "sentence1", "sentence2"], scored_pairs(draws))
    train_tokenizer(written, folder / "tokenizer", vocabulary=300)
    write_tu(folder / "data", "MUTAG", GRAPHS["tu:MUTAG@data"])
    return folder


@pytest.fixture(autouse=True)
def there(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)


@cache
def images(spec: str) -> AnyDataset:
    """Digits as they are; 50,000 times the same grey image in the place of CIFAR, or the same sentence or graph."""
    if spec in GRAPHS:
        ends, count = torch.tensor([[0, 1], [1, 0]]), GRAPHS[spec]
        places = torch.arange(count + 1) * 2
        same = Graphs(x=torch.ones(2 * count, 3), edge_index=ends.repeat(1, count), node_ptr=places, edge_ptr=places)
        return GraphDataset(name=spec, graphs=same, y=torch.arange(count) % 2, classes=("0", "1"))
    if spec in SENTENCES:
        return TextDataset(name=spec, columns=(["a bird sings"] * SENTENCES[spec],), test=["nobody waits"] * 1000)
    if spec.startswith("digits"):
        return load_data(spec)
    classes = {"cifar10": 10, "cifar100": 100}[spec.partition(":")[0]]
    x = torch.full((2 * classes, 3, 32, 32), 128, dtype=torch.uint8)
    y = torch.arange(2 * classes) % classes
    few = dataset_from_arrays(spec, x, y, x[:classes], y[:classes])
    return replace(few, x_train=x[:1].expand(50_000, -1, -1, -1), y_train=torch.arange(50_000) % classes)


@cache
def plan_of(name: str, scale: str) -> Plan:
    return make_plan(read_study(name).at_scale(scale), load=images)


def different_configs(plan: Plan) -> list[RunConfig]:
    """Of every setting the run of the first seed, each once."""
    first = plan.study.seed_list[0]
    return [run.config for run in plan.distinct.values() if run.seed == first]


def test_every_study_of_the_design_is_ready() -> None:
    assert set(study_names()) == {*SETTINGS_STUDIED.values(), *OTHER_STUDIES} == set(RUNS)


@every_study
def test_a_ready_study_says_what_it_is_at_three_sizes(name: str) -> None:
    study = read_study(name)
    assert study.name == name
    assert study.about
    assert set(study.scales) == set(SCALES)
    assert all(scale.about for scale in study.scales.values())
    assert all(scale.seeds is not None for scale in study.scales.values())
    assert any(arm.baseline for arm in study.arms)
    assert study.figures


@every_scale
@every_study
def test_it_has_as_many_runs_as_counted_by_hand(name: str, scale: str) -> None:
    plan = plan_of(name, scale)
    count = RUNS[name][SCALES.index(scale)]
    assert len(plan.distinct) == count
    assert f" {count} runs" in read_study(name).scales[scale].about


@every_study
def test_the_small_sizes_need_nothing_but_digits_or_sentences(name: str) -> None:
    own = "text:sentences.txt" if name.startswith("sentence") else OWN_DATA.get(name, "digits")
    for scale in ("smoke", "hour"):
        assert {data.partition(",")[0] for data in plan_of(name, scale).datasets} == {own}


@every_scale
@every_study
def test_no_run_asks_for_more_images_than_there_are(name: str, scale: str) -> None:
    for config in different_configs(plan_of(name, scale)):
        if config.data in SENTENCES or config.data in GRAPHS:
            assert Order(config, images(config.data)).steps >= 1
            continue
        data, total = images(config.data), IMAGES[config.data.partition(":")[0].partition(",")[0]]
        if not config.data.startswith("digits"):
            labels = torch.arange(total) % len(data.classes)
            data = replace(data, x_train=data.x_train[:1].expand(total, -1, -1, -1), y_train=labels)
        assert Order(config, data).steps >= 1


@every_study
def test_figures_speak_of_axes_arms_and_metrics_that_exist(name: str) -> None:
    study = read_study(name)
    arms = {arm.name: {axis_name(axis) for axis in (*study.axes, *arm.axes)} for arm in study.arms}
    assert len({figure.name for figure in study.figures}) == len(study.figures)
    for figure in study.figures:
        assert set(figure.arms) <= set(arms)
        known = set().union(*(arms[arm] for arm in figure.arms or arms))
        assert figure.metric in METRICS
        assert set(figure.lines) <= {*known, "arm", "seed"}
        if figure.kind in ("sweep", "grid"):
            assert figure.x in known
        if figure.kind == "similarity":
            assert study.measure.cka
        if figure.transfer:
            drawn = [a for a in study.at_scale("published").arms if a.name in (figure.arms or arms)]
            assert all(a.transfer for a in drawn)


@every_study
def test_the_published_size_rests_on_the_published_settings(name: str) -> None:
    study = read_study(name)
    rest = study.scales["published"].recipe
    base = study.at_scale("published").base
    if name.startswith("sentence"):  # the paper starts from weights that no study can make
        assert rest is None
        assert base["model"].startswith("hf-config:bert-small")
    elif name.startswith("graph"):  # the defaults of the objective, see test_recipes
        assert rest is None
        assert make_config(base) == make_config({**read_recipe("graphcl-nci1"), "keep_every": 20})
    elif name in WITHOUT_RECIPE:
        recipe, table, changed = WITHOUT_RECIPE[name]
        expected = {key: value for key, value in read_recipe(recipe).items() if key != table}
        assert rest is None
        assert base == {**expected, **changed}
    else:
        assert rest in ("simclr-cifar", "moco-v2-cifar")
        assert base == read_recipe(rest)


def test_simclr_runs_of_one_size_are_shared_among_studies() -> None:
    sweep = set(plan_of("layer-sweep", "hour").distinct)
    assert set(plan_of("checkpoints", "hour").distinct) < sweep
    assert set(plan_of("alignment-uniformity", "hour").distinct) < sweep
    assert sweep < set(plan_of("cka-heat-maps", "hour").distinct)


@every_scale
def test_transfer_scores_each_run_on_the_data_it_was_not_trained_on(scale: str) -> None:
    runs = plan_of("transfer", scale).runs
    directions = {(run.config.data, *(m.data for m in run.measured if m.data)) for run in runs}
    one, other = sorted({run.config.data for run in runs})
    assert directions == {(one, other), (other, one)}


@pytest.mark.parametrize("start", ["pretrained", "pretrained-dropout"])
def test_freezing_starts_from_what_was_trained_before(start: str) -> None:
    plan = plan_of("freeze-ablation", "published")
    keys = {run.key for run in plan.runs if run.arm == start}
    arms = {run.arm for run in plan.runs if run.start in keys}
    place = {"pretrained": "from-simclr", "pretrained-dropout": "from-dropout"}[start]
    assert len(keys) == 5
    assert arms == {place, f"{place}-frozen"}


@pytest.mark.slow
@every_study
def test_a_smoke_study_runs_to_its_end(name: str, tmp_path: Path) -> None:
    plan = make_plan(read_study(name).at_scale("smoke"))
    store, said = Store(tmp_path / "store"), list[str]()
    outcome = run_plan(plan, store, LocalEngine(workers=2), device="cpu", say=said.append)
    assert outcome.failed == {}, said
    assert len(outcome.fresh) == RUNS[name][0]
    result = collect(store, plan.study.name)
    assert result.missing == 0
    assert len(result.runs) == len(plan.runs)
    for figure in plan.study.figures:
        assert figure.metric in result.metrics() or figure.kind in ("similarity", "geometry")
    drawn = draw_all(result)
    plt.close("all")
    assert list(drawn) == [figure.name for figure in plan.study.figures]
