import json

import numpy as np
import pytest

from layerlens.data import dataset_from_arrays
from layerlens.errors import RunFolderError, ShapeError
from layerlens.pipeline import RunAnalysis, Settings, analyze_run
from layerlens.report import write_report
from layerlens.training.config import make_config
from layerlens.training.loop import train

LOOK = Settings(samples=40, batch_size=8)


@pytest.fixture(scope="module")
def dataset():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 255, (80, 8, 8)).astype(np.uint8)
    labels = np.arange(80) % 3
    return dataset_from_arrays("tiny <b>", images[:40], labels[:40], images[40:], labels[40:])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, dataset):
    root = tmp_path_factory.mktemp("runs")
    made = []
    for seed in (0, 1):
        settings = {"model": "resnet20-cifar", "epochs": 2, "batch_size": 16, "seed": seed, "data": "tiny <b>"}
        train(make_config(settings), root / f"seed-{seed}", dataset=dataset, device="cpu")
        made.append(analyze_run(root / f"seed-{seed}", dataset=dataset, settings=LOOK))
    return made


def test_the_report_of_one_run_is_one_page_that_needs_nothing_else(runs, tmp_path):
    page = write_report(runs[:1], tmp_path).read_text()
    assert "src=" in page
    assert all(part.startswith("data:image/svg+xml;base64,") for part in page.split('src="')[1:])
    assert "<link" not in page
    assert "<script" not in page


def test_text_from_outside_is_escaped(runs, tmp_path):
    page = write_report(runs[:1], tmp_path).read_text()
    assert "tiny &lt;b&gt;" in page
    assert "tiny <b>" not in page


def test_the_numbers_in_the_page_are_those_of_the_result(runs, tmp_path):
    page = write_report(runs[:1], tmp_path).read_text()
    scores = runs[0].scores["epoch-0002"]
    assert f"{scores['knn']:.4f}" in page
    assert f"{scores['probe']:.4f}" in page
    assert runs[0].recommendation.reason in page


def test_json_and_markdown_lie_beside_the_page(runs, tmp_path):
    write_report(runs, tmp_path)
    held = json.loads((tmp_path / "report.json").read_text())
    assert [RunAnalysis.from_dict(run).to_dict() for run in held["runs"]] == [run.to_dict() for run in runs]
    text = (tmp_path / "report.md").read_text()
    images = [part.split(")")[0] for part in text.split("](")[1:]]
    assert images
    assert all((tmp_path / image).exists() for image in images)


def test_several_runs_share_a_table_and_figures(runs, tmp_path):
    page = write_report(runs, tmp_path).read_text()
    assert "All runs" in page
    assert (tmp_path / "figures" / "all_similarity.png").exists()


def test_an_analysis_is_kept_and_read_again_only_for_the_same_settings(runs, dataset, tmp_path_factory):
    root = next(p for p in tmp_path_factory.getbasetemp().glob("runs*/seed-0") if (p / "analysis").exists())
    kept = root / "analysis" / "run.json"
    before = kept.read_bytes()
    assert analyze_run(root, settings=LOOK).to_dict() == runs[0].to_dict()  # no data needed: read, not made
    other = analyze_run(root, dataset=dataset, settings=Settings(samples=32, batch_size=8))
    assert other.recommendation.samples == 32
    assert kept.read_bytes() != before


def test_other_data_than_the_run_was_trained_on_are_refused(runs, tmp_path_factory):
    root = next(p for p in tmp_path_factory.getbasetemp().glob("runs*/seed-1") if (p / "analysis").exists())
    changed = dataset_from_arrays("tiny <b>", np.zeros((8, 8, 8), np.uint8), None, np.zeros((8, 8, 8), np.uint8), None)
    with pytest.raises(RunFolderError, match="other contents"):
        analyze_run(root, dataset=changed, settings=Settings(samples=16, batch_size=8))


def test_a_report_needs_runs_with_different_names(runs, tmp_path):
    with pytest.raises(ShapeError, match="at least one run"):
        write_report([], tmp_path)
    with pytest.raises(ShapeError, match="different folder names"):
        write_report([runs[0], runs[0]], tmp_path)


def test_a_folder_that_can_not_be_written_is_an_error_of_ours(runs, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunFolderError, match="--out"):
        write_report(runs[:1], tmp_path / "file" / "report")
