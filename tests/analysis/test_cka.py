"""CKA against its definition in float64, values worked by hand, invariances, and what the accumulators promise."""

import copy

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from layerlens.analysis.cka import StreamingCKA
from layerlens.analysis.kernels import centred_gram, rbf_from_gram
from layerlens.analysis.similarity import cka_matrix
from layerlens.analysis.whole_set import WholeSetCKA, cka
from layerlens.errors import (
    BatchTooSmallError,
    ConfigError,
    DataError,
    DegenerateError,
    NonFiniteError,
    ShapeError,
    UnknownLayerError,
    UnknownNameError,
)

MINIBATCHES = {"linear": [32, 32, 32, 32], "rbf": [34, 31, 31, 31]}  # odd numbers of pairs: one median for RBF


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def related_pair(n, p, mean=0.0, seed=0):
    """Two float32 layers that share half of their 16 factors, so that CKA is far from 0 and 1 for any p."""
    shared, mine, theirs = draw(3, n, 8, seed=seed)
    maps = draw(2, 16, p, seed=seed + 1)
    noise = 0.3 * draw(2, n, p, seed=seed + 2)
    return (
        torch.cat([shared, mine], 1) @ maps[0] + noise[0] + mean,
        torch.cat([shared, theirs], 1) @ maps[1] + noise[1] + mean,
    )


def kernel_matrix(x, kernel, factor=1.0):
    """K as the definition writes it, float64, without centring."""
    x = x.double().flatten(1).numpy()
    if kernel == "linear":
        return x @ x.T
    distances = pdist(x)
    return np.exp(-(squareform(distances) ** 2) / (2 * (factor * np.median(distances)) ** 2))


def biased_cka(k, l):  # noqa: E741
    h = np.eye(len(k)) - np.ones((len(k), len(k))) / len(k)
    k, l = h @ k @ h, h @ l @ h  # noqa: E741
    return (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())


def song_hsic(k, l):  # noqa: E741
    """Unbiased HSIC₁, Song et al. 2012, term by term."""
    n, one = len(k), np.ones(len(k))
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    trace, sums, cross = np.trace(k @ l), (one @ k @ one) * (one @ l @ one), one @ k @ l @ one
    return (trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3))


def debiased_cka(k, l):  # noqa: E741
    return song_hsic(k, l) / np.sqrt(song_hsic(k, k) * song_hsic(l, l))


def minibatch_cka(x, y, sizes, kernel="linear"):
    sums = np.zeros(3)
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        k, l = kernel_matrix(a, kernel), kernel_matrix(b, kernel)  # noqa: E741
        sums += len(a) * np.array([song_hsic(k, l), song_hsic(k, k), song_hsic(l, l)])
    return sums[0] / np.sqrt(sums[1] * sums[2])


def streamed(x, y, sizes, **options):
    state = StreamingCKA(["x", "y"], **options)
    for batch in zip(x.split(sizes), y.split(sizes), strict=True):
        state.update(batch)
    return state.compute()


@pytest.mark.parametrize("mean", [0, 3, 100])
@pytest.mark.parametrize("p", [10, 4096, 65536])
def test_linear_cka_equals_its_definition(p, mean):
    x, y = related_pair(128, p, mean)
    k, l = kernel_matrix(x, "linear"), kernel_matrix(y, "linear")  # noqa: E741
    assert cka(x, y, estimator="biased") == pytest.approx(biased_cka(k, l), abs=1e-6)
    assert cka(x, y) == pytest.approx(debiased_cka(k, l), abs=1e-6)
    sizes = MINIBATCHES["linear"]
    assert streamed(x, y, sizes).between("x", "y") == pytest.approx(minibatch_cka(x, y, sizes), abs=1e-6)
    assert 0.1 < debiased_cka(k, l) < 0.9  # the case is not a trivial one


@pytest.mark.parametrize(("p", "mean"), [(10, 0), (10, 3), (10, 100), (4096, 0), (4096, 3), (4096, 100), (65536, 100)])
def test_rbf_cka_equals_its_definition(p, mean):
    x, y = related_pair(127, p, mean)
    k, l = kernel_matrix(x, "rbf"), kernel_matrix(y, "rbf")  # noqa: E741
    assert cka(x, y, kernel="rbf", estimator="biased") == pytest.approx(biased_cka(k, l), abs=1e-6)
    assert cka(x, y, kernel="rbf") == pytest.approx(debiased_cka(k, l), abs=1e-6)
    if p < 65536:
        sizes = MINIBATCHES["rbf"]
        found = streamed(x, y, sizes, kernel="rbf").between("x", "y")
        assert found == pytest.approx(minibatch_cka(x, y, sizes, "rbf"), abs=1e-6)


@pytest.mark.parametrize("factor", [0.2, 0.5, 2.0])
def test_rbf_width_is_the_factor_times_the_median_distance(factor):
    x, y = related_pair(31, 10)
    expected = debiased_cka(kernel_matrix(x, "rbf", factor), kernel_matrix(y, "rbf", factor))
    assert cka(x, y, kernel="rbf", rbf_factor=factor) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("n", [4, 5, 6, 7, 9])
def test_odd_and_small_sample_counts_follow_the_definition(n):
    x, y = related_pair(n, 6, seed=n)
    k, l = kernel_matrix(x, "linear"), kernel_matrix(y, "linear")  # noqa: E741
    assert cka(x, y) == pytest.approx(debiased_cka(k, l), abs=1e-5)
    assert cka(x, y, estimator="biased") == pytest.approx(biased_cka(k, l), abs=1e-5)


def test_debiased_cka_of_four_samples_worked_by_hand():
    """K has the one pair (1,2), L the one pair (1,3): HSIC₁ = (0 + 2·2/6 − 1)/4 = −1/12, each self-HSIC 1/6."""
    x, y = torch.tensor([[1.0], [1], [0], [0]]), torch.tensor([[1.0], [0], [1], [0]])
    assert cka(x, y) == pytest.approx(-0.5, abs=1e-9)
    assert cka(x, 1 - x) == pytest.approx(1.0, abs=1e-9)
    assert cka(x, y, estimator="biased") == pytest.approx(0.0, abs=1e-9)


def test_biased_cka_of_one_feature_is_the_squared_correlation():
    """Centred (½,½,−½,−½) and (¾,−¼,−¼,−¼): product ½, norms 1 and ¾, so ¼ / ¾."""
    x, y = torch.tensor([[1.0], [1], [0], [0]]), torch.tensor([[1.0], [0], [0], [0]])
    assert cka(x, y, estimator="biased") == pytest.approx(1 / 3, abs=1e-7)


def test_rbf_kernel_of_three_points_worked_by_hand():
    """Points 0, 1, 3: distances 1, 3, 2, median 2, so exp(−d²/8)."""
    kernel = rbf_from_gram(centred_gram(torch.tensor([[0.0], [1], [3]]).double())[0])
    expected = np.exp(-np.array([[0, 1, 9], [1, 0, 4], [9, 4, 0]]) / 8)
    np.testing.assert_allclose(kernel.numpy(), expected, atol=1e-12)


CHANGES = {
    "rotation": lambda x: x @ torch.linalg.qr(draw(10, 10, seed=8))[0],
    "isotropic scaling": lambda x: 7.3 * x,
    "feature permutation": lambda x: x[:, torch.randperm(10, generator=torch.Generator().manual_seed(1))],
    "translation": lambda x: x + torch.arange(10),
}


@pytest.mark.parametrize("estimator", ["debiased", "biased"])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("change", CHANGES)
def test_cka_ignores(change, kernel, estimator):
    x, y = related_pair(64, 10)
    options = {"kernel": kernel, "estimator": estimator}
    assert cka(CHANGES[change](x), y, **options) == pytest.approx(cka(x, y, **options), abs=1e-6)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_cka_ignores_a_joint_permutation_of_samples_but_not_one_of_a_single_side(kernel):
    x, y = related_pair(64, 10)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    plain = cka(x, y, kernel=kernel)
    assert cka(x[order], y[order], kernel=kernel) == pytest.approx(plain, abs=1e-6)
    assert abs(cka(x[order], y, kernel=kernel) - plain) > 0.1


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_cka_is_changed_by_a_linear_map_that_is_no_rotation(kernel):
    x, y = related_pair(64, 10)
    stretched = x * torch.tensor([30.0] + [1.0] * 9)
    assert abs(cka(stretched, y, kernel=kernel) - cka(x, y, kernel=kernel)) > 0.05


def test_cka_is_symmetric_and_one_with_itself():
    x, y = related_pair(64, 10)
    assert cka(x, y) == pytest.approx(cka(y, x), abs=1e-12)
    assert cka(x, x.clone()) == pytest.approx(1.0, abs=1e-9)


def test_feature_maps_count_as_their_flattened_features():
    x, y = related_pair(32, 12)
    assert cka(x.view(32, 3, 2, 2), y) == pytest.approx(cka(x, y), abs=1e-9)


def test_one_number_per_sample_counts_as_one_feature():
    x, y = related_pair(32, 4)
    assert cka(x[:, 0], y) == pytest.approx(cka(x[:, :1], y), abs=1e-9)


def test_participation_counts_the_directions_that_carry_the_variance():
    cross = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    line = torch.tensor([[1.0, 2], [2, 4], [3, 6], [7, 14]])
    state = StreamingCKA(["cross", "line"])
    state.update([cross, line])
    np.testing.assert_allclose(state.compute().participation, [2.0, 1.0], atol=1e-5)


def test_a_short_last_batch_counts_by_its_samples():
    x, y = related_pair(70, 10)
    sizes = [32, 32, 6]
    found = streamed(x, y, sizes)
    assert found.between("x", "y") == pytest.approx(minibatch_cka(x, y, sizes), abs=1e-6)
    assert found.samples == 70
    assert found.weights.tolist() == [32, 32, 6]


def test_batch_order_does_not_matter():
    x, y = related_pair(96, 10)
    parts = list(zip(x.split(24), y.split(24), strict=True))
    forth, back = StreamingCKA(["x", "y"]), StreamingCKA(["x", "y"])
    for batch in parts:
        forth.update(batch)
    for batch in reversed(parts):
        back.update(batch)
    for name in ("values", "low", "high", "participation"):
        np.testing.assert_allclose(getattr(forth.compute(), name), getattr(back.compute(), name), atol=1e-12)


def test_more_batches_than_are_kept_change_no_value():
    x, y = related_pair(130 * 6, 10)
    found = streamed(x, y, [6] * 130)
    assert len(found.weights) == 64
    assert found.weights.sum() == 780
    assert found.between("x", "y") == pytest.approx(minibatch_cka(x, y, [6] * 130), abs=1e-6)


def test_sample_order_within_a_batch_does_not_matter():
    x, y = related_pair(64, 10)
    g = torch.Generator().manual_seed(4)
    within = torch.cat([torch.randperm(32, generator=g), 32 + torch.randperm(32, generator=g)])
    assert streamed(x[within], y[within], [32, 32]).between("x", "y") == pytest.approx(
        streamed(x, y, [32, 32]).between("x", "y"), abs=1e-6
    )


@pytest.mark.parametrize("kind", [StreamingCKA, WholeSetCKA])
def test_two_merged_shards_equal_one_process(kind):
    x, y = related_pair(96, 10)
    whole, first, second = (kind(["x", "y"]) for _ in range(3))
    for number, batch in enumerate(zip(x.split(24), y.split(24), strict=True)):
        whole.update(batch)
        (first if number < 2 else second).update(batch)
    first.merge(second)
    for name in ("values", "low", "high", "participation", "blocks", "weights"):
        np.testing.assert_allclose(getattr(first.compute(), name), getattr(whole.compute(), name), atol=1e-12)


@pytest.mark.parametrize(
    "other",
    [StreamingCKA(["x", "z"]), StreamingCKA(["x", "y"], kernel="rbf"), StreamingCKA(["x", "y"], rbf_factor=2.0)],
    ids=["layers", "kernel", "width"],
)
def test_merge_refuses_other(other):
    with pytest.raises(ShapeError, match="can't merge"):
        StreamingCKA(["x", "y"]).merge(other)


def test_whole_set_merge_refuses_a_streaming_accumulator():
    with pytest.raises(ShapeError, match="only a WholeSetCKA"):
        WholeSetCKA(["x"]).merge(StreamingCKA(["x"]))


@pytest.mark.parametrize("kind", [StreamingCKA, WholeSetCKA])
def test_reset_forgets_all_batches(kind):
    x, y = related_pair(64, 10)
    state, fresh = kind(["x", "y"]), kind(["x", "y"])
    state.update([y[:32], x[:32]])
    state.reset()
    for s in (state, fresh):
        s.update([x[32:], y[32:]])
    np.testing.assert_array_equal(state.compute().values, fresh.compute().values)
    assert state.compute().samples == 32


def test_whole_set_batches_do_not_change_the_whole_set_value():
    x, y = related_pair(96, 10)
    state = WholeSetCKA(["x", "y"])
    for batch in zip(x.split(32), y.split(32), strict=True):
        state.update(batch)
    assert state.compute().between("x", "y") == pytest.approx(cka(x, y), abs=1e-9)


def test_a_later_change_of_the_activation_does_not_reach_the_accumulator():
    x, y = related_pair(32, 10)
    state, expected = WholeSetCKA(["x", "y"]), cka(x, y)
    state.update([x, y])
    x.zero_()
    assert state.compute().between("x", "y") == pytest.approx(expected, abs=1e-12)


def test_update_refuses_another_number_of_layers():
    with pytest.raises(ShapeError, match="1 activations for 2 layers"):
        StreamingCKA(["x", "y"]).update([draw(8, 3)])


@pytest.mark.parametrize("call", [lambda x, y: cka(x, y), lambda x, y: StreamingCKA(["x", "y"]).update([x, y])])
def test_different_row_counts_are_refused(call):
    with pytest.raises(ShapeError, match=r"different sample counts.*\[7, 8\]"):
        call(draw(8, 3), draw(7, 3))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_than_four_samples_are_refused_with_the_batch_and_a_way_out(n):
    state = StreamingCKA(["x"])
    state.update([draw(8, 3)])
    with pytest.raises(BatchTooSmallError, match=f"batch 1 has {n} samples.*drop_last=True"):
        state.update([draw(n, 3)])


def test_compute_without_a_batch_is_refused():
    with pytest.raises(ShapeError, match="no batch was seen"):
        StreamingCKA(["x"]).compute()


def test_end_of_a_batch_without_activations_is_refused():
    with pytest.raises(ShapeError, match="no activation was handed over"):
        StreamingCKA(["x"]).end_batch()


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_names_layer_and_batch(value, kernel):
    state = StreamingCKA(["x", "y"], kernel=kernel)
    good, bad = draw(8, 3), draw(8, 3)
    bad[2, 1] = value
    state.update([good, good])
    with pytest.raises(NonFiniteError, match=r"layer 'y'.*batch 1"):
        state.update([good, bad])


def test_cka_refuses_nan():
    with pytest.raises(NonFiniteError, match="layer 'x'"):
        cka(torch.full((8, 2), float("nan")), draw(8, 2))


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("constant", [0.0, 0.1, 100.0])
def test_a_constant_layer_has_no_similarity_and_is_named(constant, kernel):
    x, y = related_pair(32, 10)
    state = StreamingCKA(["x", "dead", "y"], kernel=kernel)
    for a, b in zip(x.split(16), y.split(16), strict=True):
        state.update([a, torch.full((16, 7), constant), b])
    found = state.compute()
    assert found.missing == ("dead",)
    assert np.isnan(found.values[1]).all()
    assert np.isnan(found.participation[1])
    alone = streamed(x, y, [16, 16], kernel=kernel)
    assert found.between("x", "y") == pytest.approx(alone.between("x", "y"), abs=1e-12)


@pytest.mark.parametrize("estimator", ["debiased", "biased"])
def test_cka_refuses_a_constant_side(estimator):
    with pytest.raises(DegenerateError, match=r"x constant over the 8 samples, .*; CKA is 0/0"):
        cka(torch.ones(8, 3), draw(8, 3), estimator=estimator)


@pytest.mark.parametrize("n", [4, 5, 8])
def test_cka_refuses_samples_that_are_all_equally_far_apart(n):
    """One-hot rows: the U-centred Gram matrix is zero, so that debiased CKA is 0/0."""
    with pytest.raises(DegenerateError, match="0/0"):
        cka(torch.eye(n), draw(n, 3))


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_an_rbf_width_that_is_not_positive_is_refused(factor):
    with pytest.raises(ValueError, match="rbf_factor"):
        cka(draw(8, 3), draw(8, 3, seed=1), kernel="rbf", rbf_factor=factor)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cka(draw(8, 3), draw(8, 3), estimator="minibatch"), "unknown estimator 'minibatch'.*debiased"),
        (lambda: cka(draw(8, 3), draw(8, 3), kernel="rfb"), "unknown kernel 'rfb'; closest: rbf"),
        (lambda: cka_matrix(nn.Linear(3, 3), [draw(8, 3)], estimator="debaised"), "closest: debiased"),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(call, message):
    with pytest.raises(UnknownNameError, match=message):
        call()


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_a_level_outside_zero_and_one_is_refused(level):
    with pytest.raises(ConfigError, match="level="):
        StreamingCKA(["x"], level=level)


class Twice(nn.Module):
    """A net and its copy, fed in one pass."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
        self.nets = nn.ModuleDict({"a": net, "b": copy.deepcopy(net)})

    def forward(self, x):
        return self.nets["a"](x), self.nets["b"](x)


LAYERS = [f"nets.{net}.{i}" for net in "ab" for i in (0, 2, 4)]


@pytest.mark.parametrize("estimator", ["minibatch", "debiased", "biased"])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_a_net_equals_its_copy_layer_by_layer_under_a_shuffling_loader(kernel, estimator):
    images = TensorDataset(draw(40, 3, 8, 8), torch.zeros(40))
    loader = DataLoader(images, batch_size=10, shuffle=True, generator=torch.Generator().manual_seed(5))
    found = cka_matrix(Twice(), loader, LAYERS, kernel=kernel, estimator=estimator)
    assert found.layers == tuple(LAYERS)
    np.testing.assert_allclose([found.values[i, i + 3] for i in range(3)], 1.0, atol=1e-6)
    assert found.between("nets.a.0", "nets.b.4") < 0.99
    assert (found.estimator, found.kernel, found.samples, found.measure) == (estimator, kernel, 40, "cka")


@pytest.mark.parametrize("estimator", ["minibatch", "debiased", "biased"])
def test_cka_matrix_equals_the_definition_on_the_layers_outputs(estimator):
    model, images = Twice().eval(), 2 * draw(40, 3, 8, 8) + 1
    with torch.no_grad():
        first = model.nets["a"][0](images)
        last = model.nets["a"](images)
    k, l = kernel_matrix(first, "linear"), kernel_matrix(last, "linear")  # noqa: E741
    expected = {
        "minibatch": lambda: minibatch_cka(first, last, [10] * 4),
        "debiased": lambda: debiased_cka(k, l),
        "biased": lambda: biased_cka(k, l),
    }
    found = cka_matrix(model, images.split(10), LAYERS, estimator=estimator)
    assert found.between("nets.a.0", "nets.a.4") == pytest.approx(expected[estimator](), abs=1e-6)


def test_cka_matrix_leaves_the_model_as_it_was():
    model = Twice().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cka_matrix(model, draw(20, 3, 8, 8).split(10), LAYERS)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_cka_matrix_refuses_an_unknown_layer_an_empty_loader_and_a_small_batch():
    model = Twice()
    with pytest.raises(UnknownLayerError, match=r"no layer 'nets\.c\.0'"):
        cka_matrix(model, [draw(8, 3, 8, 8)], ["nets.c.0"])
    with pytest.raises(DataError, match="no batch"):
        cka_matrix(model, [], LAYERS)
    with pytest.raises(BatchTooSmallError, match="batch 1 has 2 samples"):
        cka_matrix(model, draw(10, 3, 8, 8).split(8), LAYERS)


def test_cka_matrix_refuses_a_layer_whose_first_dimension_is_not_the_samples():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.turn = nn.Linear(3, 6), nn.Flatten(0, 1)

        def forward(self, x):
            return self.turn(self.fc(x))

    with pytest.raises(ShapeError, match=r"'turn' returned shape \(48,\) for a batch of 8"):
        cka_matrix(Turned(), [draw(8, 3)], ["fc", "turn"])


def test_cka_matrix_names_layer_and_batch_of_a_number_that_is_not_finite():
    images = draw(16, 3, 8, 8)
    images[12, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layer 'nets\.a\.0'.*5 layers behind.*batch 1"):
        cka_matrix(Twice(), images.split(8), LAYERS)
