"""Freezing before against after, and the advice from CKA against the alternatives: every number by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
from scipy import stats

from layerlens.errors import ConfigError, DataError
from layerlens.experiments.ablation import AdviceOutcome, FreezeEffect, advice_outcome, freeze_effects
from layerlens.experiments.results import Interval, StudyResult
from layerlens.experiments.tables import sentences


def run(arm: str, seed: int, probe: float | None, *, start: str | None = None, advice: Any = (), **values: Any) -> Any:
    return {
        "key": f"{arm}{seed}{values}", "arm": arm, "baseline": arm == "plain", "start": start, "values": values,
        "seed": seed, "data": "digits", "wall_s": 1.0,
        "scores": {"": [{"epoch": 0, "probe": 0.9}, {"epoch": 2, "probe": probe}]},
        "advice": list(advice), "environment": {},
    }  # fmt: skip


def study(runs: Iterable[dict[str, Any]]) -> StudyResult:
    return StudyResult(
        name="s", study={"starts": {}}, runs=tuple(runs), similarity=(), failed={}, missing=0, environment={}
    )  # fmt: skip


def student(*values: float) -> tuple[float, float, float]:
    """Mean and bounds as scipy has them."""
    mean = sum(values) / len(values)
    return (mean, *stats.t.interval(0.95, len(values) - 1, loc=mean, scale=stats.sem(values)))


def numbers(found: Interval) -> tuple[float, float, float]:
    return found.mean, found.low, found.high


# --- freezing ---

FREE = {("a", 0): 0.80, ("a", 1): 0.90, ("b", 0): 0.70, ("b", 1): 0.85}
BEFORE = {("a", 0): 0.78, ("a", 1): 0.89, ("b", 0): 0.66, ("b", 1): 0.84}
AFTER = {("a", 0): 0.70, ("a", 1): 0.75, ("b", 0): 0.64, ("b", 1): 0.80}


def ablation(
    before: dict[Any, float] = BEFORE, after: dict[Any, float] = AFTER, start: str | None = "simclr", tag: str = ""
) -> list[dict[str, Any]]:
    runs = [run(f"free{tag}", seed, p, start=start, layer=layer) for (layer, seed), p in FREE.items()]
    for part, scores in (("before", before), ("after", after)):
        runs += [run(f"frozen{tag}", s, p, start=start, layer=layer, part=part) for (layer, s), p in scores.items()]
    return runs


def test_freeze_effects_by_hand():
    """Before minus after: seed 0 has 0.08 and 0.02, mean 0.05; seed 1 has 0.14 and 0.04, mean 0.09."""
    (found,) = freeze_effects(study(ablation()))
    assert found.start == "simclr"
    assert list(found.before) == list(found.after) == ["a", "b"]
    assert numbers(found.before["a"]) == pytest.approx(student(-0.02, -0.01))
    assert numbers(found.before["b"]) == pytest.approx(student(-0.04, -0.01))
    assert numbers(found.after["a"]) == pytest.approx(student(-0.10, -0.15))
    assert numbers(found.after["b"]) == pytest.approx(student(-0.06, -0.05))
    assert numbers(found.difference) == pytest.approx(student(0.05, 0.09))
    assert found.difference.n == 2


def test_every_start_has_its_own_effect_and_its_own_unfrozen_runs():
    turned = ablation(AFTER, BEFORE, start=None, tag=" from random")
    first, second = freeze_effects(study([*ablation(), *turned]))
    assert (first.start, second.start) == ("simclr", "random")
    assert first.difference.mean == pytest.approx(0.07)
    assert second.difference.mean == pytest.approx(-0.07)


def test_other_arms_without_a_layer_do_not_disturb():
    extra = [run("plain", s, 0.99) for s in (0, 1)] + [run("simclr", s, 0.99) for s in (0, 1)]
    (found,) = freeze_effects(study([*extra, *ablation()]))
    assert found.difference.mean == pytest.approx(0.07)


def test_the_last_checkpoint_counts():
    """Each run scored 0.9 before its training, which is above nearly all of them."""
    (found,) = freeze_effects(study(ablation()))
    assert found.before["b"].mean == pytest.approx(-0.025)


def effect(mean: float, low: float, high: float) -> str:
    some = {"a": Interval(mean=0.0, low=0.0, high=0.0, n=3)}
    return str(
        FreezeEffect(
            start="x", before=some, after=some, at=some, difference=Interval(mean=mean, low=low, high=high, n=3)
        )
    )


def test_the_sentence_where_the_layers_after_must_learn():
    assert effect(0.05, 0.012, 0.088) == (
        "From x weights, freezing what lies before the target costs 5.0 points (95 % 1.2 to 8.8, 3 seeds) less than "
        "freezing what lies after it: the layers after the target must learn."
    )


def test_the_sentence_where_the_layers_before_must_learn():
    assert effect(-0.05, -0.088, -0.012) == (
        "From x weights, freezing what lies before the target costs 5.0 points (95 % 1.2 to 8.8, 3 seeds) more than "
        "freezing what lies after it: the layers before the target must learn."
    )


@pytest.mark.parametrize("mean", [0.05, -0.05, 0.0])
def test_an_interval_that_holds_zero_says_that_nothing_is_shown(mean: float):
    said = effect(mean, mean - 0.08, mean + 0.08)
    low, high = 100 * mean - 8, 100 * mean + 8
    assert said == (
        "From x weights, freezing what lies before the target or after it makes no difference that 3 seeds can tell: "
        f"{100 * mean:+.1f} points (95 % {low:+.1f} to {high:+.1f})."
    )


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.1), (-0.1, 0.0)])
def test_an_interval_that_ends_at_zero_shows_nothing(low: float, high: float):
    assert "makes no difference" in effect((low + high) / 2, low, high)


def test_the_sentence_says_at_which_target_which_side_costs_more():
    """The mean over layers hides what crosses: before costs more at b, after at a, and at c nobody can tell."""
    spread = {"a": (0.05, 0.01, 0.09), "b": (-0.05, -0.09, -0.01), "c": (0.0, -0.02, 0.02)}
    at = {layer: Interval(mean=m, low=low, high=high, n=3) for layer, (m, low, high) in spread.items()}
    said = str(FreezeEffect(start="x", before=at, after=at, at=at, difference=at["c"]))
    assert said.endswith(
        "(95 % -2.0 to +2.0). Target by target: freezing before costs more at b; freezing after costs more at a; "
        "undecided at c."
    )


def test_the_difference_at_each_target_is_paired_by_seed():
    (found,) = freeze_effects(study(ablation()))
    for layer, difference in found.at.items():
        assert difference.mean == pytest.approx(found.before[layer].mean - found.after[layer].mean)


@pytest.mark.parametrize(("better", "word"), [(True, "after"), (False, "before")])
def test_the_sentence_follows_from_the_runs(better: bool, word: str):
    """Four seeds that agree, so that the interval is clear of 0."""
    free = [run("free", s, 0.8, start="w", layer="a") for s in range(4)]
    worse = [run("frozen", s, 0.5 + 0.01 * s, start="w", layer="a", part="after" if better else "before")
             for s in range(4)]  # fmt: skip
    equal = [run("frozen", s, 0.8, start="w", layer="a", part="before" if better else "after") for s in range(4)]
    (found,) = freeze_effects(study([*free, *worse, *equal]))
    assert str(found).endswith(f"the layers {word} the target must learn.")
    assert "28.5 points" in str(found)


def test_one_seed_shows_nothing_and_prints_no_nan():
    one = {key: p for key, p in FREE.items() if key[1] == 0}
    runs = [r for r in ablation() if r["seed"] == 0]
    assert len(runs) == 3 * len(one)
    (found,) = freeze_effects(study(runs))
    assert math.isnan(found.difference.low)
    assert "nan" not in str(found)
    assert "a single seed, which shows nothing" in str(found)


def test_a_study_that_froze_nothing_is_refused():
    with pytest.raises(DataError, match=r"'s' has no runs with an axis freeze\.part"):
        freeze_effects(study([run("deep", 0, 0.5, layer="a")]))


def test_frozen_runs_without_the_unfrozen_arm_are_refused():
    frozen = [r for r in ablation() if "part" in r["values"]]
    with pytest.raises(DataError, match="one unfrozen arm with the axis layer from simclr weights"):
        freeze_effects(study(frozen))
    with pytest.raises(DataError, match="from random weights"):
        freeze_effects(study([{**r, "start": None} for r in frozen]))


def test_two_unfrozen_arms_are_refused():
    with pytest.raises(DataError, match="needs one unfrozen arm"):
        freeze_effects(study([*ablation(), run("other", 0, 0.5, start="simclr", layer="a")]))


def test_a_seed_without_every_run_leaves_the_difference_to_the_others():
    """Seed 2 has no run frozen after b."""
    more = [run("free", 2, 0.5, start="simclr", layer=layer) for layer in ("a", "b")]
    more += [run("frozen", 2, 0.1, start="simclr", layer=layer, part="before") for layer in ("a", "b")]
    more += [run("frozen", 2, 0.9, start="simclr", layer="a", part="after")]
    (found,) = freeze_effects(study([*ablation(), *more]))
    assert numbers(found.difference) == pytest.approx(student(0.05, 0.09))


def test_no_seed_with_every_run_is_refused():
    runs = [r for r in ablation() if (r["values"].get("part"), r["values"]["layer"], r["seed"]) not in
            {("after", "a", 0), ("before", "b", 1)}]  # fmt: skip
    with pytest.raises(DataError, match="no seed of 's' has every run from simclr weights yet"):
        freeze_effects(study(runs))


@pytest.mark.parametrize("gone", [("after", "b"), ("before", "b"), (None, "b")])
def test_a_layer_counts_only_where_all_three_kinds_of_runs_are(gone: tuple[str | None, str]):
    """So says its docstring; a run that was given up must not hide the other layers."""
    runs = [r for r in ablation() if (r["values"].get("part"), r["values"]["layer"]) != gone]
    (found,) = freeze_effects(study(runs))
    assert numbers(found.difference) == pytest.approx(student(0.08, 0.14))


def test_a_start_that_is_not_done_does_not_hide_the_others():
    half = [r for r in ablation(start=None, tag=" random") if r["values"].get("part") != "after"]
    assert [found.start for found in freeze_effects(study([*ablation(), *half]))] == ["simclr"]


def test_two_frozen_arms_from_one_start_are_refused():
    other = [{**r, "arm": "other"} for r in ablation(AFTER, BEFORE) if "part" in r["values"]]
    with pytest.raises(DataError, match="one frozen arm"):
        freeze_effects(study([*ablation(), *other]))


def test_freeze_effects_of_an_unknown_metric_name_the_closest():
    with pytest.raises(Exception, match="closest: probe"):
        freeze_effects(study(ablation()), "prob")


# --- advice ---


def advised(layer: str, stop: bool, confidence: float = 0.8) -> list[dict[str, Any]]:
    other = {"layer": "l1", "stop_gradient": not stop, "confidence": 0.99}  # the second choice never counts
    return [{"layer": layer, "stop_gradient": stop, "confidence": confidence}, other]


SCORES: dict[int, dict[tuple[str, bool], float]] = {
    0: {("input", False): 0.50, ("input", True): 0.51, ("l1", False): 0.60, ("l1", True): 0.61,
        ("l2", False): 0.70, ("l2", True): 0.64, ("l3", False): 0.55, ("l3", True): 0.66},
    1: {("input", False): 0.40, ("input", True): 0.41, ("l1", False): 0.72, ("l1", True): 0.71,
        ("l2", False): 0.60, ("l2", True): 0.70, ("l3", False): 0.65, ("l3", True): 0.56},
}  # fmt: skip
PLAIN = {0: 0.62, 1: 0.66}
ADVICE = {0: advised("l2", False), 1: advised("l2", True)}


def sweep(scores: Any = SCORES, plain: Any = PLAIN, advice: Any = ADVICE) -> list[dict[str, Any]]:
    runs = [run("plain", seed, p, advice=advice.get(seed, ())) for seed, p in plain.items()]
    settings = dict.fromkeys(setting for of in scores.values() for setting in of)
    for layer, stop in settings:
        runs += [
            run("deep", seed, of[layer, stop], layer=layer, stop_gradient=stop)
            for seed, of in scores.items()
            if (layer, stop) in of
        ]
    return runs


def outcome(runs: list[dict[str, Any]]) -> AdviceOutcome:
    return advice_outcome(study(runs), arm="deep", baseline="plain")


def test_the_outcome_of_an_advice_by_hand():
    """Seed 0: l2 without scores 0.70, first of 8. Seed 1: l2 with scores 0.70, behind l1 with and without."""
    found = outcome(sweep())
    assert found.metric == "probe"
    assert found.without == ()
    assert [list(row.values()) for row in found.advised] == [
        [0, "l2", False, 0.70, 1, 8], [1, "l2", True, 0.70, 3, 8],
    ]  # fmt: skip
    means = {seed: sum(of.values()) / 8 for seed, of in SCORES.items()}
    wanted = {
        "baseline": (0.70 - 0.62, 0.70 - 0.66),
        "last layer (l3)": (0.70 - 0.55, 0.70 - 0.56),
        "middle layer (l2)": (0.0, 0.0),
        "mean of all": (0.70 - means[0], 0.70 - means[1]),
    }
    assert list(found.against) == list(wanted)
    for name, differences in wanted.items():
        d = found.against[name]
        mean, low, high = student(*differences) if differences != (0.0, 0.0) else (0.0, 0.0, 0.0)
        assert [d["mean"], d["low"], d["high"], d["n"]] == pytest.approx([mean, low, high, 2])


@pytest.mark.parametrize(("count", "middle"), [(1, "l1"), (2, "l1"), (3, "l2"), (4, "l2"), (5, "l3")])
def test_the_middle_layer_is_that_of_the_network_without_the_input(count: int, middle: str):
    layers = ["input", *(f"l{k}" for k in range(1, count + 1))]
    scores = {seed: {(layer, True): 0.1 * k for k, layer in enumerate(layers)} for seed in (0, 1)}
    found = outcome(sweep(scores, advice={0: advised("l1", True), 1: advised("l1", True)}))
    assert list(found.against)[1:3] == [f"last layer (l{count})", f"middle layer ({middle})"]


def test_equal_scores_share_the_better_rank():
    scores = {0: {("l1", True): 0.7, ("l2", True): 0.7, ("l3", True): 0.7, ("l1", False): 0.6}}
    assert outcome(sweep(scores)[1:] + sweep(scores, advice={0: advised("l2", True)})[:1]).advised[0]["rank"] == 1


def test_the_best_setting_has_rank_one_and_the_worst_the_last():
    for setting, rank in ((("l2", False), 1), (("input", False), 8)):
        found = outcome(sweep(advice={0: advised(*setting)}))
        assert (found.advised[0]["rank"], found.advised[0]["of"]) == (rank, 8)


def test_a_seed_whose_baseline_supports_no_choice_is_named_and_left_out():
    found = outcome(sweep(advice={1: ADVICE[1]}))
    assert found.without == (0,)
    assert [row["seed"] for row in found.advised] == [1]
    assert found.against["baseline"]["mean"] == pytest.approx(0.04)
    assert found.against["baseline"]["n"] == 1
    assert str(found).splitlines()[0] == "1 of 2 seeds have a supported advice"


def test_no_supported_advice_at_all_compares_nothing():
    found = outcome(sweep(advice={}))
    assert (found.advised, found.without, found.against) == ((), (0, 1), {})
    assert str(found) == "0 of 2 seeds have a supported advice"


def test_a_seed_without_augmented_runs_does_not_count():
    found = outcome(sweep(plain={**PLAIN, 2: 0.5}, advice={**ADVICE, 2: advised("l1", True)}))
    assert [row["seed"] for row in found.advised] == [0, 1]
    assert found.without == ()


def test_a_seed_without_a_baseline_does_not_count():
    found = outcome(sweep(plain={1: 0.66}))
    assert [row["seed"] for row in found.advised] == [1]


@pytest.mark.parametrize("words", [{"arm": "deep", "baseline": "x"}, {"arm": "x", "baseline": "plain"}])
def test_an_unknown_arm_is_refused(words: dict[str, str]):
    with pytest.raises(DataError, match="'s' needs finished runs of "):
        advice_outcome(study(sweep()), **words)


def test_the_mean_rank_is_over_the_advised_seeds():
    assert numbers(Interval(**{**outcome(sweep()).mean_rank, "n": 2})) == pytest.approx(student(1, 3))
    alone = outcome(sweep(advice={1: ADVICE[1]}))
    assert alone.mean_rank["mean"] == 3
    assert "mean rank" not in str(alone)
    assert outcome(sweep(advice={})).mean_rank == {}


def test_the_second_target_can_be_looked_at_too():
    """It is l1, with the other stop-gradient: rank 4 of seed 0, with stop, and rank 1 of seed 1, without."""
    found = advice_outcome(study(sweep()), arm="deep", baseline="plain", target=2)
    assert [(row["layer"], row["stop_gradient"], row["rank"]) for row in found.advised] == [
        ("l1", True, 4), ("l1", False, 1),
    ]  # fmt: skip
    assert advice_outcome(study(sweep()), arm="deep", baseline="plain", target=3).without == (0, 1)
    with pytest.raises(ConfigError, match="target=0; allowed: 1 for the first target"):
        advice_outcome(study(sweep()), arm="deep", baseline="plain", target=0)


def test_the_outcome_in_words():
    lines = str(outcome(sweep())).splitlines()
    assert lines[:3] == [
        "2 of 2 seeds have a supported advice",
        "seed 0: l2 without stop-gradient, probe 0.7000, rank 1 of 8",
        "seed 1: l2 with stop-gradient, probe 0.7000, rank 3 of 8",
    ]
    mean, low, high = student(0.08, 0.04)
    said = f"{100 * mean:+.1f} points (95 % {100 * low:+.1f} to {100 * high:+.1f})"
    _, low, high = student(1, 3)
    assert lines[3] == f"mean rank 2.0 of 8 (95 % {low:.1f} to {high:.1f}); by chance 4.5"
    assert lines[4] == f"advised minus baseline: {said}, 2 seeds"
    assert lines[6] == "advised minus middle layer (l2): +0.0 points (95 % +0.0 to +0.0), 2 seeds"


def test_an_advice_outside_the_sweep_says_what_to_do():
    with pytest.raises(DataError, match=r"seed 0 is advised \('l9', True\), which the sweep did not run; add that"):
        outcome(sweep(advice={0: advised("l9", True), 1: advised("l9", True)}))


def test_one_advice_outside_the_sweep_leaves_the_other_seeds():
    found = outcome(sweep(advice={0: advised("l9", True), 1: ADVICE[1]}))
    assert [row["seed"] for row in found.advised] == [1]
    assert "seed 0" in str(found)
    assert "l9" in str(found)


MIDDLE_OF_WORK = "bug: a run that is not there yet, or was given up, is a KeyError (and `study table` a traceback)"


def test_a_missing_run_of_the_last_layer_leaves_that_seed_out_of_that_comparison():
    some = {0: SCORES[0], 1: {k: v for k, v in SCORES[1].items() if k != ("l3", True)}}
    found = outcome(sweep(some))
    assert [row["seed"] for row in found.advised] == [0, 1]
    assert found.against["last layer (l3)"]["n"] == 1
    assert found.against["baseline"]["n"] == 2


def test_a_missing_advised_run_is_said_to_be_missing_not_to_be_outside_the_sweep():
    some = {0: SCORES[0], 1: {k: v for k, v in SCORES[1].items() if k != ("l2", True)}}
    assert [row["seed"] for row in outcome(sweep(some)).advised] == [0]


@pytest.mark.parametrize("seed_without", ["deep", "plain"])
def test_a_run_without_the_score_is_left_out(seed_without: str):
    runs = sweep()
    victim = next(r for r in runs if r["arm"] == seed_without and r["seed"] == 0)
    victim["scores"] = {"": [{"epoch": 2, "probe": None}]}
    assert 1 in [row["seed"] for row in outcome(runs).advised]


def test_the_outcome_of_an_unknown_metric_names_the_closest():
    with pytest.raises(Exception, match="closest: probe"):
        advice_outcome(study(sweep()), "prob", arm="deep", baseline="plain")


def test_an_outcome_survives_json():
    found = outcome(sweep())
    back = AdviceOutcome.from_json(found.to_json())
    assert back.to_dict() == found.to_dict()
    assert str(back) == str(found)


def test_an_outcome_of_one_seed_prints_the_same_after_json():
    found = outcome(sweep(advice={1: ADVICE[1]}))
    assert str(AdviceOutcome.from_json(found.to_json())) == str(found)


# --- which sentences a study gets ---


def test_a_sweep_gets_the_outcome_of_its_advice_and_nothing_of_freezing():
    assert list(sentences(study(sweep()))) == [str(outcome(sweep()))]


def test_an_ablation_gets_its_effects_and_nothing_of_advice():
    runs = [*ablation(), *(run("plain", s, 0.5, advice=ADVICE[s]) for s in (0, 1))]
    assert list(sentences(study(runs))) == [str(effect) for effect in freeze_effects(study(runs))]


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [run("plain", 0, 0.5)],
        [run("deep", 0, 0.5, layer="a", stop_gradient=True)],  # no baseline
        [run("plain", 0, 0.5), run("deep", 0, 0.5, layer="a")],  # no axis stop_gradient
        [run("plain", 0, 0.5), run("deep", 0, 0.5, layer="a", stop_gradient=True, rate=0.5)],  # one axis more
        [run("plain", 0, 0.5, start="w"), run("deep", 0, 0.5, layer="a", stop_gradient=True)],
        [run("frozen", 0, 0.5, layer="a", part="before")],  # not enough of it yet
    ],
)
def test_other_studies_get_no_sentence(runs: list[dict[str, Any]]):
    assert list(sentences(study(runs))) == []


def test_two_swept_arms_get_no_outcome():
    """Which of them should follow the advice is nowhere said."""
    other = [{**r, "arm": "other"} for r in sweep() if r["arm"] == "deep"]
    assert list(sentences(study([*sweep(), *other]))) == []


def test_sentences_are_of_the_metric_that_is_asked_for():
    runs = [{**r, "scores": {"": [{"epoch": 2, "probe": 0.0, "knn": r["scores"][""][-1]["probe"]}]}} for r in sweep()]
    (said,) = sentences(study(runs), "knn")
    assert "knn 0.7000" in said


def test_an_unfinished_sweep_has_a_table_without_a_traceback():
    some = {0: SCORES[0], 1: {k: v for k, v in SCORES[1].items() if k != ("l3", True)}}
    assert isinstance(list(sentences(study(sweep(some)))), list)


def test_sentences_about_alignment_are_no_percentages():
    rows = [{**r, "scores": {"": [{"epoch": 2, "alignment_test": r["scores"][""][-1]["probe"]}]}} for r in sweep()]
    assert not any("points" in said for said in sentences(study(rows), "alignment_test"))
