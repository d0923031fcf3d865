"""The main job as a user meets it: started, interrupted, started again, then read in the notebook."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "analysis_notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a `demo` in it that was interrupted once and then ran to its end."""
    place = tmp_path_factory.mktemp("place")
    words = [sys.executable, "-m", "layerlens.cli", "demo"]
    first = subprocess.Popen(words, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = place / "demo" / "simclr-digits" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=300)
    assert first.returncode == 130, err
    assert out == ""
    assert "the same command goes on where it stopped" in err
    assert "Traceback" not in err
    done_before = len(metrics.read_text().splitlines())
    assert done_before >= 1
    second = subprocess.run(words, cwd=place, capture_output=True, text=True, check=True)
    (place / "stdout").write_text(second.stdout)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))
    return place


def test_demo_prints_the_recommendation_and_the_path_of_the_report(workplace):
    out = (workplace / "stdout").read_text()
    assert out.startswith(("supported: ", "no supported choice: "))
    assert "report: demo/report.html" in out
    page = (workplace / "demo" / "report.html").read_text()
    assert all(word in page for word in ("untrained", "Regions", "k-NN", "uniformity"))


def test_demo_learns(workplace):
    scores = json.loads((workplace / "demo" / "report.json").read_text())["runs"][0]["scores"]
    first, last = scores.values()
    assert last["knn"] > first["knn"] + 0.1
    assert last["probe"] > 0.95


def test_demo_keeps_the_random_initialisation(workplace):
    assert (workplace / "demo" / "simclr-digits" / "checkpoints" / "epoch-0000.safetensors").exists()


def test_a_finished_demo_is_not_trained_again(workplace):
    result = workplace / "demo" / "simclr-digits" / "result.json"
    before = result.stat().st_mtime_ns
    words = [sys.executable, "-m", "layerlens.cli", "demo", "--json"]
    done = subprocess.run(words, cwd=workplace, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["type"] == "Recommendation"
    assert result.stat().st_mtime_ns == before


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_committed_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert cell.cell_type != "code" or (not cell.outputs and "def " not in cell.source)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(path, workplace, monkeypatch):
    folder = workplace / "analysis_notebooks"
    folder.mkdir(exist_ok=True)
    if not (workplace / "figures").exists():
        (workplace / "figures").symlink_to(ROOT / "figures")
    program = (
        "import nbformat, sys\nfrom nbclient import NotebookClient\n"
        "book = nbformat.read(sys.argv[1], as_version=4)\n"
        "place = {'metadata': {'path': sys.argv[2]}}\n"
        "NotebookClient(book, timeout=3000, kernel_name='python3', resources=place).execute()\n"
        "print(sum(bool(c.get('outputs')) for c in book.cells))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(path), str(folder)],
        capture_output=True, text=True, env={**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.strip()) >= 6
