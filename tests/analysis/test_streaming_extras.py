"""What streaming CKA keeps besides the values: influence, null, positions, the check in float64, and its memory."""

import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import pdist, squareform

from layerlens.analysis import cka as cka_module
from layerlens.analysis.cka import StreamingCKA
from layerlens.analysis.kernels import column_gram
from layerlens.analysis.resampling import cka_of
from layerlens.analysis.similarity import IMPRECISE
from layerlens.errors import BatchTooSmallError, ConfigError, NonFiniteError, ShapeError

SIZES = [12, 9, 7]
NAMES = ["layer0", "layer1", "layer2"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def related_layers(n, p=6, seed=0):
    """Three float64 layers that share two of their factors."""
    shared = draw(n, 2, seed=seed).double()
    return [shared @ draw(2, p, seed=seed + i).double() + 0.7 * draw(n, p, seed=seed + 10 + i) for i in (1, 2, 3)]


def accumulated(layers, sizes, **options):
    state = StreamingCKA(NAMES[: len(layers)], **options)
    for batch in zip(*(x.split(sizes) for x in layers), strict=True):
        state.update(batch)
    return state


def song_hsic(k, l):  # noqa: E741
    """Unbiased HSIC₁, Song et al. 2012, term by term."""
    n, one = len(k), np.ones(len(k))
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    trace, sums, cross = (k * l.T).sum(), (one @ k @ one) * (one @ l @ one), one @ k @ l @ one
    return (trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3))


def kernel_matrix(x, kernel="linear"):
    x = x.double().numpy()
    if kernel == "linear":
        x = x - x.mean(0)
        return x @ x.T
    distances = pdist(x)
    median = np.sort(distances)[(len(distances) - 1) // 2]
    return np.exp(-(squareform(distances) ** 2) / (2 * median**2))


def hsic_matrix(grams):
    return np.array([[song_hsic(k, l) for l in grams] for k in grams])  # noqa: E741


def definition(layers, sizes, kernel="linear"):
    """Minibatch CKA: HSIC₁ averaged over batches by their sizes, then one ratio."""
    batches = list(zip(*(x.split(sizes) for x in layers), strict=True))
    hsic = sum(len(batch[0]) * hsic_matrix([kernel_matrix(x, kernel) for x in batch]) for batch in batches)
    return cka_of(hsic)


# --- influence --------------------------------------------------------------------------------------------------


def recomputed_changes(layers, sizes, kernel="linear"):
    """Change of every entry without each sample, shape (n, L, L); the RBF width stays that of the whole batch."""
    grams = [[kernel_matrix(x, kernel) for x in batch] for batch in zip(*(x.split(sizes) for x in layers), strict=True)]
    sums = [n * hsic_matrix(g) for n, g in zip(sizes, grams, strict=True)]
    whole, changes = cka_of(sum(sums)), []
    for b, n in enumerate(sizes):
        for s in range(n):
            keep = np.arange(n) != s
            left = (n - 1) * hsic_matrix([k[np.ix_(keep, keep)] for k in grams[b]])
            changes.append(cka_of(sum(sums) - sums[b] + left) - whole)
    return np.array(changes)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("sizes", [[24], SIZES, [5, 5, 8]], ids=str)
def test_influence_equals_recomputing_without_each_sample(sizes, kernel):
    layers = related_layers(sum(sizes))
    for x in layers[:2]:
        x[14] += 3  # the two that this sample makes alike
    changes = recomputed_changes(layers, sizes, kernel)
    found = accumulated(layers, sizes, kernel=kernel, influence=True).influence()
    assert (found.layers, found.samples) == (tuple(NAMES), sum(sizes))
    np.testing.assert_allclose(found.largest, np.abs(changes).max((1, 2)), atol=1e-10, rtol=0)
    for i, j in itertools.product(range(3), repeat=2):
        np.testing.assert_allclose(found.change[i, j], changes[found.index[i, j], i, j], atol=1e-10, rtol=0)
        strongest = np.sort(np.abs(changes[:, i, j]))[::-1][:5]
        np.testing.assert_allclose(np.abs(found.change[i, j]), strongest, atol=1e-10, rtol=0)
    middle = np.median(found.largest)
    spread = 1.4826 * np.median(np.abs(found.largest - middle))
    np.testing.assert_allclose(found.z_score, (found.largest - middle) / spread, rtol=1e-8)


def test_influence_finds_the_sample_that_stands_out_in_two_layers():
    layers = related_layers(60)
    for x in layers[:2]:
        x[41] += 30 * draw(6)
    found = accumulated(layers, [20, 20, 20], influence=True).influence()
    assert found.outliers()[0] == 41
    assert found.index[0, 1, 0] == 41
    assert found.change[0, 1, 0] == pytest.approx(recomputed_changes(layers, [20, 20, 20])[41, 0, 1], abs=1e-10)


def test_influence_leaves_the_result_as_it_is():
    layers = related_layers(28)
    with_it, plain = accumulated(layers, SIZES, influence=True), accumulated(layers, SIZES)
    with_it.influence()
    for name in ("values", "low", "high", "blocks"):
        np.testing.assert_allclose(getattr(with_it.compute(), name), getattr(plain.compute(), name), atol=1e-13)


def test_influence_in_a_batch_of_four_is_refused():
    state = accumulated(related_layers(20), [12, 4, 4], influence=True)
    with pytest.raises(BatchTooSmallError, match=r"a batch has 4 samples.*at least 5"):
        state.influence()


def test_influence_that_was_not_kept_is_refused_with_what_to_do():
    for state in (accumulated(related_layers(28), SIZES), StreamingCKA(NAMES, influence=True)):
        with pytest.raises(ShapeError, match="influence=True and give it batches"):
            state.influence()


def test_influence_leaves_a_layer_out_that_varies_by_rounding_alone():
    x, y, _ = related_layers(28)
    dead = torch.full((28, 6), 0.1) * (1 + 1.2e-7 * (draw(28, 6) > 0))
    alone = accumulated([x, y], SIZES, influence=True).influence()
    state = accumulated([x, y, dead], SIZES, influence=True)
    assert state.compute().missing == ("layer2",)
    np.testing.assert_allclose(state.influence().largest, alone.largest, atol=1e-10, rtol=0)


# --- null -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_null_is_the_cka_of_wrongly_paired_samples(kernel):
    """Each permutation is one draw per batch from one generator; HSIC of layers with themselves stays."""
    x, y, _ = related_layers(28)
    null = accumulated([x, y], SIZES, kernel=kernel, permutations=1, seed=5).compute().null
    generator = torch.Generator().manual_seed(5)
    shuffled = torch.cat([part[torch.randperm(len(part), generator=generator)] for part in y.split(SIZES)])
    assert null.mean[0, 1] == pytest.approx(definition([x, shuffled], SIZES, kernel)[0, 1], abs=1e-10)
    assert null.permutations == 1
    assert null.bound[0, 1] == null.mean[0, 1]


def test_null_summarises_its_draws():
    """Mean and bound over draws, and as p value the share of draws, the right pairing among them, that reach it."""
    layers, count = [draw(28, 6, seed=i).double() for i in (1, 2)], 19
    found = accumulated(layers, SIZES, permutations=count, level=0.9, seed=5).compute()
    generator = torch.Generator().manual_seed(5)
    orders = [[torch.randperm(n, generator=generator) for _ in range(count)] for n in SIZES]
    wrong = []
    for k in range(count):
        shuffled = torch.cat([part[o[k]] for part, o in zip(layers[1].split(SIZES), orders, strict=True)])
        wrong.append(definition([layers[0], shuffled], SIZES)[0, 1])
    null = found.null
    assert null.mean[0, 1] == pytest.approx(np.mean(wrong), abs=1e-10)
    assert null.bound[0, 1] == pytest.approx(np.quantile(wrong, 0.9, method="higher"), abs=1e-10)
    assert null.p_value[0, 1] == (1 + sum(w >= found.values[0, 1] for w in wrong)) / (1 + count)
    assert null.level == 0.9


def test_null_of_any_layers_is_centred_at_zero_and_related_ones_are_beyond_it():
    x, y, _ = related_layers(96)
    found = accumulated([x, y, draw(96, 6, seed=99).double()], [32, 32, 32], permutations=99).compute()
    null = found.null
    assert np.abs(null.mean[np.triu_indices(3, 1)]).max() < 0.01
    assert null.p_value[0, 1] == 1 / 100
    assert null.bound[0, 1] < found.values[0, 1]
    assert null.p_value[0, 2] > 1 / 100
    for name in ("mean", "bound", "p_value"):
        np.testing.assert_array_equal(getattr(null, name), getattr(null, name).T)


def test_p_values_of_unrelated_layers_are_uniform():
    """300 pairs of layers, 19 wrong pairings each: the 20 possible values come equally often."""
    generator, found = torch.Generator().manual_seed(0), []
    for trial in range(300):
        layers = [torch.randn(24, 4, generator=generator) for _ in range(2)]
        found.append(
            accumulated(layers, [12, 12], permutations=19, seed=trial, errors=False).compute().null.p_value[0, 1]
        )
    counts = np.bincount(np.rint(np.array(found) * 20).astype(int), minlength=21)[1:]
    assert counts.sum() == 300
    assert stats.chisquare(counts).pvalue > 0.01
    assert np.mean(found) == pytest.approx(0.525, abs=0.05)


def test_null_is_set_by_the_seed():
    layers = related_layers(28)
    one, same, other = (accumulated(layers, SIZES, permutations=5, seed=s).compute().null for s in (1, 1, 2))
    np.testing.assert_array_equal(one.mean, same.mean)
    assert not np.array_equal(one.mean, other.mean)


def test_null_leaves_the_values_as_they_are_and_a_reset_starts_its_draws_again():
    layers = related_layers(28)
    state = accumulated(layers, SIZES, permutations=5)
    first = state.compute()
    np.testing.assert_array_equal(first.null.mean, state.compute().null.mean)
    np.testing.assert_allclose(first.values, accumulated(layers, SIZES).compute().values, atol=1e-14)
    state.reset()
    for batch in zip(*(x.split(SIZES) for x in layers), strict=True):
        state.update(batch)
    np.testing.assert_array_equal(first.null.mean, state.compute().null.mean)


def test_null_of_a_constant_layer_is_missing():
    x, y, _ = related_layers(28)
    null = accumulated([x, y, torch.zeros(28, 6)], SIZES, permutations=5).compute().null
    for name in ("mean", "bound", "p_value"):
        assert np.isnan(getattr(null, name)[2]).all()
        assert np.isfinite(getattr(null, name)[0, 1])


def test_without_permutations_there_is_no_null():
    assert accumulated(related_layers(28), SIZES).compute().null is None
    with pytest.raises(ConfigError, match=r"permutations=-1.*0 or more"):
        StreamingCKA(NAMES, permutations=-1)


# --- positions --------------------------------------------------------------------------------------------------


def accumulated_positions(layers, counts, **options):
    """Layers (rows, features); counts of each batch's samples, None for rows that are all samples of their own."""
    state = StreamingCKA(NAMES[: len(layers)], positions=True, **options)
    sizes = [int(c.sum()) for c in counts]
    for batch, c in zip(zip(*(x.split(sizes) for x in layers), strict=True), counts, strict=True):
        state.counts = None if options.get("independent") else c
        state.update(batch)
    return state


EVEN = [torch.full((8,), 9), torch.full((5,), 9)]
RAGGED = [torch.tensor([3, 1, 7, 9]), torch.tensor([2, 2, 11, 1, 4])]


@pytest.mark.parametrize("mean", [0, 100, 1000])
@pytest.mark.parametrize("counts", [EVEN, RAGGED], ids=["maps", "sentences"])
def test_positions_as_samples_follow_the_definition_on_flattened_positions(counts, mean):
    sizes = [int(c.sum()) for c in counts]
    layers = [(x + mean).float() for x in related_layers(sum(sizes))]
    found = accumulated_positions(layers, counts).compute()
    np.testing.assert_allclose(found.values, definition(layers, sizes), atol=1e-6, rtol=0)
    assert found.samples == sum(sizes)
    assert found.weights.tolist() == sizes


def test_positions_in_float64_follow_the_definition_in_float64():
    layers = related_layers(117)
    found = accumulated_positions(layers, EVEN).compute()
    np.testing.assert_allclose(found.values, definition(layers, [72, 45]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_positions_come_out_alike_by_rows_and_by_features(mean, monkeypatch):
    layers = [x.float() + mean for x in related_layers(sum(int(c.sum()) for c in EVEN), p=200)]
    ways = {}
    for way in ("_by_grams", "_by_features"):
        monkeypatch.setattr(StreamingCKA, "_end_of_positions", getattr(StreamingCKA, way))
        ways[way] = accumulated_positions(layers, EVEN).compute()
    one, other = ways.values()
    for name, tolerance in (("values", 1e-6), ("low", 1e-4), ("high", 1e-4), ("participation", 1e-4)):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=tolerance, rtol=tolerance)


def test_few_positions_of_wide_layers_go_by_rows_and_many_of_narrow_ones_by_features(monkeypatch):
    taken = []
    for way in ("_by_grams", "_by_features"):
        plain = getattr(StreamingCKA, way)
        monkeypatch.setattr(StreamingCKA, way, lambda self, way=way, plain=plain: (taken.append(way), plain(self))[1])
    for width in (200, 3):
        accumulated_positions([x.float() for x in related_layers(int(EVEN[0].sum()), p=width)], EVEN[:1])
    assert taken == ["_by_grams", "_by_features"]


def test_positions_count_the_directions_of_their_features():
    layers = related_layers(72)
    eigenvalues = [np.linalg.eigvalsh(np.cov(x.numpy().T)) for x in layers]
    found = accumulated_positions(layers, EVEN[:1]).compute()
    np.testing.assert_allclose(found.participation, [v.sum() ** 2 / (v**2).sum() for v in eigenvalues], rtol=1e-10)


def reach(matrix):
    """Half the interval of the first pair, on Fisher's scale."""
    return (np.arctanh(matrix.high[0, 1]) - np.arctanh(matrix.low[0, 1])) / 2


@pytest.mark.parametrize(("m", "copies"), [(24, 4), (120, 9)])
def test_copies_of_a_position_narrow_no_interval(m, copies):
    """Within a sample all positions are the same: they tell as much as one, not as many as they are."""
    layers = related_layers(m)
    once = accumulated(layers, [m]).compute()
    many = [x.repeat_interleave(copies, 0) for x in layers]
    by_sample = accumulated_positions(many, [torch.full((m,), copies)]).compute()
    independent = StreamingCKA(NAMES, positions=True)
    independent.update(many)
    independent = independent.compute()
    assert reach(by_sample) > 1.6 * reach(independent)
    assert reach(by_sample) > np.sqrt(copies) * 0.8 * reach(independent)
    assert reach(by_sample) == pytest.approx(reach(once), rel=0.1)


def test_positions_without_counts_are_samples_of_their_own():
    layers = related_layers(72)
    alone, one_each = StreamingCKA(NAMES, positions=True), StreamingCKA(NAMES, positions=True)
    one_each.counts = torch.ones(72, dtype=torch.int64)
    for state in (alone, one_each):
        state.update(layers)
    np.testing.assert_allclose(alone.compute().values, one_each.compute().values, atol=1e-13)
    assert reach(alone.compute()) == pytest.approx(reach(one_each.compute()), rel=0.15)
    np.testing.assert_allclose(alone.compute().low, accumulated(layers, [72]).compute().low, atol=1e-6)


def test_positions_are_kept_as_they_were_when_handed_over():
    layers = related_layers(72)
    expected = accumulated_positions(layers, EVEN[:1]).compute().values
    state = StreamingCKA(NAMES, positions=True)
    state.counts = EVEN[0]
    for position, x in enumerate(x.clone() for x in layers):
        state.take(position, x)
        x.zero_()
    state.end_batch()
    np.testing.assert_array_equal(state.compute().values, expected)


def test_positions_leave_the_activations_as_they_were():
    layers = related_layers(72)
    before = [x.clone() for x in layers]
    accumulated_positions(layers, EVEN[:1])
    assert all(map(torch.equal, layers, before))


@pytest.mark.parametrize("options", [{"kernel": "rbf"}, {"influence": True}, {"permutations": 3}], ids=str)
def test_positions_allow_neither_other_kernels_nor_influence_nor_permutations(options):
    with pytest.raises(ConfigError, match="linear kernel only, without influence or permutations"):
        StreamingCKA(NAMES, positions=True, **options)


@pytest.mark.parametrize("positions", [False, True])
def test_a_layer_that_is_missing_from_a_later_batch_is_named(positions):
    state = StreamingCKA(NAMES, positions=positions)
    state.update(related_layers(8))
    for position in (0, 2):
        state.take(position, related_layers(8)[position])
    with pytest.raises(ShapeError, match=r"layer1 in batch 1"):
        state.end_batch()


# --- the check in float64 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("mean", [0, 100, 1e4])
def test_the_check_finds_float32_features_precise(mean, kernel):
    layers = [(x + mean).float() for x in related_layers(64, p=300)]
    found = accumulated(layers, [32, 32], kernel=kernel, check=True).compute()
    assert 0 <= found.precision_error < 1e-6


def test_the_check_finds_a_gram_matrix_that_is_rounded_to_float16(monkeypatch):
    layers = [(x + 3 * draw(64, 300, seed=i)).float() for i, x in enumerate(related_layers(64, p=300))]
    fine = accumulated(layers, [64], check=True).compute().precision_error

    def rounded(activation):
        gram, offset = column_gram(activation)
        return gram.half().float(), offset

    monkeypatch.setattr(cka_module, "column_gram", rounded)
    found = accumulated(layers, [64], check=True).compute().precision_error
    grams = [kernel_matrix(x[:32]) for x in layers]
    coarse = [k.astype(np.float16).astype(np.float64) for k in grams]
    expected = np.abs(cka_of(hsic_matrix(coarse)) - cka_of(hsic_matrix(grams))).max()
    assert found == pytest.approx(expected, rel=0.2)
    assert found > max(IMPRECISE, 100 * fine)


def test_the_check_finds_means_that_were_not_taken_off(monkeypatch):
    layers = [(x + 3000).float() for x in related_layers(64, p=300)]
    uncentred = lambda x: (x.float() @ x.float().T, torch.zeros((), dtype=torch.float64))  # noqa: E731
    monkeypatch.setattr(cka_module, "column_gram", uncentred)
    assert accumulated(layers, [64], check=True).compute().precision_error > 1e-3


def test_the_check_changes_no_number_and_without_it_there_is_no_figure():
    layers = [x.float() for x in related_layers(64, p=300)]
    plain, checked = accumulated(layers, [32, 32]).compute(), accumulated(layers, [32, 32], check=True).compute()
    np.testing.assert_allclose(plain.values, checked.values, atol=1e-7, rtol=0)
    assert np.isnan(plain.precision_error)


def test_the_check_looks_at_the_first_batch_only():
    layers = [x.float() for x in related_layers(64, p=30)]
    one = accumulated([x[:32] for x in layers], [32], check=True).compute()
    both = accumulated(layers, [32, 32], check=True).compute()
    assert one.precision_error == both.precision_error > 0


def test_the_check_of_constant_layers_has_no_figure():
    found = accumulated([torch.zeros(16, 3)] * 2, [16], check=True).compute()
    assert np.isnan(found.precision_error)


# --- without errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_without_errors_there_are_values_but_no_intervals(kernel):
    layers = related_layers(28)
    found = accumulated(layers, SIZES, kernel=kernel, errors=False).compute()
    np.testing.assert_allclose(found.values, definition(layers, SIZES, kernel), atol=1e-10, rtol=0)
    off = ~np.eye(3, dtype=bool)
    assert np.isnan(found.low[off]).all()
    assert np.isnan(found.high[off]).all()
    full = accumulated(layers, SIZES, kernel=kernel).compute()
    np.testing.assert_allclose(found.blocks, full.blocks, atol=1e-12)
    assert (full.low[off] < full.values[off]).all()
    assert (full.values[off] < full.high[off]).all()


# --- small layers in one go -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 1.0, 1.9, 5.0, 1000.0])
def test_layers_taken_together_are_as_exact_as_one_by_one(mean):
    layers = [(x + 2 * draw(96, 60, seed=i) + mean).float() for i, x in enumerate(related_layers(96, p=60))]
    together, alone = accumulated(layers, [48, 48]), StreamingCKA(NAMES)
    for batch in zip(*(x.split(48) for x in layers), strict=True):
        for position, x in enumerate(batch):
            alone.take(position, x)
        alone.end_batch()
    exact = definition(layers, [48, 48])
    for state in (together, alone):
        np.testing.assert_allclose(state.compute().values, exact, atol=1e-7, rtol=0)
    for name in ("low", "high", "participation"):
        one, other = getattr(together.compute(), name), getattr(alone.compute(), name)
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=0)


def test_one_feature_with_a_large_mean_does_not_drown_the_others():
    layers = [(x + 2 * draw(96, 900, seed=i)).float() for i, x in enumerate(related_layers(96, p=900))]
    for x in layers:
        x[:, 701] += 1e4
    found = accumulated(layers, [48, 48]).compute()
    np.testing.assert_allclose(found.values, definition(layers, [48, 48]), atol=1e-7, rtol=0)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4 / 3])
def test_a_constant_layer_among_layers_taken_together_is_missing(constant):
    x, y, _ = ((x + 1).float() for x in related_layers(28))
    found = accumulated([x, y, torch.full((28, 6), constant)], SIZES).compute()
    assert found.missing == ("layer2",)
    np.testing.assert_allclose(found.values[:2, :2], accumulated([x, y], SIZES).compute().values, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_among_layers_taken_together_names_the_layer(value):
    layers = [x.float() for x in related_layers(28)]
    layers[1][20, 2] = value
    with pytest.raises(NonFiniteError, match=r"layer 'layer1'.*batch 1"):
        accumulated(layers, SIZES)


# --- shards -----------------------------------------------------------------------------------------------------

RESULTS = ("values", "low", "high", "participation", "blocks", "weights", "samples")


def joined(first, second, how):
    if how == "merge":
        first.merge(second)
    else:
        state = second.state()
        first.load_state(pickle.loads(pickle.dumps(state)) if how == "pickled state" else state)
    return first


@pytest.mark.parametrize("how", ["merge", "state", "pickled state"])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_shards_together_are_one_accumulator(kernel, how):
    layers, options = related_layers(28), {"kernel": kernel, "influence": True, "check": True}
    whole = accumulated(layers, SIZES, **options)
    first = accumulated([x[:12] for x in layers], [12], **options)
    joined(first, accumulated([x[12:] for x in layers], SIZES[1:], **options), how)
    for name in RESULTS:
        one, other = getattr(first.compute(), name), getattr(whole.compute(), name)
        np.testing.assert_allclose(one, other, atol=1e-12, rtol=1e-12)
    one, other = first.influence(), whole.influence()
    for name in ("largest", "change", "z_score"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-10, rtol=1e-8)
    pairs = np.triu_indices(3, 1)  # on the diagonal there is nothing but rounding
    np.testing.assert_array_equal(one.index[pairs], other.index[pairs])
    assert first.compute().precision_error == whole.compute().precision_error


@pytest.mark.parametrize("how", ["merge", "state"])
def test_shards_of_positions_together_are_one_accumulator(how):
    layers = related_layers(117)
    whole = accumulated_positions(layers, EVEN)
    first = accumulated_positions([x[:72] for x in layers], EVEN[:1])
    joined(first, accumulated_positions([x[72:] for x in layers], EVEN[1:]), how)
    for name in RESULTS:
        one, other = getattr(first.compute(), name), getattr(whole.compute(), name)
        np.testing.assert_allclose(one, other, atol=1e-12, rtol=1e-12)


def test_a_merge_leaves_the_other_accumulator_as_it_was():
    layers = related_layers(28)
    first = accumulated([x[:12] for x in layers], [12], permutations=3)
    second = accumulated([x[12:] for x in layers], SIZES[1:], permutations=3)
    before = second.compute()
    first.merge(second)
    first.update([x[:9] for x in layers])
    after = second.compute()
    np.testing.assert_array_equal(after.values, before.values)
    np.testing.assert_array_equal(after.null.mean, before.null.mean)


def test_a_null_of_shards_weighs_each_by_its_samples():
    layers = related_layers(28)
    parts = [[x[:12] for x in layers], [x[12:] for x in layers]]
    sizes = [SIZES[:1], SIZES[1:]]
    first, second = (accumulated(p, s, permutations=7) for p, s in zip(parts, sizes, strict=True))
    own = [s._shuffled.numpy() for s in (first, second)]
    first.merge(second)
    found = first.compute()
    scale = np.sqrt(np.diag(np.average(found.blocks, axis=0, weights=found.weights)))
    expected = ((own[0] + own[1]).mean(0) / 28 / (scale[:, None] * scale))[0, 1]
    assert found.null.mean[0, 1] == pytest.approx(expected, rel=1e-10)


def test_an_empty_shard_adds_nothing():
    layers = related_layers(28)
    options = {"permutations": 3, "check": True}
    state, empty = accumulated(layers, SIZES, **options), StreamingCKA(NAMES, **options)
    before = state.compute()
    state.load_state(StreamingCKA(NAMES, **options).state())
    empty.merge(state)
    for found in (state.compute(), empty.compute()):
        for name in RESULTS:
            np.testing.assert_allclose(getattr(found, name), getattr(before, name), atol=1e-14)
        np.testing.assert_allclose(found.null.mean, before.null.mean, atol=1e-14)
        assert found.precision_error == before.precision_error


@pytest.mark.parametrize("options", [{"permutations": 4}, {"positions": True}], ids=str)
def test_merge_refuses_an_accumulator_that_keeps_other_sums(options):
    with pytest.raises(ShapeError, match="can't merge"):
        StreamingCKA(NAMES).merge(StreamingCKA(NAMES, **options))


def test_merge_refuses_an_accumulator_without_errors():
    layers = related_layers(28)
    with pytest.raises(ShapeError, match="can't merge"):
        accumulated(layers, SIZES).merge(accumulated(layers, SIZES, errors=False))


def test_merge_refuses_an_accumulator_without_influence():
    layers = related_layers(28)
    with pytest.raises(ShapeError, match="can't merge"):
        accumulated(layers, SIZES, influence=True).merge(accumulated(layers, SIZES))


# --- memory -----------------------------------------------------------------------------------------------------

PEAK = """
import sys, torch
from pathlib import Path
from layerlens.analysis.cka import StreamingCKA

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

count, n, p = map(int, sys.argv[1:4])
draw = torch.Generator().manual_seed(0)
together = sys.argv[4] == "update"
warm = StreamingCKA(["a", "b"])
warm.update([torch.randn(40, 8, generator=draw) for _ in "ab"])
warm.compute()
activations = torch.empty(count if together else 1, n, p).normal_(generator=draw)
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports and of the forward pass
before = peak()
state = StreamingCKA([str(i) for i in range(count)])
for _ in range(2):
    if together:
        state.update(list(activations))
        continue
    for position in range(count):
        state.take(position, activations[0])
    state.end_batch()
state.compute()
print(peak() - before)
"""
SLACK_MIB = 16  # two temporary blocks of 8 MiB: a layer's centred columns, a part of the products


def peak_mib(*case):
    """Peak above that of the forward pass, in a process of its own that gives freed memory back at once."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAK, *map(str, case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's peak memory")
@pytest.mark.parametrize(("count", "p", "how"), [(20, 2048, "take"), (20, 16384, "take"), (60, 2048, "update")])
def test_memory_of_a_batch_is_its_gram_matrices_whatever_the_width(count, p, how):
    n = 512
    assert peak_mib(count, n, p, how) <= 1.1 * count * n**2 * 8 / 2**20 + SLACK_MIB
