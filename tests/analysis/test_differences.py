"""Tests of differences: worked by hand, paired and unpaired, with the power and the error rate that they promise."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from layerlens.analysis.cka import StreamingCKA
from layerlens.analysis.measures import parse_measure
from layerlens.analysis.pairs import PairAccumulator
from layerlens.analysis.resampling import (
    cka_of,
    difference,
    entry_difference,
    jackknife_intervals,
    leave_one_out,
    recentred_replicates,
    replicate_error,
)
from layerlens.analysis.results import CrossSimilarity, Difference, SimilarityMatrix
from layerlens.analysis.similarity import similarity_matrix
from layerlens.errors import ShapeError, UnknownLayerError


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def handmade(values, replicates, weights=None, **changes):
    """A matrix of two layers whose one entry and its replicates are given."""
    square = lambda v: np.array([[1.0, v], [v, 1.0]])  # noqa: E731
    replicates = np.stack([square(v) for v in replicates])
    weights = np.full(len(replicates), 10.0) if weights is None else np.array(weights, dtype=float)
    given = {
        "layers": ("a", "b"), "values": square(values), "low": square(np.nan), "high": square(np.nan),
        "measure": "svcca", "options": {"variance": 0.99}, "samples": int(weights.sum()), "sample_id": "same",
        "participation": np.full(2, np.nan), "weights": weights, "replicates": replicates,
    }  # fmt: skip
    return SimilarityMatrix(**{**given, **changes})


def without(groups, weights=None):
    """Means without each group, from the groups' means."""
    groups = np.array(groups, dtype=float)
    weights = np.ones(len(groups)) if weights is None else np.array(weights, dtype=float)
    return (groups @ weights - groups * weights) / (weights.sum() - weights)


def rectangle(values, replicates, **changes):
    given = {
        "first": ("a", "b"), "second": ("c",), "values": values, "low": np.full((2, 1), np.nan),
        "high": np.full((2, 1), np.nan), "samples": 40, "weights": np.full(len(replicates), 10.0),
        "replicates": replicates,
    }  # fmt: skip
    return CrossSimilarity(**{**given, **changes})


# --- jackknife intervals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbias", [False, True])
def test_the_jackknife_interval_of_a_mean_is_that_of_the_group_means(unbias):
    """Groups of mean 1.5, 3.5 and 5.5: error 2 / √3, t(2) = 4.3027; a mean has no bias to take off."""
    low, high = jackknife_intervals(
        np.array(3.5), without([1.5, 3.5, 5.5]), np.full(3, 2.0), 0.95, bounded=False, unbias=unbias
    )
    assert (low, high) == (pytest.approx(3.5 - 4.302653 * 2 / 3**0.5), pytest.approx(3.5 + 4.302653 * 2 / 3**0.5))


def test_the_jackknife_interval_of_unequal_groups_worked_by_hand():
    """Weights 1, 1, 2 and means 0, 4, 1: mean 1.5; without them 2, 2/3 and 2; pseudo-values 4·1.5 − 3·2 = 0,
    6 − 2 = 4 and 2·1.5 − 2 = 1 around 1.5: variance (2.25/3 + 6.25/3 + 0.25/1) / 3."""
    weights = np.array([1.0, 1, 2])
    error = math.sqrt((2.25 / 3 + 6.25 / 3 + 0.25) / 3)
    replicates = without([0, 4, 1], weights)
    np.testing.assert_allclose(replicates, [2, 2 / 3, 2])
    assert replicate_error(replicates, weights, np.array(1.5)) == pytest.approx(error)
    low, high = jackknife_intervals(np.array(1.5), replicates, weights, 0.95, bounded=False, unbias=True)
    assert (low, high) == (pytest.approx(1.5 - 4.302653 * error), pytest.approx(1.5 + 4.302653 * error))


def test_the_bias_of_a_variance_is_taken_off_and_its_own_error_counted():
    """Dividing by n is too low by s² / n, which leaving out single samples finds exactly."""
    x = np.array([1.0, 2, 4, 9, 5])
    whole, without_one = x.var(), np.array([np.delete(x, i).var() for i in range(5)])
    low, high = jackknife_intervals(np.array(whole), without_one, np.ones(5), 0.9, bounded=False, unbias=True)
    assert (low + high) / 2 == pytest.approx(x.var(ddof=1))
    error = replicate_error(without_one, np.ones(5), np.array(whole))
    reach = stats.t.ppf(0.95, 4) * math.hypot(error, (x.var(ddof=1) - whole) / 2**0.5)
    assert (high - low) / 2 == pytest.approx(reach)
    plain = jackknife_intervals(np.array(whole), without_one, np.ones(5), 0.9, bounded=False, unbias=False)
    assert sum(plain) / 2 == pytest.approx(whole)
    assert plain[1] - plain[0] == pytest.approx(2 * stats.t.ppf(0.95, 4) * error)


def test_bounded_intervals_are_those_of_fishers_z():
    """Without a group z is 0.9, 1.1 or 1.3: error √(2/3 · 0.08), t(2) = 2.919986, around z = 1."""
    values, replicates = np.tanh(np.array(1.0)), np.tanh(np.array([0.9, 1.1, 1.3]))
    low, high = jackknife_intervals(values, replicates, np.ones(3), 0.9, bounded=True, unbias=False)
    reach = 2.919986 * math.sqrt(2 / 3 * 0.08)
    assert np.arctanh([low, high]) == pytest.approx([1 - reach, 1 + reach])


def test_intervals_of_arrays_are_those_of_their_entries():
    values, replicates, weights = (
        np.array([[0.2, 0.5]]),
        np.random.default_rng(0).normal(0.4, 0.1, (4, 1, 2)),
        np.ones(4),
    )
    low, high = jackknife_intervals(values, replicates, weights, 0.95, bounded=True, unbias=True)
    for k in range(2):
        one = jackknife_intervals(values[0, k], replicates[:, 0, k], weights, 0.95, bounded=True, unbias=True)
        assert (low[0, k], high[0, k]) == (pytest.approx(one[0]), pytest.approx(one[1]))


# --- differences by hand -----------------------------------------------------------------------------------------

FIRST, SECOND = [0.1, 0.3, 0.2, 0.4], [0.6, 0.7, 0.7, 0.8]  # means of four groups


def test_a_paired_difference_is_tested_group_by_group():
    """Differences of the groups 0.5 0.4 0.5 0.4: mean 0.45, error √(0.01/3/4), t(3) = 15.59."""
    found = difference(handmade(0.25, without(FIRST)), handmade(0.7, without(SECOND)))
    error = math.sqrt(0.01 / 3 / 4)
    assert found.paired
    assert found.values[0, 1] == pytest.approx(0.45)
    assert found.p_value[0, 1] == pytest.approx(2 * stats.t.sf(0.45 / error, 3))
    assert (found.high - found.low)[0, 1] == pytest.approx(2 * 3.182446 * error)
    assert found.low[0, 1] + found.high[0, 1] == pytest.approx(0.9)


def test_an_unpaired_difference_adds_both_errors():
    found = difference(handmade(0.25, without(FIRST)), handmade(0.7, without(SECOND), sample_id="other"), level=0.9)
    error = math.hypot(np.std(FIRST, ddof=1), np.std(SECOND, ddof=1)) / 2
    assert not found.paired
    assert found.p_value[0, 1] == pytest.approx(2 * stats.t.sf(0.45 / error, 3))
    assert (found.high - found.low)[0, 1] == pytest.approx(2 * 2.353363 * error)
    assert found.level == 0.9


def test_unpaired_matrices_may_have_different_numbers_of_groups():
    """The quantile is that of the fewer."""
    found = difference(handmade(0.25, without(FIRST)), handmade(0.6, without([0.5, 0.6, 0.7])))
    error = math.hypot(np.std(FIRST, ddof=1) / 2, 0.1 / 3**0.5)
    assert not found.paired
    assert found.p_value[0, 1] == pytest.approx(2 * stats.t.sf(0.35 / error, 2))


def test_the_sign_is_second_minus_first():
    one, two = handmade(0.25, without(FIRST)), handmade(0.7, without(SECOND))
    forth, back = difference(one, two), difference(two, one)
    np.testing.assert_allclose(forth.values, -back.values)
    np.testing.assert_allclose(forth.low, -back.high)
    np.testing.assert_allclose(forth.p_value, back.p_value)


@pytest.mark.parametrize(
    ("changes", "paired"),
    [
        ({}, True),
        ({"sample_id": "other"}, False),
        ({"weights": [10, 10, 10, 11]}, False),
        ({"reduce": "pool"}, True),
        ({"level": 0.5}, True),
    ],
)
def test_matrices_are_paired_where_samples_and_groups_are_the_same(changes, paired):
    assert difference(handmade(0.25, without(FIRST)), handmade(0.7, without(SECOND), **changes)).paired is paired


def test_matrices_of_unknown_samples_are_not_paired():
    one, two = (handmade(v, without(g), sample_id="") for v, g in ((0.25, FIRST), (0.7, SECOND)))
    assert not difference(one, two).paired


def test_a_matrix_does_not_differ_from_itself():
    """Without variation there is nothing to test; taken as other samples, the chance is one."""
    matrix = handmade(0.25, without(FIRST))
    itself, other = difference(matrix, matrix), difference(matrix, replace(matrix, sample_id="other"))
    for found in (itself, other):
        np.testing.assert_array_equal(found.values, 0.0)
        assert np.isnan(found.p_value.diagonal()).all()
        assert np.isnan(found.adjusted.diagonal()).all()
    assert math.isnan(itself.p_value[0, 1])
    assert other.p_value[0, 1] == other.adjusted[0, 1] == 1.0
    assert other.low[0, 1] < 0 < other.high[0, 1]


def test_a_change_without_any_variation_is_certain():
    found = difference(handmade(0.25, [0.2, 0.3, 0.25]), handmade(0.5, [0.45, 0.55, 0.5]))
    assert found.p_value[0, 1] == pytest.approx(0.0, abs=1e-12)
    assert (found.low[0, 1], found.high[0, 1]) == (pytest.approx(0.25), pytest.approx(0.25))


def test_two_entries_of_one_matrix_are_compared_group_by_group():
    values = np.array([[0.25], [0.7]])
    replicates = np.stack([without(FIRST), without(SECOND)], 1)[:, :, None]
    found = entry_difference(rectangle(values, replicates), ("a", "c"), ("b", "c"))
    error = math.sqrt(0.01 / 3 / 4)
    assert (found.rows, found.columns, found.paired) == (("a–c",), ("b–c",), True)
    assert found.values.item() == pytest.approx(0.45)
    assert found.p_value.item() == found.adjusted.item() == pytest.approx(2 * stats.t.sf(0.45 / error, 3))
    assert found.high.item() - found.low.item() == pytest.approx(2 * 3.182446 * error)
    np.testing.assert_allclose(entry_difference(rectangle(values, replicates), ("b", "c"), ("a", "c")).values, -0.45)


def test_an_entry_does_not_differ_from_itself_or_its_mirror_image():
    matrix = handmade(0.25, without(FIRST))
    for second in (("a", "b"), ("b", "a")):
        found = entry_difference(matrix, ("a", "b"), second)
        assert found.values.item() == 0.0
        assert math.isnan(found.p_value.item())


# --- Holm --------------------------------------------------------------------------------------------------------


def holm(p):
    """Step by step, as Holm 1979 has it."""
    order, adjusted, running = np.argsort(p), np.empty(len(p)), 0.0
    for rank, k in enumerate(order):
        running = max(running, min(1.0, (len(p) - rank) * p[k]))
        adjusted[k] = running
    return adjusted


def four_layers(seed, scale=0.1, missing=False):
    random = np.random.default_rng(seed)
    groups = random.normal(0.5, scale, (6, 4, 4))
    groups = (groups + groups.transpose(0, 2, 1)) / 2
    groups[:, range(4), range(4)] = 1.0
    if missing:
        groups[:, 2, :] = groups[:, :, 2] = np.nan
    values = groups.mean(0)
    replicates = (groups.sum(0) - groups) / 5
    return SimilarityMatrix(
        layers=tuple("abcd"), values=values, low=values, high=values, measure="svcca", samples=60,
        participation=np.full(4, np.nan), weights=np.full(6, 10.0), replicates=replicates,
    )  # fmt: skip


@pytest.mark.parametrize("missing", [False, True])
def test_adjusted_chances_are_holms_over_the_distinct_entries(missing):
    found = difference(four_layers(0), four_layers(1, missing=missing))
    upper = [(i, j) for i in range(4) for j in range(i + 1, 4) if not (missing and 2 in (i, j))]
    raw = np.array([found.p_value[place] for place in upper])
    np.testing.assert_allclose([found.adjusted[place] for place in upper], holm(raw))
    np.testing.assert_array_equal(found.adjusted, found.adjusted.T)
    tested = ~np.isnan(found.p_value)
    assert tested.sum() == 2 * len(upper)
    assert (np.isnan(found.adjusted) == ~tested).all()
    assert (found.adjusted[tested] >= found.p_value[tested]).all()
    assert (found.adjusted[tested] <= 1).all()


def test_adjusted_chances_of_a_rectangle_count_every_entry():
    random = np.random.default_rng(0)
    groups = random.normal(0.5, 0.1, (2, 6, 2, 2)) + np.array([0, 0.08])[:, None, None, None]
    both = [rectangle(g.mean(0), (g.sum(0) - g) / 5, second=("c", "d"), low=g.mean(0), high=g.mean(0)) for g in groups]
    found = difference(*both)
    np.testing.assert_allclose(found.adjusted.ravel(), holm(found.p_value.ravel()))
    assert (found.adjusted > found.p_value).any()


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ("a", "c")}, r"the matrices have other layers: \('a', 'b'\) and \('a', 'c'\); choose the same"),
        ({"measure": "pwcca"}, r"the matrices hold other measures: svcca .* and pwcca"),
        ({"options": {"variance": 0.9}}, r"other measures: svcca \{'variance': 0\.99\} and svcca"),
    ],
)
def test_matrices_of_other_things_are_refused(change, message):
    with pytest.raises(ShapeError, match=message):
        difference(handmade(0.25, without(FIRST)), replace(handmade(0.7, without(SECOND)), **change))


@pytest.mark.parametrize("which", [0, 1])
def test_a_matrix_without_groups_is_refused(which):
    matrices = [handmade(0.25, without(FIRST)), handmade(0.7, without(SECOND))]
    matrices[which] = replace(matrices[which], replicates=np.zeros((0, 2, 2)), weights=np.zeros(0))
    with pytest.raises(ShapeError, match="a test needs at least two groups of samples; give more batches"):
        difference(*matrices)
    with pytest.raises(ShapeError, match="at least two groups"):
        entry_difference(matrices[which], ("a", "b"), ("a", "a"))


def test_one_batch_is_no_two_groups():
    state = StreamingCKA(["a", "b"])
    state.update([draw(20, 3), draw(20, 3, seed=1)])
    with pytest.raises(ShapeError, match="at least two groups"):
        difference(state.compute(), state.compute())


def test_an_entry_of_an_unknown_layer_is_refused():
    with pytest.raises(UnknownLayerError, match="no layer 'x' in this matrix; allowed: a, b"):
        entry_difference(handmade(0.25, without(FIRST)), ("a", "x"), ("a", "b"))


@pytest.mark.parametrize("level", [95, 0.0, 1.0])
def test_a_level_outside_zero_and_one_is_refused(level):
    with pytest.raises(ValueError, match="level="):
        difference(handmade(0.25, without(FIRST)), handmade(0.7, without(SECOND)), level=level)


# --- real matrices -----------------------------------------------------------------------------------------------


class Halves(nn.Module):
    """The thirds of the input's features as three layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x):
        parts = x.chunk(3, 1)
        return self.a(parts[0]), self.b(parts[1]), self.c(parts[2])


def thirds(n=160, p=6, noise=(0.5, 0.5), seed=0):
    """b and c are noisy copies of a."""
    a, b, c = draw(3, n, p, seed=seed)
    return torch.cat([a, a + noise[0] * b, a + noise[1] * c], 1)


def measured(rows, measure="cka", **options):
    return similarity_matrix(Halves(), rows.split(16), "a,b,c", measure=measure, **options)


KINDS = ["cka", "cka,kernel=rbf", "cka,estimator=debiased", "cka,estimator=biased", "procrustes", "rsa_pearson"]


@pytest.mark.parametrize("measure", KINDS)
def test_layers_that_really_differ_are_told_apart(measure):
    """More noise on b in the second data; c stays as alike as it was. The samples are not the same ones."""
    quiet, loud = measured(thirds(), measure), measured(thirds(noise=(2.0, 0.5), seed=1), measure)
    found = difference(quiet, loud)
    assert not found.paired
    assert found.adjusted[0, 1] < 0.01
    assert found.p_value[0, 1] < 1e-2 * found.p_value[0, 2]
    np.testing.assert_allclose(found.values, loud.values - quiet.values)
    assert not found.low[0, 1] <= 0 <= found.high[0, 1]
    within = entry_difference(loud, ("a", "b"), ("a", "c"))
    assert within.p_value.item() < 1e-2 * entry_difference(quiet, ("a", "b"), ("a", "c")).p_value.item()
    assert within.p_value.item() < 0.001
    assert within.values.item() == pytest.approx(loud.between("a", "c") - loud.between("a", "b"))


@pytest.mark.parametrize("measure", ["cka", "cka,estimator=debiased", "procrustes"])
def test_pairing_takes_out_what_the_samples_share(measure):
    """Slightly more of the same noise on b shows only where the samples are compared one by one."""
    one, two = (measured(thirds(noise=(level, 0.5)), measure) for level in (0.5, 0.53))
    two = replace(two, sample_id=one.sample_id)  # two checkpoints see the same samples; here the data stand for them
    paired, apart = difference(one, two), difference(one, replace(two, sample_id="other"))
    assert paired.paired
    assert not apart.paired
    assert paired.p_value[0, 1] < 0.05 < apart.p_value[0, 1]
    assert (paired.high - paired.low)[0, 1] < 0.5 * (apart.high - apart.low)[0, 1]
    np.testing.assert_array_equal(paired.values, apart.values)


def test_two_models_on_the_same_loader_are_paired():
    rows = thirds()
    found = [
        similarity_matrix(Halves(), rows.split(16), "a", other=Halves(), other_layers=layers, measure=measure)
        for measure in ("cka", "procrustes")
        for layers in ("b,c", "b,c")
    ]
    assert difference(found[0], found[1]).paired
    assert np.isnan(difference(found[2], found[3]).p_value).all()
    assert difference(found[0], found[1]).rows == ("a",)


@pytest.mark.parametrize("estimator", ["minibatch", "debiased", "biased"])
def test_replicates_scatter_around_the_values_of_their_own_estimator(estimator):
    found = measured(thirds(80, 20), f"cka,estimator={estimator}")
    replicates = recentred_replicates(found)
    np.testing.assert_allclose(replicates.mean(0), found.values, atol=0.02)
    own = leave_one_out(found.blocks, found.weights) - cka_of(np.average(found.blocks, axis=0, weights=found.weights))
    np.testing.assert_allclose(replicates - found.values, own, atol=1e-12)


@pytest.mark.parametrize("kind", [difference, None])
def test_a_difference_comes_back_from_json_and_leaves_as_a_frame(kind):
    one, two = measured(thirds()), measured(thirds(seed=1))
    found = difference(one, two) if kind else entry_difference(one, ("a", "b"), ("a", "c"))
    text = found.to_json()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    back = Difference.from_json(text)
    for name, value in vars(found).items():
        np.testing.assert_equal(getattr(back, name), value, err_msg=name)
    frame = found.to_frame()
    assert list(frame.columns) == ["layer_a", "layer_b", "values", "low", "high", "p_value", "adjusted"]
    assert len(frame) == found.values.size
    np.testing.assert_equal(frame["p_value"].to_numpy(), found.p_value.ravel())


# --- error rate --------------------------------------------------------------------------------------------------

CASES = 300


def accumulated(parts, names, measure):
    """The matrix of batches of layers: minibatch CKA in batches of 16, or another measure in 6 groups."""
    if measure == "cka":
        state = StreamingCKA(names, errors=False)
        for batch in zip(*(p.split(16) for p in parts), strict=True):
            state.update(batch)
    else:
        state = PairAccumulator(names, *parse_measure(measure), groups=6)
        for position, rows in enumerate(parts):
            state.take(position, rows)
        state.end_batch()
    return state.compute()


def sampled(generator, n=96):
    """A layer and two copies that are equally noisy."""
    a, b, c = torch.randn(3, n, 4, generator=generator)
    return a, a + b, a + c


def unpaired_chance(generator, measure):
    one, two = (accumulated(sampled(generator, 192)[:2], "ab", measure) for _ in range(2))
    found = difference(one, two)
    assert not found.paired
    return found.p_value[0, 1]


def paired_chance(generator, measure):
    a, b, c = sampled(generator)
    one, two = (replace(accumulated((a, y), "ab", measure), sample_id="same") for y in (b, c))
    found = difference(one, two)
    assert found.paired
    return found.p_value[0, 1]


def entry_chance(generator, measure):
    matrix = accumulated(sampled(generator), "abc", measure)
    return entry_difference(matrix, ("a", "b"), ("a", "c")).p_value.item()


@pytest.mark.parametrize(
    ("chance", "measure"),
    [(unpaired_chance, "cka"), (paired_chance, "cka"), (entry_chance, "cka"), (entry_chance, "procrustes")],
)
def test_where_nothing_differs_one_in_twenty_is_called_different(chance, measure):
    """Of 300 the binomial spread is 1.3 %."""
    generator = torch.Generator().manual_seed(3)
    found = np.array([chance(generator, measure) for _ in range(CASES)])
    assert 0.02 <= (found < 0.05).mean() <= 0.08
    assert 0.4 < np.median(found) < 0.6


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("groups", [3, 8, 30])
def test_chances_of_normal_groups_are_evenly_spread(groups, paired):
    """A paired test of means is exactly Student's; an unpaired one has more degrees of freedom than it counts on."""
    values = 0.5 + 0.1 * np.random.default_rng(groups).normal(size=(2, groups, 4000, 1))
    one, two = (
        rectangle(
            v.mean(0), (v.sum(0) - v) / (groups - 1), first=tuple(map(str, range(4000))), low=v.mean(0),
            high=v.mean(0), sample_id="same" if paired else name,
        )
        for v, name in zip(values, "ab", strict=True)
    )  # fmt: skip
    found = difference(one, two)
    assert found.paired is paired
    wrong = (found.p_value < 0.05).mean()
    assert 0.04 < wrong < 0.06 if paired else 0.005 < wrong < 0.055
    assert (found.adjusted < 0.05).sum() <= 2
