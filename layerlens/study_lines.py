"""Which settings of a study are which lines of a figure: their labels, their looks, their places along an axis."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from layerlens.errors import DataError, ShapeError, check_known
from layerlens.experiments.results import Interval, Line, StudyResult, lower_is_better
from layerlens.experiments.study import axis_name
from layerlens.figures import _COLOURS, _score_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLACK = "#000000"  # what others are compared with
_PALETTE = tuple(colour for colour in _COLOURS if colour != _BLACK)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_DASHES = ("-", "--", ":", "-.")
_MOST_LOOKS = len(_PALETTE) * len(_MARKERS)
_LOG_FROM = 20.0  # numbers that span more get a logarithmic axis
_WORDS = {"stop_gradient": "stop-gradient", "train_samples": "training samples", "labels": "share of labels"}

Key = tuple[bool, float, str]  # of a row or column: whether the axis is lacking, a number, the label
Cells = dict[tuple[Key, Key], Line]  # by row and column
Curve = dict[int, Interval]  # by epoch
Look = dict[str, Any]  # arguments of a matplotlib line


@dataclass(frozen=True, kw_only=True)
class Group:
    """Settings that are one line: of one arm, with the same values of the axes that tell lines apart.

    `points` are its settings by their place on the axis that is drawn; a single one has no place where it lacks it.
    """

    label: str
    look: Look
    points: tuple[tuple[Any, Line], ...]
    placed: bool

    @property
    def first(self) -> Line:
        """Its first setting, the only one where nothing is drawn along an axis."""
        return self.points[0][1]


def wanted_arms(result: StudyResult, arms: Sequence[str]) -> list[str]:
    """The named arms; all but the starts by default."""
    starts = result.study.get("starts", ())
    planned = [arm["name"] for arm in result.study.get("arms", ())]
    known = list(dict.fromkeys((*planned, *(run["arm"] for run in result.runs), *starts)))
    for arm in arms:
        check_known("arm", arm, known)
    return list(arms) or [arm for arm in known if arm not in starts]


def chosen(result: StudyResult, metric: str, arms: Sequence[str], data: str, axes: Sequence[str] = ()) -> list[Line]:
    """The settings that are drawn, after a check of every name; an axis is known before a run of it has finished."""
    planned = [result.study.get("axes", {}), *(arm.get("axes", {}) for arm in result.study.get("arms", ()))]
    known = [axis_name(field) for fields in planned for field in fields]
    known += [name for run in result.runs for name in run["values"]]
    for axis in axes:
        check_known("axis", axis, dict.fromkeys((*known, "arm")))
    if not result.runs:
        raise DataError(f"no run of {result.name!r} has finished yet")
    wanted = wanted_arms(result, arms)
    if data:
        check_known("data", data, dict.fromkeys(d for run in result.runs for d in run["scores"] if d))
    found = [line for line in result.lines(metric, data=data) if line.arm in wanted]
    if not found:
        where = f"on {data}" if data else "on its own data"
        raise DataError(f"no finished run of {', '.join(wanted)} in {result.name!r} has {metric!r} {where}")
    return found


def groups(found: Sequence[Line], lines: Sequence[str] = (), x: str = "") -> list[Group]:
    """Settings as lines of a figure, in the order of the study.

    With `x="arm"` its arm is the place of a setting; baselines stay lines across.
    """
    axes = [axis for axis in lines if axis not in ("arm", x)] or [axis for axis in _varying(found) if axis != x]
    if set(lines) == {"arm"}:
        axes = []
    kept: dict[str, tuple[Line, list[tuple[Any, Line]]]] = {}  # by what tells them from other lines
    for line in found:
        along = x == "arm" and not line.baseline
        values = {axis: line.values[axis] for axis in axes if axis in line.values}
        told = replace(line, arm="" if along else line.arm, values=values)
        kept.setdefault(_setting(told), (told, []))[1].append((line.arm if along else line.values.get(x), line))
    for _, points in kept.values():
        _refuse_same_place(points)
    named = "arm" in lines or len({line.arm for line in found if not line.baseline}) > 1
    return [
        Group(label=_label(told, named), look=style, points=tuple(p), placed=not told.arm or x in p[0][1].values)
        for (told, p), style in zip(kept.values(), _looks_of([told for told, _ in kept.values()]), strict=True)
    ]


def curves(drawn: Sequence[Group], result: StudyResult, metric: str, data: str) -> Iterator[tuple[Group, Curve]]:
    """Each line with its score at each kept epoch."""
    found: dict[str, Curve] = {}
    for epoch in sorted({row["epoch"] for run in result.runs for row in run["scores"].get(data, ())}):
        for line in result.lines(metric, epoch=epoch, data=data):
            found.setdefault(_setting(line), {})[epoch] = line.score
    for group in drawn:
        yield group, found.get(_setting(group.first), {})


def cells(found: Sequence[Line], x: str, rows: Sequence[str]) -> tuple[Cells, list[tuple[str, Line]]]:
    """Settings by row and column of a table, and with their labels those that have neither axis."""
    places: Cells = {}
    neither = []
    for line in found:
        at = _key(line, rows), _key(line, [x])
        if at[0][0] and x not in ("arm", *line.values):
            neither.append(line)
        else:
            _refuse_same_place([(at, places.setdefault(at, line)), (at, line)])
    if not places:
        raise DataError(f"no finished run that is drawn has the axes {x!r} or {', '.join(rows)}")
    return places, [(group.label, line) for group in groups(neither) for _, line in group.points]


def _setting(line: Line) -> str:
    return repr((line.arm, line.values))


def _key(line: Line, axes: Sequence[str]) -> Key:
    """Numbers in order of size, text in the order of the study, arms that lack the axes last."""
    have = {"arm": line.arm, **line.values}
    found = [axis for axis in axes if axis in have]
    if not set(found) - {"arm"}:
        return True, 0.0, line.arm
    value, alone = have[found[0]], len(found) == 1
    size = float(value) if alone and isinstance(value, int | float) else 0.0
    label = plain(value) if alone and not isinstance(value, bool) else ", ".join(say(a, have[a]) for a in found)
    return False, size, label


def _refuse_same_place(points: Sequence[tuple[Any, Line]]) -> None:
    seen: dict[str, Line] = {}
    for place, line in points:
        other = seen.setdefault(repr(place), line)
        if other is not line:
            axes = dict.fromkeys((*line.values, *other.values))
            differ = [axis for axis in axes if repr(line.values.get(axis)) != repr(other.values.get(axis))]
            what = f"differ in {', '.join(differ)}" if differ else f"are of {other.arm!r} and {line.arm!r}"
            raise ShapeError(
                f"settings of {line.arm!r} that {what} would be one point; tell them apart by "
                f"{', '.join(differ) or 'arm'}, or name fewer arms"
            )


def _varying(lines: Sequence[Line]) -> list[str]:
    """Axes of which the settings have more than one value."""
    axes = dict.fromkeys(axis for line in lines for axis in line.values)
    return [axis for axis in axes if len({repr(line.values[axis]) for line in lines if axis in line.values}) > 1]


def _label(told: Line, named: bool) -> str:
    says = [say(axis, value) for axis, value in told.values.items()]
    name = [told.arm] if told.arm and (named or told.baseline or not says) else []
    return ", ".join([*name, *says]) or "_arms"


def words(axis: str) -> str:
    """An axis in words."""
    return _WORDS.get(axis, axis.replace("_", " "))


def say(axis: str, value: Any) -> str:
    """A value in the field's words.

    >>> say("stop_gradient", True), say("layer", "layer4"), say("rate", 0.5)
    ('stop', 'layer4', 'rate 0.5')
    """
    if axis == "stop_gradient" and isinstance(value, bool):
        return "stop" if value else "no stop"
    return value if isinstance(value, str) else f"{words(axis)} {plain(value)}"


def plain(value: Any) -> str:
    """A value without its axis, as at a tick."""
    if isinstance(value, list | tuple):
        return "+".join(plain(one) for one in value)
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def quantity(metric: str, data: str = "") -> str:
    """A score in words."""
    name = _score_name(metric)
    gap = "\n" if len(name) + len(data) > 38 else " "  # longer than a figure is high
    name = f"{name},{gap}on {data}" if data else name
    return f"{name} (lower is better)" if lower_is_better(metric) else name


def look(k: int) -> Look:
    """Of the k-th line; 48 differ in colour or marker."""
    shape = _MARKERS[(k + k // 24) % len(_MARKERS)]  # 24 steps bring the same colour and marker together
    dash = _DASHES[k // len(_PALETTE) % len(_DASHES)]
    return {"color": _PALETTE[k % len(_PALETTE)], "marker": shape, "linestyle": dash}


def _looks_of(told: Sequence[Line]) -> Iterator[Look]:
    """Baselines black and dashed; the others by colour and marker, without stop-gradient dashed and open."""
    families = [repr((line.arm, {k: v for k, v in line.values.items() if k != "stop_gradient"})) for line in told]
    different = list(dict.fromkeys(family for family, line in zip(families, told, strict=True) if not line.baseline))
    if len(different) > _MOST_LOOKS:
        raise ShapeError(f"{len(different)} lines can't be told apart; allowed: {_MOST_LOOKS}. Name fewer arms")
    solid = {"linestyle": "-"} if any("stop_gradient" in line.values for line in told) else {}
    baselines = count()
    for family, line in zip(families, told, strict=True):
        if line.baseline:
            k = next(baselines)
            yield {"color": _BLACK, "marker": _MARKERS[k % len(_MARKERS)], "linestyle": _DASHES[1 + k % 3]}
        elif line.values.get("stop_gradient") is False:
            yield {**look(different.index(family)), "linestyle": "--", "markerfacecolor": "white"}
        else:
            yield {**look(different.index(family)), **solid}


@dataclass(frozen=True)
class Ruler:
    """Places along an axis: `ticks` by label, and a `step` to the side that is small beside their distances."""

    ticks: dict[str, float]
    text: bool
    log: bool
    step: float

    def place(self, value: Any, k: int, count: int) -> float:
        """Where line k of several is drawn, so that their intervals stand side by side."""
        at = self.ticks[plain(value)] + (k - (count - 1) / 2) * self.step * min(1.0, 5 / count)
        return float(10**at) if self.log else at

    def apply(self, axes: Axes) -> None:
        """Ticks at the values, as many as have room."""
        if self.log:
            axes.set_xscale("log")
            axes.minorticks_off()
        places = list(self.ticks.values())
        room, kept = 0.0 if self.text else 0.07 * (places[-1] - places[0]), places[:1]
        for place in places[1:]:
            if place - kept[-1] >= room:
                kept.append(place)
        names = [name for name, place in self.ticks.items() if place in kept]
        axes.set_xticks([10**place if self.log else place for place in kept], names)
        if self.text:
            axes.set_xlim(-0.5, len(places) - 0.5)
            slant(axes, names, axes.bbox.width / axes.figure.dpi)


def ruler(sequences: Sequence[Sequence[Any]]) -> Ruler:
    """Numbers to scale, anything else in the order of the study."""
    values = [value for sequence in sequences for value in sequence]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        numbers = {plain(value): float(value) for value in sorted(values)}
        log = min(values) > 0 and max(values) / min(values) > _LOG_FROM
        ticks = {name: math.log10(number) if log else number for name, number in numbers.items()}
        gaps = np.diff(list(ticks.values()))
        step = min(0.12 * gaps.min(), 0.012 * gaps.sum()) if len(gaps) else 0.02
        return Ruler(ticks=ticks, text=False, log=log, step=float(step))
    names = _merged([[plain(value) for value in sequence] for sequence in sequences])
    return Ruler(ticks={name: float(k) for k, name in enumerate(names)}, text=True, log=False, step=0.12)


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


def slant(axes: Axes, names: Sequence[str], width_in: float) -> None:
    """Turn the tick labels along x where they would run into each other."""
    if max(len(name) for name in names) * 0.075 > width_in / len(names):
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
