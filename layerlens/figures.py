"""Results as figures; beside `study_figures` the only module that imports matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.analysis.measures import MEASURES
from layerlens.analysis.regions import RegionSet
from layerlens.analysis.results import CrossSimilarity, FilmStrip, Geometry, LayerProfile, Result, SimilarityMatrix
from layerlens.errors import ShapeError
from layerlens.files import write_atomically, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from layerlens.recommendation import Target
    from layerlens.trajectory import Trajectory

FORMATS = ("png", "svg", "pdf")
_STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "figure.dpi": 110, "savefig.dpi": 200, "svg.hashsalt": "layerlens", "svg.fonttype": "path",
    "pdf.fonttype": 42, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito
_TARGET = "#E41A1C"
_SCORES = {
    "knn": "k-NN accuracy, test", "knn10": "10-NN accuracy, test", "probe": "logistic regression, test accuracy",
    "linear": "linear probe, test accuracy", "top1": "classifier, test accuracy",
}  # fmt: skip


def heatmap(
    matrix: SimilarityMatrix | CrossSimilarity,
    *,
    regions: RegionSet | None = None,
    targets: Sequence[Target] = (),
    title: str | None = None,
    ax: Axes | None = None,
    colorbar: bool = True,
) -> Axes:
    """Similarity of all pairs of layers; black frames are regions, red marks are recommended targets.

    A red triangle on the diagonal points right at a target with stop-gradient and left at one without. Layer order
    is the network's; the origin is at the lower left, as in the paper's figures. The scale is the measure's range
    from no similarity on, [0, 1] for CKA, so that figures compare; bright is alike, also for a distance; grey means
    no value.

    Args:
        matrix: What to draw, of one model or two.
        regions: Supported ones get a solid frame, others a dotted one.
        targets: From a `Recommendation`.
        title: Above the axes.
        ax: Where to draw; a new figure by default.
        colorbar: Whether to add one.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    with _style():
        if isinstance(matrix, CrossSimilarity) and (regions or targets):
            raise ShapeError("regions and targets belong to the matrix of one model, not to one of two")
        rows, columns = len(matrix.rows), len(matrix.columns)
        high, wide = (min(3.2 + 0.22 * count, 9.0) for count in (rows, columns))
        axes = ax or plt.subplots(figsize=(wide + 0.7, high), layout="constrained")[1]
        low, top, colours = _scale(matrix)
        image = axes.imshow(np.ma.masked_invalid(matrix.values), vmin=low, vmax=top, cmap=colours, origin="lower")
        axes.set_xticks(range(columns), [f"{name}  {i}" for i, name in enumerate(matrix.columns)], rotation=90)
        axes.set_yticks(range(rows), [f"{name}  {i}" for i, name in enumerate(matrix.rows)])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if max(rows, columns) <= 12:
            _annotate(axes, matrix)
        if isinstance(matrix, CrossSimilarity):
            axes.set(xlabel=matrix.labels[1], ylabel=matrix.labels[0])
        for region in regions.regions if regions else ():
            first, last = (matrix.rows.index(region.layers[k]) for k in (0, -1))
            size = last - first + 1
            line = "-" if region.supported else ":"
            frame = Rectangle((first - 0.5, first - 0.5), size, size, fill=False, ec="black", lw=1.8, ls=line)
            frame.set_clip_on(False)
            axes.add_patch(frame)
        for target in targets:
            place = matrix.rows.index(target.layer)
            _mark(axes, place, target)
            for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
                labels[place].set_color(_TARGET)
        axes.set_title(title if title is not None else f"{_name_of(matrix)}, {matrix.samples} samples")
        if colorbar:
            axes.figure.colorbar(image, ax=axes, shrink=0.8, label=_quantity(matrix))
    return axes


def heatmaps(
    matrices: Mapping[str, SimilarityMatrix],
    *,
    regions: Mapping[str, RegionSet] | None = None,
    targets: Mapping[str, Sequence[Target]] | None = None,
) -> Figure:
    """Several heat maps side by side on one scale, with one colour bar.

    Args:
        matrices: By title.
        regions, targets: By the same titles, where there are any.
    """
    import matplotlib.pyplot as plt

    if not matrices:
        raise ShapeError("no matrix to draw")
    with _style():
        count = max(len(m.layers) for m in matrices.values())
        side = min(2.9 + 0.16 * count, 6.0)
        figure, row = plt.subplots(
            1, len(matrices), figsize=(side * len(matrices) + 0.6, side), layout="constrained", squeeze=False
        )
        for axes, (title, matrix) in zip(row[0], matrices.items(), strict=True):
            heatmap(
                matrix, regions=(regions or {}).get(title), targets=(targets or {}).get(title, ()), title=title,
                ax=axes, colorbar=False,
            )  # fmt: skip
        first = next(iter(matrices.values()))
        figure.colorbar(row[0][0].images[0], ax=list(row[0]), shrink=0.8, label=_quantity(first))
    return figure


def film_strip(strip: FilmStrip, *, targets: Sequence[Sequence[Target]] = (), columns: int = 6) -> Figure:
    """The matrices of a run's checkpoints, first to last, on one scale.

    Args:
        strip: From `pipeline.film_strip`.
        targets: Of each frame, marked as in `heatmap`.
        columns: Frames per row.
    """
    import matplotlib.pyplot as plt

    if targets and len(targets) != len(strip.frames):
        raise ShapeError(f"targets of {len(targets)} frames for {len(strip.frames)}; give one sequence for each")

    if not strip.frames or columns < 1:
        raise ShapeError("no frame to draw" if not strip.frames else f"columns={columns}; allowed: 1 or more")
    with _style():
        count = len(strip.frames)
        across = min(columns, count)
        down = -(-count // across)
        layers = len(strip.frames[0].layers)
        side = min(2.0 + 0.1 * layers, 4.0)
        figure, grid = plt.subplots(
            down, across, figsize=(side * across + 1.6, side * down + 0.8), layout="constrained", squeeze=False
        )
        for place, axes in enumerate(grid.flat):
            if place >= count:
                axes.set_visible(False)
                continue
            matrix, (low, top, colours) = strip.frames[place], _scale(strip.frames[0])
            axes.imshow(np.ma.masked_invalid(matrix.values), vmin=low, vmax=top, cmap=colours, origin="lower")
            axes.set_title(strip.labels[place])
            for target in targets[place] if targets else ():
                _mark(axes, strip.frames[place].layers.index(target.layer), target)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            named = place % across == 0
            axes.set_yticks(range(layers), matrix.layers if named else [""] * layers)
            axes.set_xticks(range(layers), strip.frames[0].layers if place + across >= count else [""] * layers)
            axes.tick_params(axis="x", rotation=90)
        figure.suptitle(f"{_name_of(strip.frames[0])}, {strip.frames[0].samples} samples")
        figure.colorbar(grid[0][0].images[0], ax=list(grid.flat), shrink=0.8, label=_quantity(strip.frames[0]))
    return figure


def geometry_plane(trajectories: Mapping[str, Sequence[Geometry]], *, ax: Axes | None = None) -> Axes:
    """Alignment against uniformity, an arrow from each checkpoint to the next; lower left is better.

    Args:
        trajectories: By label, checkpoints in the order of training.
        ax: Where to draw.
    """
    import matplotlib.pyplot as plt

    with _style():
        axes = ax or plt.subplots(figsize=(4.6, 3.8), layout="constrained")[1]
        for (label, points), colour in zip(trajectories.items(), _cycle(), strict=False):
            points = [p for p in points if np.isfinite(p.uniformity)]
            x, y = [p.uniformity for p in points], [p.alignment for p in points]
            axes.plot(x, y, "o", ms=4, color=colour, label=label)
            for k in range(len(x) - 1):
                arrow = {"arrowstyle": "->", "color": colour, "lw": 1.2, "shrinkA": 2, "shrinkB": 2}
                axes.annotate("", (x[k + 1], y[k + 1]), (x[k], y[k]), arrowprops=arrow)
            for k in {0, len(points) - 1}:
                if points and points[k].epoch is not None:
                    axes.annotate(f"epoch {points[k].epoch}", (x[k], y[k]), textcoords="offset points", xytext=(6, 5))
        axes.set(xlabel="uniformity (lower is better)", ylabel="alignment (lower is better)")
        axes.margins(0.18)
        axes.legend(frameon=False)
    return axes


def layer_profile(profiles: Mapping[str, LayerProfile], *, ax: Axes | None = None) -> Axes:
    """One number per layer, in network order, with its interval as a band.

    Args:
        profiles: By label; all over the same layers.
        ax: Where to draw.
    """
    import matplotlib.pyplot as plt

    names = {p.layers for p in profiles.values()}
    if len(names) != 1:
        raise ShapeError("the profiles must be over the same layers, and at least one")
    layers = names.pop()
    with _style():
        axes = ax or plt.subplots(figsize=(2.4 + 0.35 * len(layers), 3.4), layout="constrained")[1]
        place = np.arange(len(layers))
        for (label, profile), colour in zip(profiles.items(), _cycle(), strict=False):
            axes.plot(place, profile.values, "o-", ms=4, color=colour, label=label)
            axes.fill_between(place, profile.low, profile.high, color=colour, alpha=0.2, lw=0)
        axes.set_xticks(place, layers, rotation=90 if len(layers) > 8 else 45)
        first = next(iter(profiles.values()))
        if MEASURES[first.measure].low >= 0:
            axes.set_ylim(bottom=0)
        axes.set_ylabel(first.measure.replace("_", " "))
        axes.legend(frameon=False)
    return axes


def training_curves(
    runs: Mapping[str, Iterable[Mapping[str, Any]]], *, key: str = "loss", ax: Axes | None = None
) -> Axes:
    """A logged number over the epochs of one run or several.

    Args:
        runs: Metrics lines by label, as `metrics.jsonl` holds them.
        key: `loss`, `knn`, `dev` or `learning_rate`.
        ax: Where to draw.
    """
    import matplotlib.pyplot as plt

    with _style():
        axes = ax or plt.subplots(figsize=(4.4 if len(runs) < 5 else 6.0, 3.2), layout="constrained")[1]
        for (label, lines), look in zip(runs.items(), _looks(), strict=False):
            points = [(line["epoch"], line[key]) for line in lines if line.get(key) is not None]
            axes.plot(*zip(*points, strict=True) if points else ([], []), label=label, **look)
        names = {
            "loss": "training loss (nats)", "knn": "k-NN accuracy, held-out", "learning_rate": "learning rate",
            "dev": "Spearman correlation, dev pairs",
        }  # fmt: skip
        axes.set(xlabel="epoch", ylabel=names.get(key, key))
        _legend(axes, len(runs))
    return axes


def score_curves(trajectories: Mapping[str, Trajectory], *, key: str = "knn", ax: Axes | None = None) -> Axes:
    """A score of each kept checkpoint over the epochs of one run or several.

    Args:
        trajectories: By label.
        key: A column of `Trajectory.rows`, such as `knn`, `probe`, `linear` or `alignment_test`.
        ax: Where to draw.
    """
    import matplotlib.pyplot as plt

    with _style():
        axes = ax or plt.subplots(figsize=(4.4 if len(trajectories) < 5 else 6.0, 3.2), layout="constrained")[1]
        for (label, trajectory), look in zip(trajectories.items(), _looks(), strict=False):
            points = [(row["epoch"], row[key]) for row in trajectory.rows if row.get(key) is not None]
            axes.plot(*zip(*points, strict=True) if points else ([], []), marker="o", ms=3, label=label, **look)
        axes.set(xlabel="epoch", ylabel=_score_name(key))
        _legend(axes, len(trajectories))
    return axes


def ratio_areas(lines: Sequence[Mapping[str, Any]], *, window: int = 1, ax: Axes | None = None) -> Axes:
    """AdaLASE's ratios over the steps of a run, stacked: the width of a band is the share of steps augmented there.

    Args:
        lines: As `ratios.jsonl` holds them: step, arm, and a ratio for each arm, in the order of the layers.
        window: Steps that each drawn point averages.
        ax: Where to draw.

    Raises:
        ShapeError: No line, or a window below 1.
    """
    import matplotlib.pyplot as plt

    if not lines or window < 1:
        raise ShapeError(f"{len(lines)} lines of ratios, window={window}; needed: at least one of each")
    arms = [name for name in lines[0] if name not in ("step", "arm")]
    values = np.array([[line[arm] for arm in arms] for line in lines])  # (steps, arms)
    groups = np.array_split(np.arange(len(lines)), max(len(lines) // window, 1))
    steps = [lines[int(rows[-1])]["step"] for rows in groups]
    with _style():
        axes = ax or plt.subplots(figsize=(5.4, 3.2), layout="constrained")[1]
        colours = plt.get_cmap("viridis")(np.linspace(0.05, 0.95, len(arms)))
        axes.stackplot(steps, np.array([values[rows].mean(0) for rows in groups]).T, labels=arms, colors=colours)
        axes.set(xlabel="step", ylabel="ratio", ylim=(0, 1), xlim=(steps[0], max(steps[-1], steps[0] + 1)))
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return axes


def save_figure(
    drawn: Axes | Figure,
    stem: str | Path,
    source: Mapping[str, Result] | Any,
    formats: Sequence[str] = FORMATS,
    *,
    facts: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a figure in every format, and beside it the JSON that it was drawn from; the figure is closed.

    Args:
        drawn: What a function of this module returned.
        stem: Path without an ending.
        source: The result, or results by label.
        formats: Of `png`, `svg`, `pdf`.
        facts: What the result was made from, kept beside it in the JSON.

    Raises:
        RunFolderError: The folder can't be written.
    """
    import matplotlib.pyplot as plt

    figure: Any = getattr(drawn, "figure", drawn)
    stem, stamps = Path(stem), {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
    content = source.to_dict() if isinstance(source, Result) else _by_label(source)
    content = content if facts is None else {**content, "facts": dict(facts)}
    written = []
    try:
        for ending in formats:
            path, drawing = stem.with_name(f"{stem.name}.{ending}"), io.BytesIO()
            with _style():
                figure.savefig(drawing, format=ending, metadata=stamps[ending])
            write_atomically(path, drawing.getvalue())
            written.append(path)
    finally:
        plt.close(figure)
    path = stem.with_name(f"{stem.name}.json")
    write_json(path, content)
    return [*written, path]


def _score_name(key: str) -> str:
    """A score in words."""
    if key == "mean" or key.startswith(("STS", "SICK")):
        return f"{'STS' if key == 'mean' else key}, Spearman correlation"
    return _SCORES.get(key, key.replace("_", ", "))


def _mark(axes: Axes, place: int, target: Target) -> None:
    """A triangle on the diagonal, that points right with stop-gradient and left without."""
    marker = ">" if target.stop_gradient else "<"
    axes.plot(place, place, marker=marker, ms=9, mfc=_TARGET, mec="white", mew=0.9, ls="")


def _by_label(source: Any) -> Any:
    if isinstance(source, Result):
        return source.to_dict()
    if isinstance(source, Mapping):
        return {str(key): _by_label(value) for key, value in source.items()}
    if isinstance(source, list | tuple):
        return [_by_label(value) for value in source]
    return source


def _scale(matrix: SimilarityMatrix | CrossSimilarity) -> tuple[float, float, Any]:
    """Limits and colours from the measure: bright is alike."""
    import matplotlib.pyplot as plt

    measure = MEASURES[matrix.measure]
    colours = plt.get_cmap("viridis" if measure.higher_is_alike else "viridis_r").with_extremes(bad="0.75")
    return max(measure.low, 0.0), measure.high, colours


def _name_of(matrix: SimilarityMatrix | CrossSimilarity) -> str:
    if matrix.measure == "cka":
        return f"{matrix.options.get('kernel', 'linear')} CKA"
    return matrix.measure.replace("_", " ")


def _quantity(matrix: SimilarityMatrix | CrossSimilarity) -> str:
    measure = MEASURES[matrix.measure]
    name = "CKA" if matrix.measure == "cka" else matrix.measure.replace("_", " ")
    name = "procrustes angle, rad" if matrix.measure == "procrustes" else name
    return name if measure.higher_is_alike else f"{name} (higher is {measure.higher})"


def _annotate(axes: Axes, matrix: SimilarityMatrix | CrossSimilarity) -> None:
    small = 7 if len(matrix.rows) <= 8 else 5.5
    (low, top, _), alike = _scale(matrix), MEASURES[matrix.measure].higher_is_alike
    for i, j in np.ndindex(*matrix.values.shape):
        value = matrix.values[i, j]
        if (i != j or isinstance(matrix, CrossSimilarity)) and np.isfinite(value):
            text = f"{value:.2f}".replace("0.", ".", 1)
            share = (value - low) / (top - low)
            dark = (share if alike else 1 - share) < 0.6
            axes.text(j, i, text, ha="center", va="center", fontsize=small, color="white" if dark else "black")


def _looks() -> Iterator[dict[str, Any]]:
    """Colours, solid first, then dashed, so that more lines than colours stay apart."""
    for style in ("-", "--", ":"):
        for colour in _COLOURS:
            yield {"color": colour, "linestyle": style}
    yield from ({"color": colour, "linestyle": "-."} for colour in _cycle())


def _legend(axes: Axes, lines: int) -> None:
    """Inside while it is small, else beside the axes."""
    beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if lines > 4 else {}
    axes.legend(frameon=False, **beside)


def _cycle() -> Iterator[str]:
    while True:
        yield from _COLOURS


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        yield
