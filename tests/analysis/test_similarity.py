"""similarity_matrix and measure_layers over real passes: each entry is what the pure functions say of the outputs."""

import copy
import gc
import itertools
import json
import math
import re
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from layerlens.activations import features
from layerlens.analysis.cka import null_of
from layerlens.analysis.measures import MEASURES, make_pair_measure, parse_measure
from layerlens.analysis.neighbours import mutual_knn
from layerlens.analysis.profiles import measure_layers
from layerlens.analysis.projection import Projection
from layerlens.analysis.resampling import jackknife_intervals
from layerlens.analysis.results import Caution, CrossSimilarity, PermutationNull, SimilarityMatrix
from layerlens.analysis.rows import RowStore
from layerlens.analysis.rsa import rsa
from layerlens.analysis.similarity import cka_matrix, similarity_matrix
from layerlens.analysis.subspace import Procrustes, mean_cca, procrustes, pwcca, svcca
from layerlens.analysis.whole_set import cka
from layerlens.errors import (
    BatchTooSmallError,
    ConfigError,
    DegenerateError,
    LayerlensError,
    NonFiniteError,
    ShapeError,
    UnknownLayerError,
    UnknownNameError,
)
from layerlens.reduction import Reduction, make_reduction

PAIRS = [m.name for m in MEASURES.values() if m.over == "pairs"]
WHOLE_SET = [name for name in PAIRS if name != "cka"]
SIZES = [20, 20, 20, 16]
N = sum(SIZES)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(model, seed):
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(scale * draw(*parameter.shape, seed=seed + k))
    return model


def convolutions(seed=1):
    """Maps, and then vectors, for images (n, 2, 6, 6)."""
    return fill(nn.Sequential(nn.Conv2d(2, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 6), nn.ReLU()), seed)


def perceptron(seed=11):
    """Another architecture for the same images."""
    return fill(nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.Tanh(), nn.Linear(9, 4)), seed)


def images(n=N, seed=0):
    """Few factors and some noise, so that layers are alike in part."""
    return (draw(n, 5, seed=seed) @ draw(5, 72, seed=90) + 0.5 * draw(n, 72, seed=seed + 1)).view(n, 2, 6, 6)


IMAGES = images()
BATCHES = IMAGES.split(SIZES)


def outputs(model, x=IMAGES):
    """Each layer's output, by a walk through the modules."""
    found = {"input": x}
    with torch.no_grad():
        for name, module in model.named_children():
            x = found[name] = module(x)
    return found


def u_centred(x):
    """Entry by entry as Székely and Rizzo write it, float64."""
    x = x.double().flatten(1).numpy()
    k, n = x @ x.T, len(x)
    np.fill_diagonal(k, 0)
    u = k - k.sum(1, keepdims=True) / (n - 2) - k.sum(0, keepdims=True) / (n - 2) + k.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(u, 0)
    return u


def minibatch(x, y, sizes=SIZES):
    """Unbiased HSIC averaged over batches by their sizes, then one ratio."""
    sums = np.zeros(3)
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        a, b = u_centred(a - a.mean(0)), u_centred(b - b.mean(0))
        n = len(a)
        sums += n * np.array([(a * b).sum(), (a * a).sum(), (b * b).sum()]) / (n * (n - 3))
    return sums[0] / math.sqrt(sums[1] * sums[2])


PURE = {
    "cka": minibatch,
    "cka,estimator=debiased": cka,
    "cka,estimator=biased": lambda x, y: cka(x, y, estimator="biased"),
    "cka,kernel=rbf,estimator=debiased": lambda x, y: cka(x, y, kernel="rbf"),
    "cka,kernel=rbf,rbf_factor=0.5,estimator=biased": lambda x, y: cka(
        x, y, kernel="rbf", rbf_factor=0.5, estimator="biased"
    ),
    "mean_cca": mean_cca,
    "svcca": svcca,
    "svcca,variance=0.7": lambda x, y: svcca(x, y, variance=0.7),
    "pwcca": pwcca,
    "procrustes": procrustes,
    "procrustes_squared": lambda x, y: procrustes(x, y, squared=True),
    "rsa_spearman": rsa,
    "rsa_spearman,distance=euclidean": lambda x, y: rsa(x, y, distance="euclidean"),
    "rsa_pearson": lambda x, y: rsa(x, y, correlation="pearson"),
    "rsa_pearson,distance=cosine": lambda x, y: rsa(x, y, correlation="pearson", distance="cosine"),
    "mutual_knn": mutual_knn,
    "mutual_knn,k=4": lambda x, y: mutual_knn(x, y, k=4),
}
NAMES = ["0", "2", "3"]


def matrix(measure="cka", model=None, batches=BATCHES, layers="0,2,3", **options):
    return similarity_matrix(model or convolutions(), batches, layers, measure=measure, **options)


def cross(measure="cka", batches=BATCHES, **options):
    given = {"labels": ("old", "new"), "other": perceptron(), "other_layers": "1,3", **options}
    return similarity_matrix(convolutions(), batches, "0,3", measure=measure, **given)


# --- entries, order, options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", PURE)
def test_every_entry_is_the_pure_function_of_the_two_outputs(measure):
    found, rows = matrix(measure, groups=0), outputs(convolutions())
    for i, first in enumerate(NAMES):
        for j, second in enumerate(NAMES):
            if i != j:
                expected = PURE[measure](rows[first], rows[second])
                assert found.between(first, second) == pytest.approx(expected, abs=2e-6), (first, second)
    np.testing.assert_allclose(found.values, found.values.T, atol=1e-12)
    best = MEASURES[found.measure].high if MEASURES[found.measure].higher_is_alike else MEASURES[found.measure].low
    np.testing.assert_array_equal(found.values.diagonal(), best)


def test_every_pair_measure_has_a_pure_function_here():
    assert {text.partition(",")[0] for text in PURE} == set(PAIRS)


@pytest.mark.parametrize("measure", ["cka", "cka,estimator=debiased", "svcca"])
def test_layers_stand_in_the_order_in_which_they_run(measure):
    found = matrix(measure, layers=["3", "input", "0"], groups=0)
    assert found.layers == found.rows == found.columns == ("input", "0", "3")
    rows = outputs(convolutions())
    assert found.values[0, 2] == pytest.approx(PURE[measure](rows["input"], rows["3"]), abs=2e-6)


@pytest.mark.parametrize("measure", ["cka,estimator=debiased", "svcca", "mutual_knn", "procrustes"])
@pytest.mark.parametrize("size", [1, 7, 40, N])
def test_batches_do_not_change_a_measure_of_the_whole_set(measure, size):
    found = matrix(measure, batches=IMAGES.split(size), permutations=3)
    whole = matrix(measure, permutations=3)
    for name in ("values", "low", "high"):
        np.testing.assert_allclose(getattr(found, name), getattr(whole, name), atol=1e-5)
    np.testing.assert_allclose(found.null.mean, whole.null.mean, atol=1e-5)
    assert found.samples == whole.samples == N


@pytest.mark.parametrize(
    ("measure", "options"),
    [
        ("cka", {"kernel": "linear", "estimator": "minibatch"}),
        ("cka,estimator=debiased", {"kernel": "linear", "estimator": "debiased"}),
        ("cka,kernel=rbf,estimator=biased", {"kernel": "rbf", "estimator": "biased", "rbf_factor": 1.0}),
        ("cka,kernel=rbf,rbf_factor=0.5", {"kernel": "rbf", "estimator": "minibatch", "rbf_factor": 0.5}),
        ("svcca,variance=0.9", {"variance": 0.9, "estimator": "whole-set"}),
        ("rsa-spearman", {"distance": "correlation", "estimator": "whole-set"}),
        ("mutual_knn,k=4", {"k": 4, "estimator": "whole-set"}),
        ("procrustes", {"estimator": "whole-set"}),
    ],
)
def test_measure_options_and_level_are_recorded(measure, options):
    for found in (matrix(measure, level=0.9, groups=4), cross(measure, level=0.9, groups=4)):
        assert found.measure == measure.partition(",")[0].replace("-", "_")
        assert found.options == options
        assert (found.level, found.samples, found.reduce) == (0.9, N, "flatten")
        assert len(found.sample_id) == 16


@pytest.mark.parametrize("estimator", ["minibatch", "debiased", "biased"])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_cka_matrix_is_similarity_matrix_with_the_options_of_cka(kernel, estimator):
    one = cka_matrix(
        convolutions(), BATCHES, "0,2,3", kernel=kernel, rbf_factor=0.7, estimator=estimator, level=0.8
    )  # fmt: skip
    other = matrix(f"cka,kernel={kernel},rbf_factor=0.7,estimator={estimator}", level=0.8)
    assert one.to_dict() == other.to_dict()
    assert one.estimator == estimator
    assert one.kernel == kernel


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"measure": "ckaa"}, UnknownNameError, "unknown measure 'ckaa'; closest: cka"),
        ({"measure": "effective_rank"}, ConfigError, "use measure_layers"),
        ({"measure": "cka,estimator=whole-set"}, UnknownNameError, "unknown estimator 'whole-set'"),
        ({"layers": "0,nope"}, UnknownLayerError, "no layer 'nope'"),
        ({"reduce": "pol"}, UnknownNameError, "unknown reduction 'pol'; closest: pool"),
        ({"level": 95}, ConfigError, "level=95; allowed: between 0 and 1"),
        ({"level": 95, "measure": "svcca"}, ConfigError, "level=95; allowed: between 0 and 1"),
        ({"measure": "svcca", "groups": 1}, ConfigError, "groups=1; allowed: 0 for no intervals, or 2 or more"),
        ({"measure": "svcca", "groups": -1}, ConfigError, "groups=-1; allowed"),
        ({"measure": "svcca", "groups": 39}, BatchTooSmallError, "76 samples for 39 groups; .*fewer groups"),
        ({"permutations": -1}, ConfigError, "permutations=-1; allowed: 0 or more"),
        ({"measure": "svcca", "permutations": -1}, ConfigError, "permutations=-1; allowed: 0 or more"),
        ({"measure": "svcca", "memory_mib": 0}, ConfigError, "memory_mib=0; allowed: above 0"),
        ({"projection": 8}, ConfigError, "projection=8; allowed: a whole number from 16, or 0"),
        ({"projection": 32.0}, ConfigError, r"projection=32\.0; allowed"),
        ({"labels": ("A", "A")}, ConfigError, "two models need two different names"),
        ({"tolerance": 0.0}, ConfigError, r"tolerance=0\.0; allowed: between 0 and 1"),
        ({"tolerance": 1.5}, ConfigError, r"tolerance=1\.5; allowed"),
    ],
)
def test_a_wrong_setting_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        matrix(**options)


@pytest.mark.parametrize("measure", ["cka", "svcca"])
def test_the_model_is_left_as_it_was(measure):
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    matrix(measure, model, layers="0,1")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- two models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", PURE)
def test_every_entry_across_two_models_is_the_pure_function_of_the_two_outputs(measure):
    found, first, second = cross(measure, groups=0), outputs(convolutions()), outputs(perceptron())
    assert isinstance(found, CrossSimilarity)
    assert (found.first, found.second, found.labels) == (("0", "3"), ("1", "3"), ("old", "new"))
    for a in found.first:
        for b in found.second:
            assert found.between(a, b) == pytest.approx(PURE[measure](first[a], second[b]), abs=2e-6), (a, b)


class Both(nn.Module):
    """Two models side by side in one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = convolutions(), perceptron()

    def forward(self, x):
        return self.a(x), self.b(x)


@pytest.mark.parametrize("measure", ["cka", "cka,estimator=debiased", "cka,estimator=biased", "svcca", "procrustes"])
def test_the_rectangle_is_a_part_of_the_joint_matrix(measure):
    found = cross(measure, permutations=7)
    joint = similarity_matrix(Both(), BATCHES, "a.0,a.3,b.1,b.3", measure=measure, permutations=7)
    cut = (slice(None, 2), slice(2, None))
    for name in ("values", "low", "high"):
        np.testing.assert_allclose(getattr(found, name), getattr(joint, name)[cut], atol=1e-6)
    for name in ("mean", "bound", "p_value"):
        np.testing.assert_allclose(getattr(found.null, name), getattr(joint.null, name)[cut], atol=1e-5)
    np.testing.assert_array_equal(found.weights, joint.weights)
    assert (found.samples, found.sample_id) == (joint.samples, joint.sample_id)


@pytest.mark.parametrize("measure", ["cka", "cka,estimator=debiased", "cka,estimator=biased", "svcca", "mutual_knn"])
def test_replicates_are_the_rectangle_without_each_group_in_turn(measure):
    """Their weighted mean is close to the values, and their spread is that of the intervals' order."""
    found = cross(measure, groups=8)
    groups = len(SIZES) if measure == "cka" else 8 if measure in WHOLE_SET else N // 4
    assert found.replicates.shape == (groups, 2, 2)
    assert found.leave_out() is found.replicates
    assert len(found.weights) == groups
    assert found.weights.sum() == pytest.approx(N)
    np.testing.assert_allclose(found.replicates.mean(0), found.values, atol=0.05)
    assert (found.replicates.std(0) > 1e-4).all()


def test_a_model_with_itself_scores_best_on_the_diagonal():
    model = convolutions()
    for measure in PAIRS:
        found = similarity_matrix(model, BATCHES, "0,3", other=model, other_layers="0,3", measure=measure, groups=0)
        best = MEASURES[measure].high if MEASURES[measure].higher_is_alike else MEASURES[measure].low
        np.testing.assert_allclose(found.values.diagonal(), best, atol=1e-6)
        assert found.counterparts() == {"0": "0", "3": "3"}


def test_only_pairs_across_the_two_models_are_compared(monkeypatch):
    compare, calls = Procrustes.compare, []
    monkeypatch.setattr(Procrustes, "compare", lambda self, a, b: calls.append(1) or compare(self, a, b))
    cross("procrustes", groups=0)
    assert len(calls) == 4


def test_both_models_take_a_forward_of_their_own():
    found = cross(
        "cka,estimator=debiased", forward=lambda m, x: m(-x), other_forward=lambda m, x: m(x.flip(0)), groups=0
    )
    first, second = outputs(convolutions(), -IMAGES), outputs(perceptron(), torch.cat([b.flip(0) for b in BATCHES]))
    assert found.between("3", "1") == pytest.approx(cka(first["3"], second["1"]), abs=2e-6)


def test_the_other_models_layers_default_to_its_own_blocks():
    found = similarity_matrix(convolutions(), BATCHES, "0", other=perceptron())
    assert found.second == similarity_matrix(perceptron(), BATCHES).layers


def test_layers_of_the_second_model_are_looked_up_in_the_second_model():
    with pytest.raises(UnknownLayerError, match="no layer number 4 in Sequential; allowed: -1 to 2"):
        cross(other_layers="4")


# --- reductions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["cka", "cka,estimator=debiased", "svcca", "rsa_spearman"])
@pytest.mark.parametrize("reduce", ["pool", "pool,channels=last"])
def test_pooled_layers_are_compared_by_their_means(measure, reduce):
    last = reduce.endswith("last")

    class Model(nn.Sequential):
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1) if last else x)

    model = Model(nn.Identity(), nn.Tanh())
    found = similarity_matrix(model, BATCHES, "0,1", measure=measure, reduce=reduce, groups=0)
    rows = [x.mean((2, 3)) for x in (IMAGES, IMAGES.tanh())]
    assert found.between("0", "1") == pytest.approx(PURE[measure](*rows), abs=1e-5)
    assert found.reduce == reduce


@pytest.mark.parametrize("text", ["positions", "positions,grid=2"])
@pytest.mark.parametrize("measure", ["cka", "cka,estimator=debiased", "cka,estimator=biased", "svcca", "procrustes"])
def test_position_wise_layers_are_compared_row_by_row(measure, text):
    reduction, cells = make_reduction(text), 4 if "grid" in text else 16
    found = matrix(measure, layers="0,1", reduce=text, groups=0)
    rows = [reduction(outputs(convolutions())[name]) for name in ("0", "1")]
    sizes = [[cells * s for s in SIZES]] if measure == "cka" else []
    assert found.between("0", "1") == pytest.approx(PURE[measure](*rows, *sizes), abs=1e-5)
    assert (found.reduce, found.samples) == (text, cells * N)


def test_a_reduction_may_be_given_as_such():
    assert matrix(layers="0,1", reduce=Reduction("positions", grid=2)).reduce == "positions,grid=2"


def test_the_jackknife_of_positions_leaves_out_whole_samples():
    """Group g has the samples g, g + 4, …, with all their positions."""
    found = matrix("svcca,variance=0.7", layers="0,1", reduce="positions", groups=4)
    rows = [Reduction("positions")(outputs(convolutions())[name]).view(N, 16, 2) for name in ("0", "1")]
    for g in range(4):
        keep = torch.arange(N) % 4 != g
        expected = svcca(*(r[keep].flatten(0, 1) for r in rows), variance=0.7)
        assert found.replicates[g, 0, 1] == pytest.approx(expected, abs=1e-6)
    assert found.weights.tolist() == [16 * 19] * 4


@pytest.mark.parametrize("measure", ["cka", "cka,estimator=debiased", "svcca"])
def test_layers_of_different_resolution_are_refused_position_by_position(measure):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2))
    with pytest.raises(ShapeError, match=r"layer '1' has 4 positions per sample and layer '0' 16.*grid=4"):
        similarity_matrix(model, BATCHES, "0,1", measure=measure, reduce="positions")
    assert np.isfinite(
        similarity_matrix(model, BATCHES, "0,1", measure=measure, reduce="positions,grid=2").values
    ).all()


@pytest.mark.parametrize("measure", ["cka", "svcca"])
def test_a_layer_without_positions_is_named(measure):
    with pytest.raises(ShapeError, match=r"layer '3': an output of shape .* has no positions; leave this layer out"):
        matrix(measure, layers="0,3", reduce="positions")


@pytest.mark.parametrize("measure", ["cka", "cka,estimator=debiased", "svcca"])
def test_models_of_different_resolution_are_refused_position_by_position(measure):
    with pytest.raises(ShapeError, match=r"B:0.*A:0"):
        similarity_matrix(
            convolutions(), BATCHES, "0", other=nn.Sequential(nn.Conv2d(2, 3, 5)), other_layers="0",
            measure=measure, reduce="positions",
        )  # fmt: skip


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.whole, self.first = nn.Identity(), nn.Identity()

    def forward(self, x, attention_mask):
        return self.whole(x), self.first(x[:, :3])


@pytest.mark.parametrize("measure", ["cka", "cka,estimator=debiased", "svcca"])
def test_a_layer_of_fewer_tokens_than_the_mask_is_refused(measure):
    mask = (torch.arange(4) < torch.tensor([3, 2, 4, 1, 4] * 5)[:, None]).long()
    batch = {"x": draw(25, 4, 6), "attention_mask": mask}
    with pytest.raises(ShapeError, match=r"whole.*first|first.*whole"):
        similarity_matrix(Tokens(), [batch], "whole,first", measure=measure, reduce="positions")


def test_permutations_of_positions_are_refused_for_cka():
    with pytest.raises(ConfigError, match="positions as samples allow the linear kernel only"):
        matrix(layers="0,1", reduce="positions", permutations=3)
    with pytest.raises(ConfigError, match="positions as samples allow the linear kernel only"):
        matrix("cka,kernel=rbf", layers="0,1", reduce="positions")


@pytest.mark.parametrize("measure", ["cka", "procrustes"])
def test_permutations_of_positions_are_refused(measure):
    with pytest.raises(ConfigError, match="positions"):
        similarity_matrix(convolutions(), BATCHES, "0", measure=measure, reduce="positions", permutations=3)


# --- projection --------------------------------------------------------------------------------------------------


class Halves(nn.Module):
    """The two halves of the input's features as two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Identity(), nn.Identity()

    def forward(self, x):
        half = x.shape[1] // 2
        return self.a(x[:, :half]), self.b(x[:, half:])


def related(n, p, noise=1.0, seed=0):
    """Rows whose two halves share what they have in common."""
    shared, a, b = draw(3, n, p, seed=seed)
    return torch.cat([shared + noise * a, shared + noise * b], 1)


def halves(measure="cka", rows=None, **options):
    rows = related(80, 30) if rows is None else rows
    return similarity_matrix(Halves(), rows.split(20), "a,b", measure=measure, **options)


@pytest.mark.parametrize("measure", ["cka", "cka,estimator=debiased", "svcca"])
def test_a_projection_is_recorded_with_a_caution(measure):
    found = halves(measure, related(80, 100), projection=64)
    assert found.options["projection"] == 64
    caution = next(c for c in found.cautions if c.code == "LL012")
    assert "folded to 64 numbers" in caution.text
    plain = halves(measure, related(80, 100))
    assert "projection" not in plain.options
    assert "LL012" not in {c.code for c in plain.cautions}


@pytest.mark.parametrize("measure", ["cka", "cka,estimator=debiased", "procrustes"])
def test_a_projection_is_drawn_from_its_seed(measure):
    rows = related(80, 100)
    first, again, other, exact = (
        halves(measure, rows, groups=0, **o)
        for o in ({"projection": 64, "seed": 3}, {"projection": 64, "seed": 3}, {"projection": 64, "seed": 4}, {})
    )
    np.testing.assert_array_equal(first.values, again.values)
    gap = abs(first.values[0, 1] - other.values[0, 1])
    assert 1e-4 < gap < 0.3
    assert abs(first.values[0, 1] - exact.values[0, 1]) < 0.3


@pytest.mark.parametrize("measure", ["cka", "cka,estimator=biased", "mutual_knn"])
def test_layers_no_wider_than_the_projection_stay_exact(measure):
    rows = related(80, 64)
    np.testing.assert_array_equal(halves(measure, rows, projection=64).values, halves(measure, rows).values)


def test_without_a_wide_layer_a_projection_makes_no_caution():
    assert not halves(projection=64).cautions


def biased_cka_of_folded(x, y, width, seed):
    fold = Projection(width, seed)
    return cka(fold(0, x), fold(1, y), estimator="biased")


@pytest.mark.parametrize(("n", "p", "noise"), [(40, 1500, 0.5), (40, 1500, 2.0), (60, 400, 1.0)])
@pytest.mark.parametrize("width", [64, 256])
def test_the_error_of_a_projection_stays_below_its_bound(n, p, noise, width):
    x, y = related(n, p, noise).split(p, 1)
    exact = cka(x, y, estimator="biased")
    found = np.array([biased_cka_of_folded(x, y, width, seed) for seed in range(50)])
    error = math.sqrt(np.mean((found / exact - 1) ** 2))
    singular = torch.linalg.svdvals((x - x.mean(0)).double()).square()
    bound = Projection(width).error_bound(float(singular.sum() ** 2 / singular.square().sum()))
    assert 0.001 < error < bound


def test_folded_inner_products_are_unbiased_with_the_promised_variance():
    """Over 400 seeds the mean lies within four standard errors, and no variance exceeds its bound by far."""
    x = related(6, 100, 1.0)[:, :100].double()
    found = torch.stack([Projection(16, seed)(0, x) for seed in range(400)])
    products, exact = found @ found.transpose(1, 2), x @ x.T
    sizes = x.square().sum(1)
    variance = (sizes[:, None] * sizes + exact.square()) / 16
    assert ((products.mean(0) - exact).abs() < 4 * (variance / 400).sqrt()).all()
    assert (products.var(0) < 1.3 * variance).all()


@pytest.mark.parametrize("p", [33, 100, 128])
def test_every_feature_goes_to_one_place_with_its_sign(p):
    folded = Projection(32, seed=2)(0, torch.eye(p))
    assert torch.equal(folded.square().sum(1), torch.ones(p))
    assert set(folded.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert folded.abs().sum(0).max() - folded.abs().sum(0).min() <= 1  # places are even to one feature


def test_features_that_stand_a_width_apart_seldom_meet():
    """Both in one place in about one draw of 16, so that the norm of 2 is then 0 or 4."""
    row = torch.zeros(1, 64)
    row[0, [0, 16]] = 1.0
    norms = [float(Projection(16, seed)(0, row).square().sum()) for seed in range(300)]
    assert set(norms) == {0.0, 2.0, 4.0}
    assert 0.02 < np.mean(np.array(norms) != 2.0) < 0.12


def test_a_projection_folds_every_sample_in_the_same_way_and_every_layer_in_its_own():
    fold, x = Projection(32, seed=1), draw(10, 100)
    torch.testing.assert_close(torch.cat([fold(0, x[:3]), fold(0, x[3:])]), fold(0, x))
    assert not torch.allclose(fold(1, x), fold(0, x))
    assert torch.equal(fold(2, x[:, :32]), x[:, :32])
    assert torch.equal(Projection(32, seed=1)(0, x), fold(0, x))


def test_maps_are_folded_as_their_rows_and_half_precision_in_float32():
    maps = draw(5, 3, 4, 4)
    assert torch.equal(Projection(16)(0, maps), Projection(16)(0, maps.flatten(1)))
    assert Projection(16)(0, maps.bfloat16()).dtype == torch.float32


# --- early stop --------------------------------------------------------------------------------------------------


class Counted:
    def __init__(self, batches):
        self.batches, self.taken = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.taken += 1
            yield batch


def many(count=30, size=16):
    return Counted(related(count * size, 30).split(size))


def reach(found):
    off = ~np.eye(len(found.layers), dtype=bool)
    return max((found.high - found.values)[off].max(), (found.values - found.low)[off].max())


def test_tolerance_stops_at_the_first_batch_whose_intervals_are_narrow_enough():
    loader = many()
    found = similarity_matrix(Halves(), loader, "a,b", tolerance=0.05)
    assert 4 < loader.taken < 30
    assert found.samples == 16 * loader.taken
    assert reach(found) <= 0.05
    earlier = similarity_matrix(Halves(), loader.batches[: loader.taken - 1], "a,b")
    assert reach(earlier) > 0.05
    same = similarity_matrix(Halves(), loader.batches[: loader.taken], "a,b")
    np.testing.assert_array_equal(found.values, same.values)
    assert found.sample_id == same.sample_id


def test_the_wider_side_of_an_interval_counts_for_the_tolerance():
    """Near 1 an interval reaches further down than up: here 8 batches until the lower side is narrow enough."""
    batches = related(16 * 12, 30, 0.3).split(16)
    found = [similarity_matrix(Halves(), batches[:k], "a,b") for k in range(4, 13)]
    up, down = ([(m.high - m.values)[0, 1] for m in found], [(m.values - m.low)[0, 1] for m in found])
    tolerance = down[4] + 1e-9
    assert min(down[:4]) > tolerance > min(up[:4])
    loader = Counted(batches)
    similarity_matrix(Halves(), loader, "a,b", tolerance=tolerance)
    assert loader.taken == 8


def test_a_tolerance_that_is_never_met_takes_all_batches():
    loader = many(6)
    assert similarity_matrix(Halves(), loader, "a,b", tolerance=1e-4).samples == 96
    assert loader.taken == 6


def test_no_sweep_stops_before_four_batches():
    loader = many()
    similarity_matrix(Halves(), loader, "a,b", tolerance=0.99)
    assert loader.taken == 4


def test_settle_is_asked_with_the_matrix_so_far_and_stops_when_it_says_so():
    loader, asked = many(), []

    def settle(found):
        asked.append(found)
        return len(asked) == 3

    found = similarity_matrix(Halves(), loader, "a,b", settle=settle)
    assert loader.taken == 6
    assert [m.samples for m in asked] == [64, 80, 96]
    assert all(isinstance(m, SimilarityMatrix) for m in asked)
    np.testing.assert_array_equal(asked[-1].values, found.values)


def test_tolerance_and_settle_must_both_be_met():
    loader = many()
    similarity_matrix(Halves(), loader, "a,b", tolerance=0.99, settle=lambda m: m.samples >= 160)
    assert loader.taken == 10
    loader = many(12)
    similarity_matrix(Halves(), loader, "a,b", tolerance=1e-4, settle=lambda _: True)
    assert loader.taken == 12


def test_two_models_stop_early_as_one_does():
    loader = many()
    similarity_matrix(Halves(), loader, "a", other=Halves(), other_layers="b", tolerance=0.05)
    assert 4 < loader.taken < 30


@pytest.mark.parametrize("stop", [{"tolerance": 0.1}, {"settle": lambda _: True}])
@pytest.mark.parametrize("measure", ["cka,estimator=debiased", "cka,estimator=biased", *WHOLE_SET])
def test_an_early_stop_is_refused_for_the_whole_set(measure, stop):
    with pytest.raises(ConfigError, match="tolerance and settle need minibatch CKA"):
        matrix(measure, **stop)


@pytest.mark.parametrize("stop", [{"tolerance": 0.1}, {"settle": lambda _: True}])
def test_an_early_stop_is_refused_where_batches_are_shared_out(stop):
    with pytest.raises(ConfigError, match="can't be combined with sharded=True"):
        matrix(sharded=True, **stop)


def test_layers_that_are_all_constant_take_all_batches():
    loader = Counted([torch.ones(8, 6)] * 5)
    found = similarity_matrix(Halves(), loader, "a,b", tolerance=0.1)
    assert found.missing == ("a", "b")
    assert loader.taken == 5


# --- memory ------------------------------------------------------------------------------------------------------

BIG = {
    "svcca": (300, 400),
    "pwcca": (200, 2000),
    "procrustes": (300, 400),
    "mutual_knn": (300, 1500),
    "rsa_spearman": (400, 60),
    "cka,estimator=debiased": (200, 3000),
    "cka,estimator=biased,kernel=rbf": (300, 3000),
}


@pytest.mark.parametrize("measure", BIG)
def test_what_the_memory_error_asks_for_is_enough_and_little_less_is_not(measure):
    n, p = BIG[measure]
    rows = related(n, p)

    def run(mib):
        return similarity_matrix(Halves(), rows.split(100), "a,b", measure=measure, memory_mib=mib, groups=0)

    with pytest.raises(ConfigError, match=r"raise memory_mib by \d+") as caught:
        run(1)
    needed = 1 + int(re.search(r"raise memory_mib by (\d+)", str(caught.value))[1])
    found = run(needed)
    with pytest.raises(ConfigError, match="raise memory_mib by"):
        run(int(0.6 * needed))
    np.testing.assert_allclose(found.values, run(2048).values, atol=1e-6)


def test_rows_on_disk_leave_no_open_file_behind():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = measure_layers(
            nn.Sequential(nn.Identity()), [related(200, 200)], "0", estimator="whole-set", memory_mib=0.25, groups=0
        )
        gc.collect()
    assert math.isfinite(found.values[0])
    assert not [w for w in caught if w.category is ResourceWarning]


def test_rows_make_room_for_the_measure_by_going_to_disk(monkeypatch):
    spill, spilt = RowStore.spill, []
    monkeypatch.setattr(RowStore, "spill", lambda store: spilt.append(store.bytes) or spill(store))
    rows = related(300, 400)
    ample, tight = (halves("svcca", rows, groups=0, memory_mib=mib) for mib in (2048, 8))
    assert spilt == [2 * 300 * 400 * 4]
    np.testing.assert_array_equal(ample.values, tight.values)


def test_the_streaming_estimator_needs_no_memory_for_rows():
    assert halves(memory_mib=1e-6).samples == 80


# --- what is refused or missing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("measure", ["cka,estimator=debiased", "cka,estimator=biased", *WHOLE_SET])
def test_fewer_than_four_samples_in_all_are_refused(measure, n):
    with pytest.raises(BatchTooSmallError, match=f"{n} samples in all; .* at least 4"):
        halves(measure, related(n, 30), groups=0)


def test_a_batch_of_three_is_refused_by_the_streaming_estimator_alone():
    rows = related(43, 30)
    with pytest.raises(BatchTooSmallError, match="batch 2 has 3 samples"):
        halves(rows=rows)
    assert halves("cka,estimator=debiased", rows).samples == 43


@pytest.mark.parametrize("measure", PURE)
def test_a_constant_layer_is_missing_with_a_caution_and_leaves_the_others_alone(measure):
    model = convolutions()
    with torch.no_grad():
        model[3].weight.zero_()
    found, whole = matrix(measure, model, layers="0,1,3"), matrix(measure, layers="0,1,3")
    assert found.missing == ("3",)
    assert [(c.code, c.layers) for c in found.cautions if c.code == "LL006"] == [("LL006", ("3",))]
    assert "3 does not vary" in found.cautions[-1].text
    for name in ("values", "low", "high"):
        assert np.isnan(getattr(found, name)[2]).all()
        assert np.isnan(getattr(found, name)[:, 2]).all()
        np.testing.assert_allclose(getattr(found, name)[:2, :2], getattr(whole, name)[:2, :2], atol=1e-6)


@pytest.mark.parametrize("measure", ["cka", "cka,estimator=debiased", "svcca"])
def test_a_constant_layer_of_two_models_is_missing_under_its_label(measure):
    model = perceptron()
    with torch.no_grad():
        model[3].weight.zero_()
    found = cross(measure, other=model)
    assert found.missing == ("new:3",)
    assert [c.layers for c in found.cautions if c.code == "LL006"] == [("new:3",)]
    assert np.isnan(found.values).tolist() == [[False, True]] * 2
    assert found.counterparts() == {"0": "1", "3": "1"}


@pytest.mark.parametrize("measure", ["cka", "cka,estimator=debiased", "svcca", "mutual_knn"])
def test_a_constant_layer_has_no_null(measure):
    """Features whose mean over a batch is not exact."""
    rows = torch.cat([draw(76, 40), draw(1, 40, seed=1).expand(76, 40)], 1)
    null = halves(measure, rows, permutations=3).null
    for array in (null.mean, null.bound, null.p_value):
        assert np.isnan(array).tolist() == [[False, True], [True, True]]


def test_a_layer_with_samples_of_norm_zero_is_not_called_constant():
    """mutual_knn has no direction for two samples; the layer varies over the others."""
    rows = draw(40, 6)
    rows[3] = rows[9] = -1.0
    found = similarity_matrix(nn.Sequential(nn.ReLU(), nn.Linear(6, 4)), [rows], "0,1", measure="mutual_knn")
    assert found.missing == ("0",)
    assert "does not vary" not in found.cautions[0].text


@pytest.mark.parametrize("measure", PURE)
def test_nan_names_the_layer_where_it_begins(measure):
    model = convolutions()
    with torch.no_grad():
        model[3].bias[2] = float("nan")
    with pytest.raises(NonFiniteError, match="layer '3'"):
        matrix(measure, model, layers="0,1,3,4")


@pytest.mark.parametrize("measure", ["cka", "cka,estimator=biased", "svcca", "mutual_knn"])
def test_nan_in_the_second_model_is_named_with_its_label(measure):
    model = perceptron()
    with torch.no_grad():
        model[1].bias[2] = float("inf")
    with pytest.raises(NonFiniteError, match="layer 'new:1'"):
        cross(measure, other=model)


# --- precision ---------------------------------------------------------------------------------------------------


def true_cka(x, y):
    a, b = (u_centred(t.double() - t.double().mean(0)) for t in (x, y))
    return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())


@pytest.mark.parametrize("measure", ["cka", "cka,estimator=debiased"])
def test_a_bfloat16_model_is_measured_in_float32(measure):
    """Against float64 of the very activations that the model gave."""
    model, rows = fill(nn.Sequential(nn.Linear(60, 300), nn.Tanh(), nn.Linear(300, 200)), 1).bfloat16(), related(96, 30)
    found = similarity_matrix(model, [rows.bfloat16()], "0,2", measure=measure)
    kept = [features(model, [rows.bfloat16()], name) for name in ("0", "2")]
    assert found.between("0", "2") == pytest.approx(true_cka(*kept), abs=1e-6)
    assert abs(true_cka(*kept) - cka(*(k.bfloat16() @ torch.ones(k.shape[1], 3).bfloat16() for k in kept))) > 1e-3


@pytest.mark.parametrize("estimator", ["minibatch", "debiased"])
def test_the_float32_check_is_made_and_can_be_left_out(estimator):
    found = halves(f"cka,estimator={estimator}")
    assert 0 <= found.precision_error < 1e-6
    assert math.isnan(halves(f"cka,estimator={estimator}", check=False).precision_error)
    assert not found.cautions


def test_a_layer_too_fine_for_float32_is_cautioned():
    """Samples that lie 4000 apart in directions of their own, beside which float32 loses what they share."""
    rows, own = related(64, 30), 3e3 * torch.eye(64)
    rows = torch.cat([own, rows[:, :30], own, rows[:, 30:]], 1)
    found = similarity_matrix(Halves(), [rows], "a,b")
    assert found.precision_error > 1e-6
    caution = next(c for c in found.cautions if c.code == "LL011")
    assert f"up to {found.precision_error:.1e}" in caution.text
    exact = similarity_matrix(Halves(), [rows.double()], "a,b", check=False)
    assert abs(found.values[0, 1] - exact.values[0, 1]) > 1e-6


@pytest.mark.parametrize("estimator", ["minibatch", "debiased", "biased"])
def test_a_model_in_float64_scores_what_it_scores_in_float32(estimator):
    model, rows = fill(nn.Sequential(nn.Linear(60, 30), nn.ReLU(), nn.Linear(30, 5)), 1), related(64, 30) + 1
    single, double = (
        similarity_matrix(m, [x], "0,1,2", measure=f"cka,estimator={estimator}")
        for m, x in ((copy.deepcopy(model), rows), (copy.deepcopy(model).double(), rows.double()))
    )
    np.testing.assert_allclose(double.values, single.values, atol=1e-5)
    assert double.precision_error < 1e-12


def test_the_float64_check_leaves_the_users_batch_alone():
    rows = related(64, 30).double()
    before = rows.clone()
    similarity_matrix(nn.Sequential(nn.Linear(60, 3)).double(), [rows], "input,0")
    assert torch.equal(rows, before)


@pytest.mark.parametrize(
    ("measure", "place"),
    [
        ("cka", 7),
        ("cka,estimator=debiased", 8),
        ("cka,estimator=debiased", 7),
        ("cka,estimator=biased", -1),
    ],
)
def test_one_feature_of_large_mean_does_not_drown_the_others(measure, place):
    """A massive activation, as transformers have: a constant in one feature of many, which centring takes out."""
    rows = related(96, 2000, 0.5)
    far = rows.clone()
    far[:, place] += 1e4
    found, plain = (similarity_matrix(Halves(), [r], "a,b", measure=measure) for r in (far, rows))
    assert found.values[0, 1] == pytest.approx(plain.values[0, 1], abs=1e-5)


# --- cautions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["mean_cca", "svcca", "pwcca"])
def test_too_few_samples_for_the_directions_are_cautioned(measure):
    narrow, wide = (torch.cat([draw(60, 5), draw(60, p, seed=1)], 1) for p in (5, 50))

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.five, self.rest = nn.Identity(), nn.Identity()

        def forward(self, x):
            return self.five(x[:, :5]), self.rest(x[:, 5:])

    found = similarity_matrix(Parts(), [wide], "five,rest", measure=measure)
    caution = next(c for c in found.cautions if c.code == "LL010")
    assert caution.layers == ("rest",)
    assert f"too few samples for {measure}: 60 for up to" in caution.text
    assert not similarity_matrix(Parts(), [narrow], "five,rest", measure=measure).cautions


@pytest.mark.parametrize("measure", ["procrustes", "procrustes_squared", "rsa_spearman", "rsa_pearson", "mutual_knn"])
def test_measures_that_any_number_of_directions_suits_make_no_caution(measure):
    assert not halves(measure, related(30, 100)).cautions


# --- permutations ------------------------------------------------------------------------------------------------

NULLS = ["cka", "cka,kernel=rbf", "cka,estimator=debiased", *WHOLE_SET]


def unrelated(n=80, p=12):
    return torch.cat([draw(n, p), draw(n, p, seed=1)], 1)


@pytest.mark.parametrize("measure", [*NULLS, "cka,estimator=biased"])
def test_unrelated_layers_score_what_wrong_pairings_score(measure):
    found = halves(measure, unrelated(), permutations=99, groups=0)
    sign = 1 if MEASURES[found.measure].higher_is_alike else -1
    value, null = found.values[0, 1], found.null
    assert sign * value <= sign * null.bound[0, 1]
    assert null.p_value[0, 1] > 0.05
    assert abs(value - null.mean[0, 1]) < 2 * abs(null.bound[0, 1] - null.mean[0, 1])
    assert (null.permutations, null.level) == (99, 0.95)


@pytest.mark.parametrize("measure", [*NULLS, "cka,estimator=biased"])
def test_related_layers_score_beyond_all_wrong_pairings(measure):
    found = halves(measure, related(80, 12, 0.5), permutations=39, groups=0)
    sign = 1 if MEASURES[found.measure].higher_is_alike else -1
    assert sign * found.values[0, 1] > sign * found.null.bound[0, 1]
    np.testing.assert_allclose(found.null.p_value, 1 / 40)
    for array in (found.null.mean, found.null.bound):
        np.testing.assert_allclose(array, array.T, atol=1e-12)


@pytest.mark.parametrize("measure", NULLS)
def test_permutations_are_drawn_from_their_seed(measure):
    first, again, other = (halves(measure, permutations=9, groups=0, seed=s).null for s in (3, 3, 4))
    np.testing.assert_array_equal(first.mean, again.mean)
    assert abs(first.mean[0, 1] - other.mean[0, 1]) > 1e-6
    np.testing.assert_array_equal(halves(measure, permutations=9, groups=0).values, halves(measure, groups=0).values)


@pytest.mark.parametrize("measure", ["cka,estimator=debiased", "svcca", "procrustes", "mutual_knn", "rsa_pearson"])
def test_the_null_is_that_of_permuted_samples(measure):
    """Mean and bound over 200 wrong pairings, drawn here by NumPy."""
    rows = related(40, 8)
    null = similarity_matrix(Halves(), [rows], "a,b", measure=measure, permutations=200, groups=0).null
    random = np.random.default_rng(0)
    x, y = rows.split(8, 1)
    score = true_cka if measure.startswith("cka") else PURE[measure]
    wrong = np.array([score(x, y[random.permutation(40)]) for _ in range(200)])
    assert null.mean[0, 1] == pytest.approx(wrong.mean(), abs=4 * wrong.std() / math.sqrt(100))
    end = 0.95 if MEASURES[measure.partition(",")[0]].higher_is_alike else 0.05
    assert null.bound[0, 1] == pytest.approx(np.quantile(wrong, end), abs=0.6 * wrong.std())


@pytest.mark.parametrize("measure", ["cka", "cka,estimator=debiased"])
def test_the_null_of_six_samples_is_that_of_all_their_pairings(measure):
    """Few enough to go through all 720; a wrong count of samples in a denominator shows."""
    rows = related(6, 2).double()
    x, y = rows.split(2, 1)
    null = similarity_matrix(Halves(), [rows], "a,b", measure=measure, permutations=600, groups=0).null
    every = np.array([true_cka(x, y[list(order)]) for order in itertools.permutations(range(6))])
    assert null.mean[0, 1] == pytest.approx(every.mean(), abs=4 * every.std() / math.sqrt(600))
    assert np.quantile(every, 0.93) <= null.bound[0, 1] <= np.quantile(every, 0.97)


def test_the_minibatch_null_permutes_within_batches():
    """Batches that differ in their mean stay together: a permutation over all samples would break more."""
    rows = related(80, 8)
    null = halves(rows=rows, permutations=200).null
    random, x, y = np.random.default_rng(0), *rows.split(8, 1)
    orders = [np.concatenate([20 * b + random.permutation(20) for b in range(4)]) for _ in range(200)]
    wrong = np.array([minibatch(x, y[order], [20] * 4) for order in orders])
    assert null.mean[0, 1] == pytest.approx(wrong.mean(), abs=4 * wrong.std() / math.sqrt(100))
    assert null.bound[0, 1] == pytest.approx(np.quantile(wrong, 0.95), abs=0.6 * wrong.std())


@pytest.mark.parametrize("measure", [text for text in PURE if not text.startswith("cka")])
def test_permuting_a_prepared_layer_is_preparing_the_permuted_rows(measure):
    worker = make_pair_measure(*parse_measure(measure))
    x, y = related(30, 8, 0.3).double().split(8, 1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(order, order.argsort())  # order and its inverse are told apart
    found = worker.compare(worker.prepare(x), worker.permute(worker.prepare(y), order))
    assert found == pytest.approx(worker.compare(worker.prepare(x), worker.prepare(y[order])), abs=1e-9)
    assert abs(found - worker.compare(worker.prepare(x), worker.prepare(y))) > 1e-3


def test_the_null_of_four_wrong_pairings_worked_by_hand():
    """Of 0.1 0.3 0.5 0.2, 0.4 is reached by one: p = 2/5; 75 % lie at or below 0.3; a distance counts from below."""
    values = np.array([[0.4]])
    wrong = np.array([0.1, 0.3, 0.5, 0.2]).reshape(4, 1, 1)
    null = null_of(values, wrong, 0.6)
    assert (null.mean.item(), null.bound.item()) == (pytest.approx(0.275), 0.3)
    assert null.p_value.item() == pytest.approx(2 / 5)
    distance = null_of(values, wrong, 0.6, higher_is_alike=False)
    assert distance.p_value.item() == pytest.approx(4 / 5)
    assert distance.bound.item() == 0.2


# --- intervals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", WHOLE_SET)
def test_without_groups_there_are_values_but_no_intervals(measure):
    found, whole = halves(measure, groups=0), halves(measure)
    np.testing.assert_array_equal(found.values, whole.values)
    assert np.isnan(found.low).all()
    assert np.isnan(found.high).all()
    assert (len(found.replicates), len(found.weights)) == (0, 0)
    assert np.isfinite(whole.low).all()


def test_two_samples_for_each_group_are_enough():
    found = halves("procrustes", related(40, 12), groups=20)
    assert len(found.replicates) == 20
    assert np.isfinite(found.low).all()


@pytest.mark.parametrize("measure", ["svcca,variance=0.7", "procrustes", "rsa_pearson", "mutual_knn,k=4"])
def test_replicates_are_the_measure_without_each_group_of_samples(measure):
    """Sample i is in group i modulo the number of groups; the intervals follow from them."""
    rows = related(50, 8)
    found = halves(measure, rows, groups=4)
    pure = {**PURE, "svcca,variance=0.7": PURE["svcca,variance=0.7"]}[measure]
    for g in range(4):
        keep = torch.arange(50) % 4 != g
        assert found.replicates[g, 0, 1] == pytest.approx(pure(*rows[keep].split(8, 1)), abs=1e-6)
    assert found.weights.tolist() == [13, 13, 12, 12]
    entry = MEASURES[found.measure]
    low, high = jackknife_intervals(
        found.values, found.replicates, found.weights, 0.95, bounded=entry.high == 1, unbias=entry.unbias
    )
    assert (found.low[0, 1], found.high[0, 1]) == (pytest.approx(low[0, 1]), pytest.approx(high[0, 1]))
    np.testing.assert_array_equal(found.low.diagonal(), found.values.diagonal())
    np.testing.assert_array_equal(found.high.diagonal(), found.values.diagonal())


@pytest.mark.parametrize("measure", ["cka", "cka,estimator=debiased", *WHOLE_SET])
def test_intervals_are_in_order_and_a_higher_level_is_wider(measure):
    narrow, wide = (halves(measure, related(80, 12), level=level) for level in (0.5, 0.99))
    assert wide.low[0, 1] < narrow.low[0, 1] < narrow.high[0, 1] < wide.high[0, 1]


@pytest.mark.parametrize("measure", [*["cka", "cka,estimator=debiased"], *WHOLE_SET])
@pytest.mark.parametrize(
    "rows",
    [related(80, 12), related(80, 12, 0.1), unrelated(), draw(40, 200)],
    ids=["some", "much", "none", "few samples"],
)
def test_intervals_do_not_lie_outside_the_range(measure, rows):
    """An end may; the whole interval may not."""
    found, entry = halves(measure, rows), MEASURES[measure.partition(",")[0]]
    assert found.high[0, 1] >= entry.low
    assert found.low[0, 1] <= entry.high


# --- there and back ----------------------------------------------------------------------------------------------

ROUND = {
    "minibatch": lambda: matrix(permutations=5),
    "rbf": lambda: matrix("cka,kernel=rbf,estimator=debiased", permutations=5),
    "svcca": lambda: matrix("svcca,variance=0.9", permutations=5),
    "no groups": lambda: matrix("mutual_knn", groups=0),
    "constant layer": lambda: halves("procrustes", torch.cat([draw(40, 4), torch.ones(40, 4)], 1), permutations=3),
    "two models": lambda: cross(permutations=5),
    "two models, svcca": lambda: cross("svcca", permutations=5, projection=16),
    "two models, no groups": lambda: cross("rsa_spearman", groups=0),
}


@pytest.mark.parametrize("case", ROUND)
def test_a_result_comes_back_from_json_field_by_field(case):
    found = ROUND[case]()
    text = found.to_json()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    back = type(found).from_json(text)
    assert vars(back).keys() == vars(found).keys()
    for name, value in vars(found).items():
        assert type(getattr(back, name)) is type(value), name
        if isinstance(value, PermutationNull):
            np.testing.assert_equal(vars(back.null), vars(value))
        else:
            np.testing.assert_equal(getattr(back, name), value, err_msg=name)
    assert back.to_json() == text
    assert all(isinstance(c, Caution) for c in back.cautions)


@pytest.mark.parametrize("case", ROUND)
def test_a_frame_has_a_row_for_every_entry(case):
    found = ROUND[case]()
    frame = found.to_frame()
    columns = ["layer_a", "layer_b", "value", "low", "high", "measure"]
    assert list(frame.columns) == columns + (["null_bound", "p_value"] if found.null is not None else [])
    assert len(frame) == len(found.rows) * len(found.columns)
    assert set(frame.measure) == {found.measure}
    for _, row in frame.iterrows():
        i, j = found.place(row.layer_a, row.layer_b)
        np.testing.assert_equal((row.value, row.low, row.high), (found.values[i, j], found.low[i, j], found.high[i, j]))
        if found.null is not None:
            np.testing.assert_equal((row.null_bound, row.p_value), (found.null.bound[i, j], found.null.p_value[i, j]))


def test_the_cases_of_these_round_trips_hold_cautions_and_gaps():
    assert ROUND["constant layer"]().cautions[0].layers == ("b",)
    assert np.isnan(ROUND["constant layer"]().null.bound).any()
    assert "LL012" in {c.code for c in ROUND["two models, svcca"]().cautions}


# --- measure_layers ----------------------------------------------------------------------------------------------

SINGLE = [m.name for m in MEASURES.values() if m.over == "layers"]
VIEWED = [m.name for m in MEASURES.values() if m.over == "views"]
OPTIONED = [*SINGLE, "intrinsic_dimension,discard=0.3", "uniformity,t=0.5"]


def of_rows(measure, rows):
    entry, options = parse_measure(measure)
    return entry.load()(rows.flatten(1), **options)


@pytest.mark.parametrize("measure", OPTIONED)
def test_a_layer_measure_of_the_whole_set_is_the_pure_function_of_the_outputs(measure):
    found = measure_layers(convolutions(), BATCHES, "0,2,3", measure=measure, estimator="whole-set", groups=0)
    expected = [of_rows(measure, outputs(convolutions())[name]) for name in NAMES]
    np.testing.assert_allclose(found.values, expected, rtol=1e-4)
    assert found.layers == tuple(NAMES)
    assert (found.measure, found.samples) == (measure.partition(",")[0], N)
    assert np.isnan(found.low).all()


@pytest.mark.parametrize("measure", OPTIONED)
def test_a_layer_measure_of_batches_is_their_mean_with_a_t_interval(measure):
    found = measure_layers(convolutions(), BATCHES, "0,3", measure=measure, level=0.9)
    rows = outputs(convolutions())
    each = np.array([[of_rows(measure, part) for part in rows[name].split(SIZES)] for name in ("0", "3")])
    np.testing.assert_allclose(found.values, each.mean(1), rtol=1e-4)
    reach = stats.t.ppf(0.95, 3) * stats.sem(each, axis=1)
    np.testing.assert_allclose(np.array(found.high) - found.values, reach, rtol=1e-2)
    np.testing.assert_allclose(found.values - np.array(found.low), reach, rtol=1e-2)


@pytest.mark.parametrize("measure", ["rankme", "participation_ratio", "uniformity"])
def test_the_whole_set_interval_is_a_jackknife_over_groups_of_samples(measure):
    found = measure_layers(convolutions(), BATCHES, "3", measure=measure, estimator="whole-set", groups=5)
    rows = outputs(convolutions())["3"]
    without = np.array([[of_rows(measure, rows[torch.arange(N) % 5 != g])] for g in range(5)])
    weights = np.array([16.0, 15, 15, 15, 15])
    low, high = jackknife_intervals(np.array(found.values), without, weights, 0.95, bounded=False, unbias=False)
    np.testing.assert_allclose((found.low, found.high), (low, high), rtol=1e-4)
    assert found.low[0] < found.values[0] < found.high[0]


@pytest.mark.parametrize(
    ("measure", "estimator", "ceiling"),
    [
        ("effective_rank", "whole-set", N - 1),
        ("effective_rank", "minibatch", 19),
        ("participation_ratio", "whole-set", N - 1),
        ("rankme", "whole-set", N),
        ("rankme", "minibatch", 20),
        ("uniformity", "whole-set", math.nan),
    ],
)
def test_the_ceiling_is_what_the_samples_allow(measure, estimator, ceiling):
    found = measure_layers(convolutions(), BATCHES, "0", measure=measure, estimator=estimator)
    np.testing.assert_equal(found.ceiling, float(ceiling))


@pytest.mark.parametrize("measure", SINGLE)
@pytest.mark.parametrize("estimator", ["minibatch", "whole-set"])
def test_a_constant_layer_has_no_value_and_a_caution(measure, estimator):
    model = convolutions()
    with torch.no_grad():
        model[3].weight.zero_()
        model[3].bias.zero_()  # uniformity of equal directions would be 0
    found = measure_layers(model, BATCHES, "0,3", measure=measure, estimator=estimator)
    assert math.isnan(found.values[1])
    assert math.isfinite(found.values[0])
    assert [(c.code, c.layers) for c in found.cautions] == [("LL006", ("3",))]


@pytest.mark.parametrize("measure", SINGLE)
@pytest.mark.parametrize("estimator", ["minibatch", "whole-set"])
def test_nan_in_a_layer_is_named(measure, estimator):
    model = convolutions()
    with torch.no_grad():
        model[3].bias[2] = float("nan")
    with pytest.raises(NonFiniteError, match="layer '3'"):
        measure_layers(model, BATCHES, "0,3", measure=measure, estimator=estimator)


def test_layer_measures_take_a_reduction():
    found = measure_layers(convolutions(), BATCHES, "0", estimator="whole-set", reduce="pool", groups=0)
    assert found.values[0] == pytest.approx(
        of_rows("effective_rank", outputs(convolutions())["0"].mean((2, 3))), rel=1e-4
    )
    found = measure_layers(convolutions(), BATCHES, "0", estimator="whole-set", reduce="positions", groups=0)
    rows = Reduction("positions")(outputs(convolutions())["0"])
    assert found.values[0] == pytest.approx(of_rows("effective_rank", rows), rel=1e-4)


def test_the_jackknife_of_a_layers_positions_leaves_out_whole_samples():
    """Maps that are constant over their 16 positions tell no more than one position does."""
    vectors = draw(60, 5)
    maps = vectors[:, :, None, None].expand(60, 5, 4, 4).contiguous()
    options = {"measure": "participation_ratio", "estimator": "whole-set"}
    one = measure_layers(nn.Sequential(nn.Identity()), [vectors], "0", **options)
    many = measure_layers(nn.Sequential(nn.Identity()), [maps], "0", reduce="positions", **options)
    assert many.values[0] == pytest.approx(one.values[0], rel=1e-6)
    assert many.high[0] - many.low[0] == pytest.approx(one.high[0] - one.low[0], rel=0.1)


# --- views -------------------------------------------------------------------------------------------------------


def linear_model():
    """Odd in its input, so that the opposite input gives opposite rows."""
    return fill(nn.Sequential(nn.Flatten(), nn.Linear(72, 9, bias=False), nn.Linear(9, 4, bias=False)), 3)


@pytest.mark.parametrize(
    ("measure", "identity", "opposite"),
    [
        ("alignment", 0.0, 0.0),
        ("invariance", 1.0, -1.0),
        ("diversity", 1.0, 1.0),
        ("invariance,views=1", 1.0, -1.0),
        ("invariance,views=4", 1.0, -1.0),
        ("diversity,views=4", 1.0, 1.0),
        ("alignment,alpha=1", 0.0, 0.0),
    ],
)
def test_views_that_are_the_input_or_its_opposite_are_measured_as_such(measure, identity, opposite):
    for views, expected in ((lambda x: x.clone(), identity), (lambda x: -x, opposite)):
        found = measure_layers(linear_model(), BATCHES, "1,2", measure=measure, views=views)
        np.testing.assert_allclose(found.values, expected, atol=1e-6)
        assert found.samples == N


def turns(*factors):
    """The k-th view multiplies by the k-th factor, again and again; the look at the layers comes first."""
    calls = []

    def view(x):
        calls.append(len(x))
        return x * factors[sum(size == len(x) for size in calls[:-1]) % len(factors)]

    return view, calls


def test_alignment_compares_the_two_views_of_each_sample():
    view, _ = turns(1.0, -1.0)
    found = measure_layers(linear_model(), [IMAGES], "1", measure="alignment", views=view)
    assert found.values[0] == pytest.approx(4.0)


def test_diversity_is_the_mean_over_the_pairs_of_views():
    """Of 1, 1, -1 the pairs' cosines are 1, -1, -1."""
    view, calls = turns(1.0, 1.0, -1.0)
    found = measure_layers(linear_model(), [IMAGES], "1,2", measure="diversity,views=3", views=view)
    np.testing.assert_allclose(found.values, -1 / 3, atol=1e-6)
    assert calls.count(N) == 3


def test_invariance_is_the_mean_over_the_views_of_the_cosine_with_the_sample():
    """Of 1, 1, 1, -1: (3 - 1) / 4."""
    view, calls = turns(1.0, 1.0, 1.0, -1.0)
    found = measure_layers(linear_model(), [IMAGES], "1,2", measure="invariance,views=4", views=view)
    np.testing.assert_allclose(found.values, 0.5, atol=1e-6)
    assert calls.count(N) == 4


def test_views_of_noise_are_measured_as_the_pure_function_says():
    noise = 0.5 * draw(N, 2, 6, 6, seed=5)
    view = lambda x: x + noise[: len(x)]  # noqa: E731
    found = measure_layers(linear_model(), [IMAGES], "1,2", measure="invariance,views=1", views=view)
    plain, seen = outputs(linear_model()), outputs(linear_model(), IMAGES + noise)
    for value, name in zip(found.values, ("1", "2"), strict=True):
        expected = torch.cosine_similarity(plain[name].double(), seen[name].double()).mean()
        assert value == pytest.approx(float(expected), abs=1e-6)
    assert found.low[0] < found.values[0] < found.high[0]


@pytest.mark.parametrize("measure", VIEWED)
def test_a_measure_of_views_without_views_says_what_it_needs(measure):
    with pytest.raises(ConfigError, match=f"{measure} needs views=: a function that makes a random view"):
        measure_layers(linear_model(), BATCHES, "1", measure=measure)


def test_views_reach_the_input_of_a_batch_with_labels():
    seen = []
    view = lambda x: seen.append(tuple(x.shape)) or x  # noqa: E731
    loader = [(batch, torch.zeros(len(batch))) for batch in BATCHES]
    found = measure_layers(linear_model(), loader, "1", measure="alignment", views=view)
    assert found.values[0] == pytest.approx(0.0, abs=1e-9)
    assert set(seen) == {(2, 2, 6, 6), (20, 2, 6, 6), (16, 2, 6, 6)}


def test_views_of_named_arguments_leave_the_others_alone():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x, factor):
            return self.layer(x * factor)

    batch = {"x": draw(20, 5), "factor": torch.tensor([[1.0, 0, 2, 0, 3]])}
    found = measure_layers(Scaled(), [batch], "layer", measure="invariance,views=1", views=lambda x: x.flip(1))
    flipped = torch.cosine_similarity(batch["x"] * batch["factor"], batch["x"].flip(1) * batch["factor"]).mean()
    assert found.values[0] == pytest.approx(float(flipped), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"measure": "svcca"}, ConfigError, "use similarity_matrix"),
        ({"measure": "rankmee"}, UnknownNameError, "closest: rankme"),
        ({"estimator": "debiased"}, UnknownNameError, "unknown estimator of effective_rank 'debiased'.*minibatch"),
        ({"measure": "alignment", "estimator": "minibatch"}, UnknownNameError, "unknown estimator of alignment"),
        ({"groups": 1}, ConfigError, "groups=1; allowed: 0 for no intervals, or 2 or more"),
        ({"level": 1.0}, ConfigError, r"level=1\.0; allowed: between 0 and 1"),
        ({"estimator": "whole-set", "memory_mib": 0}, ConfigError, "memory_mib=0; allowed: above 0"),
        ({"layers": "nope"}, UnknownLayerError, "no layer 'nope'"),
    ],
)
def test_a_wrong_setting_of_measure_layers_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        measure_layers(linear_model(), BATCHES, **options)


def test_too_small_batches_are_refused_with_layer_and_batch():
    with pytest.raises(LayerlensError, match=r"layer '1', batch 1: 3 samples; at least 4"):
        measure_layers(linear_model(), [IMAGES[:8], IMAGES[:3]], "1", measure="rankme")
    with pytest.raises(DegenerateError, match="constant"):
        mean_cca(torch.ones(5, 2), draw(5, 2))
