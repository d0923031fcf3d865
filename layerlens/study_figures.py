"""A study's figures: scores over axes and epochs, mean CKA, the geometry plane, grids, what freezing costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.analysis.results import SimilarityMatrix
from layerlens.errors import DataError, LayerlensError, ShapeError, check_known
from layerlens.experiments.ablation import FreezeEffect, freeze_effects
from layerlens.experiments.results import Interval, Line, StudyResult
from layerlens.experiments.study import Drawing, axis_name
from layerlens.figures import _COLOURS, _SCORES, _legend, _style, heatmap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLACK = "#000000"  # what others are compared with
_PALETTE = tuple(colour for colour in _COLOURS if colour != _BLACK)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_DASHES = ("-", "--", ":", "-.")
_MOST_MAPS = 20  # a baseline and eight layers with and without stop-gradient fit
_MOST_LOOKS = len(_PALETTE) * len(_MARKERS)
_LOG_FROM = 20.0  # numbers that span more get a logarithmic axis
_WORDS = {"stop_gradient": "stop-gradient", "train_samples": "training samples", "labels": "share of labels"}


@dataclass(frozen=True)
class _Group:
    """Settings that are one line: of one arm, with the same `values` of the axes that tell lines apart.

    `points` are its settings by their place on the axis that is drawn; a single one has no place where it lacks it.
    """

    label: str
    arm: str
    baseline: bool
    values: dict[str, Any]
    points: tuple[tuple[Any, Line], ...]
    placed: bool

    @property
    def family(self) -> str:
        """The same for a setting with and without stop-gradient."""
        return repr((self.arm, {k: v for k, v in self.values.items() if k != "stop_gradient"}))


def sweep(
    result: StudyResult,
    *,
    metric: str = "probe",
    x: str = "layer",
    lines: Sequence[str] = (),
    arms: Sequence[str] = (),
    data: str = "",
    ax: Axes | None = None,
) -> Axes:
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
    import matplotlib.pyplot as plt

    _check_axes(result, x, *lines)
    groups = _groups(_lines(result, metric, arms, data), lines, x)
    placed = [group for group in groups if group.placed]
    if not placed:
        raise DataError(f"no finished run of {result.name!r} that is drawn has the axis {x!r}")
    ruler = _ruler([[value for value, _ in group.points] for group in placed])
    looks, bands = _looks_of(groups), len(groups) - len(placed)
    entries = len(groups) + 4 * bands  # a legend inside would lie on the bands, so it stands beside
    with _style():
        size = _size(min(entries, max(len(groups), 5)), 1.6 + 0.42 * len(ruler.ticks) if ruler.text else 0)
        axes = ax or plt.subplots(figsize=size, layout="constrained")[1]
        for group, look in zip(groups, looks, strict=True):
            if not group.placed:
                _band(axes, group, look, marked=bands > 1)
        for k, group in enumerate(placed):
            points = sorted((ruler.place(value, k, len(placed)), line.score) for value, line in group.points)
            look = looks[groups.index(group)]
            _with_bars(axes, points, group.label, {**look, "linestyle": "none"} if x == "arm" else look)
        ruler.apply(axes)
        axes.set(xlabel=_words(x), ylabel=_quantity(metric, data))
        _within(axes, metric)
        _legend(axes, entries)
    return axes


def over_epochs(
    result: StudyResult,
    *,
    metric: str = "probe",
    lines: Sequence[str] = (),
    arms: Sequence[str] = (),
    data: str = "",
    ax: Axes | None = None,
) -> Axes:
    """A score of each setting over its kept checkpoints, with Student's intervals over seeds as bands.

    Args:
        result: Of the study.
        metric: A score.
        lines: Axes that the labels name; all that vary by default.
        arms: Which are drawn; all but the starts by default.
        data: Other data that were scored.
        ax: Where to draw.

    Raises:
        ShapeError, UnknownNameError, DataError: As for `sweep`.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    _check_axes(result, *lines)
    groups = _groups(_lines(result, metric, arms, data), lines)
    curves = _curves(result, metric, data)
    shade = 0.15 if len(groups) < 6 else 0.07
    with _style():
        axes = ax or plt.subplots(figsize=_size(len(groups)), layout="constrained")[1]
        for group, look in zip(groups, _looks_of(groups), strict=True):
            curve = curves[_key(group.points[0][1])]
            means, low, high = _columns(curve.values())
            axes.plot(list(curve), means, label=group.label, ms=4, lw=1.3, zorder=2 + group.baseline, **look)
            axes.fill_between(list(curve), low, high, color=look["color"], alpha=shade, lw=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.set(xlabel="epoch", ylabel=_quantity(metric, data))
        _within(axes, metric)
        _legend(axes, len(groups))
    return axes


def similarity(result: StudyResult, *, arms: Sequence[str] = (), columns: int = 4) -> Figure:
    """Mean CKA over seeds: the untrained baseline, then the last checkpoint of every setting, on one scale.

    Args:
        result: Of the study.
        arms: Which are drawn; all but the starts by default.
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
    seeds = sorted({kept["seeds"] for kept in result.similarity})
    with _style():
        across, down = min(columns, len(maps)), -(-len(maps) // columns)
        count = max(len(m.layers) for m in maps.values())
        side = min(1.5 + 0.11 * count, 3.6)
        figure, cells = plt.subplots(
            down, across, figsize=(side * across + 1.4, (side + 0.2) * down + 0.5), layout="constrained", squeeze=False
        )
        alike = len({m.layers for m in maps.values()}) == 1
        for place, (axes, (title, matrix)) in enumerate(zip(cells.flat, maps.items(), strict=False)):
            heatmap(matrix, title=fill(title, int(12 * side)), ax=axes, colorbar=False)
            for text in list(axes.texts):
                text.remove()  # numbers would not be legible at this size
            below = not alike or place + across >= len(maps)
            beside = not alike or place % across == 0
            axes.set_xticks(range(len(matrix.layers)), matrix.layers if below else [""] * len(matrix.layers))
            axes.set_yticks(range(len(matrix.layers)), matrix.layers if beside else [""] * len(matrix.layers))
        for axes in list(cells.flat)[len(maps) :]:
            axes.set_visible(False)
        many = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
        figure.colorbar(
            cells[0][0].images[0], ax=list(cells.flat), shrink=0.9 if down == 1 else 0.6,
            label="CKA" if seeds == [1] else f"CKA, mean of {many} seeds",
        )  # fmt: skip
    return figure


def geometry(
    result: StudyResult, *, arms: Sequence[str] = (), split: str = "both", data: str = "", ax: Axes | None = None
) -> Axes:
    """Alignment against uniformity, mean over seeds, an arrow from each kept epoch to the next; lower left is better.

    Args:
        result: Of the study.
        arms: Which are drawn; all but the starts by default.
        split: `train`, `test`, or `both`: then the training split's arrows are dotted and its marks small.
        data: Other data that were scored.
        ax: Where to draw.

    Raises:
        ShapeError, UnknownNameError, DataError: As for `sweep`.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    check_known("split", split, ("both", "train", "test"))
    splits = ("test", "train") if split == "both" else (split,)
    groups = _groups(_lines(result, f"alignment_{splits[0]}", arms, data), ())
    epochs: dict[int, None] = {}
    with _style():
        height = max(3.8, 0.18 * len(groups) + 0.9)
        axes = ax or plt.subplots(figsize=(4.6 + 1.8 * (len(groups) > 4), height), layout="constrained")[1]
        looks = _looks_of(groups)
        for part in splits:
            small = part == "train" and split == "both"
            paths = [_curves(result, f"{name}_{part}", data) for name in ("alignment", "uniformity")]
            for group, look in zip(groups, looks, strict=True):
                rows, columns = (path.get(_key(group.points[0][1]), {}) for path in paths)
                kept = [epoch for epoch in rows if epoch in columns]
                points = [(columns[epoch].mean, rows[epoch].mean) for epoch in kept]
                epochs |= dict.fromkeys(kept)
                _trajectory(axes, points, {**look, "linestyle": ":" if small else "-"}, 3 if small else 5)
        handles = [
            Line2D([], [], label=group.label, ms=5, **{**look, "linestyle": "none"})
            for group, look in zip(groups, looks, strict=True)
        ]
        if split == "both":
            grey: dict[str, Any] = {"color": "0.35", "marker": "o"}
            handles += [
                Line2D([], [], label="test", ms=5, ls="-", **grey), Line2D([], [], label="train", ms=3, ls=":", **grey)
            ]  # fmt: skip
        where = "" if split == "both" else f", {split}"
        axes.set(xlabel=f"uniformity{where} (lower is better)", ylabel=f"alignment{where} (lower is better)")
        if data:
            axes.set_title(f"on {data}")
        axes.margins(0.1)
        beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(handles) > 4 else {}
        title = _epochs(sorted(epochs))
        axes.legend(handles=handles, frameon=False, title=title, title_fontsize=8, alignment="left", **beside)
    return axes


def grid(
    result: StudyResult,
    *,
    metric: str = "probe",
    x: str,
    rows: str | Sequence[str],
    arms: Sequence[str] = (),
    data: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Means of a score of the last checkpoints, one axis against another, with half of Student's intervals.

    The best cell of each row has a frame; grey means no run. Settings that have only one of the two axes get a row or
    a column under their arm's name; those that have neither stand in the title.

    Args:
        result: Of the study.
        metric: A score; bright is better.
        x: Axis along the columns.
        rows: Axis along the rows, or several whose combinations are the rows.
        arms: Which are drawn; all but the starts by default.
        data: Other data that were scored.
        ax: Where to draw.

    Raises:
        ShapeError: Several settings would share a cell.
        UnknownNameError, DataError: As for `sweep`.
    """
    import matplotlib.pyplot as plt

    downward = (rows,) if isinstance(rows, str) else tuple(rows)
    _check_axes(result, x, *downward)
    cells, beside = _cells(_lines(result, metric, arms, data), x, downward)
    across, down = _ordered([column for _, column in cells]), _ordered([row for row, _ in cells])
    means = np.full((len(down), len(across)), np.nan)
    for (row, column), line in cells.items():
        means[down.index(row), across.index(column)] = line.score.mean
    low_is_better = _lower_is_better(metric)
    with _style():
        size = (2.4 + 0.72 * len(across), max(2.8, 1.3 + 0.46 * len(down)))
        axes = ax or plt.subplots(figsize=size, layout="constrained")[1]
        colours = plt.get_cmap("viridis_r" if low_is_better else "viridis").with_extremes(bad="0.75")
        image = axes.imshow(np.ma.masked_invalid(means), cmap=colours, aspect="auto")
        for (row, column), line in cells.items():
            _write_cell(axes, image, across.index(column), down.index(row), line.score)
        for place, values in enumerate(means):
            best = np.nanargmin(values) if low_is_better else np.nanargmax(values)
            _frame(axes, int(best), place)
        for keys, divide in ((across, axes.axvline), (down, axes.axhline)):
            split = sum(_is_axis(key) for key in keys)
            if 0 < split < len(keys):
                divide(split - 0.5, color="white", lw=5)
        names = [_tick(key) for key in across]
        axes.set_xticks(range(len(across)), names)
        if _long(names, size[0] - 2.4):
            plt.setp(axes.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(down)), [_tick(key) for key in down])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel=_words(x), ylabel=", ".join(_words(axis) for axis in downward))
        axes.set_title("\n".join(f"{label}: {_number(line.score)}" for label, line in beside), fontsize=8)
        axes.figure.colorbar(image, ax=axes, label=_quantity(metric, data))
    return axes


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
    with _style():
        count = max(len(effect.before) for effect in effects)
        size = ((1.1 + 0.4 * max(count, 3)) * len(effects) + 0.8, 3.2)
        figure, panels = plt.subplots(1, len(effects), figsize=size, layout="constrained", sharey=True, squeeze=False)
        for axes, effect in zip(panels[0], effects, strict=True):
            _freeze_panel(axes, effect)
        first = panels[0][0]
        first.set_ylabel(f"gain over the unfrozen run:\n{_quantity(metric, '')}")
        if metric in _SCORES:
            low, high = first.get_ylim()
            first.set_ylim(max(low, -1.0), min(high, 1.0))  # an interval of two seeds may reach beyond
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
    metric, arms = drawing.metric, drawing.arms
    if drawing.kind == "similarity":
        if drawing.transfer:
            raise DataError("similarity is measured on the run's own data only; leave out transfer")
        return similarity(result, arms=arms)
    if drawing.kind == "freeze":
        return freeze_costs(result, metric)
    data = _other_data(result, arms) if drawing.transfer else ""
    if drawing.kind == "geometry":
        return geometry(result, arms=arms, data=data)
    if drawing.kind == "epochs":
        return over_epochs(result, metric=metric, lines=drawing.lines, arms=arms, data=data)
    if drawing.kind == "sweep":
        return sweep(result, metric=metric, x=drawing.x, lines=drawing.lines, arms=arms, data=data)
    if not drawing.lines:
        raise ShapeError("a grid needs its rows; set lines to the name of an axis")
    return grid(result, metric=metric, x=drawing.x, rows=drawing.lines, arms=arms, data=data)


def _other_data(result: StudyResult, arms: Sequence[str]) -> str:
    """The first data that the arms drawn were scored on besides their own."""
    wanted = _wanted(result, arms)
    for run in result.runs:
        if run["arm"] in wanted and (others := [data for data in run["scores"] if data]):
            return str(others[0])
    raise DataError(f"no finished run of {', '.join(wanted)} was scored on other data; set transfer of these arms")


def _wanted(result: StudyResult, arms: Sequence[str]) -> list[str]:
    known = [*(arm["name"] for arm in result.study.get("arms", ())), *(run["arm"] for run in result.runs)]
    known = list(dict.fromkeys((*known, *result.study.get("starts", ()))))
    for arm in arms:
        check_known("arm", arm, known)
    return list(arms) or [arm for arm in known if arm not in result.study.get("starts", ())]


def _check_axes(result: StudyResult, *names: str) -> None:
    study = result.study
    planned = [study.get("axes", {}), *(arm.get("axes", {}) for arm in study.get("arms", ()))]
    known = [axis_name(field) for axes in planned for field in axes]
    known += [name for run in result.runs for name in run["values"]]
    for name in names:
        check_known("axis", name, dict.fromkeys((*known, "arm")))


def _lines(result: StudyResult, metric: str, arms: Sequence[str], data: str) -> list[Line]:
    """The settings that are drawn."""
    if not result.runs:
        raise DataError(f"no run of {result.name!r} has finished yet")
    wanted = _wanted(result, arms)
    if data:
        check_known("data", data, dict.fromkeys(d for run in result.runs for d in run["scores"] if d))
    found = [line for line in result.lines(metric, data=data) if line.arm in wanted]
    if not found:
        where = f"on {data}" if data else "on its own data"
        raise DataError(f"no finished run of {', '.join(wanted)} in {result.name!r} has {metric!r} {where}")
    return found


def _key(line: Line) -> str:
    return repr((line.arm, line.values))


def _curves(result: StudyResult, metric: str, data: str) -> dict[str, dict[int, Interval]]:
    """Of each setting the score at each kept epoch."""
    epochs = sorted({row["epoch"] for run in result.runs for row in run["scores"].get(data, ())})
    curves: dict[str, dict[int, Interval]] = {}
    for epoch in epochs:
        for line in result.lines(metric, epoch=epoch, data=data):
            curves.setdefault(_key(line), {})[epoch] = line.score
    return curves


def _axes_of(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(axis for line in lines for axis in line.values))


def _varying(lines: Sequence[Line]) -> list[str]:
    """Axes of which the settings have more than one value."""
    return [a for a in _axes_of(lines) if len({repr(line.values[a]) for line in lines if a in line.values}) > 1]


def _groups(found: Sequence[Line], lines: Sequence[str], x: str = "") -> list[_Group]:
    """Settings as lines of a figure, in the order of the study."""
    axes = [axis for axis in lines if axis not in ("arm", x)] or [a for a in _varying(found) if a != x]
    if set(lines) == {"arm"}:
        axes = []
    named = "arm" in lines or len({line.arm for line in found if not line.baseline}) > 1
    kept: dict[str, list[tuple[Any, Line]]] = {}
    for line in found:
        arm = "" if _is_place(line, x) else line.arm
        place = line.arm if _is_place(line, x) else line.values.get(x)
        kept.setdefault(repr((arm, _shown(line, axes))), []).append((place, line))
    groups = []
    for points in kept.values():
        _refuse_same_place(points)
        first, shown = points[0][1], _shown(points[0][1], axes)
        words = [_say(axis, value) for axis, value in shown.items()]
        along = _is_place(first, x)
        name = [first.arm] if (named or first.baseline or not words) and not along else []
        groups.append(
            _Group(
                label=", ".join([*name, *words]) or "_arms", arm="" if along else first.arm, baseline=first.baseline,
                values=shown, points=tuple(points), placed=along or x in first.values,
            )
        )  # fmt: skip
    return groups


def _shown(line: Line, axes: Sequence[str]) -> dict[str, Any]:
    return {axis: line.values[axis] for axis in axes if axis in line.values}


def _is_place(line: Line, x: str) -> bool:
    """Whether its arm is its place along the axis; baselines stay horizontal lines."""
    return x == "arm" and not line.baseline


def _refuse_same_place(points: Sequence[tuple[Any, Line]]) -> None:
    seen: dict[str, Line] = {}
    for place, line in points:
        other = seen.setdefault(repr(place), line)
        if other is not line:
            differ = [a for a in _axes_of([line, other]) if repr(line.values.get(a)) != repr(other.values.get(a))]
            what = f"differ in {', '.join(differ)}" if differ else f"are of {other.arm!r} and {line.arm!r}"
            raise ShapeError(
                f"settings of {line.arm!r} that {what} would be one point; tell them apart by "
                f"{', '.join(differ) or 'arm'}, or name fewer arms"
            )


def _words(axis: str) -> str:
    return _WORDS.get(axis, axis.replace("_", " "))


def _say(axis: str, value: Any) -> str:
    """A value in the field's words: `stop`, `layer4`, `rate 0.5`."""
    if axis == "stop_gradient" and isinstance(value, bool):
        return "stop" if value else "no stop"
    return value if isinstance(value, str) else f"{_words(axis)} {_plain(value)}"


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(_plain(one) for one in value)
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _quantity(metric: str, data: str) -> str:
    name = _SCORES.get(metric, metric.replace("_", ", "))
    gap = "\n" if len(name) + len(data) > 38 else " "  # longer than a figure is high
    name = f"{name},{gap}on {data}" if data else name
    return f"{name} (lower is better)" if _lower_is_better(metric) else name


def _lower_is_better(metric: str) -> bool:
    return metric.startswith(("alignment", "uniformity"))


def _looks_of(groups: Sequence[_Group]) -> list[dict[str, Any]]:
    """Baselines black and dashed; the others by colour and marker, without stop-gradient dashed and open."""
    families = list(dict.fromkeys(group.family for group in groups if not group.baseline))
    if len(families) > _MOST_LOOKS:
        raise ShapeError(f"{len(families)} lines can't be told apart; allowed: {_MOST_LOOKS}. Name fewer arms")
    stops = any("stop_gradient" in group.values for group in groups)
    looks, baselines = [], 0
    for group in groups:
        if group.baseline:
            shape = _MARKERS[baselines % len(_MARKERS)]
            look = {"color": _BLACK, "marker": shape, "linestyle": _DASHES[1 + baselines % 3]}
            baselines += 1
        else:
            k = families.index(group.family)
            marker = _MARKERS[(k + k // 24) % len(_MARKERS)]  # 24 steps bring the same colour and marker together
            dash = "-" if stops else _DASHES[k // len(_PALETTE) % len(_DASHES)]
            look = {"color": _PALETTE[k % len(_PALETTE)], "marker": marker, "linestyle": dash}
            if group.values.get("stop_gradient") is False:
                look |= {"linestyle": "--", "markerfacecolor": "white"}
        looks.append(look)
    return looks


@dataclass(frozen=True)
class _Ruler:
    """Places along an axis: `ticks` by label, and a `step` to the side that is small beside their distances."""

    ticks: dict[str, float]
    text: bool
    log: bool
    step: float

    def place(self, value: Any, k: int, count: int) -> float:
        """Where line k of several is drawn, so that their intervals stand side by side."""
        at = self.ticks[_plain(value)] + (k - (count - 1) / 2) * self.step * min(1.0, 5 / count)
        return float(10**at) if self.log else at

    def apply(self, axes: Axes) -> None:
        """Ticks at the values, as many as have room."""
        places = list(self.ticks.values())
        if self.log:
            axes.set_xscale("log")
            axes.minorticks_off()
        room, kept = 0.0 if self.text else 0.07 * (places[-1] - places[0]), [0]
        for k in range(1, len(places)):
            if places[k] - places[kept[-1]] >= room:
                kept.append(k)
        names = [list(self.ticks)[k] for k in kept]
        axes.set_xticks([10 ** places[k] if self.log else places[k] for k in kept], names)
        if self.text:
            axes.set_xlim(-0.5, len(places) - 0.5)
            figure: Any = axes.figure
            if _long(names, axes.get_position().width * figure.get_figwidth()):
                for label in axes.get_xticklabels():
                    label.set(rotation=45, ha="right", rotation_mode="anchor")


def _ruler(sequences: Sequence[Sequence[Any]]) -> _Ruler:
    """Numbers to scale, anything else in the order of the study."""
    values = list(chain.from_iterable(sequences))
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        numbers = sorted({_plain(value): float(value) for value in values}.items(), key=lambda item: item[1])
        log = numbers[0][1] > 0 and numbers[-1][1] / numbers[0][1] > _LOG_FROM
        ticks = {name: math.log10(number) if log else number for name, number in numbers}
        gaps = np.diff(list(ticks.values()))
        step = min(0.12 * gaps.min(), 0.012 * gaps.sum()) if len(gaps) else 0.02
        return _Ruler(ticks=ticks, text=False, log=log, step=float(step))
    names = _merged([[_plain(value) for value in sequence] for sequence in sequences])
    return _Ruler(ticks={name: float(k) for k, name in enumerate(names)}, text=True, log=False, step=0.12)


def _merged(sequences: Sequence[Sequence[str]]) -> list[str]:
    """One order that keeps those of all sequences where they agree.

    >>> _merged([["layer1", "layer3"], ["layer1", "layer2", "layer3"]])
    ['layer1', 'layer2', 'layer3']
    """
    merged: list[str] = []
    for sequence in sequences:
        after = 0
        for name in sequence:
            if name not in merged:
                merged.insert(after, name)
            after = merged.index(name) + 1
    return merged


def _long(names: Sequence[str], width_in: float) -> bool:
    """Whether tick labels would run into each other."""
    return max(len(name) for name in names) * 0.075 > width_in / len(names)


def _size(entries: int, least: float = 0) -> tuple[float, float]:
    """Of a figure whose legend stands beside it from five entries on, in inches."""
    beside = 2.0 if entries > 4 else 0.0
    return max(4.4, least) + beside, max(3.2, 0.18 * entries + 0.4)


def _columns(found: Iterable[Interval]) -> tuple[list[float], list[float], list[float]]:
    kept = list(found)
    return [i.mean for i in kept], [i.low for i in kept], [i.high for i in kept]


def _with_bars(axes: Axes, points: Sequence[tuple[float, Interval]], label: str, look: dict[str, Any]) -> None:
    means, low, high = (np.array(column) for column in _columns(score for _, score in points))
    reach = None if np.isnan(low).all() else [means - low, high - means]
    axes.errorbar(
        [place for place, _ in points], means, yerr=reach, label=label, capsize=2, elinewidth=0.9, lw=1.3, ms=5, **look
    )


def _band(axes: Axes, group: _Group, look: dict[str, Any], *, marked: bool) -> None:
    """A setting without the axis; its mark stands at the right end where there are several."""
    score, style = group.points[0][1].score, dict(look)
    if not group.baseline and style["linestyle"] == "-":
        style["linestyle"] = "-."
    style |= {"markevery": [1], "clip_on": False} if marked else {"marker": ""}
    axes.axhline(score.mean, lw=1.3, ms=5, label=group.label, zorder=1.5, **style)
    if math.isfinite(score.low):
        axes.axhspan(score.low, score.high, color=look["color"], alpha=0.12, lw=0, zorder=0.5)


def _within(axes: Axes, metric: str) -> None:
    """No room beyond what an accuracy can be; the interval of two seeds may reach there."""
    if metric in _SCORES:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02), min(high, 1.02))


def _trajectory(axes: Axes, points: Sequence[tuple[float, float]], look: dict[str, Any], size: float) -> None:
    across, up = [p[0] for p in points], [p[1] for p in points]
    axes.plot(across, up, ms=size, **{**look, "linestyle": "none"})
    for k in range(len(points) - 1):
        arrow = {
            "arrowstyle": "->", "color": look["color"], "lw": 1.1, "linestyle": look["linestyle"], "shrinkA": size / 2,
            "shrinkB": size / 2,
        }  # fmt: skip
        axes.annotate("", points[k + 1], points[k], arrowprops=arrow)


def _epochs(epochs: Sequence[int]) -> str:
    names = [str(epoch) for epoch in epochs]
    return "epochs " + ", ".join(names if len(names) <= 6 else [*names[:3], "…", names[-1]])


def _maps(result: StudyResult, arms: Sequence[str]) -> dict[str, SimilarityMatrix]:
    """Mean matrices by title, the untrained one first."""
    wanted = _wanted(result, arms)
    baselines = {run["arm"] for run in result.runs if run["baseline"]}
    found = [kept for kept in result.similarity if kept["arm"] in wanted]
    if not found:
        raise DataError(f"no finished run of {', '.join(wanted)} in {result.name!r} has CKA; set measure.cka")
    if len(found) > _MOST_MAPS:
        raise ShapeError(f"{len(found)} heat maps; allowed: {_MOST_MAPS}. Name the arms to draw: {', '.join(wanted)}")
    fresh = [kept for kept in result.similarity if kept["start"] is None and kept["arm"] in {*baselines, *wanted}]
    fresh.sort(key=lambda kept: kept["arm"] not in baselines)
    maps = {"untrained": SimilarityMatrix.from_dict(fresh[0]["first"])} if fresh else {}
    none = Interval(mean=math.nan, low=math.nan, high=math.nan, n=0)
    settings = [
        Line(arm=kept["arm"], values=kept["values"], baseline=kept["arm"] in baselines, score=none, gain=None)
        for kept in found
    ]
    for group, kept in zip(_groups(settings, ()), found, strict=True):
        maps[group.label] = SimilarityMatrix.from_dict(kept["last"])
    return maps


_Key = tuple[str, Any]  # axis and value, or ("arm", name) where the axis is lacking


def _cells(
    found: Sequence[Line], x: str, rows: Sequence[str]
) -> tuple[dict[tuple[tuple[_Key, ...], tuple[_Key, ...]], Line], list[tuple[str, Line]]]:
    """Settings by row and column, and those that have neither axis."""
    cells: dict[tuple[tuple[_Key, ...], tuple[_Key, ...]], Line] = {}
    neither = []
    for line in found:
        column, row = _keys(line, [x]), _keys(line, rows)
        if not column and not _is_axis(row):
            neither.append(line)
            continue
        at = row or (("arm", line.arm),), column or (("arm", line.arm),)
        if at in cells:
            _refuse_same_place([(at, cells[at]), (at, line)])
        cells[at] = line
    if not cells:
        raise DataError(f"no finished run that is drawn has the axes {x!r} or {', '.join(rows)}")
    return cells, [(group.label, line) for group in _groups(neither, ()) for _, line in group.points]


def _keys(line: Line, axes: Sequence[str]) -> tuple[_Key, ...]:
    have = {"arm": line.arm, **line.values}
    return tuple((axis, _hashable(have[axis])) for axis in axes if axis in have)


def _hashable(value: Any) -> Any:
    return tuple(_hashable(one) for one in value) if isinstance(value, list) else value


def _ordered(keys: Sequence[tuple[_Key, ...]]) -> list[tuple[_Key, ...]]:
    """Numbers by size, text in the order of the study, arms that lack the axis last."""
    different = dict.fromkeys(keys)
    values, arms = ([key for key in different if _is_axis(key) == wanted] for wanted in (True, False))
    if all(isinstance(key[0][1], int | float) and len(key) == 1 for key in values):
        values.sort(key=lambda key: key[0][1])
    return [*values, *arms]


def _is_axis(key: tuple[_Key, ...]) -> bool:
    """Whether it has a value of an axis, and not the name of an arm alone."""
    return any(axis != "arm" for axis, _ in key)


def _tick(key: tuple[_Key, ...]) -> str:
    if len(key) == 1 and not isinstance(key[0][1], bool):
        return _plain(key[0][1])
    return ", ".join(_say(axis, value) for axis, value in key)


def _number(score: Interval) -> str:
    reach = score.high - score.mean
    return f"{score.mean:.3f}" + (f" ±{reach:.3f}" if math.isfinite(reach) else "")


def _write_cell(axes: Axes, image: Any, column: int, row: int, score: Interval) -> None:
    red, green, blue, _ = image.cmap(image.norm(score.mean))
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
    text = _number(score).replace(" ", "\n")
    axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")


def _frame(axes: Axes, column: int, row: int) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=4, foreground="white")]  # black is lost on the dark end of the scale
    frame = Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, ec="black", lw=2, path_effects=halo)
    axes.add_patch(frame)


def _freeze_panel(axes: Axes, effect: FreezeEffect) -> None:
    layers = list(effect.before)
    axes.axhline(0, color="0.4", lw=0.8, zorder=0.5)
    for k, (part, costs) in enumerate((("before", effect.before), ("after", effect.after))):
        points = [(place + 0.16 * (k - 0.5), costs[layer]) for place, layer in enumerate(layers)]
        look = {"color": _PALETTE[k], "marker": _MARKERS[k], "linestyle": _DASHES[k]}
        _with_bars(axes, points, part, look)
    axes.set_xticks(range(len(layers)), layers, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set(title=f"from {effect.start} weights", xlabel="target")
