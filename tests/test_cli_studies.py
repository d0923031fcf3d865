"""`layerlens study`: end to end on a tiny study; one line, exit code 2 and nothing written for each mistake."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from here import Here

from layerlens.cli import main
from layerlens.experiments import engines
from layerlens.experiments.engines import make_engine
from layerlens.experiments.job import Job
from layerlens.experiments.results import StudyResult

STUDY = """
[base]
model = "mlp,width=16,depth=2"
data = "npz:{data}"
epochs = 2
batch_size = 32
knn_every = 2
keep_every = 2

[[arms]]
name = "plain"
baseline = true

[[arms]]
name = "deep"

[arms.settings.augment]
rate = 0.5

[arms.axes]
"augment.layer" = ["blocks.0"]
"augment.stop_gradient" = [false, true]

[measure]
k = 5
samples = 40
batch_size = 20
"""
FIGURE = """
[[figures]]
kind = "sweep"
name = "by_layer"
lines = ["arm", "stop_gradient"]
"""


class Silent(Here):
    """Without what a worker says on stderr: it has a log."""

    def start(self, job: Job) -> None:
        with redirect_stderr(io.StringIO()):
            super().start(job)


def made(name: str, **options: Any) -> Any:
    """The engine that a command asks for; the local one does its jobs here, which saves its processes' start."""
    asked = make_engine(name, **options)
    return Silent() if name == "local" else asked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 digits and 48 for the test, with labels and without."""
    from sklearn.datasets import load_digits

    place = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    images = (16 * images.reshape(-1, 8, 8)).clip(0, 255).astype(np.uint8)
    split = {"x_train": images[:96], "x_test": images[96:144]}
    np.savez(place / "digits.npz", **split, y_train=labels[:96], y_test=labels[96:144])
    np.savez(place / "plain.npz", **split)
    return place


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the study as study.toml."""
    monkeypatch.setattr(engines, "make_engine", made)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "study.toml", folder)
    return tmp_path


def write(path: Path, folder: Path, *more: str, text: str = STUDY) -> Path:
    path.write_text(text.format(data=folder / "digits.npz") + "\n".join(more))
    return path


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The study, done with two seeds; tests only read it."""
    place = tmp_path_factory.mktemp("done")
    write(place / "study.toml", folder, FIGURE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "make_engine", made)
        main(["study", "run", str(place / "study.toml"), "--store", str(place / "store"), "--seeds", "2",
              "--device", "cpu"])  # fmt: skip
    before = tree(place)
    yield place / "store"
    assert tree(place) == before


def tree(folder: Path) -> dict[str, int]:
    """Every file and when it was changed."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def said(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[str, str]:
    """What `layerlens study …` printed, and what it said beside."""
    left: Any = 0
    try:
        main(["study", *map(str, words)])
    except SystemExit as done:
        left = done.code
    out, err = capsys.readouterr()
    assert left == code, (left, err)
    assert "Traceback" not in err
    return out, err


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[str, str]:
    return said(capsys, "run", "study.toml", "--store", "store", "--device", "cpu", *words, code=code)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a mistake is answered with; a dry run may have timed something before."""
    out, err = said(capsys, *words, code=2)
    assert out == ""
    lines = [line for line in err.split("\r")[-1].splitlines() if not line.startswith("timing ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("layerlens: ")
    return lines[0]


# --- end to end ---


def test_a_run_prints_its_table_and_the_second_one_does_nothing(here: Path, capsys: pytest.CaptureFixture[str]):
    out, err = run(capsys)
    lines = out.splitlines()
    assert lines[0].startswith("study: probe, mean over n seeds with 95 % interval")
    assert lines[1].split()[:4] == ["arm", "layer", "stop_gradient", "n"]
    assert [line.split()[:4] for line in lines[2:5]] == [
        ["plain", "-", "-", "1"], ["deep", "blocks.0", "no", "1"], ["deep", "blocks.0", "yes", "1"],
    ]  # fmt: skip
    assert lines[-1] == "3 runs, 3 of them now; tables, figures and JSON: store/studies/study"
    assert "3/3" in err
    assert "run/s" not in out
    before = tree(here / "store" / "runs")
    out, _ = run(capsys)
    assert out.splitlines()[-1].startswith("3 runs, 0 of them now; ")
    assert tree(here / "store" / "runs") == before


def test_json_is_all_that_stdout_holds(here: Path, capsys: pytest.CaptureFixture[str]):
    out, err = run(capsys, "--json")
    found = StudyResult.from_json(out)
    assert [r["arm"] for r in found.runs] == ["plain", "deep", "deep"]
    assert "3/3" in err
    kept = StudyResult.from_json((here / "store" / "studies" / "study" / "result.json").read_text())
    assert kept.runs == found.runs


def test_more_seeds_are_added_and_a_name_shares_the_runs(here: Path, capsys: pytest.CaptureFixture[str]):
    run(capsys)
    assert run(capsys, "--seeds", 2)[0].splitlines()[-1].startswith("6 runs, 3 of them now; ")
    last = run(capsys, "--seeds", 2, "--name", "again")[0].splitlines()[-1]
    assert last == "6 runs, 0 of them now; tables, figures and JSON: store/studies/again"
    rows = json.loads(said(capsys, "status", "--store", "store", "--json")[0])
    assert [(row["study"], row["runs"], row["done"]) for row in rows] == [("again", 6, 6), ("study", 6, 6)]


def test_settings_of_the_command_line_make_other_runs(here: Path, capsys: pytest.CaptureFixture[str]):
    run(capsys)
    assert "3 runs, 3 of them now" in run(capsys, "--epochs", 1)[0]
    assert "3 runs, 3 of them now" in run(capsys, "--model", "mlp,width=8,depth=2")[0]
    configs = [json.loads(p.read_text())["config"] for p in (here / "store" / "runs").glob("*/config.json")]
    assert sorted((c["model"][4:11], c["epochs"]) for c in configs) == sorted(
        3 * [("width=1", 2), ("width=1", 1), ("width=8", 2)]
    )


def test_a_dry_run_says_what_it_costs_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]):
    before = tree(here)
    out, err = run(capsys, "--dry-run", "--workers", 2)
    lines = out.splitlines()
    assert lines[0] == "3 runs, 3 of them missing"
    assert lines[1].startswith("about ")
    assert "with 2 workers" in lines[1]
    assert lines[2].endswith(" MiB of disk")
    assert lines[3].startswith("timed: mlp,width=16,depth=2, npz:")
    assert "timing " in err
    found = json.loads(run(capsys, "--dry-run", "--json")[0])
    assert (found["type"], found["runs"], found["done"]) == ("Cost", 3, 0)
    assert tree(here) == before


def test_the_real_local_engine_runs_a_small_network(folder: Path, tmp_path: Path):
    """In a process of its own, with one worker: data on stdout, progress on stderr."""
    base = 'seeds = 1\n[base]\nmodel = "resnet18-cifar,width=4"\ndata = "digits"\nepochs = 2\ntrain_samples = 64\n'
    text = f"{base}batch_size = 32\n[measure]\nsamples = 40\nbatch_size = 20\nscores = false\n"
    (tmp_path / "small.toml").write_text(text)
    words = [sys.executable, "-W", "error", "-m", "layerlens", "study", "run", "small.toml", "--workers", "1"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "small: 1 runs, without scores (scores = false)", "",
        "1 runs, 1 of them now; tables, figures and JSON: studies/studies/small",
    ]  # fmt: skip
    assert "1/1" in done.stderr
    assert "Traceback" not in done.stderr


def test_unlabelled_data_have_their_geometry_in_the_table(here: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    out, _ = run(capsys, "--data", f"npz:{folder / 'plain.npz'}")
    assert "study-plain.npz: alignment_test, mean over n seeds" in out  # settings of its own, so a name of its own
    assert (
        "uniformity_train"
        in said(capsys, "table", "study-plain.npz", "--store", "store", "--metric", "uniformity_train")[0]
    )


# --- what is there at the end ---


def test_tables_figures_and_json_lie_beside_the_plan(store: Path):
    folder = store / "studies" / "study"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    drawn = {f"figures/by_layer.{ending}" for ending in ("png", "svg", "pdf", "json")}
    assert {"plan.json", "result.json", "long.csv", "probe.csv", "probe.tex", *drawn} <= names


def test_the_files_are_what_table_prints(store: Path, capsys: pytest.CaptureFixture[str]):
    for name, form in (("long.csv", "long"), ("probe.csv", "csv"), ("probe.tex", "latex")):
        out, err = said(capsys, "table", "study", "--store", store, "--format", form)
        assert out == (store / "studies" / "study" / name).read_text()
        assert err == ""


def test_every_format_has_the_same_numbers(store: Path, capsys: pytest.CaptureFixture[str]):
    def printed(*words: object) -> str:
        return said(capsys, "table", "study", "--store", store, *words)[0]

    found = StudyResult.from_json(printed("--json"))
    wanted = [line.score.mean for line in found.lines("knn")]
    rows = list(csv.DictReader(io.StringIO(printed("--metric", "knn", "--format", "csv"))))
    assert [float(row["mean"]) for row in rows] == pytest.approx(wanted)
    long = list(csv.DictReader(io.StringIO(printed("--format", "long"))))
    assert len(long) == len(found.to_frame())
    last = [float(r["value"]) for r in long if (r["metric"], r["epoch"], r["arm"]) == ("knn", "2", "plain")]
    assert np.mean(last) == pytest.approx(wanted[0])
    latex = printed("--metric", "knn", "--format", "latex")
    assert latex.count(r"\\") == 4
    assert f"{100 * wanted[0]:.1f}" in latex
    table = printed("--metric", "knn").splitlines()
    assert [float(line.split()[4]) for line in table[2:5]] == pytest.approx(wanted, abs=5e-5)


def test_another_epoch_can_be_printed(store: Path, capsys: pytest.CaptureFixture[str]):
    words = ("table", "study", "--store", store, "--metric", "uniformity_test", "--format", "csv")
    first = list(csv.DictReader(io.StringIO(said(capsys, *words, "--epoch", 0)[0])))
    last = list(csv.DictReader(io.StringIO(said(capsys, *words, "--epoch", 2)[0])))
    usual = list(csv.DictReader(io.StringIO(said(capsys, *words)[0])))
    assert last == usual != first


def test_status_counts_and_lists(store: Path, capsys: pytest.CaptureFixture[str]):
    lines = said(capsys, "status", "--store", store)[0].splitlines()
    assert lines[0].split() == ["study", "runs", "done", "running", "failed", "missing", "left_s"]
    assert lines[1].split()[:6] == ["study", "6", "6", "0", "0", "0"]
    assert len(lines) == 2
    every = said(capsys, "status", "study", "--store", store, "--runs")[0]
    assert every.count("seed=1") == 3
    (found,) = json.loads(said(capsys, "status", "--store", store, "--json", "--runs")[0])
    assert (found["study"], found["runs"], found["done"], found["left_s"]) == ("study", 6, 6, 0.0)
    assert {(row["arm"], row["state"], row["epochs"], row["of"]) for row in found["of"]} == {
        ("plain", "done", 2, 2), ("deep", "done", 2, 2),
    }  # fmt: skip


def test_status_of_no_store_says_that_nothing_was_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert said(capsys, "status", "--store", tmp_path / "x")[0] == f"no study was begun in {str(tmp_path / 'x')!r}\n"
    assert said(capsys, "status", "--store", tmp_path / "x", "--json")[0] == "[]\n"
    assert not (tmp_path / "x").exists()


def test_status_opens_without_torch(store: Path):
    code = (
        "import sys; from layerlens.cli import main\n"
        "main(sys.argv[1:])\n"
        "assert not {'torch', 'pandas', 'matplotlib', 'sklearn'} & set(sys.modules)"
    )
    words = [sys.executable, "-c", code, "study", "status", "--store", str(store), "--runs"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "plain" in done.stdout


def test_help_of_each_command_opens_without_torch():
    code = (
        "import sys; from layerlens.cli import main\n"
        "for words in ([], ['list'], ['run'], ['status'], ['table']):\n"
        "    try: main(['study', *words, '--help'])\n"
        "    except SystemExit as done: assert not done.code\n"
        "assert not {'torch', 'pandas', 'matplotlib', 'pydantic'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("Usage: layerlens study") == 5


def test_list_names_the_ready_studies_and_prints_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    names = [row["name"] for row in json.loads(said(capsys, "list", "--json")[0])]
    assert {"layer-sweep", "freeze-ablation"} <= set(names)
    lines = said(capsys, "list")[0].splitlines()
    assert lines[0].split() == ["name", "about"]
    assert [line.split()[0] for line in lines[1:]] == names
    text = said(capsys, "list", "layer-sweep")[0]
    assert json.loads(said(capsys, "list", "layer-sweep", "--json")[0])["toml"].rstrip() == text.rstrip()
    (tmp_path / "mine.toml").write_text(text)
    assert "layer-sweep" in refused(capsys, "list", "layer-swep")


# --- what goes wrong in a run ---

DIVERGING = ('"augment.layer" = ["blocks.0"]', '"augment.layer" = ["blocks.0"]\n"loss_scale" = [1.0, 1e38]')


def test_a_failed_run_is_told_everywhere_and_the_others_are_done(
    here: Path, folder: Path, capsys: pytest.CaptureFixture[str]
):
    write(here / "study.toml", folder, text=STUDY.replace(*DIVERGING))
    out, err = run(capsys, code=1)
    assert "0 runs are missing, 2 failed" in out
    assert "3 runs, 3 of them now" in out
    assert "NaN or infinite" in err
    assert "2 runs failed; `layerlens study status study --store store` says why" in err
    lines = said(capsys, "status", "study", "--store", "store")[0].splitlines()
    assert lines[1].split()[:6] == ["study", "5", "3", "0", "2", "0"]
    problems = [line for line in lines if "failed" in line and "deep" in line]
    assert len(problems) == 2
    assert all("NaN or infinite" in line and "0/2" in line for line in problems)
    found = json.loads(said(capsys, "status", "--store", "store", "--json", "--runs")[0])[0]["of"]
    assert ["NaN or infinite" in (row["problem"] or "") for row in found] == [row["state"] == "failed" for row in found]
    table = said(capsys, "table", "study", "--store", "store")[0]
    assert "2 failed" in table
    assert said(capsys, "status", "--store", "store", "--json")[0].count('"failed": 2') == 1


def test_a_damaged_result_is_set_aside_and_the_run_done_again(here: Path, capsys: pytest.CaptureFixture[str]):
    run(capsys)
    victim = sorted((here / "store" / "runs").iterdir())[1]
    wanted = json.loads((victim / "result.json").read_text())
    (victim / "result.json").write_text("{")
    lines = said(capsys, "status", "--store", "store")[0].splitlines()
    assert lines[1].split()[1:6] == ["3", "2", "0", "0", "1"]
    assert "1 runs are missing" in said(capsys, "table", "study", "--store", "store")[0]
    out, err = run(capsys)
    assert "3 runs, 1 of them now" in out
    assert f"'store/runs/{victim.name}/result.json' was damaged" in err
    assert "Traceback" not in err
    assert (victim / "result.json.damaged-1").read_text() == "{"
    assert json.loads((victim / "result.json").read_text())["loss"] == wanted["loss"]


def test_a_damaged_measurement_is_one_line_that_names_it(here: Path, capsys: pytest.CaptureFixture[str]):
    run(capsys)
    path = next((here / "store" / "runs").glob("*/analysis/study-scores-*.json"))
    path.write_text("{")
    assert path.name in refused(capsys, "table", "study", "--store", "store")


# --- mistakes: one line, exit code 2, nothing written ---

WRONG_FILES = {
    "a typo in a key": ("seed_s = 3\n" + STUDY, "'seed_s'; closest: seeds"),
    "a typo in a setting": (STUDY.replace("epochs", "epoch"), "'epoch'; closest: epochs"),
    "a typo in an arm": (STUDY.replace("baseline", "base_line"), "closest: baseline"),
    "an axis over an unknown field": (STUDY.replace('"augment.layer"', '"augment.layr"'), "augment.layer"),
    "bad TOML": (STUDY + "\n[base", "study.toml' is not valid TOML"),
    "no runs": ("arms = []\n" + STUDY.partition("[[arms]]")[0], "there must be one"),
    "a value out of range": (STUDY.replace("rate = 0.5", "rate = 1.5"), "rate"),
    "a typo in the model": (STUDY.replace("mlp,width", "mpl,width"), "mlp"),
    "missing data": (STUDY.replace("{data}", "nowhere.npz"), "nowhere.npz"),
    "seeds that are no number": ("seeds = 'five'\n" + STUDY, "seeds"),
    "an unknown start": (STUDY.replace('name = "deep"', 'name = "deep"\nstart = "pre"'), "start='pre'"),
}


@pytest.mark.parametrize(
    ("file", "dry"),
    [(file, ("--dry-run",)) for file in WRONG_FILES]
    + [
        (file, ()) for file in WRONG_FILES
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused(
    here: Path, folder: Path, capsys: pytest.CaptureFixture[str], file: str, dry: tuple[str, ...]
):
    text, words = WRONG_FILES[file]
    write(here / "study.toml", folder, text=text)
    before = tree(here)
    assert words in refused(capsys, "run", "study.toml", "--store", "store", *dry)
    assert tree(here) == before


WRONG_WORDS: dict[str, tuple[tuple[object, ...], str]] = {
    "an unknown study": (("layer-swep",), "closest: layer-sweep"),
    "no file": (("nowhere.toml",), "nowhere.toml"),
    "a folder": ((".",), "unknown study '.'"),
    "an unknown scale": (("layer-sweep", "--scale", "smok"), "closest: smoke"),
    "a scale that it has not": (("study.toml", "--scale", "smoke"), "'smoke'"),
    "an unknown engine": (("study.toml", "--engine", "lokal"), "closest: local"),
    "no workers": (("study.toml", "--workers", 0), "workers=0; allowed: 1 or more"),
    "no threads": (("study.toml", "--threads", 0), "threads=0; allowed: 1 or more"),
    "negative retries": (("study.toml", "--retries", -1), "retries=-1; allowed: 0 or more"),
    "a negative limit": (("study.toml", "--limit-s", -1), "limit_s=-1.0; allowed: "),
    "no seeds": (("study.toml", "--seeds", 0), "seeds=0: allowed: how many, from 1"),
    "negative seeds": (("study.toml", "--seeds", -3), "seeds=-3"),
    "no epochs": (("study.toml", "--epochs", 0), "epochs=0"),
    "an option without =": (("study.toml", "--option", "partition"), "KEY=VALUE"),
    "an unknown option of the local engine": (("study.toml", "--option", "partition=gpu"), "partition"),
    "an option that is an argument": (("study.toml", "--option", "workers=2"), "workers"),
    "an option that is the name": (("study.toml", "--option", "name=x"), "name"),
    "an option without a key": (("study.toml", "--option", "=x"), "option ''"),
    "an unknown device": (("study.toml", "--device", "tpu"), "tpu"),
    "a typo in the model": (("study.toml", "--model", "mpl"), "mlp"),
    "missing data": (("study.toml", "--data", "npz:gone.npz"), "gone.npz"),
    "a name that is a path": (("study.toml", "--name", "../x"), "name='../x'"),
    "a name with a space": (("study.toml", "--name", "a b"), "name='a b'"),
    "a word for a number": (("study.toml", "--seeds", "five"), "five"),
}


@pytest.mark.parametrize("mistake", WRONG_WORDS)
def test_wrong_words_are_refused(here: Path, capsys: pytest.CaptureFixture[str], mistake: str):
    words, answer = WRONG_WORDS[mistake]
    before = tree(here)
    assert answer in refused(capsys, "run", "--store", "store", *words)
    assert tree(here) == before


@pytest.mark.parametrize("mistake", WRONG_WORDS)
def test_wrong_words_are_refused_by_a_dry_run(here: Path, capsys: pytest.CaptureFixture[str], mistake: str):
    words, answer = WRONG_WORDS[mistake]
    assert answer in refused(capsys, "run", "--store", "store", "--dry-run", *words)


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("slurm", "submitit")])
@pytest.mark.parametrize("how", ["absent", "broken"])
def test_an_engine_without_its_extra_says_what_to_install(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, engine: str, package: str, how: str
):
    if how == "absent":
        monkeypatch.setitem(sys.modules, package, None)
    else:
        monkeypatch.delitem(sys.modules, package, raising=False)
        (here / "stub" / package).mkdir(parents=True)
        (here / "stub" / package / "__init__.py").write_text("raise ImportError('libfoo.so is missing')")
        monkeypatch.syspath_prepend(here / "stub")
    line = refused(capsys, "run", "study.toml", "--store", "store", "--engine", engine)
    assert f'pip install "layerlens-torch[{engine}]"' in line
    assert not (here / "store").exists()


def other_folder(path: Path) -> str:
    path.mkdir()
    (path / "thesis.tex").touch()
    return "exists and is no store"


def newer_store(path: Path) -> str:
    path.mkdir()
    (path / "store.json").write_text('{"schema": 99}')
    return "newer layerlens (store schema 99"


def a_file(path: Path) -> str:
    path.touch()
    return "exists and is no store"


def damaged_store(path: Path) -> str:
    path.mkdir()
    (path / "store.json").write_text("{")
    return "store.json' is damaged"


@pytest.mark.parametrize("make", [other_folder, newer_store, a_file, damaged_store])
@pytest.mark.parametrize("command", [("run", "study.toml"), ("run", "study.toml", "--dry-run"), ("status",),
                                     ("status", "s"), ("table", "s")])  # fmt: skip
def test_what_is_no_store_of_ours_is_left_alone(
    here: Path, capsys: pytest.CaptureFixture[str], make: Any, command: tuple[str, ...]
):
    words = make(here / "place")
    before = tree(here)
    assert words in refused(capsys, *command, "--store", "place")
    assert tree(here) == before


def test_an_unknown_study_of_a_store_is_answered_with_the_closest(store: Path, capsys: pytest.CaptureFixture[str]):
    for command in ("status", "table"):
        assert "no study 'studdy' in " in (line := refused(capsys, command, "studdy", "--store", store))
        assert "closest: study" in line


def test_tables_of_an_unknown_metric_name_the_closest(store: Path, capsys: pytest.CaptureFixture[str]):
    for form in ("table", "csv", "latex"):
        line = refused(capsys, "table", "study", "--store", store, "--metric", "prob", "--format", form)
        assert "unknown metric 'prob'; closest: probe" in line


@pytest.mark.parametrize(("option", "value"), [("--epoch", "7"), ("--on", "npz:other")])
def test_a_table_of_what_was_not_measured_is_refused(
    store: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
):
    assert value in refused(capsys, "table", "study", "--store", store, option, value)


def test_a_table_of_nothing_says_so(here: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    write(here / "study.toml", folder, text=STUDY.replace("epochs = 2", "epochs = 2\nloss_scale = 1e38"))
    out, _ = run(capsys, code=1)
    assert "study: no run is finished; 0 are missing, 3 failed" in out
    assert "no run is finished" in said(capsys, "table", "study", "--store", "store")[0]


@pytest.mark.parametrize("form", ["csv", "latex"])
def test_a_table_without_scores_says_why(here: Path, folder: Path, capsys: pytest.CaptureFixture[str], form: str):
    write(here / "study.toml", folder, text=STUDY.replace("[measure]", "[measure]\nscores = false"))
    run(capsys)
    assert "without scores" in refused(capsys, "table", "study", "--store", "store", "--format", form)


@pytest.mark.parametrize("name", ["plan", "result"])
def test_a_figure_can_not_overwrite_the_files_of_its_study(
    here: Path, folder: Path, capsys: pytest.CaptureFixture[str], name: str
):
    write(here / "study.toml", folder, FIGURE.replace("by_layer", name))
    left: Any = 0
    try:
        main(["study", "run", "study.toml", "--store", "store", "--device", "cpu"])
    except SystemExit as done:
        left = done.code
    capsys.readouterr()
    assert left == 2 or said(capsys, "status", "--store", "store")[0].splitlines()[1].split()[:3] == ["study", "3", "3"]
    if left != 2:
        assert StudyResult.from_json((here / "store" / "studies" / "study" / "result.json").read_text()).runs


@pytest.mark.parametrize("fault", [('lines = ["arm"', 'metric = "nonsense"\nlines = ["arm"'), ('"arm"', '"layr"')])
def test_a_figure_that_can_not_be_drawn_does_not_hide_the_table(
    here: Path, folder: Path, capsys: pytest.CaptureFixture[str], fault: tuple[str, str]
):
    """Or is refused before anything was run; hours of training must not end in a word about a figure alone."""
    write(here / "study.toml", folder, FIGURE.replace(*fault))
    left: Any = 0
    try:
        main(["study", "run", "study.toml", "--store", "store", "--device", "cpu"])
    except SystemExit as done:
        left = done.code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert "plain" in out or (left == 2 and not (here / "store").exists())
