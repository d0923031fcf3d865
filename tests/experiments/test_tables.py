"""The LaTeX table: what is printed by hand, whole rows whatever the names hold, points only where they apply."""

from __future__ import annotations

import re
from typing import Any

import pytest

from layerlens.errors import UnknownNameError
from layerlens.experiments.results import StudyResult
from layerlens.experiments.tables import latex


def run(arm: str, seed: int, *, baseline: bool = False, start: str | None = None, axes: Any = None, **scores: Any):
    return {
        "key": f"{arm}{seed}{axes}", "arm": arm, "baseline": baseline, "start": start, "values": axes or {},
        "seed": seed, "data": "digits", "wall_s": 1.0,
        "scores": {"": [{"epoch": 0, "probe": 0.0}, {"epoch": 2, **scores}]},
        "advice": [], "environment": {},
    }  # fmt: skip


def study(*runs: dict[str, Any]) -> StudyResult:
    return StudyResult(name="s-1", study={"starts": {}}, runs=runs, similarity=(), failed={}, missing=0, environment={})


def rows(text: str) -> list[list[str]]:
    """Cells of each row, the head first; what a LaTeX of booktabs would make of it."""
    lines = text.splitlines()
    assert lines[0].startswith("% s-1: ")
    columns = re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", lines[1])
    assert columns
    assert (lines[2], lines[4], lines[-2], lines[-1]) == (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}")
    assert text.endswith("\\end{tabular}\n")
    found = []
    for line in (lines[3], *lines[5:-2]):
        assert line.endswith(r" \\")
        row = re.split(r"(?<!\\)&", line.removesuffix(r" \\"))
        assert len(row) == len(columns.group(1))
        assert len(re.findall(r"(?<!\\)\$", line)) % 2 == 0
        assert line.replace(r"\{", "").replace(r"\}", "").count("{") == line.replace(r"\{", "").replace(
            r"\}", ""
        ).count("}")
        found.append([cell.strip() for cell in row])
    return found


SWEEP = [
    *(run("plain", s, baseline=True, probe=p, alignment_test=a) for s, p, a in ((0, 0.5, 1.0), (1, 0.6, 1.2))),
    *(run("deep", s, axes={"layer": "a", "stop_gradient": True}, probe=p, alignment_test=a)
      for s, p, a in ((0, 0.7, 0.5), (1, 0.7, 0.6))),
    run("deep", 0, axes={"layer": "b", "stop_gradient": False}, probe=0.25, alignment_test=2.0),
]  # fmt: skip


def test_the_whole_table_by_hand():
    """Half intervals of two seeds are half their difference times 12.7062: 63.5 points, and for the gain as well."""
    assert rows(latex(study(*SWEEP))) == [
        ["arm", "layer", r"stop\_gradient", "n", "probe", "gain"],
        ["plain", "--", "--", "2", r"$55.0 \pm 63.5$", "--"],
        ["deep", "a", "yes", "2", r"$70.0 \pm 0.0$", r"$+15.0 \pm 63.5$"],
        ["deep", "b", "no", "1", "$25.0$", "$-25.0$"],
    ]


def test_numbers_are_right_of_their_columns_and_words_left():
    assert latex(study(*SWEEP)).splitlines()[1] == r"\begin{tabular}{lllrrr}"


@pytest.mark.parametrize("metric", ["alignment_test", "uniformity_train"])
def test_alignment_and_uniformity_are_no_percentages(metric: str):
    runs = [
        run("plain", s, baseline=True, **{metric: a}) for s, a in ((0, -1.0), (1, -1.2))
    ] + [run("deep", 0, **{metric: -1.5})]  # fmt: skip
    assert rows(latex(study(*runs), metric))[1:] == [
        ["plain", "2", r"$-1.100 \pm 1.271$", "--"], ["deep", "1", "$-1.500$", "$-0.500$"],
    ]  # fmt: skip


def test_the_asked_for_epoch_and_data_are_printed():
    both = run("a", 0, probe=0.5)
    both["scores"]["other"] = [{"epoch": 2, "probe": 0.125}]
    assert rows(latex(study(both), epoch=0))[1][-2] == "$0.0$"
    assert rows(latex(study(both), data="other"))[1][-2] == "$12.5$"


def test_axes_that_only_some_arms_have_are_columns_of_all():
    runs = [run("a", 0, axes={"rate": 0.1}, probe=0.5), run("b", 0, axes={"layer": "l"}, probe=0.5)]
    runs += [run("c", 0, probe=0.5)]
    found = rows(latex(study(*runs)))
    assert [row[:3] for row in found] == [["arm", "rate", "layer"], ["a", "0.1", "--"], ["b", "--", "l"],
                                         ["c", "--", "--"]]  # fmt: skip


SPECIAL = {
    "a & b": r"a \& b",
    "50 %": r"50 \%",
    "a_b": r"a\_b",
    "#1": r"\#1",
    "{x}": r"\{x\}",
    "x~y": r"x\textasciitilde{}y",
    r"C:\new": r"C:\textbackslash{}new",
    "no $ here": r"no \$ here",
    "$5": r"\$5",
    "x^2": r"x\textasciicircum{}2",
}


@pytest.mark.parametrize(
    "name", SPECIAL
)  # fmt: skip
def test_names_are_escaped(name: str):
    found = rows(latex(study(run(name, 0, probe=0.5), run("x", 0, axes={"layer": name}, probe=0.5))))
    assert found[1][0] == SPECIAL[name]
    assert found[2][1] == SPECIAL[name]


def test_an_arm_in_brackets_is_no_distance_between_rows():
    text = latex(study(run("a", 0, probe=0.5), run("[b]", 0, probe=0.5)))
    assert not re.search(r"\\\\\s*\[", text)


def test_lists_and_none_as_values_of_an_axis_are_one_cell():
    runs = [run("a", 0, axes={"kinds": ["cutout", "noise"], "protocol": None}, probe=0.5)]
    assert rows(latex(study(*runs)))[1] == ["a", "{[}'cutout', 'noise'{]}", "--", "1", "$50.0$", "--"]


def test_an_unknown_metric_names_the_closest():
    with pytest.raises(UnknownNameError, match="closest: probe"):
        latex(study(*SWEEP), "prob")


def test_every_number_agrees_with_the_table():
    found = study(*SWEEP)
    wanted = found.table()
    for cells, (_, record) in zip(rows(latex(found))[1:], wanted.iterrows(), strict=True):
        assert float(re.findall(r"-?[\d.]+", cells[-2])[0]) == pytest.approx(100 * record["mean"], abs=0.05)
        assert int(cells[-3]) == record["n"]
