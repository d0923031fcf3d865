"""A study's figures: scores over axes and epochs, mean CKA, the geometry plane, grids, what freezing costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens import study_lines
from layerlens.analysis.results import SimilarityMatrix
from layerlens.errors import DataError, LayerlensError, ShapeError, check_known
from layerlens.experiments.ablation import freeze_effects
from layerlens.experiments.results import Interval, Line, StudyResult, lower_is_better
from layerlens.experiments.study import Drawing
from layerlens.figures import _SCORES, _legend, _style, heatmap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_MAPS = 20  # a baseline and eight layers with and without stop-gradient fit


@_style()
def sweep(
    result: StudyResult, *, metric: str = "probe", x: str = "layer", lines: Sequence[str] = (),
    arms: Sequence[str] = (), data: str = "", ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """A score of the last checkpoints over one axis of a study, with Student's intervals over seeds.

    Settings that lack the axis are horizontal lines with their interval as a band; baselines are black.

    Args:
        result: Of the study.
        metric: A score, as for `StudyResult.lines`.
        x: Short name of the axis, or `arm`. Text keeps the order of the study; numbers are to scale, on a logarithmic
            axis if they span more than a factor of 20.
        lines: Axes of whose values each combination is a line, besides the arm; all that vary by default. With `arm`
            among them every label names the arm.
        arms: Which are drawn; all but the starts by default.
        data: Other data that were scored.
        ax: Where to draw.

    Raises:
        ShapeError: `lines` leaves settings together that differ, or there are too many lines.
        UnknownNameError: No such metric, axis, arm or data.
        DataError: No finished run to draw.
    """
    groups = study_lines.groups(study_lines.chosen(result, metric, arms, data, [x, *lines]), lines, x)
    placed = [group for group in groups if group.placed]
    if not placed:
        raise DataError(f"no finished run of {result.name!r} that is drawn has the axis {x!r}")
    ruler = study_lines.ruler([[value for value, _ in group.points] for group in placed])
    bands = len(groups) - len(placed)
    entries = len(groups) + 4 * bands  # a legend inside would lie on the bands, so it stands beside
    least = 1.6 + 0.42 * len(ruler.ticks) if ruler.text else 0.0
    axes = ax or _new_axes(*_size(min(entries, max(len(groups), 5)), least))
    for group in groups:
        if not group.placed:
            _band(axes, group, marked=bands > 1)
    for k, group in enumerate(placed):
        points = sorted((ruler.place(value, k, len(placed)), line.score) for value, line in group.points)
        _with_bars(axes, points, group.label, {**group.look, "linestyle": "none"} if x == "arm" else group.look)
    ruler.apply(axes)
    axes.set(xlabel=study_lines.words(x), ylabel=study_lines.quantity(metric, data))
    _within(axes, metric)
    _legend(axes, entries)
    return axes


@_style()
def over_epochs(
    result: StudyResult, *, metric: str = "probe", lines: Sequence[str] = (), arms: Sequence[str] = (), data: str = "",
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """A score of each setting over its kept checkpoints, with Student's intervals over seeds as bands.

    Args:
        result, metric, arms, data, ax: As for `sweep`.
        lines: Axes that the labels name; all that vary by default.

    Raises:
        ShapeError, UnknownNameError, DataError: As for `sweep`.
    """
    from matplotlib.ticker import MaxNLocator

    groups = study_lines.groups(study_lines.chosen(result, metric, arms, data, lines), lines)
    shade = 0.15 if len(groups) < 6 else 0.07
    axes = ax or _new_axes(*_size(len(groups)))
    for group, curve in study_lines.curves(groups, result, metric, data):
        epochs, scores = zip(*curve.items(), strict=True)
        means, low, high = _columns(scores)
        axes.plot(epochs, means, label=group.label, ms=4, lw=1.3, zorder=2 + group.first.baseline, **group.look)
        axes.fill_between(epochs, low, high, color=group.look["color"], alpha=shade, lw=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set(xlabel="epoch", ylabel=study_lines.quantity(metric, data))
    _within(axes, metric)
    _legend(axes, len(groups))
    return axes


@_style()
def similarity(result: StudyResult, *, arms: Sequence[str] = (), columns: int = 4) -> Figure:
    """Mean CKA over seeds: the untrained baseline, then the last checkpoint of every setting, on one scale.

    Args:
        result, arms: As for `sweep`.
        columns: Maps per row.

    Raises:
        ShapeError: More than 20 settings, or a wrong number of columns.
        UnknownNameError: No such arm.
        DataError: No CKA was measured.
    """
    import matplotlib.pyplot as plt

    if columns < 1:
        raise ShapeError(f"columns={columns}; allowed: 1 or more")
    maps = _maps(result, arms)
    across, down = min(columns, len(maps)), -(-len(maps) // columns)
    side = min(1.5 + 0.11 * max(len(m.layers) for m in maps.values()), 3.6)
    size = (side * across + 1.4, (side + 0.2) * down + 0.5)
    figure, cells = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    alike = len({m.layers for m in maps.values()}) == 1
    for place, (axes, (title, matrix)) in enumerate(zip(cells.flat, maps.items(), strict=False)):
        heatmap(matrix, title=fill(title, int(12 * side)), ax=axes, colorbar=False)
        for text in list(axes.texts):
            text.remove()  # numbers would not be legible at this size
        places, blank = range(len(matrix.layers)), [""] * len(matrix.layers)
        axes.set_xticks(places, blank if alike and place + across < len(maps) else matrix.layers)
        axes.set_yticks(places, blank if alike and place % across else matrix.layers)
    for axes in cells.flat[len(maps) :]:
        axes.set_visible(False)
    seeds = {kept["seeds"] for kept in result.similarity}
    many = " to ".join(str(count) for count in sorted({min(seeds), max(seeds)}))
    label = "CKA" if seeds == {1} else f"CKA, mean of {many} seeds"
    figure.colorbar(cells[0][0].images[0], ax=list(cells.flat), shrink=0.9 if down == 1 else 0.6, label=label)
    return figure


@_style()
def geometry(
    result: StudyResult, *, arms: Sequence[str] = (), split: str = "both", data: str = "", ax: Axes | None = None
) -> Axes:
    """Alignment against uniformity, mean over seeds, an arrow from each kept epoch to the next; lower left is better.

    Args:
        result, arms, data, ax: As for `sweep`.
        split: `train`, `test`, or `both`: then the training split's arrows are dotted and its marks small. Runs over
            sentences have one split, their dev pairs.

    Raises:
        ShapeError, UnknownNameError, DataError: As for `sweep`.
    """
    from matplotlib.lines import Line2D

    check_known("split", split, ("both", "train", "test"))
    measured = [part for part in ("test", "train") if f"alignment_{part}" in result.metrics()]
    both = split == "both" and len(measured) == 2
    splits = ("test", "train") if both else (measured or ["test"]) if split == "both" else [split]
    groups = study_lines.groups(study_lines.chosen(result, f"alignment_{splits[0]}", arms, data))
    axes = ax or _new_axes(4.6 + 1.8 * (len(groups) > 4), max(3.8, 0.18 * len(groups) + 0.9))
    epochs: set[int] = set()
    for part in splits:
        small = both and part == "train"
        rows, columns = (
            study_lines.curves(groups, result, f"{name}_{part}", data) for name in ("alignment", "uniformity")
        )
        for (group, up), (_, across) in zip(rows, columns, strict=True):
            points = {epoch: (across[epoch].mean, up[epoch].mean) for epoch in up if epoch in across}
            epochs |= points.keys()
            look = {**group.look, "linestyle": ":" if small else "-"}
            _trajectory(axes, list(points.values()), look, 3 if small else 5)
    handles = [Line2D([], [], label=group.label, ms=5, **{**group.look, "linestyle": "none"}) for group in groups]
    if both:
        for label, size, dash in (("test", 5, "-"), ("train", 3, ":")):
            handles.append(Line2D([], [], label=label, ms=size, ls=dash, color="0.35", marker="o"))
    where = "" if both else f", {splits[0]}"
    axes.set(xlabel=f"uniformity{where} (lower is better)", ylabel=f"alignment{where} (lower is better)")
    if data:
        axes.set_title(f"on {data}")
    axes.margins(0.1)
    beside: study_lines.Look = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(handles) > 4 else {}
    names = [str(epoch) for epoch in sorted(epochs)]
    title = "epochs " + ", ".join(names if len(names) <= 6 else [*names[:3], "…", names[-1]])
    axes.legend(handles=handles, frameon=False, title=title, title_fontsize=8, alignment="left", **beside)
    return axes


@_style()
def grid(
    result: StudyResult, *, metric: str = "probe", x: str, rows: str | Sequence[str], arms: Sequence[str] = (),
    data: str = "", ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Means of a score of the last checkpoints, one axis against another, with half of Student's intervals.

    The best cell of each row has a frame; grey means no run. Settings that have only one of the two axes get a row or
    a column under their arm's name; those that have neither stand in the title.

    Args:
        result, arms, data, ax: As for `sweep`.
        metric: A score; bright is better.
        x: Axis along the columns.
        rows: Axis along the rows, or several whose combinations are the rows.

    Raises:
        ShapeError: Several settings would share a cell.
        UnknownNameError, DataError: As for `sweep`.
    """
    downward = (rows,) if isinstance(rows, str) else tuple(rows)
    found = study_lines.chosen(result, metric, arms, data, [x, *downward])
    cells, beside = study_lines.cells(found, x, downward)
    down, across = (sorted(dict.fromkeys(keys), key=lambda key: key[:2]) for keys in zip(*cells, strict=True))
    places = {(down.index(row), across.index(column)): line.score for (row, column), line in cells.items()}
    means = np.full((len(down), len(across)), np.nan)
    for place, score in places.items():
        means[place] = score.mean
    low, width = lower_is_better(metric), 2.4 + 0.72 * len(across)
    axes = ax or _new_axes(width, max(2.8, 1.3 + 0.46 * len(down)))
    image = axes.imshow(np.ma.masked_invalid(means), cmap="viridis_r" if low else "viridis", aspect="auto")
    image.set_cmap(image.get_cmap().with_extremes(bad="0.75"))
    for place, score in places.items():
        _write_cell(axes, image, place, score)
    for row, best in enumerate(np.nanargmin(means, 1) if low else np.nanargmax(means, 1)):
        _frame(axes, int(best), row)
    for keys, divide in ((across, axes.axvline), (down, axes.axhline)):
        lacking = sum(key[0] for key in keys)
        if 0 < lacking < len(keys):
            divide(len(keys) - lacking - 0.5, color="white", lw=5)
    names = [label for _, _, label in across]
    axes.set_xticks(range(len(across)), names)
    study_lines.slant(axes, names, width - 2.4)
    axes.set_yticks(range(len(down)), [label for _, _, label in down])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=study_lines.words(x), ylabel=", ".join(study_lines.words(axis) for axis in downward))
    axes.set_title("\n".join(f"{label}: {_number(line.score)}" for label, line in beside), fontsize=8)
    axes.figure.colorbar(image, ax=axes, label=study_lines.quantity(metric, data))
    return axes


@_style()
def freeze_costs(result: StudyResult, metric: str = "probe") -> Figure:
    """What freezing before and after each target costs: the gain over the unfrozen run, one panel per start.

    Args:
        result: Of a study with the axes `part` and `layer`.
        metric: A score.

    Raises:
        DataError: As for `freeze_effects`.
    """
    import matplotlib.pyplot as plt

    effects = freeze_effects(result, metric)
    count = max(3, *(len(effect.before) for effect in effects))
    size = ((1.1 + 0.4 * count) * len(effects) + 0.8, 3.2)
    figure, panels = plt.subplots(1, len(effects), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, effect in zip(panels[0], effects, strict=True):
        axes.axhline(0, color="0.4", lw=0.8, zorder=0.5)
        for k, (part, dash) in enumerate((("before", "-"), ("after", "--"))):
            points = [(place + 0.16 * (k - 0.5), gain) for place, gain in enumerate(getattr(effect, part).values())]
            _with_bars(axes, points, part, {**study_lines.look(k), "linestyle": dash})
        axes.set_xticks(range(len(effect.before)), effect.before, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.5, len(effect.before) - 0.5)
        axes.set(title=f"from {effect.start} weights", xlabel="target")
    panels[0][0].set_ylabel(f"gain over the unfrozen run:\n{study_lines.quantity(metric)}")
    _within(panels[0][0], metric, -1.0, 1.0)
    panels[0][-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title="freeze")
    return figure


def draw(result: StudyResult, drawing: Drawing) -> Axes | Figure:
    """One figure of a study.

    Args:
        result: Of the study.
        drawing: What the study says about it. `x` of a grid are its columns and `lines` its rows; `transfer` takes the
            first other data that the arms drawn were scored on.

    Raises:
        LayerlensError: As for the function that draws it; the message starts with the drawing's name.
    """
    try:
        return _draw(result, drawing)
    except LayerlensError as error:
        raise type(error)(f"figure {drawing.name!r}: {error}") from error


def draw_all(result: StudyResult) -> dict[str, Axes | Figure]:
    """Every figure that the study asks for, by name.

    Raises:
        LayerlensError: One of them can't be drawn; the message starts with its name, and none stays open.
    """
    import matplotlib.pyplot as plt

    drawn: dict[str, Axes | Figure] = {}
    try:
        for content in result.study.get("figures", ()):
            drawing = Drawing.model_validate(content)
            drawn[drawing.name] = draw(result, drawing)
    except LayerlensError:
        for one in drawn.values():
            figure: Any = getattr(one, "figure", one)
            plt.close(figure)
        raise
    return drawn


def _draw(result: StudyResult, drawing: Drawing) -> Axes | Figure:
    kind, arms = drawing.kind, drawing.arms
    if kind == "similarity" and drawing.transfer:
        raise DataError("similarity is measured on the run's own data only; leave out transfer")
    if kind == "similarity":
        return similarity(result, arms=arms)
    if kind == "freeze":
        return freeze_costs(result, drawing.metric)
    data = _other_data(result, arms) if drawing.transfer else ""
    if kind == "geometry":
        return geometry(result, arms=arms, data=data)
    of: dict[str, Any] = {"metric": drawing.metric, "arms": arms, "data": data}
    if kind == "epochs":
        return over_epochs(result, lines=drawing.lines, **of)
    if kind == "sweep":
        return sweep(result, x=drawing.x, lines=drawing.lines, **of)
    if not drawing.lines:
        raise ShapeError("a grid needs its rows; set lines to the name of an axis")
    return grid(result, x=drawing.x, rows=drawing.lines, **of)


def _other_data(result: StudyResult, arms: Sequence[str]) -> str:
    """The first data that the arms drawn were scored on besides their own."""
    wanted = study_lines.wanted_arms(result, arms)
    others = [data for run in result.runs if run["arm"] in wanted for data in run["scores"] if data]
    if not others:
        raise DataError(f"no finished run of {', '.join(wanted)} was scored on other data; set transfer of these arms")
    return str(others[0])


def _maps(result: StudyResult, arms: Sequence[str]) -> dict[str, SimilarityMatrix]:
    """Mean matrices by title, the untrained one first."""
    wanted = study_lines.wanted_arms(result, arms)
    found = [kept for kept in result.similarity if kept["arm"] in wanted]
    if not found:
        raise DataError(f"no finished run of {', '.join(wanted)} in {result.name!r} has CKA; set measure.cka")
    if len(found) > _MOST_MAPS:
        raise ShapeError(f"{len(found)} heat maps; allowed: {_MOST_MAPS}. Name the arms to draw: {', '.join(wanted)}")
    baselines = {run["arm"] for run in result.runs if run["baseline"]}
    fresh = [kept for kept in result.similarity if kept["start"] is None and kept["arm"] in {*baselines, *wanted}]
    first = sorted(fresh, key=lambda kept: kept["arm"] not in baselines)[:1]
    none = Interval(mean=math.nan, low=math.nan, high=math.nan, n=0)
    settings = [
        Line(arm=kept["arm"], values=kept["values"], baseline=kept["arm"] in baselines, score=none, gain=None)
        for kept in found
    ]
    titles = ["untrained"] * len(first) + [group.label for group in study_lines.groups(settings)]
    contents = [*(kept["first"] for kept in first), *(kept["last"] for kept in found)]
    return {title: SimilarityMatrix.from_dict(content) for title, content in zip(titles, contents, strict=True)}


def _new_axes(width: float, height: float) -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _size(entries: int, least: float = 0) -> tuple[float, float]:
    """Of a figure whose legend stands beside it from five entries on, in inches."""
    beside = 2.0 if entries > 4 else 0.0
    return max(4.4, least) + beside, max(3.2, 0.18 * entries + 0.4)


def _columns(scores: Sequence[Interval]) -> Any:
    """Means, lower and upper ends, shape (3, scores)."""
    return np.array([(score.mean, score.low, score.high) for score in scores]).T


def _with_bars(axes: Axes, points: Sequence[tuple[float, Interval]], label: str, look: study_lines.Look) -> None:
    places, scores = zip(*points, strict=True)
    means, low, high = _columns(scores)
    reach = None if np.isnan(low).all() else [means - low, high - means]
    axes.errorbar(places, means, yerr=reach, label=label, capsize=2, elinewidth=0.9, lw=1.3, ms=5, **look)


def _band(axes: Axes, group: study_lines.Group, *, marked: bool) -> None:
    """A setting without the axis; its mark stands at the right end where there are several."""
    score, look = group.first.score, dict(group.look)
    if not group.first.baseline and look["linestyle"] == "-":
        look["linestyle"] = "-."
    look |= {"markevery": [1], "clip_on": False} if marked else {"marker": ""}
    axes.axhline(score.mean, lw=1.3, ms=5, label=group.label, zorder=1.5, **look)
    if math.isfinite(score.low):
        axes.axhspan(score.low, score.high, color=look["color"], alpha=0.12, lw=0, zorder=0.5)


def _within(axes: Axes, metric: str, least: float = -0.02, most: float = 1.02) -> None:
    """No room beyond what an accuracy can be; the interval of two seeds may reach there."""
    if metric in _SCORES:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, least), min(high, most))


def _trajectory(axes: Axes, points: Sequence[tuple[float, float]], look: study_lines.Look, size: float) -> None:
    axes.plot([x for x, _ in points], [y for _, y in points], ms=size, **{**look, "linestyle": "none"})
    arrow = {key: look[key] for key in ("color", "linestyle")}
    arrow |= {"arrowstyle": "->", "lw": 1.1, "shrinkA": size / 2, "shrinkB": size / 2}
    for start, end in pairwise(points):
        axes.annotate("", end, start, arrowprops=arrow)


def _number(score: Interval) -> str:
    reach = score.high - score.mean
    return f"{score.mean:.3f}" + (f" ±{reach:.3f}" if math.isfinite(reach) else "")


def _write_cell(axes: Axes, image: Any, place: tuple[int, int], score: Interval) -> None:
    red, green, blue, _ = image.cmap(image.norm(score.mean))
    colour = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"
    text = _number(score).replace(" ", "\n")
    axes.text(place[1], place[0], text, ha="center", va="center", fontsize=7, color=colour)


def _frame(axes: Axes, column: int, row: int) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=4, foreground="white")]  # black is lost on the dark end of the scale
    frame = Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, ec="black", lw=2, path_effects=halo)
    axes.add_patch(frame)
