"""Results of runs as one self-contained HTML page, Markdown and JSON, with the figures beside them."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from layerlens import figures
from layerlens.analysis.results import SCHEMA
from layerlens.errors import ShapeError
from layerlens.files import write_atomically, write_json
from layerlens.pipeline import RunAnalysis

_SCORES = {
    "knn": "k-NN (k = 200)",
    "knn10": "k-NN (k = 10)",
    "probe": "linear probe",
    "top1": "classifier",
    "svm": "SVM",
}


def write_report(runs: Sequence[RunAnalysis], folder: str | Path) -> Path:
    """Write `report.html`, `report.md`, `report.json` and `figures/` for one run or several side by side.

    Args:
        runs: At least one; their names must differ.
        folder: Where to; files of an earlier report there are replaced, each in one step.

    Returns:
        The path of the HTML page.

    Raises:
        ShapeError: No run, or two of the same name.
        RunFolderError: The folder can't be written.
    """
    if not runs:
        raise ShapeError("a report needs at least one run")
    names = [run.name for run in runs]
    if len(set(names)) != len(names):
        raise ShapeError(f"runs in one report need different folder names; got {names}")
    folder = Path(folder)
    drawn = {run.name: _draw_run(run, folder / "figures" / run.name) for run in runs}
    common = _draw_comparison(runs, folder / "figures") if len(runs) > 1 else {}
    write_json(folder / "report.json", {"type": "Report", "schema": SCHEMA, "runs": [run.to_dict() for run in runs]})
    write_atomically(folder / "report.md", _render("report.md.jinja", runs, drawn, common, folder).encode())
    write_atomically(folder / "report.html", _render("report.html.jinja", runs, drawn, common, folder).encode())
    return folder / "report.html"


def _draw_run(run: RunAnalysis, folder: Path) -> dict[str, Path]:
    """Every figure of one run; the SVG of each by name."""
    found = run.recommendation
    titles = ("untrained twin", run.after.label)
    ranks = dict(zip(titles, (run.before.effective_rank, run.after.effective_rank), strict=True))
    drawn: dict[str, tuple[Any, Any]] = {
        "similarity": (
            figures.heatmaps(
                dict(zip(titles, (run.before.cka, run.after.cka), strict=True)),
                regions={run.after.label: found.regions}, targets={run.after.label: found.targets},
            ),
            {"untrained twin": run.before.cka, run.after.label: run.after.cka, "recommendation": found},
        ),
        "geometry": (figures.geometry_plane({run.name: run.trajectory}), list(run.trajectory)),
        "effective_rank": (figures.layer_profile(ranks), ranks),
        "training": (figures.training_curves({run.name: run.metrics}), run.metrics),
    }  # fmt: skip
    for key in ("knn", "dev"):
        if any(line.get(key) is not None for line in run.metrics):
            drawn[key] = (figures.training_curves({run.name: run.metrics}, key=key), run.metrics)
    return {name: _svg(figures.save_figure(axes, folder / name, source)) for name, (axes, source) in drawn.items()}


def _draw_comparison(runs: Sequence[RunAnalysis], folder: Path) -> dict[str, Path]:
    """The figures that show several runs together."""
    matrices = {run.name: run.after.cka for run in runs}
    drawn: dict[str, tuple[Any, Any]] = {
        "all_similarity": (
            figures.heatmaps(
                matrices, regions={r.name: r.recommendation.regions for r in runs},
                targets={r.name: r.recommendation.targets for r in runs},
            ),
            matrices,
        ),
        "all_geometry": (
            figures.geometry_plane({r.name: r.trajectory for r in runs}), {r.name: list(r.trajectory) for r in runs},
        ),
        "all_training": (figures.training_curves({r.name: r.metrics for r in runs}), {r.name: r.metrics for r in runs}),
    }  # fmt: skip
    return {name: _svg(figures.save_figure(axes, folder / name, source)) for name, (axes, source) in drawn.items()}


def _svg(written: Sequence[Path]) -> Path:
    return next(path for path in written if path.suffix == ".svg")


def _render(
    template: str, runs: Sequence[RunAnalysis], drawn: dict[str, dict[str, Path]], common: dict[str, Path], folder: Path
) -> str:
    from jinja2 import Environment, StrictUndefined

    text = resources.files("layerlens").joinpath("templates", template).read_text(encoding="utf-8")
    page = Environment(
        autoescape=template.endswith("html.jinja"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.filters["embed"] = lambda path: "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
    page.filters["score"] = lambda name: _SCORES.get(name, name)
    page.filters["beside"] = lambda path: path.relative_to(folder).as_posix()
    page.filters["settings"] = lambda config: json.dumps(_shown(config), indent=1)
    return page.from_string(text).render(runs=runs, drawn=drawn, common=common)


def _shown(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}
