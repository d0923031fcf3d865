"""HSIC of all pairs against its definition in float64, what each sample adds to it, and its stated sampling error."""

import itertools

import numpy as np
import pytest
import torch

from layerlens.analysis import hsic
from layerlens.analysis.cka import without_each
from layerlens.analysis.hsic import hsic_from_features, hsic_from_grams, hsic_from_parts
from layerlens.analysis.kernels import u_centre
from layerlens.errors import BatchTooSmallError

WAYS = ["grams", "features"]
WIDTHS = (3, 7, 60)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related_layers(n, seed=0):
    """Three layers of 3, 7 and 60 features that share two factors, none of them centred."""
    shared = draw(n, 2, seed=seed)
    return [shared @ draw(2, p, seed=seed + p) + 0.7 * draw(n, p, seed=seed + 100 + p) + 2 for p in WIDTHS]


def centred(layers):
    return [x - x.mean(0) for x in layers]


def found(way, layers, piece=5, **options):
    if way == "grams":
        return hsic_from_grams(torch.stack([u_centre(x @ x.T) for x in centred(layers)]), **options)
    pieces = lambda: zip(*(x.split(piece) for x in centred(layers)), strict=True)  # noqa: E731
    return hsic_from_features(pieces, [x.shape[1] for x in layers], **options)


def song_hsic(x, y):
    """Unbiased HSIC₁ of the linear kernel, Song et al. 2012, term by term."""
    k, l = (t.numpy() @ t.numpy().T for t in (x, y))  # noqa: E741
    n, one = len(k), np.ones(len(k))
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    trace, sums, cross = np.trace(k @ l), (one @ k @ one) * (one @ l @ one), one @ k @ l @ one
    return (trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3))


def song_matrix(layers):
    return np.array([[song_hsic(x, y) for y in layers] for x in layers])


def u_centred(x):
    """U-centring entry by entry, Székely and Rizzo 2014."""
    x = x.numpy() - x.numpy().mean(0)
    k, n = x @ x.T, len(x)
    np.fill_diagonal(k, 0)
    u = k - k.sum(1, keepdims=True) / (n - 2) - k.sum(0, keepdims=True) / (n - 2) + k.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(u, 0)
    return u


def assert_same(one, other, tolerance=1e-11):
    assert one.samples == other.samples
    for name in ("value", "covariance", "each"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", [4, 5, 24, 90])
def test_hsic_equals_song_term_by_term(n, way):
    layers = related_layers(n)
    np.testing.assert_allclose(found(way, layers).value.numpy(), song_matrix(layers), rtol=1e-9, atol=1e-9)


def test_hsic_of_four_samples_worked_by_hand():
    """K has the one pair (1, 2), L the one pair (1, 3): (0 + 2·2/6 − 1)/4 = −1/12, each with itself 1/6."""
    x, y = torch.tensor([[1.0], [1], [0], [0]]).double(), torch.tensor([[1.0], [0], [1], [0]]).double()
    expected = torch.tensor([[1 / 6, -1 / 12], [-1 / 12, 1 / 6]], dtype=torch.float64)
    for way in WAYS:
        torch.testing.assert_close(found(way, [x, y]).value, expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("n", [5, 24, 90])
def test_both_ways_agree_on_value_error_and_parts(n, each):
    layers = related_layers(n)
    assert_same(found("grams", layers, each=each), found("features", layers, each=each))


@pytest.mark.parametrize("way", WAYS)
def test_value_without_error_and_parts_is_the_same(way):
    layers = related_layers(24)
    bare = found(way, layers, errors=False)
    torch.testing.assert_close(bare.value, found(way, layers, each=True).value, rtol=1e-12, atol=0)
    assert bare.each is None
    assert bare.covariance.shape == (2, 3, 3, 3)
    assert not bare.covariance.any()


@pytest.mark.parametrize("way", WAYS)
def test_hsic_is_symmetric_and_positive_for_a_layer_with_itself(way):
    value = found(way, related_layers(24)).value
    torch.testing.assert_close(value, value.T, rtol=1e-12, atol=0)
    assert (value.diagonal() > 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_what_each_sample_adds_is_the_row_sum_and_averages_to_the_value(way):
    layers = related_layers(24)
    result = found(way, layers, each=True)
    a = np.stack([u_centred(x) for x in layers])
    np.testing.assert_allclose(result.each.numpy(), np.einsum("ist,jst->sij", a, a) / 21, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.each.mean(0), result.value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", [5, 6, 24])
def test_leaving_out_each_sample_is_exact(n, way):
    layers = related_layers(n)
    without = without_each(found(way, layers, each=True).each, n)
    assert without.shape == (n, 3, 3)
    for s in range(n):
        rest = [torch.cat([x[:s], x[s + 1 :]]) for x in layers]
        np.testing.assert_allclose(without[s].numpy(), song_matrix(rest), rtol=1e-9, atol=1e-9)


def test_leaving_out_one_of_four_samples_is_refused():
    with pytest.raises(BatchTooSmallError, match=r"4 samples.*at least 5"):
        without_each(found("grams", related_layers(4), each=True).each, 4)


@pytest.mark.parametrize("block", [1, 200, 1000])
def test_size_of_the_temporary_copies_never_changes_an_answer(block, monkeypatch):
    layers, counts = related_layers(30), torch.tensor([4, 1, 10, 15])
    whole = [found("grams", layers, each=True, counts=c) for c in (None, counts)]
    monkeypatch.setattr(hsic, "_BLOCK", block)
    for before, c in zip(whole, (None, counts), strict=True):
        after = found("grams", layers, each=True, counts=c)
        assert_same(after, before, 1e-6 if c is None else 1e-12)  # the second-order part adds up in float32
        torch.testing.assert_close(after.each, before.each, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("piece", [1, 7, 29, 30])
def test_size_of_the_pieces_never_changes_an_answer(piece):
    layers, counts = related_layers(30), torch.tensor([4, 1, 10, 15])
    for c in (None, counts):
        assert_same(
            found("features", layers, piece, each=True, counts=c), found("features", layers, each=True, counts=c)
        )


def test_order_of_the_samples_does_not_matter():
    layers = related_layers(30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    for way in WAYS:
        one, other = found(way, layers, each=True), found(way, [x[order] for x in layers], each=True)
        torch.testing.assert_close(other.value, one.value, rtol=1e-11, atol=0)
        torch.testing.assert_close(other.covariance, one.covariance, rtol=1e-5, atol=1e-6 * one.covariance.abs().max())
        torch.testing.assert_close(other.each, one.each[order], rtol=1e-10, atol=1e-10)


def test_covariance_of_seven_samples_equals_its_definition_over_distinct_indices():
    """ζ₁ and ζ₂ as means over distinct pairs, triples and quadruples of samples, Hoeffding 1948, index by index."""
    n, layers = 7, related_layers(7)
    a = [u_centred(x) for x in layers]
    h = [[a[i] * a[j] for j in range(3)] for i in range(3)]
    order = [list(itertools.permutations(range(n), k)) for k in (2, 3, 4)]
    scale = ((n - 1) / (n - 3)) ** 2 / (n * (n - 1))
    expected = np.zeros((2, 3, 3, 3))
    for i, j in itertools.product(range(3), repeat=2):
        for kind, (f, g) in enumerate([(h[i][j], h[i][j]), (h[i][j], h[i][i]), (h[i][i], h[j][j])]):
            pairs = np.mean([f[s, t] * g[s, t] for s, t in order[0]])
            apart = np.mean([f[s, t] * g[u, v] for s, t, u, v in order[2]])
            first = np.mean([f[s, t] * g[s, u] for s, t, u in order[1]]) - apart
            second = pairs - apart
            expected[:, kind, i, j] = scale * (4 * (n - 2) * first + 4 * second), scale * 2 * second
    result = found("grams", layers).covariance.numpy()
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_second_order_part_of_many_samples_is_estimated_from_some():
    """From a few hundred of 1,100 samples, so that the ways differ there; what the jackknife states hardly moves."""
    layers = [draw(1100, 4, seed=s) for s in (1, 2)]
    layers[1] += 0.5 * layers[0]
    a = [u_centred(x) for x in layers]
    second = 2 * np.mean((a[0] * a[1]) ** 2) / (1100 * 1097)
    grams, features = found("grams", layers), found("features", layers, 300)
    assert float(grams.covariance[1, 0, 0, 1]) == pytest.approx(second, rel=0.25)
    assert float(features.covariance[1, 0, 0, 1]) == pytest.approx(second, rel=0.5)
    assert float(grams.covariance[1, 0, 0, 1]) != pytest.approx(second, rel=1e-6)  # it is an estimate
    torch.testing.assert_close(features.covariance[0, 0], grams.covariance[0, 0], rtol=1e-3, atol=0)
    for piece in (100, 250, 1100):
        assert_same(found("features", layers, piece), features, 1e-6)  # the same samples, whatever the pieces


def simulated(n, draws, make, seed, counts=None):
    """Values of many draws, and the variances that they state, less the part that the jackknife counts twice."""
    generator = torch.Generator().manual_seed(seed)
    values, stated = [], []
    for _ in range(draws):
        result = found(
            "grams", make(lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)), counts=counts
        )
        values.append(result.value)
        stated.append(result.covariance[0] - result.covariance[1])
    return torch.stack(values).numpy(), torch.stack(stated).mean(0).numpy()


@pytest.mark.parametrize("n", [32, 64])
def test_stated_covariance_is_the_spread_over_draws_of_gaussian_layers(n):
    """Layers 0 and 1 share four factors, 2 and 3 are unrelated to all; 400 draws tell a variance to 7 to 10 %."""

    def make(normal):
        shared = normal(n, 4)
        return [shared + normal(n, 4), shared + normal(n, 4), normal(n, 4), normal(n, 4)]

    values, stated = simulated(n, 400, make, seed=0)
    for i, j in [(0, 1), (0, 2), (2, 3), (0, 0), (1, 1), (2, 2), (3, 3)]:
        assert stated[0, i, j] == pytest.approx(values[:, i, j].var(ddof=1), rel=0.25), (i, j)
    mixed = np.cov(values[:, 0, 1], values[:, 0, 0])[0, 1]
    apart = np.cov(values[:, 0, 0], values[:, 1, 1])[0, 1]
    assert stated[1, 0, 1] == pytest.approx(mixed, rel=0.25)
    assert stated[2, 0, 1] == pytest.approx(apart, rel=0.25)


def test_jackknife_counts_the_second_order_part_twice_for_unrelated_layers():
    """For unrelated layers all is of second order, so that half of what the jackknife states is surplus."""
    results = [found("grams", [draw(64, 4, seed=s), draw(64, 4, seed=s + 999)]).covariance for s in range(200)]
    jackknife, second = torch.stack(results).mean(0)[:, 0, 0, 1]
    assert float(second / jackknife) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_one_sample_add_up_and_leave_the_value(way):
    layers, counts = related_layers(30), torch.tensor([4, 1, 10, 15])
    plain, grouped = found(way, layers, each=True), found(way, layers, each=True, counts=counts)
    torch.testing.assert_close(grouped.value, plain.value, rtol=1e-12, atol=0)
    assert grouped.samples == 30
    assert grouped.each.shape == (4, 3, 3)
    torch.testing.assert_close(grouped.each.mean(0), grouped.value, rtol=1e-11, atol=1e-11)
    sums = torch.stack([part.sum(0) for part in plain.each.split(counts.tolist())])
    torch.testing.assert_close(grouped.each, sums * 4 / 30, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_error_of_grouped_rows_is_the_spread_of_the_samples_sums(way):
    """4 m / (m − 1) Σ_g (c_g − c̄)(c'_g − c̄') over (n(n − 3))², to first order."""
    layers, counts, n = related_layers(30), torch.tensor([4, 1, 10, 15]), 30
    result = found(way, layers, counts=counts).covariance
    c = torch.stack([p.sum(0) for p in found("grams", layers, each=True).each.split(counts.tolist())]) * (n - 3)
    for i, j in itertools.product(range(3), repeat=2):
        for kind, (f, g) in enumerate([((i, j), (i, j)), ((i, j), (i, i)), ((i, i), (j, j))]):
            one, other = c[:, f[0], f[1]], c[:, g[0], g[1]]
            spread = float(((one - one.mean()) * (other - other.mean())).sum())
            expected = 4 * 4 / 3 * spread / (n * (n - 3)) ** 2
            assert float(result[0, kind, i, j]) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert not result[1].any()


def test_stated_error_of_samples_with_several_rows_is_the_spread_over_draws():
    """Six rows per sample that share most of their content: as if independent, the error would be far too small."""
    m, rows = 60, 6

    def make(normal):
        shared = (normal(m, 1, 4) + 0.3 * normal(m, rows, 4)).flatten(0, 1)
        return [shared + (normal(m, 1, 4) + 0.3 * normal(m, rows, 4)).flatten(0, 1) for _ in range(2)]

    counts = torch.full((m,), rows)
    values, stated = simulated(m, 200, make, seed=3, counts=counts)
    _, independent = simulated(m, 50, make, seed=3)
    spread = values[:, 0, 1].var(ddof=1)
    assert stated[0, 0, 1] == pytest.approx(spread, rel=0.25)
    assert independent[0, 0, 1] < spread / 3


def test_parts_alone_give_the_same_result():
    layers = related_layers(30)
    whole = found("grams", layers, each=True)
    parts, stack = whole.each * 27, torch.stack([u_centre(x @ x.T) for x in centred(layers)])
    assert_same(hsic_from_parts(parts.sum(0), parts, stack, each=True), whole)
    assert hsic_from_parts(parts.sum(0), parts, stack).each is None


def test_scaling_a_layer_scales_its_hsic_by_the_square_and_the_error_by_the_fourth_power():
    layers = related_layers(30)
    scaled = [layers[0], 3 * layers[1], layers[2]]
    for way in WAYS:
        one, other = found(way, layers), found(way, scaled)
        assert float(other.value[0, 1]) == pytest.approx(9 * float(one.value[0, 1]), rel=1e-10)
        assert float(other.value[1, 1]) == pytest.approx(81 * float(one.value[1, 1]), rel=1e-10)
        assert float(other.covariance[0, 0, 1, 1] / one.covariance[0, 0, 1, 1]) == pytest.approx(81**2, rel=1e-5)
