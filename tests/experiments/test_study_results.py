"""What a study found: means, gains and intervals worked by hand, the long table, JSON, and what damaged files say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from layerlens.analysis.results import FilmStrip, SimilarityMatrix
from layerlens.errors import DataError, LayerlensError, UnknownNameError
from layerlens.experiments.results import ALWAYS, StudyResult, collect, interval, label
from layerlens.experiments.store import Store
from layerlens.experiments.study import axis_name
from layerlens.recommendation import recommend
from layerlens.trajectory import Trajectory


def run(arm: str = "deep", seed: int = 0, probe: float | None = 0.5, **more: Any) -> dict[str, Any]:
    """A finished run with one checkpoint; what is no other part of it is the value of an axis."""
    known = {"baseline": False, "start": None, "advice": [], "scores": None, "on": "digits"}
    parts = {name: more.pop(name, usual) for name, usual in known.items()}
    scores = parts["scores"] or {"": [{"epoch": 2, "probe": probe}]}
    parts["data"] = parts.pop("on")
    key = f"{arm}-{seed}-" + "-".join(map(str, more.values()))
    return {**parts, "key": key, "arm": arm, "values": more, "seed": seed, "wall_s": 1.0, "scores": scores,
            "environment": {}}  # fmt: skip


def study(*runs: dict[str, Any], **more: Any) -> StudyResult:
    fields: dict[str, Any] = {"similarity": (), "failed": {}, "missing": 0, "environment": {}, **more}
    return StudyResult(name="s", study={"arms": [], "starts": {"begin": {}}}, runs=runs, **fields)


def matrix(values: Any, layers: tuple[str, ...] = ("a", "b"), participation: Any = None) -> SimilarityMatrix:
    values = np.asarray(values, dtype=float)
    nothing = np.full_like(values, np.nan)
    return SimilarityMatrix(
        layers=layers, values=values, low=nothing, high=nothing, samples=8, weights=np.zeros(0),
        participation=np.ones(len(layers)) if participation is None else np.asarray(participation),
    )  # fmt: skip


# --- intervals ---


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_an_interval_is_the_one_of_student_as_scipy_has_it(count: int, level: float):
    values = np.random.default_rng(count).normal(0.7, 0.05, count)
    low, high = stats.t.interval(level, count - 1, loc=values.mean(), scale=stats.sem(values))
    found = interval(list(values), level)
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high), rel=1e-12)
    assert found.n == count


def test_an_interval_of_two_seeds_by_hand():
    """Half the difference times t(0.975, 1) = 12.7062."""
    found = interval([0.6, 0.8])
    assert found.mean == pytest.approx(0.7)
    assert found.high - found.mean == pytest.approx(0.1 * 12.7062, abs=1e-5)


def test_a_single_seed_has_a_mean_and_no_bounds():
    found = interval([0.25])
    assert (found.mean, found.n) == (0.25, 1)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_equal_seeds_have_an_interval_of_no_width():
    found = interval([0.5, 0.5, 0.5])
    assert found.low == found.mean == found.high == 0.5


# --- lines: scores and gains ---


def test_a_gain_is_the_mean_of_differences_of_equal_seeds_by_hand():
    """Seeds 0, 1, 2 gain 0.1, 0.3, 0.2: the interval is that of these three, not of two independent groups."""
    plain = [run("plain", seed, p, baseline=True) for seed, p in enumerate((0.1, 0.5, 0.9))]
    deep = [run("deep", seed, p, layer="a") for seed, p in enumerate((0.2, 0.8, 1.1))]
    first, second = study(*plain, *deep).lines()
    assert (first.arm, first.baseline, first.gain) == ("plain", True, None)
    assert (second.arm, second.values, second.baseline) == ("deep", {"layer": "a"}, False)
    assert second.score.mean == pytest.approx(0.7)
    low, high = stats.t.interval(0.95, 2, loc=0.2, scale=stats.sem([0.1, 0.3, 0.2]))
    assert second.gain is not None
    assert (second.gain.mean, second.gain.low, second.gain.high) == pytest.approx((0.2, low, high))
    assert second.gain.n == 3


def test_a_gain_counts_only_seeds_that_both_have():
    """The order of the runs says nothing; seed 7 has no baseline, seed 2 has nothing but a baseline."""
    plain = [run("plain", seed, p, baseline=True) for seed, p in ((2, 0.9), (1, 0.5), (0, 0.1))]
    deep = [run("deep", seed, p) for seed, p in ((0, 0.2), (7, 0.99), (1, 0.8))]
    line = study(*deep, *plain).lines()[0]
    assert line.score.n == 3
    assert line.score.mean == pytest.approx((0.2 + 0.99 + 0.8) / 3)
    assert line.gain is not None
    assert (line.gain.n, line.gain.mean) == (2, pytest.approx(0.2))


def test_without_a_common_seed_there_is_no_gain():
    line = study(run("plain", 0, baseline=True), run("deep", 1)).lines()[1]
    assert line.gain is None


def test_without_a_baseline_there_is_no_gain():
    assert study(run("a", 0), run("b", 0)).lines()[1].gain is None


def test_the_level_is_that_of_both_intervals():
    runs = [run("plain", s, p, baseline=True) for s, p in ((0, 0.1), (1, 0.2))]
    runs += [run("deep", s, p) for s, p in ((0, 0.3), (1, 0.5))]
    narrow, wide = (study(*runs).lines(level=level)[1] for level in (0.5, 0.95))
    ratio = stats.t.ppf(0.975, 1) / stats.t.ppf(0.75, 1)
    for name in ("score", "gain"):
        reach = [getattr(line, name).high - getattr(line, name).mean for line in (narrow, wide)]
        assert reach[1] / reach[0] == pytest.approx(ratio)


def test_a_line_is_compared_with_the_baseline_of_its_own_values():
    runs = [run("plain", 0, 0.1, baseline=True, rate=0.1), run("plain", 0, 0.5, baseline=True, rate=0.5)]
    runs += [run("deep", 0, 0.8, rate=0.5, layer="a"), run("deep", 0, 0.8, rate=0.1, layer="a")]
    gains = [line.gain.mean for line in study(*runs).lines() if line.gain]
    assert gains == pytest.approx([0.3, 0.7])


def test_of_two_fitting_baselines_the_one_that_shares_more_values_counts():
    runs = [run("plain", 0, 0.1, baseline=True), run("unfrozen", 0, 0.6, baseline=True, layer="a")]
    runs += [run("frozen", 0, 0.7, layer="a", part="before")]
    for order in (runs, runs[::-1]):
        line = next(line for line in study(*order).lines() if line.arm == "frozen")
        assert line.gain is not None
        assert line.gain.mean == pytest.approx(0.1)


def test_a_baseline_of_the_same_start_comes_before_one_that_shares_more():
    runs = [run("plain", 0, 0.1, baseline=True, start="simclr"), run("random", 0, 0.6, baseline=True, layer="a")]
    runs += [run("frozen", 0, 0.7, start="simclr", layer="a", part="before")]
    line = study(*runs).lines()[-1]
    assert line.gain is not None
    assert line.gain.mean == pytest.approx(0.6)


def test_a_baseline_of_another_start_is_better_than_none():
    runs = [run("plain", 0, 0.1, baseline=True), run("frozen", 0, 0.7, start="simclr")]
    line = study(*runs).lines()[-1]
    assert line.gain is not None
    assert line.gain.mean == pytest.approx(0.6)


def test_a_baseline_with_a_contradicting_value_is_never_used():
    runs = [run("plain", 0, 0.1, baseline=True, rate=0.1), run("deep", 0, 0.8, rate=0.5)]
    assert study(*runs).lines()[1].gain is None


def test_a_baseline_that_varies_what_a_run_does_not_have_is_never_used():
    assert study(run("plain", 0, 0.1, baseline=True, rate=0.1), run("deep", 0, 0.8)).lines()[1].gain is None


def test_a_baseline_on_other_data_is_never_used():
    runs = [run("plain", 0, 0.1, baseline=True, on="npz:x"), run("plain", 0, 0.3, baseline=True)]
    assert study(runs[0], run("deep", 0, 0.8)).lines()[1].gain is None
    assert study(runs[1], run("deep", 0, 0.8)).lines()[1].gain is not None


def test_a_start_is_compared_with_nothing():
    assert study(run("plain", 0, baseline=True), run("begin", 0)).lines()[1].gain is None


def test_values_that_are_lists_are_compared_as_well():
    runs = [run("plain", 0, 0.1 * k, baseline=True, kinds=[kind]) for k, kind in ((1, "cutout"), (2, "noise"))]
    line = study(*runs, run("deep", 0, 0.8, kinds=["noise"], layer="a")).lines()[-1]
    assert line.gain is not None
    assert line.gain.mean == pytest.approx(0.6)


def test_settings_are_lines_in_the_order_of_the_study():
    runs = [run("z", s, layer=layer) for layer in ("l2", "l1") for s in (0, 1)] + [run("a", 0)]
    found = [(line.arm, line.values.get("layer"), line.score.n) for line in study(*runs).lines()]
    assert found == [("z", "l2", 2), ("z", "l1", 2), ("a", None, 1)]


# --- which checkpoint, which data, which score ---

PEAKED = [{"epoch": 0, "probe": 0.2}, {"epoch": 5, "probe": 0.9, "knn": 0.8}, {"epoch": 10, "probe": 0.6, "knn": 0.7}]


def test_the_last_checkpoint_counts_even_if_another_was_better():
    assert study(run(scores={"": PEAKED})).lines()[0].score.mean == 0.6


def test_another_epoch_and_other_data_can_be_asked_for():
    found = study(run(scores={"": PEAKED, "npz:other": [{"epoch": 5, "probe": 0.3}, {"epoch": 10, "probe": 0.4}]}))
    assert found.lines(epoch=5)[0].score.mean == 0.9
    assert found.lines(epoch=0)[0].score.mean == 0.2
    assert found.lines(data="npz:other")[0].score.mean == 0.4
    assert found.lines(data="npz:other", epoch=5)[0].score.mean == 0.3
    with pytest.raises(DataError, match=r"no knn at epoch 0; it was measured at 5, 10"):
        found.lines("knn", epoch=0)
    assert found.scores("knn", epoch=5) == {0: 0.8}


def test_a_setting_that_was_not_scored_there_has_no_line():
    both = {"": [{"epoch": 2, "probe": 0.5}], "npz:other": [{"epoch": 2, "probe": 0.1}]}
    found = study(run("a", 0), run("b", 0, scores=both))
    assert [line.arm for line in found.lines(data="npz:other")] == ["b"]


@pytest.mark.parametrize("what", [{"epoch": 7}, {"data": "npz:othr"}])
def test_an_epoch_or_data_that_no_run_has_is_refused_with_what_there_is(what: dict[str, Any]):
    scores = {"": PEAKED, "npz:other": PEAKED}
    with pytest.raises(LayerlensError, match=r"7.*0, 5, 10|npz:othr.*npz:other"):
        study(run(scores=scores)).lines(**what)


def test_an_unknown_metric_is_answered_with_the_closest_ones():
    found = study(run(scores={"": [{"epoch": 2, "probe": 0.5, "knn": 0.5, "uniformity_test": -2.0}]}))
    assert found.metrics() == ["probe", "knn", "uniformity_test"]
    for call in (found.lines, found.table):
        with pytest.raises(UnknownNameError, match="unknown metric 'uniformity'; closest: uniformity_test"):
            call("uniformity")


def test_scores_of_an_unknown_metric_are_refused_as_well():
    with pytest.raises(UnknownNameError, match="unknown metric 'prob'; closest: probe"):
        study(run()).scores("prob")


def test_metrics_are_those_of_any_checkpoint_of_any_data():
    other = {"": [{"epoch": 0, "knn": 0.1}, {"epoch": 2, "probe": 0.5}], "x": [{"epoch": 2, "top1": 0.5}]}
    assert study(run(scores=other), run("b", scores={"": [{"epoch": 2, "linear": 1.0}]})).metrics() == [
        "knn", "probe", "top1", "linear",
    ]  # fmt: skip


def test_a_score_that_is_none_leaves_its_seed_out():
    """NaN travels as null: a collapsed embedding has no alignment."""
    runs = [run("plain", s, p, baseline=True) for s, p in ((0, 0.1), (1, None))]
    runs += [run("deep", s, p) for s, p in ((0, None), (1, 0.9))]
    first, second = study(*runs).lines()
    assert (first.score.n, first.score.mean) == (1, 0.1)
    assert (second.score.n, second.score.mean, second.gain) == (1, 0.9, None)
    assert study(*runs).scores(arm="plain") == {0: 0.1}


def test_a_last_checkpoint_without_the_score_is_not_replaced_by_an_earlier_one():
    rows = [{"epoch": 1, "probe": 0.4}, {"epoch": 2, "probe": None}]
    with pytest.raises(DataError, match="no probe at the last epoch; it was measured at 1"):
        study(run(scores={"": rows})).lines()


# --- scores of one setting ---


def test_scores_are_those_of_the_one_setting_with_these_values():
    runs = [run("deep", s, 0.1 * s, layer=layer) for layer in ("a", "b") for s in (1, 2)] + [run("plain", 1, 0.7)]
    assert study(*runs).scores(arm="deep", layer="b") == pytest.approx({1: 0.1, 2: 0.2})
    assert study(*runs).scores(arm="plain") == {1: 0.7}
    assert study(*runs).scores(layer=None) == {1: 0.7}


@pytest.mark.parametrize(
    ("where", "count"), [({}, 3), ({"arm": "deep"}, 2), ({"layer": "c"}, 0), ({"start": "x"}, 0), ({"layr": "a"}, 0)]
)
def test_scores_of_several_settings_or_none_are_refused(where: dict[str, Any], count: int):
    runs = [run("deep", 0, layer="a"), run("deep", 0, layer="b"), run("plain", 0)]
    with pytest.raises(DataError, match=f"^{count} settings of 's' have "):
        study(*runs).scores(**where)


# --- tables ---


def test_the_table_has_one_row_per_line_with_everything_by_hand():
    runs = [run("plain", s, p, baseline=True) for s, p in ((0, 0.1), (1, 0.3))]
    runs += [run("deep", s, p, layer="a", stop_gradient=True) for s, p in ((0, 0.4), (1, 0.8))]
    found = study(*runs).table()
    assert list(found.columns) == [
        "arm", "layer", "stop_gradient", "n", "mean", "low", "high", "gain", "gain_low", "gain_high",
    ]  # fmt: skip
    first, second = found.to_dict(orient="records")
    assert (first["arm"], first["n"], first["mean"]) == ("plain", 2, pytest.approx(0.2))
    assert all(math.isnan(first[name]) for name in ("gain", "gain_low", "gain_high"))
    low, high = stats.t.interval(0.95, 1, loc=0.4, scale=stats.sem([0.3, 0.5]))
    assert (second["arm"], second["layer"], second["stop_gradient"]) == ("deep", "a", True)
    assert [second[name] for name in ("gain", "gain_low", "gain_high")] == pytest.approx([0.4, low, high])


def test_the_long_table_has_a_row_per_number():
    """Two runs: 3 checkpoints with 1 + 2 + 2 scores and 1 checkpoint with 1, and other data with 1: 5 + 1 + 1."""
    other = [{"epoch": 10, "knn": 0.25}]
    found = study(run("deep", 3, scores={"": PEAKED, "x": other}, start="w", rate=0.5), run("plain", 4)).to_frame()
    columns = ["arm", "start", "key", "layer", "stop_gradient", "rate", "seed", "data", "epoch", "metric", "value"]
    assert list(found.columns) == columns
    assert len(found) == 7
    assert found.iloc[5].to_dict() == {
        "arm": "deep", "start": "w", "key": "deep-3-0.5", "layer": None, "stop_gradient": None, "rate": 0.5, "seed": 3,
        "data": "x", "epoch": 10, "metric": "knn", "value": 0.25,
    }  # fmt: skip
    assert list(found.value) == [0.2, 0.9, 0.8, 0.6, 0.7, 0.25, 0.5]
    assert set(found[found.arm == "deep"].rate) == {0.5}


@pytest.mark.parametrize("runs", [[], [run(scores={"": []})], [run()], [run(layer="a", part="after")]])
def test_layer_stop_gradient_and_rate_are_columns_of_every_long_table(runs: list[dict[str, Any]]):
    columns = list(study(*runs).to_frame().columns)
    assert columns[:3] == ["arm", "start", "key"]
    assert tuple(columns[3:6]) == ALWAYS == ("layer", "stop_gradient", "rate")
    assert columns[-5:] == ["seed", "data", "epoch", "metric", "value"]
    assert columns[6:-5] == (["part"] if runs and "part" in runs[0]["values"] else [])


def test_a_missing_score_is_nan_in_the_long_table():
    found = study(run(scores={"": [{"epoch": 1, "a": 0.5, "b": None}]})).to_frame()
    assert found.value.dtype == float
    assert np.isnan(found.value.iloc[1])


def test_an_axis_over_data_stays_readable_in_the_long_table():
    assert axis_name("data") == "trained_on"
    found = study(run("a", 0, trained_on="digits"), run("a", 0, trained_on="npz:x")).to_frame()
    assert any({"digits", "npz:x"} == set(found[column].astype(str)) for column in found.columns if column != "key")


def test_scores_of_an_axis_over_data_can_be_asked_for():
    found = study(run("a", 0, 0.1, trained_on="digits"), run("a", 0, 0.2, trained_on="npz:x"))
    assert found.scores(**found.runs[1]["values"]) == {0: 0.2}


# --- JSON ---


def test_a_result_survives_json_with_every_answer():
    runs = [run("plain", s, p, baseline=True) for s, p in ((0, 0.1), (1, 0.3))]
    runs += [run("deep", s, p, layer="a", stop_gradient=True) for s, p in ((0, 0.4), (1, None))]
    kept = {"arm": "deep", "start": None, "values": {"layer": "a"}, "seeds": 1}
    kept |= {name: matrix([[1, 0.5], [0.5, 1]]).to_dict() for name in ("first", "last")}
    found = study(*runs, similarity=(kept,), failed={"deep seed=2": "no"}, missing=3)
    text = found.to_json()
    assert "NaN" not in text
    back = StudyResult.from_json(text)
    assert back.to_dict() == found.to_dict()
    assert back.lines() == found.lines()
    assert back.to_frame().equals(found.to_frame())
    assert np.array_equal(back.mean_similarity(arm="deep").values, [[1, 0.5], [0.5, 1]])
    assert (back.failed, back.missing) == ({"deep seed=2": "no"}, 3)


def test_nan_travels_as_null():
    found = study(run(scores={"": [{"epoch": 1, "alignment_test": math.nan, "probe": 0.5}]}))
    row = json.loads(found.to_json())["runs"][0]["scores"][""][0]
    assert row == {"epoch": 1, "alignment_test": None, "probe": 0.5}


def test_a_nan_score_leaves_its_seed_out_as_null_does():
    found = study(run("a", 0, math.nan), run("a", 1, 0.5))
    assert found.lines() == StudyResult.from_json(found.to_json()).lines()


def test_a_result_from_json_equals_the_one_that_was_written():
    found = study(run())
    assert StudyResult.from_json(found.to_json()) == found


# --- similarity ---


def test_mean_similarity_is_the_one_of_the_setting_that_is_asked_for():
    kept = [
        {"arm": arm, "start": None, "values": {"layer": layer}, "seeds": 1,
         "first": matrix([[1, x], [x, 1]]).to_dict(), "last": matrix([[1, x + 0.1], [x + 0.1, 1]]).to_dict()}
        for arm, layer, x in (("deep", "a", 0.1), ("deep", "b", 0.2), ("plain", "b", 0.3))
    ]  # fmt: skip
    found = study(similarity=tuple(kept))
    assert found.mean_similarity(arm="deep", layer="b").values[0, 1] == pytest.approx(0.3)
    assert found.mean_similarity(arm="plain", last=False).values[0, 1] == pytest.approx(0.3)
    with pytest.raises(DataError, match=r"2 settings of 's' with CKA have \{'arm': 'deep'\}"):
        found.mean_similarity(arm="deep")
    with pytest.raises(DataError, match="0 settings"):
        found.mean_similarity(layer="c")


# --- collect, from a store whose files are written by hand ---


def film(seed: int) -> FilmStrip:
    """Two frames of eight batches: random weights are alike everywhere, trained ones in l3 to l6."""
    from layerlens.analysis.resampling import cka_of, jackknife_intervals, leave_one_out

    def frame(lengths: list[int], draw: int) -> SimilarityMatrix:
        label = np.repeat(np.arange(len(lengths)), lengths)
        levels = np.where(label[:, None] == label[None, :], 0.9, 0.2)
        np.fill_diagonal(levels, 1.0)
        draws = np.triu(np.random.default_rng(draw).normal(0, 0.01, (8, *levels.shape)), 1)
        blocks, weights = levels + draws + draws.swapaxes(1, 2), np.full(8, 64.0)
        low, high = jackknife_intervals(
            cka_of(blocks.mean(0)), leave_one_out(blocks, weights), weights, 0.95, bounded=True, unbias=False
        )
        return SimilarityMatrix(
            layers=tuple(f"l{i}" for i in range(8)), values=cka_of(blocks.mean(0)), low=low, high=high, samples=512,
            participation=np.full(8, 9.0 + draw), blocks=blocks, weights=weights,
        )  # fmt: skip

    return FilmStrip(labels=("epoch 0", "epoch 2"), frames=(frame([8], seed), frame([3, 4, 1], seed + 10)), changes=())


CKA, SCORES = "analysis/study-cka-1.json", "analysis/study-scores-1.json"


def planned(key: str, arm: str = "plain", *, start: str | None = None, seed: int = 0, **values: Any) -> dict[str, Any]:
    return {
        "key": key, "arm": arm, "baseline": arm == "plain", "start": start, "values": values,
        "seed": seed, "data": "digits", "epochs": 2,
        "augment": None, "files": [CKA, SCORES], "measured": [["cka", None, CKA], ["scores", None, SCORES]],
    }  # fmt: skip


def finish(store: Store, key: str, seed: int = 0, probe: float = 0.5) -> Path:
    folder = store.run_folder(key)
    (folder / "analysis").mkdir(parents=True)
    (folder / "last.safetensors").touch()
    result = {"run": key, "epochs": 2, "loss": 1.0, "knn": 0.5, "wall_s": 2.5, "checkpoints": ["last.safetensors"]}
    result["environment"] = {"torch": "2"}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / CKA).write_text(film(seed).to_json())
    scored = [{"epoch": 0, "probe": 0.1}, {"epoch": 2, "probe": probe}]
    rows = Trajectory(name="r", data="digits", rows=tuple(scored), facts={}).to_dict()
    (folder / SCORES).write_text(json.dumps(rows))
    return folder


def begun(folder: Path) -> Store:
    """A study with a start, a finished baseline of two seeds, an arm from the start, a failed and a missing run."""
    made = Store(folder)
    arms = [{"name": "plain", "start": None}, {"name": "late", "start": "begin"}]
    runs = [planned("s0", "begin"), planned("p0"), planned("p1", seed=1), planned("d0", "late", start="s0", layer="a")]
    runs += [planned("d1", "late", start="s0", seed=1, layer="a"), planned("m", "late", start="s0", seed=2, layer="a")]
    made.write_plan("s", {"study": {"arms": arms, "starts": {"begin": {}}}, "runs": runs})
    for key, seed in (("s0", 0), ("p0", 0), ("p1", 1), ("d0", 0)):
        finish(made, key, seed, probe=0.5 + 0.1 * seed)
    made.add_failure("d1", "failed", "ValueError: no", given_up=False)
    made.add_failure("d1", "died", "the worker was killed", given_up=True)
    made.add_failure("m", "failed", "ValueError: once", given_up=False)
    made.write_plan("one", {"study": {"arms": arms, "starts": {"begin": {}}}, "runs": runs[2:3]})
    return made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return begun(tmp_path / "store")


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    """What is read of that study."""
    return collect(begun(tmp_path_factory.mktemp("read") / "store"), "s")


def test_collect_reads_what_is_finished_and_counts_the_rest(collected: StudyResult):
    found = collected
    assert [(r["key"], r["arm"], r["start"], r["seed"], r["wall_s"]) for r in found.runs] == [
        ("s0", "begin", None, 0, 2.5), ("p0", "plain", None, 0, 2.5), ("p1", "plain", None, 1, 2.5),
        ("d0", "late", "begin", 0, 2.5),
    ]  # fmt: skip
    assert found.failed == {"late layer=a seed=1": "the worker was killed"}
    assert found.missing == 1
    assert found.runs[0]["scores"] == {"": [{"epoch": 0, "probe": 0.1}, {"epoch": 2, "probe": 0.5}]}
    assert found.runs[0]["environment"] == {"torch": "2"}
    assert found.name == "s"
    assert "torch" in str(found.environment)


def test_a_run_without_all_its_measurements_is_missing(store: Store):
    (store.run_folder("p1") / SCORES).unlink()
    found = collect(store, "one")
    assert (found.runs, found.missing, found.failed) == ((), 1, {})


def test_a_run_in_words():
    assert label("deep", {"layer": "a", "rate": 0.5}, 3) == "deep layer=a rate=0.5 seed=3"


def test_advice_is_what_the_first_and_the_last_matrix_of_that_run_recommend(collected: StudyResult):
    runs = {r["key"]: r for r in collected.runs}
    for key, seed in (("p0", 0), ("p1", 1)):
        strip = film(seed)
        wanted = recommend(strip.frames[-1], strip.frames[0]).targets
        assert wanted
        assert runs[key]["advice"] == [
            {"layer": t.layer, "stop_gradient": t.stop_gradient, "confidence": t.confidence} for t in wanted
        ]


def test_runs_that_start_from_others_have_no_advice(collected: StudyResult):
    """Their first matrix is no untrained twin."""
    runs = {r["key"]: r for r in collected.runs}
    assert runs["d0"]["advice"] == []
    assert [key for key, run in runs.items() if run["advice"]] == [k for k, r in runs.items() if r["baseline"]]


def test_mean_similarity_is_the_mean_over_seeds_with_students_interval(collected: StudyResult):
    found = collected
    assert [(s["arm"], s["seeds"]) for s in found.similarity] == [("begin", 1), ("plain", 2), ("late", 1)]
    for last, k in ((True, -1), (False, 0)):
        frames = [film(seed).frames[k] for seed in (0, 1)]
        values = np.stack([frame.values for frame in frames])
        low, high = stats.t.interval(0.95, 1, loc=values.mean(0), scale=np.maximum(stats.sem(values), 1e-300))
        mean = found.mean_similarity(arm="plain", last=last)
        assert np.abs(mean.values - values.mean(0)).max() <= 5.1e-5
        assert np.abs(mean.low - low).max() <= 5.1e-5
        assert np.abs(mean.high - high).max() <= 5.1e-5
        assert np.allclose(mean.participation, np.mean([f.participation for f in frames], 0), atol=5.1e-5)
        assert mean.layers == frames[0].layers
        assert (mean.level, len(mean.blocks), len(mean.weights)) == (0.95, 0, 0)


def test_mean_similarity_of_one_seed_has_no_interval(collected: StudyResult):
    mean = collected.mean_similarity(arm="begin")
    assert np.isnan(mean.low).all()
    assert np.isnan(mean.high).all()
    assert np.abs(mean.values - film(0).frames[-1].values).max() <= 5.1e-5


def test_mean_similarity_comes_back_from_json(collected: StudyResult):
    back = StudyResult.from_json(collected.to_json())
    for arm in ("begin", "plain"):
        one, two = (r.mean_similarity(arm=arm) for r in (collected, back))
        assert np.array_equal(one.values, two.values)
        assert np.array_equal(one.low, two.low, equal_nan=True)


def test_a_layer_that_is_constant_in_one_seed_has_no_mean_similarity(store: Store):
    path = store.run_folder("p1") / CKA
    for key in ("s0", "d0"):  # only the two seeds of the baseline are of interest
        (store.run_folder(key) / "result.json").unlink()
    content = json.loads(path.read_text())
    values = content["frames"][1]["values"]
    for i in range(8):
        values[7][i] = values[i][7] = None
    path.write_text(json.dumps(content))
    mean = collect(store, "s").mean_similarity(arm="plain")
    assert mean.missing == ("l7",)
    assert np.isfinite(mean.values[:7, :7]).all()
    assert np.isfinite(mean.low[:7, :7]).all()


def test_a_study_without_measurements_collects_runs_without_scores(store: Store):
    plan = store.read_plan("s")
    runs = [{**r, "files": [], "measured": []} for r in plan["runs"]]
    store.write_plan("bare", {"study": plan["study"], "runs": runs})
    found = collect(store, "bare")
    assert [r["scores"] for r in found.runs] == [{}] * 4
    assert [r["advice"] for r in found.runs] == [[]] * 4
    assert (found.similarity, found.metrics()) == ((), [])


def test_an_unknown_study_is_answered_with_the_closest_ones(store: Store):
    with pytest.raises(UnknownNameError, match=r"no study 'ss' in .*; closest: s"):
        collect(store, "ss")


DAMAGE = {
    "cut off": '{"rows": [{"epo',
    "empty": "",
    "a list": "[]",
    "another type": '{"type": "Geometry", "schema": 1}',
    "a newer schema": '{"type": "FilmStrip", "schema": 99}',
    "without its fields": '{"type": "FilmStrip", "schema": 1}',
}
KEPT = ("cut off", "empty", "a list")


@pytest.mark.parametrize(
    ("file", "damage"),
    [*((CKA, d) for d in DAMAGE), *((SCORES, d) for d in (*KEPT, "another type"))],
)  # fmt: skip
def test_a_damaged_measurement_is_one_line_that_names_its_file(store: Store, file: str, damage: str):
    path = store.run_folder("p1") / file
    path.write_text(DAMAGE[damage])
    with pytest.raises(LayerlensError) as caught:
        collect(store, "one")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_plan_is_one_line_that_names_it(store: Store):
    path = store.study_folder("s") / "plan.json"
    path.write_text("{")
    with pytest.raises(LayerlensError, match=r"plan\.json' is damaged"):
        collect(store, "s")
