"""From regions to targets: which layer, with stop-gradient or without, in which order, and with what caution."""

import json

import numpy as np
import pytest

from layerlens.analysis.resampling import cka_of, jackknife_intervals, leave_one_out
from layerlens.analysis.results import Geometry, SimilarityMatrix
from layerlens.errors import DataError
from layerlens.recommendation import Recommendation, recommend


def noisy(similarity, *, batches=8, noise=0.01, seed=0, participation=None):
    """A result whose batches are a similarity matrix and a little symmetric noise."""
    similarity = np.asarray(similarity, dtype=float)
    draws = np.triu(np.random.default_rng(seed).normal(0, noise, (batches, *similarity.shape)), 1)
    blocks, weights = similarity + draws + draws.swapaxes(1, 2), np.full(batches, 64.0)
    values, count = cka_of(blocks.mean(0)), len(similarity)
    without = leave_one_out(blocks, weights)
    low, high = jackknife_intervals(values, without, weights, 0.95, bounded=True, unbias=False)
    return SimilarityMatrix(
        layers=tuple(f"l{i}" for i in range(count)), values=values, low=low, high=high, samples=64 * batches,
        participation=np.full(count, 9.0) if participation is None else participation, blocks=blocks, weights=weights,
    )  # fmt: skip


def levels(lengths, within=0.9, across=0.2):
    label = np.repeat(np.arange(len(lengths)), lengths)
    within = np.broadcast_to(within, len(lengths))[label]
    similarity = np.where(label[:, None] == label[None, :], within[:, None], across).astype(float)
    np.fill_diagonal(similarity, 1.0)
    return similarity


TRAINED, TWIN = noisy(levels([3, 4, 1])), noisy(levels([8], 0.9), seed=1)


def codes(found):
    return [caution.code for caution in found.cautions]


def places(found):
    return [(t.rank, t.layer, t.index, t.stop_gradient) for t in found.targets]


def test_a_region_is_started_with_stop_gradient_and_ended_without_deepest_first():
    found = recommend(TRAINED, TWIN, resamples=20)
    assert places(found) == [(1, "l3", 3, True), (2, "l6", 6, False), (3, "l0", 0, True), (4, "l2", 2, False)]
    assert found.verdict == "supported"
    assert found.reason == "l3 to l6 is the strongest deep run of 2"
    assert codes(found) == []
    assert found.samples == 512


def test_strength_counts_as_well_as_depth():
    """Gains about .7 at depth 1/7 and .1 at depth 5/7 without a twin: 0.10 against 0.07."""
    matrix = noisy(levels([3, 1, 3, 1], within=[0.9, 0.2, 0.3, 0.2]), noise=0.001)
    found = recommend(matrix, resamples=5)
    strengths = [r.contrast.value * (int(r.layers[0][1:]) + int(r.layers[-1][1:])) / 14 for r in found.regions.regions]
    order = [t.layer for t in found.targets if t.stop_gradient]
    starts = [r.layers[0] for r in found.regions.regions]
    assert order == [starts[i] for i in np.argsort(strengths)[::-1]]
    assert order[0] == "l0"


def test_the_gain_over_the_twin_ranks_where_there_is_a_twin():
    """The deeper run has the larger contrast, but most of it is there untrained as well."""
    matrix = noisy(levels([3, 2, 3], within=[0.7, 0.2, 0.9], across=0.1), noise=0.003)
    twin = noisy(levels([3, 2, 3], within=[0.1, 0.1, 0.85], across=0.1), noise=0.003, seed=1)
    assert recommend(matrix, resamples=5).targets[0].layer == "l5"
    assert recommend(matrix, twin, resamples=5).targets[0].layer == "l0"


def test_evidence_and_confidence_are_those_of_the_region():
    found = recommend(TRAINED, TWIN, resamples=20)
    region, first, second = found.regions.regions[1], *found.targets[:2]
    assert first.evidence == {
        "within": region.within, "outside": region.outside, "contrast": region.contrast.value,
        "twin": region.twin.value, "gain": region.gain.value,
    }  # fmt: skip
    assert (first.confidence, second.confidence) == (region.start_confidence, region.end_confidence)
    assert f"CKA {region.within:.2f} within against {region.outside:.2f}" in first.reason
    assert "l3 to l6 starts here" in first.reason
    assert "l3 to l6 ends here" in second.reason
    assert "untrained" in first.reason


def test_without_a_twin_there_is_a_target_and_a_caution_ll007():
    found = recommend(TRAINED, resamples=5)
    assert found.verdict == "supported"
    assert codes(found) == ["LL007"]
    assert found.targets[0].evidence["twin"] is None
    assert found.targets[0].evidence["gain"] is None
    assert "untrained" not in found.targets[0].reason


def test_what_the_architecture_alone_does_is_no_target_ll002():
    found = recommend(TRAINED, TRAINED, resamples=5)
    assert (found.verdict, found.targets) == ("no supported choice", ())
    assert found.reason == "the runs that stand out do so before training as well, so training did not make them"
    assert codes(found) == ["LL002", "LL002"]


def test_too_few_batches_give_no_target_ll003():
    found = recommend(noisy(levels([3, 4, 1]), batches=3), TWIN, resamples=5)
    assert (found.verdict, found.targets) == ("no supported choice", ())
    assert "too few samples or batches" in found.reason
    assert "LL003" in codes(found)


def test_no_region_is_an_answer_of_its_own_ll001():
    found = recommend(noisy(levels([6], 0.5), noise=0.05), noisy(levels([6], 0.5), seed=1), resamples=5)
    assert (found.verdict, found.targets) == ("no supported choice", ())
    assert found.reason == "no run of layers stands out from its neighbours beyond chance"
    assert codes(found) == ["LL001"]


def test_an_embedding_of_one_direction_is_collapsed_ll005():
    matrix = noisy(levels([3, 4, 1]), participation=np.array([9.0] * 7 + [1.2]))
    found = recommend(matrix, TWIN, resamples=5)
    assert codes(found) == ["LL005"]
    assert "1.20 directions carry the variance of l7" in found.cautions[0].text
    assert found.cautions[0].layers == ("l7",)
    narrow_inside = noisy(levels([3, 4, 1]), participation=np.array([1.2] + [9.0] * 7))
    assert codes(recommend(narrow_inside, TWIN, resamples=5)) == []


@pytest.mark.parametrize(("uniformity", "expected"), [(-0.05, ["LL005"]), (-2.5, [])])
def test_a_uniformity_near_zero_is_a_collapse_ll005(uniformity, expected):
    geometry = Geometry(alignment=0.01, uniformity=uniformity, samples=100, split="test")
    assert codes(recommend(TRAINED, TWIN, geometry=geometry, resamples=5)) == expected


def test_a_target_at_the_last_layer_is_told_ll008():
    found = recommend(noisy(levels([3, 4])), noisy(levels([7], 0.9), seed=1), resamples=5)
    assert codes(found) == ["LL008"]
    assert found.cautions[0].layers == ("l6",)
    assert "l6 is the last layer" in found.cautions[0].text


def test_a_run_over_nearly_all_layers_is_told_ll009():
    found = recommend(noisy(levels([7, 1])), TWIN, resamples=5)
    assert codes(found) == ["LL009"]
    assert "7 of 8 layers" in found.cautions[0].text
    assert found.cautions[0].layers == tuple(f"l{i}" for i in range(7))
    assert "LL009" not in codes(recommend(noisy(levels([6, 2])), TWIN, resamples=5))


def test_cautions_are_in_the_order_of_their_codes():
    matrix = noisy(levels([3, 4]), batches=3, participation=np.full(7, 1.0))
    assert codes(recommend(matrix, resamples=5)) == ["LL001", "LL003", "LL005", "LL007"]


def test_printing_shows_verdict_targets_and_cautions():
    lines = str(recommend(TRAINED, resamples=20)).splitlines()
    assert lines[0] == "supported: l3 to l6 is the strongest deep run of 2"
    assert lines[1].startswith("1. l3 with stop-gradient (confidence 100%): the co-adapted run l3 to l6 starts here")
    assert lines[2].startswith("2. l6 without stop-gradient (confidence 100%)")
    assert lines[5].startswith("LL007 no untrained twin")
    assert len(lines) == 6


def test_printing_without_support_says_so_and_why():
    text = str(recommend(noisy(levels([6], 0.5), noise=0.05), resamples=5))
    assert text.startswith("no supported choice: no run of layers stands out")
    assert "\n1. " not in text
    assert "\nLL001 no region" in text


def test_the_frame_has_one_row_per_target():
    found = recommend(TRAINED, TWIN, resamples=5)
    frame = found.to_frame()
    assert list(frame["rank"]) == [1, 2, 3, 4]
    assert list(frame.layer) == ["l3", "l6", "l0", "l2"]
    assert list(frame.stop_gradient) == [True, False, True, False]
    assert {"confidence", "reason", "contrast", "gain", "twin", "within", "outside", "index"} <= set(frame.columns)
    np.testing.assert_array_equal(frame.contrast, [t.evidence["contrast"] for t in found.targets])


def test_the_frame_without_targets_keeps_its_columns():
    frame = recommend(TRAINED, TRAINED, resamples=5).to_frame()
    assert len(frame) == 0
    assert {"rank", "layer", "stop_gradient", "confidence"} <= set(frame.columns)


@pytest.mark.parametrize("baseline", [None, TWIN, TRAINED], ids=["no twin", "supported", "unsupported"])
def test_a_recommendation_comes_back_from_json(baseline):
    found = recommend(TRAINED, baseline, resamples=5)
    back = Recommendation.from_json(found.to_json())
    assert back == found
    assert str(back) == str(found)
    assert json.loads(found.to_json())["type"] == "Recommendation"


def test_a_damaged_recommendation_is_refused():
    content = recommend(TRAINED, TWIN, resamples=5).to_dict()
    for key, value in (("regions", {}), ("targets", [{"rank": 1}]), ("cautions", [{"text": "no code"}])):
        with pytest.raises(DataError, match="this Recommendation is damaged"):
            Recommendation.from_dict({**content, key: value})


def test_a_seed_decides_the_confidences():
    values = levels([4, 4])
    values[3, 4:] = values[4:, 3] = values[3, :3] = values[:3, 3] = 0.6
    matrix = noisy(values, noise=0.1)
    first, again = (recommend(matrix, resamples=50, seed=3) for _ in range(2))
    assert first == again
