"""The studies behind notebook 02 in small: every layer, stop and no stop, frozen before and after, five seeds."""

from pathlib import Path
from typing import Any

import pytest

from layerlens.experiments.ablation import advice_outcome, freeze_effects
from layerlens.experiments.results import StudyResult
from layerlens.experiments.runner import run_study
from layerlens.experiments.study import Study, make_study, read_study
from layerlens.files import read_json

ROOT = Path(__file__).parents[2]
SMALL = {"model": "resnet18-cifar,width=4", "epochs": 2, "train_samples": 192, "batch_size": 64, "keep_every": 2}


def small(name: str, layers: str | list[str]) -> Study:
    """A study of the notebook with its five seeds, at a size for CI."""
    content: dict[str, Any] = read_study(ROOT / "analysis_notebooks" / f"{name}.toml").model_dump()
    content["base"] |= SMALL
    for arm in content["arms"]:
        if arm["axes"]:
            arm["axes"]["augment.layer"] = layers
    return make_study(content)


@pytest.mark.slow
def test_a_layer_sweep_with_five_seeds_says_whether_the_advice_was_good(tmp_path: Path):
    study = small("layer_sweep_digits", "input and each layer")
    found = run_study(study, tmp_path / "store", workers=2, device="cpu")
    assert (len(found.runs), found.missing, found.failed) == (85, 0, {})
    lines = found.lines("knn")
    assert [line.score.n for line in lines] == [5] * 17
    assert all(line.gain is not None and line.gain.n == 5 for line in lines if not line.baseline)
    stop, no_stop = (
        found.scores("knn", arm="Deep Augmentation", layer="input", stop_gradient=flag) for flag in (True, False)
    )
    assert stop == no_stop  # nothing learns before the input, so there is no gradient to stop
    advised = [run["seed"] for run in found.runs if run["baseline"] and run["advice"]]
    outcome = advice_outcome(found, "knn", arm="Deep Augmentation", baseline="SimCLR")
    assert [row["seed"] for row in outcome.advised] == advised
    assert all(1 <= row["rank"] <= row["of"] == 16 for row in outcome.advised)
    assert len(outcome.without) == 5 - len(advised)


@pytest.mark.slow
def test_a_freeze_ablation_with_five_seeds_sums_itself_up_for_every_start(tmp_path: Path):
    study = small("freeze_ablation_digits", ["layer2", "layer4"])
    found = run_study(study, tmp_path / "store", workers=2, device="cpu")
    assert (found.missing, found.failed) == (0, {})
    effects = freeze_effects(found, "knn")
    assert [effect.start for effect in effects] == ["pretrained", "random", "pretrained-dropout"]
    assert all(list(effect.before) == list(effect.after) == ["layer2", "layer4"] for effect in effects)
    assert all(effect.difference.n == 5 for effect in effects)
    assert all(str(effect).startswith(f"From {effect.start} weights") for effect in effects)


SHOWN = [("layer_sweep_digits", 85, 0, 5), ("freeze_ablation_digits", 285, 0, 5), ("layer_sweep_cifar10", 39, 6, 3)]


@pytest.mark.parametrize(("name", "runs", "missing", "seeds"), SHOWN)
def test_the_committed_results_are_of_the_committed_studies(name: str, runs: int, missing: int, seeds: int):
    found = StudyResult.from_dict(read_json(ROOT / "figures" / name / "result.json"))
    assert make_study(found.study) == read_study(ROOT / "analysis_notebooks" / f"{name}.toml")
    assert (len(found.runs), found.missing, found.failed) == (runs, missing, {})
    assert {run["seed"] for run in found.runs} == set(range(seeds))


def test_the_committed_results_on_sentences_are_those_of_the_ready_study():
    found = StudyResult.from_dict(read_json(ROOT / "figures" / "sentence_embeddings" / "result.json"))
    assert make_study(found.study) == read_study("sentence-embeddings").at_scale("hour")
    assert (len(found.runs), found.missing, found.failed) == (81, 0, {})
    assert {run["seed"] for run in found.runs} == {0, 1, 2}


@pytest.mark.parametrize("name", ["MUTAG", "PROTEINS", "NCI1"])
def test_the_committed_results_on_graphs_are_those_of_the_ready_study(name: str):
    found = StudyResult.from_dict(read_json(ROOT / "figures" / f"graph_layers_{name.lower()}" / "result.json"))
    study = read_study("graph-layers").at_scale("published", data=f"graphs-npz:graphs_{name}.npz")
    assert make_study({**found.study, "name": study.name}) == study
    assert (len(found.runs), found.missing, found.failed) == (85, 0, {})
    assert {line.score.n for line in found.lines("svm")} == {5}
