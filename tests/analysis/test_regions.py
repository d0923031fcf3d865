"""Co-adaptation regions: exact segmentation, known regions found, none invented, and every caution."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from layerlens.analysis.regions import RegionSet, find_regions, segment
from layerlens.analysis.resampling import cka_of, jackknife_intervals, leave_one_out
from layerlens.analysis.results import SimilarityMatrix
from layerlens.analysis.similarity import cka_matrix
from layerlens.data import load_data
from layerlens.errors import ConfigError, ShapeError, UnknownNameError
from layerlens.training.network import load_network

CASES = 200


def matrix_of(blocks, *, batch=64, participation=None):
    """A result from HSIC blocks (B, L, L), one per batch."""
    weights, count = np.full(len(blocks), float(batch)), blocks.shape[1]
    values = cka_of(blocks.mean(0))
    low = high = np.full(values.shape, np.nan)
    if len(blocks) > 1:
        without = leave_one_out(blocks, weights)
        low, high = jackknife_intervals(values, without, weights, 0.95, bounded=True, unbias=False)
    return SimilarityMatrix(
        layers=tuple(f"l{i}" for i in range(count)), values=values, low=low, high=high, samples=batch * len(blocks),
        participation=np.full(count, 9.0) if participation is None else participation, blocks=blocks, weights=weights,
    )  # fmt: skip


def noisy(similarity, *, batches=8, noise=0.01, seed=0):
    """Batches whose HSIC is a similarity matrix and a little symmetric noise."""
    draws = np.random.default_rng(seed).normal(0, noise, (batches, *np.shape(similarity)))
    return matrix_of(np.asarray(similarity) + np.triu(draws, 1) + np.triu(draws, 1).swapaxes(1, 2))


def two_level(lengths, within=0.9, across=0.2):
    label = np.repeat(np.arange(len(lengths)), lengths)
    similarity = np.where(label[:, None] == label[None, :], within, across).astype(float)
    np.fill_diagonal(similarity, 1.0)
    return similarity


def measured(layers, batches=8):
    """The matrix of activations (L, n, p): unbiased HSIC of all pairs in each batch, in float64, written out."""
    count, n, p = layers.shape
    m = n // batches
    x = layers.reshape(count, batches, m, p).swapaxes(0, 1)
    k = x @ x.swapaxes(2, 3)
    k[..., range(m), range(m)] = 0
    rows = k.sum(-1) / (m - 2)
    u = k - rows[..., :, None] - rows[..., None, :] + (rows.sum(-1) / (m - 1))[..., None, None]
    u[..., range(m), range(m)] = 0
    flat = u.reshape(batches, count, m * m)
    return matrix_of(flat @ flat.swapaxes(1, 2) / (m * (m - 3)))


def planted(lengths, within, across, rng, n=512, p=48):
    """Layers whose population CKA is `within` inside a run and `across` between runs: each is a sum of a factor
    common to all, one of its run and its own, and the CKA of two such layers is their squared shared variance."""
    shares = np.sqrt([np.sqrt(across), np.sqrt(within) - np.sqrt(across), 1 - np.sqrt(within)])
    common, runs = rng.normal(size=(n, p)), rng.normal(size=(len(lengths), n, p))
    own = rng.normal(size=(sum(lengths), n, p))
    return shares[0] * common + shares[1] * np.repeat(runs, lengths, axis=0) + shares[2] * own


def random_lengths(rng):
    """At least two runs, one of them of two layers or more, over 5 to 14 layers."""
    count = int(rng.integers(5, 15))
    while True:
        cuts = np.sort(rng.choice(np.arange(1, count), size=int(rng.integers(1, min(count - 1, 6))), replace=False))
        lengths = np.diff([0, *cuts, count])
        if lengths.max() > 1:
            return lengths


def runs_of(lengths):
    edges = np.cumsum([0, *lengths])
    return [(int(a), int(b)) for a, b in itertools.pairwise(edges)]


def all_segmentations(count):
    for cuts in itertools.product([False, True], repeat=count - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), count]
        yield list(itertools.pairwise(edges))


def inside(values, runs):
    return [values[i, j] for a, b in runs for i in range(a, b) for j in range(i + 1, b)]


def explained_variance(values, runs):
    """Sum of squares that the two levels explain; 0 if pairs inside are not the more alike."""
    pairs = values[np.triu_indices(len(values), 1)]
    within = inside(values, runs)
    if not within or len(within) == len(pairs) or np.mean(within) <= pairs.mean():
        return 0.0
    across = (pairs.sum() - sum(within)) / (len(pairs) - len(within))
    return (
        len(within) * (np.mean(within) - pairs.mean()) ** 2 + (len(pairs) - len(within)) * (across - pairs.mean()) ** 2
    )


def modularity(values, runs):
    mean = values[np.triu_indices(len(values), 1)].mean()
    return sum(v - mean for v in inside(values, runs))


SCORES = {"two-level": explained_variance, "modularity": modularity}


@pytest.mark.parametrize("kind", ["uniform", "signed", "smooth"])
@pytest.mark.parametrize("count", range(2, 9))
@pytest.mark.parametrize("criterion", SCORES)
def test_segment_equals_brute_force_over_all_segmentations(criterion, count, kind):
    rng = np.random.default_rng(count)
    for _ in range(6):
        values = rng.uniform(0, 1, (count, count)) if kind == "uniform" else rng.normal(size=(count, count))
        if kind == "smooth":
            values = np.exp(-abs(np.subtract.outer(*[np.cumsum(rng.uniform(0, 1, count))] * 2))) + 0.05 * values
        values = (values + values.T) / 2
        scores = {tuple(runs): SCORES[criterion](values, runs) for runs in all_segmentations(count)}
        found = tuple(segment(values, criterion=criterion))
        assert scores[found] == pytest.approx(max(scores.values()), abs=1e-9)


def test_segment_worked_by_hand():
    """Pairs .9, .2 | .1: with 0–1 inside, the levels are .9 against .15."""
    values = np.array([[1, 0.9, 0.1], [0.9, 1, 0.2], [0.1, 0.2, 1]])
    assert segment(values) == [(0, 2), (2, 3)]
    assert segment(values, criterion="modularity") == [(0, 2), (2, 3)]


@pytest.mark.parametrize("criterion", SCORES)
@pytest.mark.parametrize("lengths", [[3, 4], [1, 4, 2], [2, 1, 1, 3], [5, 1]])
def test_segment_finds_clean_blocks(lengths, criterion):
    assert segment(two_level(lengths), criterion=criterion) == runs_of(lengths)


def test_segment_ignores_the_diagonal():
    values = two_level([2, 3])
    np.fill_diagonal(values, -7.0)
    assert segment(values) == [(0, 2), (2, 5)]


@pytest.mark.parametrize("criterion", SCORES)
def test_segment_of_one_or_no_layer(criterion):
    assert segment(np.ones((1, 1)), criterion=criterion) == [(0, 1)]
    assert segment(np.ones((0, 0)), criterion=criterion) == []


def test_two_level_does_not_split_a_matrix_without_levels():
    assert segment(np.ones((5, 5))) == [(0, 5)]


def test_planted_activations_have_the_similarity_they_are_planted_with():
    layers = planted([2, 3], 0.85, 0.3, np.random.default_rng(0), n=4096)
    np.testing.assert_allclose(measured(layers).values, two_level([2, 3], 0.85, 0.3), atol=0.03)


def test_planted_regions_are_found_exactly():
    rng, exact = np.random.default_rng(0), 0
    for _ in range(CASES):
        lengths = random_lengths(rng)
        layers = planted(lengths, rng.uniform(0.8, 0.97), rng.uniform(0, 0.4), rng)
        found = find_regions(measured(layers), resamples=1)
        exact += list(found.runs) == [tuple(f"l{i}" for i in range(a, b)) for a, b in runs_of(lengths)]
    print(f"exact {exact / CASES:.3f}")
    assert exact >= 0.95 * CASES


def test_no_region_stands_out_among_independent_layers():
    rng, clean = np.random.default_rng(1), 0
    for _ in range(CASES):
        layers = rng.normal(size=(int(rng.integers(4, 14)), 512, int(rng.integers(4, 64))))
        clean += not any(region.distinct for region in find_regions(measured(layers), resamples=1).regions)
    print(f"clean {clean / CASES:.3f}")
    assert clean >= 0.95 * CASES


def test_planted_regions_stand_out():
    rng, distinct, total = np.random.default_rng(2), 0, 0
    for _ in range(30):
        found = find_regions(measured(planted(random_lengths(rng), 0.9, rng.uniform(0, 0.3), rng)), resamples=1)
        distinct, total = distinct + sum(r.distinct for r in found.regions), total + len(found.regions)
    assert total > 20
    assert distinct >= 0.95 * total


def test_numbers_of_a_region_worked_by_hand():
    values = two_level([2, 3, 1])
    values[2, 3] = values[3, 2] = 0.6
    values[1, 3] = values[3, 1] = 0.5
    found = find_regions(noisy(values, noise=1e-6), resamples=2)
    region = found.regions[1]
    assert region.layers == ("l2", "l3", "l4")
    assert region.within == pytest.approx((0.6 + 0.9 + 0.9) / 3, abs=1e-4)
    assert region.outside == pytest.approx((0.2 + 0.5 + 0.2 + 3 * 0.2) / 6, abs=1e-4)
    assert region.contrast.value == pytest.approx(region.within - region.outside, abs=1e-9)
    assert region.contrast.low < region.contrast.value < region.contrast.high
    assert found.runs == (("l0", "l1"), ("l2", "l3", "l4"), ("l5",))


@pytest.mark.parametrize("criterion", SCORES)
def test_confidences_lie_in_zero_and_one_and_are_one_at_the_networks_ends(criterion):
    rng = np.random.default_rng(3)
    for _ in range(5):
        layers = planted(random_lengths(rng), 0.6, 0.4, rng, n=128, p=16)
        found = find_regions(measured(layers), criterion=criterion, resamples=20)
        for region in found.regions:
            assert 0 <= region.start_confidence <= 1
            assert 0 <= region.end_confidence <= 1
            assert region.start_confidence == 1 or region.layers[0] != "l0"
            assert region.end_confidence == 1 or region.layers[-1] != found.layers[-1]


def test_resampling_is_seeded():
    layers = planted([3, 4], 0.6, 0.4, np.random.default_rng(3), n=128, p=8)
    first, again = (find_regions(measured(layers), resamples=50, seed=5) for _ in range(2))
    assert first == again


def codes(found):
    return [caution.code for caution in found.cautions]


def test_a_clear_region_carries_no_caution():
    found = find_regions(noisy(two_level([3, 4])), resamples=20)
    assert codes(found) == []
    assert [r.supported for r in found.regions] == [True, True]
    assert found.regions[0].twin is found.regions[0].gain is found.regions[0].trained is None


def test_a_contrast_that_training_made_counts_as_trained():
    found = find_regions(noisy(two_level([3, 4])), noisy(two_level([3, 4], 0.9, 0.8), seed=1), resamples=5)
    first = found.regions[0]
    assert first.trained is True
    assert first.twin.value == pytest.approx(0.1, abs=0.02)
    assert first.gain.value == pytest.approx(first.contrast.value - first.twin.value, abs=1e-9)
    assert first.supported
    assert codes(found) == []


def test_a_contrast_of_the_twin_as_well_is_architectural_ll002():
    matrix = noisy(two_level([3, 4]))
    found = find_regions(matrix, matrix, resamples=5)
    assert [(r.distinct, r.trained, r.supported) for r in found.regions] == [(True, False, False)] * 2
    assert codes(found) == ["LL002", "LL002"]
    assert "l0 to l2 stands out by 0.7" in found.cautions[0].text
    assert found.cautions[0].layers == ("l0", "l1", "l2")


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_too_few_batches_support_nothing_ll003(batches):
    found = find_regions(noisy(two_level([3, 4]), batches=batches), resamples=5)
    assert not any(r.supported for r in found.regions)
    assert len(found.regions) == 2
    assert "LL003" in codes(found)
    assert f"{64 * batches} in {batches} batches" in found.cautions[0].text


def test_four_batches_can_support_a_region():
    found = find_regions(noisy(two_level([3, 4]), batches=4), resamples=5)
    assert any(r.supported for r in found.regions)
    assert codes(found) == []


def test_few_samples_in_enough_batches_are_told_as_well_ll003():
    blocks = noisy(two_level([3, 4])).blocks
    assert codes(find_regions(matrix_of(blocks, batch=8), resamples=5)) == ["LL003"]


def test_one_batch_has_no_resamples_and_no_interval_but_still_runs():
    found = find_regions(noisy(two_level([3, 4]), batches=1))
    assert found.resamples == 0
    assert [len(run) for run in found.runs] == [3, 4]
    assert np.isnan(found.regions[0].contrast.low)


def test_a_boundary_that_moves_with_the_batches_is_unstable_ll004():
    """Layer 3 is as near to the first run as to the second, so that the noise decides where it belongs."""
    similarity = two_level([4, 3])
    similarity[3, 4:] = similarity[4:, 3] = similarity[3, :3] = similarity[:3, 3] = 0.6
    found = find_regions(noisy(similarity, noise=0.1), resamples=100)
    shaky = [c for c in found.cautions if c.code == "LL004"]
    assert shaky
    assert "unstable boundary" in shaky[0].text
    region = next(r for r in found.regions if set(shaky[0].layers) <= set(r.layers))
    assert region.supported
    assert min(region.start_confidence, region.end_confidence) < 0.8


@pytest.mark.parametrize("dead", [0, 2, 6])
def test_a_dead_layer_is_named_and_left_out_ll006(dead):
    blocks = noisy(two_level([3, 4])).blocks.copy()
    blocks[:, dead], blocks[:, :, dead] = 0.0, 0.0
    found = find_regions(matrix_of(blocks), resamples=5)
    assert codes(found) == ["LL006"]
    assert found.cautions[0].layers == (f"l{dead}",)
    assert f"l{dead}" in found.cautions[0].text
    alive = [f"l{i}" for i in range(7) if i != dead]
    assert [name for run in found.runs for name in run] == alive
    assert [len(run) for run in found.runs] == ([2, 4] if dead < 3 else [3, 3])
    assert all(r.supported for r in found.regions)


def test_a_network_that_is_all_dead_has_no_region():
    found = find_regions(matrix_of(np.zeros((8, 3, 3))), resamples=5)
    assert found.runs == found.regions == ()
    assert codes(found) == ["LL006"]


def test_a_twin_that_cannot_be_compared_is_told():
    """A layer of the twin is dead: the run is compared without it, or a caution says that it was not compared."""
    blocks = noisy(two_level([3, 4]), seed=1).blocks.copy()
    blocks[:, 6], blocks[:, :, 6] = 0.0, 0.0
    found = find_regions(noisy(two_level([3, 4])), matrix_of(blocks), resamples=5)
    assert found.regions[0].trained is not None or found.cautions


def test_a_network_of_one_run_has_no_region():
    found = find_regions(matrix_of(np.ones((8, 5, 5))), resamples=5)
    assert found.runs == (("l0", "l1", "l2", "l3", "l4"),)
    assert found.regions == ()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"criterion": "modular"}, UnknownNameError, "unknown criterion 'modular'; closest: modularity"),
        ({"resamples": 0}, ConfigError, "resamples=0; allowed: 1 or more"),
        ({"baseline": noisy(two_level([2, 2]))}, ShapeError, "the baseline has layers"),
    ],
    ids=["criterion", "resamples", "baseline"],
)
def test_find_regions_refuses(options, error, message):
    with pytest.raises(error, match=message):
        find_regions(noisy(two_level([3, 4])), **options)


def test_a_region_set_comes_back_from_json():
    matrix = noisy(two_level([3, 4]))
    for baseline in (None, matrix):
        found = find_regions(matrix, baseline, resamples=5)
        assert RegionSet.from_json(found.to_json()) == found


def test_a_region_set_without_intervals_comes_back_from_json_with_nan():
    found = find_regions(noisy(two_level([3, 4]), batches=1))
    back = RegionSet.from_json(found.to_json()).regions[0].contrast
    assert (back.value, type(back.low)) == (found.regions[0].contrast.value, float)
    assert np.isnan(back.low)


def test_a_region_set_leaves_as_one_row_per_region():
    frame = find_regions(noisy(two_level([3, 1, 4])), resamples=5).to_frame()
    assert list(frame.start) == ["l0", "l4"]
    assert list(frame.end) == ["l2", "l7"]
    assert {"within", "outside", "contrast", "twin", "gain", "start_confidence", "end_confidence", "supported"} <= set(
        frame.columns
    )


@pytest.fixture(scope="module")
def trained_resnet20(shared_data, tmp_path_factory):
    archive = tmp_path_factory.mktemp("cifar") / "cifar10.npz"
    script = [shared_data / "unpack_images.py", shared_data / "cifar10_full_webp.npz", archive]
    subprocess.run([sys.executable, *script, "--train-per-class", "1"], check=True, capture_output=True)
    dataset = load_data(f"npz:{archive},normalize=imagenet")
    weights = shared_data / "weights" / "akamaster_cifar10_resnet20.pt"
    network, _ = load_network(weights, model="resnet20-cifar", dataset=dataset)
    batches = dataset.batches("test", samples=1000, batch_size=100)
    with torch.no_grad():
        return cka_matrix(network, batches, "blocks")


@pytest.mark.parametrize("criterion", SCORES)
def test_a_trained_resnet20_splits_into_its_three_known_runs(trained_resnet20, criterion):
    found = find_regions(trained_resnet20, criterion=criterion)
    assert [len(run) for run in found.runs] == [3, 6, 3]
    assert [(r.start_confidence, r.end_confidence) for r in found.regions] == [(1.0, 1.0)] * 3
    assert found.resamples == 200
    assert trained_resnet20.samples == 1000
