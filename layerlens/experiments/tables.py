"""A study's table for a paper, and the sentences that sum it up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from layerlens.errors import DataError
from layerlens.experiments.ablation import advice_outcome, freeze_effects
from layerlens.experiments.results import Interval, StudyResult, lower_is_better

_ESCAPES = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "[": "{[}", "]": "{]}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


def latex(result: StudyResult, metric: str = "probe", *, epoch: int | None = None, data: str = "") -> str:
    r"""The table as LaTeX with booktabs: mean and half of the 95 % interval, gain over the baseline, in points.

    Args:
        result: Of a study.
        metric, epoch, data: As for `StudyResult.lines`.

    Scores in [0, 1] are printed as percentages; alignment and uniformity as they are.
    """
    lines = result.lines(metric, epoch=epoch, data=data)
    axes = list(dict.fromkeys(name for line in lines for name in line.values))
    factor, places = (1, 3) if lower_is_better(metric) else (100, 1)
    head = ["arm", *axes, "n", metric, "gain"]
    rows = [
        [
            _escape(line.arm), *(_escape(_word(line.values.get(name))) for name in axes), str(line.score.n),
            _number(line.score, factor, places), _number(line.gain, factor, places, sign=True),
        ]
        for line in lines
    ]  # fmt: skip
    body = [" & ".join(row) + r" \\" for row in rows]
    columns = "l" * (1 + len(axes)) + "r" * 3
    parts = [
        f"% {result.name}: mean over n seeds and half of the 95 % interval; needs the package booktabs",
        rf"\begin{{tabular}}{{{columns}}}", r"\toprule", " & ".join(map(_escape, head)) + r" \\", r"\midrule",
        *body, r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def sentences(result: StudyResult, metric: str = "probe") -> Iterator[str]:
    """What the table says about layers, where the study asked: freezing, and the advice from CKA."""
    with suppress(DataError):  # no such ablation, or not enough of it yet
        yield from map(str, freeze_effects(result, metric))
    swept = {run["arm"] for run in result.runs if {"layer", "stop_gradient"} == set(run["values"])}
    plain = [run["arm"] for run in result.runs if run["baseline"] and not run["values"] and run["start"] is None]
    if len(swept) == 1 and plain:
        with suppress(DataError):
            yield str(advice_outcome(result, metric, arm=swept.pop(), baseline=plain[0]))


def _number(found: Interval | None, factor: float, places: int, *, sign: bool = False) -> str:
    if found is None:
        return "--"
    form = f"{'+' if sign else ''}.{places}f"
    mean = format(factor * found.mean, form)
    reach = "" if found.low != found.low else f" \\pm {factor * (found.mean - found.low):.{places}f}"
    return f"${mean}{reach}$"


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "--" if value is None else str(value)


def _escape(cell: str) -> str:
    return "".join(_ESCAPES.get(c, c) for c in cell)
