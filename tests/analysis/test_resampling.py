"""Jackknife and bootstrap over batches: textbook formulas, and intervals that cover what they promise."""

import numpy as np
import pytest
import torch

from layerlens.analysis.cka import StreamingCKA
from layerlens.analysis.resampling import (
    bootstrap,
    cka_of,
    jackknife_error,
    jackknife_intervals,
    leave_one_out,
    t_quantile,
)
from layerlens.analysis.results import SimilarityMatrix
from layerlens.analysis.whole_set import WholeSetCKA


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def three_layers(sizes=(16, 16, 16, 16, 16), kind=StreamingCKA, **options):
    shared, a, b, c = draw(4, sum(sizes), 8)
    state = kind(["a", "b", "c"], **options)
    for batch in zip(*(t.split(list(sizes)) for t in (shared + a, shared + 0.5 * b, c)), strict=True):
        state.update(batch)
    return state.compute()


def test_cka_of_divides_by_the_root_of_the_diagonal():
    found = cka_of(np.array([[[4.0, 3.0], [3.0, 9.0]]]))
    np.testing.assert_allclose(found, [[[1.0, 0.5], [0.5, 1.0]]])


def test_cka_of_a_zero_or_negative_diagonal_is_nan_without_a_warning():
    found = cka_of(np.array([[0.0, 0.0, 0.0], [0.0, -1.0, 0.5], [0.0, 0.5, 1.0]]))
    np.testing.assert_array_equal(np.isfinite(found), np.diag([False, False, True]))


def test_leave_one_out_equals_the_matrix_of_the_remaining_batches():
    shared, a, b = draw(3, 40, 8)
    x, y, sizes = shared + a, shared + b, [16, 12, 12]
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    whole = StreamingCKA(["x", "y"])
    for batch in batches:
        whole.update(batch)
    found = leave_one_out(whole.compute().blocks, whole.compute().weights)
    for left_out in range(3):
        rest = StreamingCKA(["x", "y"])
        for number, batch in enumerate(batches):
            if number != left_out:
                rest.update(batch)
        np.testing.assert_allclose(found[left_out], rest.compute().values, atol=1e-12)


def test_jackknife_of_equal_batches_is_the_textbook_formula():
    matrix = three_layers()
    without = np.array([m[0, 1] for m in leave_one_out(matrix.blocks, matrix.weights)])
    expected = np.sqrt(4 / 5 * ((without - without.mean()) ** 2).sum())
    assert jackknife_error(lambda s: s[..., 0, 1], matrix) == pytest.approx(expected, rel=1e-9)


def test_jackknife_of_a_mean_is_the_standard_error_of_the_mean():
    """With unit diagonals the off-diagonal entry is the plain mean of 1, 2, 3, 4 tenths: error √(5/3/4) / 10."""
    blocks = np.stack([np.array([[1.0, v], [v, 1.0]]) for v in (0.1, 0.2, 0.3, 0.4)])
    matrix = handmade(blocks, np.full(4, 10.0))
    assert jackknife_error(lambda s: s[..., 0, 1], matrix) == pytest.approx(np.sqrt(5 / 12) / 10, rel=1e-9)


def handmade(blocks, weights, estimator="minibatch"):
    values = cka_of(np.average(blocks, axis=0, weights=weights))
    without = leave_one_out(blocks, weights)
    low, high = jackknife_intervals(values, without, weights, 0.95, bounded=True, unbias=False)
    return SimilarityMatrix(
        layers=tuple("abcdefgh"[: blocks.shape[1]]), values=values, low=low, high=high, samples=int(weights.sum()),
        options={"estimator": estimator}, participation=np.full(blocks.shape[1], 5.0), blocks=blocks, weights=weights,
    )  # fmt: skip


def test_a_batch_of_unequal_size_counts_by_its_size_in_the_jackknife():
    """Busing's error of one mean per batch, written out for sizes 1, 2, 3 and batch values .1, .2, .6."""
    values, n = np.array([0.1, 0.2, 0.6]), np.array([1.0, 2.0, 3.0])
    blocks = np.stack([np.array([[1.0, v], [v, 1.0]]) for v in values])
    whole, h = np.average(values, weights=n), n.sum() / n
    without = (n @ values - n * values) / (n.sum() - n)
    estimate = 3 * whole - ((1 - n / n.sum()) * without).sum()
    pseudo = h * whole - (h - 1) * without
    expected = np.sqrt(((pseudo - estimate) ** 2 / (h - 1)).mean())
    assert jackknife_error(lambda s: s[..., 0, 1], handmade(blocks, n)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("level", "groups", "expected"), [(0.95, 2, 12.7062), (0.95, 10, 2.26216), (0.9, 4, 2.35336)])
def test_t_quantiles_are_those_of_the_table(level, groups, expected):
    assert t_quantile(level, groups) == pytest.approx(expected, abs=1e-4)


def test_intervals_hold_their_value_are_symmetric_and_stay_inside_minus_one_and_one():
    found = three_layers()
    off = ~np.eye(3, dtype=bool)
    assert (found.low[off] < found.values[off]).all()
    assert (found.values[off] < found.high[off]).all()
    assert (abs(np.stack([found.low, found.high])) <= 1).all()
    np.testing.assert_allclose(found.low, found.low.T, atol=1e-9)
    np.testing.assert_array_equal(found.low.diagonal(), 1.0)
    np.testing.assert_array_equal(found.high.diagonal(), 1.0)


def test_a_higher_level_gives_a_wider_interval():
    narrow, wide = three_layers(level=0.5), three_layers(level=0.99)
    assert wide.low[0, 1] < narrow.low[0, 1]
    assert narrow.high[0, 1] < wide.high[0, 1]


def test_one_batch_has_an_interval_from_its_samples():
    found = three_layers(sizes=(40,))
    assert (found.low[0, 1] < found.values[0, 1]) & (found.values[0, 1] < found.high[0, 1])


def test_without_errors_there_is_no_interval():
    found = three_layers(errors=False)
    assert np.isfinite(found.values).all()
    assert np.isnan(found.low[0, 1])


def test_a_constant_layer_has_no_interval_and_leaves_the_others_theirs():
    state = StreamingCKA(["x", "dead", "y"])
    for x, y in zip(draw(40, 5).split(10), draw(40, 5, seed=1).split(10), strict=True):
        state.update([x, torch.ones(10, 2), y])
    found = state.compute()
    assert np.isnan(found.low[1]).all()
    assert np.isnan(found.high[:, 1]).all()
    assert np.isfinite(found.low[[0, 2, 0], [0, 2, 2]]).all()


def test_whole_set_intervals_surround_the_whole_set_value():
    found = three_layers(kind=WholeSetCKA)
    assert found.low[0, 1] < found.between("a", "b") < found.high[0, 1]


def test_ninety_five_percent_intervals_cover_the_population_value():
    """Gaussian layers x = [z, u] A, y = [z, v] B: population CKA = ‖Σxy‖² / (‖Σxx‖ ‖Σyy‖), exactly."""
    a, b = draw(2, 6, 10, seed=1).double()
    xy, xx, yy = a[:3].T @ b[:3], a.T @ a, b.T @ b
    population = float(xy.square().sum() / (xx.norm() * yy.norm()))
    assert 0.1 < population < 0.9
    generator, covered = torch.Generator().manual_seed(2), 0
    for _ in range(200):
        state = StreamingCKA(["x", "y"])
        for _ in range(10):
            z, u, v = torch.randn(3, 40, 3, generator=generator, dtype=torch.float64)
            state.update([torch.cat([z, u], 1) @ a, torch.cat([z, v], 1) @ b])
        found = state.compute()
        covered += found.low[0, 1] <= population <= found.high[0, 1]
    print(f"coverage {covered / 200:.3f}")
    assert 0.90 <= covered / 200 <= 0.99


def test_bootstrap_is_seeded_and_of_the_asked_shape():
    matrix = three_layers()
    first, again, other = bootstrap(matrix, 7, seed=1), bootstrap(matrix, 7, seed=1), bootstrap(matrix, 7, seed=2)
    assert first.shape == (7, 3, 3)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_bootstrap_of_equal_batches_is_the_matrix_itself():
    blocks = np.tile(np.array([[1.0, 0.3], [0.3, 1.0]]), (6, 1, 1))
    np.testing.assert_allclose(bootstrap(handmade(blocks, np.full(6, 8.0)), 5), np.tile(blocks[0], (5, 1, 1)))


def test_bootstrap_spread_agrees_with_the_jackknife():
    values = 0.5 + 0.1 * draw(30, seed=3).numpy()
    matrix = handmade(np.stack([np.array([[1.0, v], [v, 1.0]]) for v in values]), np.full(30, 8.0))
    spread = bootstrap(matrix, 2000)[:, 0, 1].std()
    assert spread == pytest.approx(float(jackknife_error(lambda s: s[..., 0, 1], matrix)), rel=0.1)


def test_bootstrap_of_a_whole_set_matrix_is_centred_on_its_own_values():
    blocks = np.tile(np.array([[1.0, 0.3], [0.3, 1.0]]), (6, 1, 1))
    minibatch = handmade(blocks, np.full(6, 8.0), "debiased")
    shifted = SimilarityMatrix(**{**vars(minibatch), "values": np.array([[1.0, 0.4], [0.4, 1.0]])})
    np.testing.assert_allclose(bootstrap(shifted, 4)[:, 0, 1], 0.4)
