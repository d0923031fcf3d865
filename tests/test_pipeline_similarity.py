"""Any measure of a network, two networks, a run's film strip and single images: on one choice of images."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from layerlens import build_model
from layerlens.activations import capture
from layerlens.analysis.measures import MEASURES
from layerlens.analysis.resampling import cka_of, difference, jackknife_intervals, leave_one_out
from layerlens.analysis.results import CrossSimilarity, LayerProfile, SimilarityMatrix
from layerlens.data import dataset_from_arrays
from layerlens.errors import ConfigError, RunFolderError, UnknownLayerError, UnknownNameError
from layerlens.pipeline import Settings, compare, film_strip, influence_of_samples, measure_network
from layerlens.recommendation import recommend, settled
from layerlens.training.config import make_config
from layerlens.training.loop import train
from layerlens.training.network import load_network

PAIRS = [name for name, measure in MEASURES.items() if measure.over == "pairs"]
VIEWS = [name for name, measure in MEASURES.items() if measure.over == "views"]
SINGLE = [name for name, measure in MEASURES.items() if measure.over == "layers"]
SETTINGS = Settings(samples=48, batch_size=8)
LAYERS = ("blocks.0", "blocks.1", "fc")


def make_data(seed=0):
    """Four kinds of 8 × 8 pattern with noise: 40 images to train on, 60 to look at."""
    generator = np.random.default_rng(seed)
    y = np.arange(100) % 4
    patterns = np.random.default_rng(7).random((4, 1, 8, 8)) * 180
    x = (patterns[y] + generator.random((100, 1, 8, 8)) * 70).astype(np.uint8)
    made = dataset_from_arrays("tiny", x[:40], y[:40], x[40:], y[40:])
    return replace(made, mean=(0.5,), std=(0.2,))


DATA = make_data()


def network(seed=0, model="mlp,width=12,depth=2"):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(model, input_shape=(1, 8, 8), classes=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with the checkpoints of epochs 0, 1 and 2."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    settings = {"model": "mlp,width=12,depth=2", "data": "tiny", "epochs": 2, "batch_size": 16, "keep_every": 1}
    train(make_config(settings), folder, dataset=DATA, device="cpu")
    return folder


@pytest.fixture(scope="module")
def strip(run):
    return film_strip(run, dataset=DATA, settings=SETTINGS)


def assert_same_matrix(found, wanted):
    for name in ("values", "low", "high", "participation"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


def test_a_film_strip_has_one_frame_per_kept_checkpoint(strip):
    assert strip.labels == ("epoch 0", "epoch 1", "epoch 2")
    assert [frame.layers for frame in strip.frames] == [strip.frames[0].layers] * 3
    assert strip.frames[0].layers[:2] == ("blocks.0", "blocks.1")


def test_all_frames_saw_the_same_samples_in_the_same_order(strip):
    assert len({frame.sample_id for frame in strip.frames}) == 1
    assert strip.frames[0].sample_id
    assert {frame.samples for frame in strip.frames} == {48}


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_each_frame_is_the_matrix_of_its_checkpoint(run, strip, epoch):
    checkpoint = run / "checkpoints" / f"epoch-{epoch:04}.safetensors"
    own = measure_network(load_network(checkpoint, dataset=DATA)[0], DATA, "cka", settings=SETTINGS)
    assert_same_matrix(strip.frames[epoch], own)


def test_changes_are_paired_and_from_each_frame_to_the_next(strip):
    assert [change.paired for change in strip.changes] == [True, True]
    for k, change in enumerate(strip.changes):
        np.testing.assert_allclose(change.values, strip.frames[k + 1].values - strip.frames[k].values, atol=1e-15)
        beside = ~np.eye(len(change.rows), dtype=bool)
        assert (change.low[beside] < change.values[beside]).all()
        assert (change.values[beside] < change.high[beside]).all()
    assert np.abs(strip.changes[0].values).max() > 0


def test_pairing_tells_a_change_more_sharply_than_two_separate_looks(run, strip):
    """Frames of other images share nothing, so their differences are less certain."""
    other = film_strip(run, dataset=DATA, settings=replace(SETTINGS, split="train"))
    assert other.frames[0].sample_id != strip.frames[0].sample_id
    apart = difference(strip.frames[0], other.frames[1])
    assert not apart.paired
    beside = ~np.eye(len(apart.rows), dtype=bool)
    width = {name: np.median((found.high - found.low)[beside]) for name, found in
             (("paired", strip.changes[0]), ("apart", apart))}  # fmt: skip
    assert width["paired"] < width["apart"]


def test_a_film_strip_of_a_whole_set_measure_has_changes_too(run):
    found = film_strip(run, dataset=DATA, measure="procrustes", settings=SETTINGS)
    assert {frame.measure for frame in found.frames} == {"procrustes"}
    assert [change.paired for change in found.changes] == [True, True]


def test_a_film_strip_of_one_batch_has_frames_but_no_tests(run):
    found = film_strip(run, dataset=DATA, settings=Settings(samples=12, batch_size=12))
    assert (len(found.frames), found.changes) == (3, ())


def test_the_level_of_the_settings_is_that_of_frames_and_changes(run):
    found = film_strip(run, dataset=DATA, settings=replace(SETTINGS, level=0.5))
    assert {result.level for result in (*found.frames, *found.changes)} == {0.5}


def test_a_film_strip_needs_a_measure_of_pairs_and_a_finished_run(run, tmp_path):
    with pytest.raises(ConfigError, match="rankme is a measure of single layers"):
        film_strip(run, dataset=DATA, measure="rankme")
    with pytest.raises(UnknownNameError, match="closest: svcca"):
        film_strip(run, dataset=DATA, measure="svca")
    with pytest.raises(RunFolderError, match="no run folder"):
        film_strip(tmp_path, dataset=DATA)
    shutil.copytree(run, tmp_path / "lost")
    (tmp_path / "lost" / "checkpoints" / "epoch-0001.safetensors").unlink()
    with pytest.raises(RunFolderError, match="lacks checkpoints"):
        film_strip(tmp_path / "lost", dataset=DATA)


def cka_by_definition(x, y):
    """Biased linear CKA in float64: ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖) with centred columns."""
    x, y = (np.asarray(rows, dtype=np.float64).reshape(len(rows), -1) for rows in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    return np.square(x.T @ y).sum() / np.sqrt(np.square(x.T @ x).sum() * np.square(y.T @ y).sum())


def rows_of(model, names, batches):
    """Rows of each layer over all batches."""
    kept = [[] for _ in names]
    with capture(model.eval(), names, lambda place, output: kept[place].append(output.clone())), torch.no_grad():
        for images, _ in batches:
            model(images)
    return [torch.cat(pieces) for pieces in kept]


def test_compare_gives_the_rectangle_of_the_first_layers_by_the_second():
    one, two = network(1), network(2, "mlp,width=6,depth=4")
    found = compare(one, two, DATA, measure="cka,estimator=biased", labels=("wide", "deep"), settings=SETTINGS)
    assert isinstance(found, CrossSimilarity)
    assert (found.rows, found.columns) == (LAYERS, ("blocks.0", "blocks.1", "blocks.2", "blocks.3", "fc"))
    assert (found.labels, found.samples) == (("wide", "deep"), 48)
    batches = DATA.batches("test", samples=48, batch_size=8, seed=0)
    rows = [
        dict(zip(names, rows_of(model, names, batches), strict=True))
        for model, names in ((one, found.rows), (two, found.columns))
    ]
    expected = [[cka_by_definition(rows[0][a], rows[1][b]) for b in found.columns] for a in found.rows]
    np.testing.assert_allclose(found.values, expected, atol=1e-6)


@pytest.mark.parametrize("measure", PAIRS)
def test_a_network_compared_with_itself_gives_its_own_matrix(measure):
    model = network(3)
    own = measure_network(model, DATA, measure, settings=SETTINGS, groups=0)
    found = compare(model, network(3), DATA, measure=measure, settings=SETTINGS, groups=0)
    np.testing.assert_allclose(found.values, own.values, atol=5e-5)  # PWCCA's weights are not unique
    assert found.sample_id == own.sample_id


@pytest.mark.parametrize("measure", ["cka", "mutual_knn", "procrustes"])
def test_turning_the_two_networks_round_transposes_the_rectangle(measure):
    one, two = network(1), network(2, "mlp,width=6,depth=3")
    found = compare(one, two, DATA, measure=measure, settings=SETTINGS, groups=4)
    back = compare(two, one, DATA, measure=measure, settings=SETTINGS, groups=4)
    for name in ("values", "low", "high"):
        np.testing.assert_allclose(getattr(found, name), getattr(back, name).T, atol=1e-6)


def test_compare_takes_layers_of_its_own_for_the_second_network():
    settings = replace(SETTINGS, layers="blocks.0,fc")
    models = network(1), network(2, "resnet20-cifar")
    found = compare(*models, DATA, settings=settings, other_layers="layer1,layer3")
    assert (found.rows, found.columns) == (("blocks.0", "fc"), ("layer1", "layer3"))
    with pytest.raises(UnknownLayerError, match=r"no layer 'blocks\.0' in CifarResNet"):
        compare(*models, DATA, settings=settings)


def test_compare_leaves_both_networks_as_they_were():
    models = network(1).train(), network(2, "resnet20-cifar").train()
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    compare(*models, DATA, settings=SETTINGS)
    for model, state in zip(models, before, strict=True):
        assert model.training
        assert not any(module._forward_hooks for module in model.modules())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("measure", ["cka", "mutual_knn"])
def test_the_null_of_a_rectangle_is_lower_than_what_the_layers_share(measure):
    models = (network(seed, "mlp,width=64,depth=2") for seed in (1, 2))
    settings = Settings(samples=60, batch_size=20)
    found = compare(*models, DATA, measure=measure, settings=settings, permutations=19, groups=0)
    assert found.null.permutations == 19
    assert found.null.mean.shape == found.null.bound.shape == found.values.shape
    assert (found.null.mean <= found.null.bound).all()
    assert (found.values > found.null.bound).all()
    np.testing.assert_allclose(found.null.p_value, 1 / 20)


def test_two_networks_need_two_names_and_a_measure_of_pairs():
    with pytest.raises(ConfigError, match="two different names"):
        compare(network(1), network(2), DATA, labels=("a", "a"), settings=SETTINGS)
    with pytest.raises(ConfigError, match="rankme is a measure of single layers"):
        compare(network(1), network(2), DATA, measure="rankme", settings=SETTINGS)


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_of_a_network_stays_in_its_range(name):
    promise = MEASURES[name]
    found = measure_network(network(1), DATA, name, settings=Settings(samples=60, batch_size=20), groups=2)
    assert type(found) is (SimilarityMatrix if promise.over == "pairs" else LayerProfile)
    assert (found.measure, found.layers, found.samples) == (name, LAYERS, 60)
    values = np.array(found.values)
    assert (values >= promise.low - 1e-6).all()
    assert (values <= promise.high + 1e-6).all()
    assert np.ptp(values) > 1e-3


@pytest.mark.parametrize("name", VIEWS)
def test_a_measure_of_views_is_the_same_in_every_run_of_one_seed(name):
    model = network(1)
    state = torch.get_rng_state()
    first, again = (measure_network(model, DATA, name, settings=SETTINGS, groups=0) for _ in range(2))
    other = measure_network(model, DATA, name, settings=replace(SETTINGS, seed=1), groups=0)
    assert first.values == again.values
    assert first.values != other.values
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_drawn_with_the_seed_of_the_settings(name):
    seeds = []

    def views(images, generator):
        seeds.append(generator.initial_seed())
        return images.flip(3)

    measure_network(network(1), DATA, name, settings=replace(SETTINGS, seed=5), groups=0, views=views)
    assert len(seeds) >= 2 * 6  # two views of each of six batches
    assert set(seeds) == {5}


@pytest.mark.parametrize(("name", "ideal"), [("alignment", 0.0), ("invariance", 1.0), ("diversity", 1.0)])
def test_views_that_change_nothing_leave_nothing_to_tell_apart(name, ideal):
    same = measure_network(network(1), DATA, name, settings=SETTINGS, groups=0, views=lambda images, generator: images)
    np.testing.assert_allclose(same.values, ideal, atol=1e-6)
    usual = measure_network(network(1), DATA, name, settings=SETTINGS, groups=0)
    assert (np.abs(np.array(usual.values) - ideal) > 1e-3).all()


def test_cka_takes_kernel_and_estimator_from_the_settings():
    settings = replace(SETTINGS, kernel="rbf", estimator="debiased")
    found = measure_network(network(1), DATA, "cka", settings=settings)
    named = measure_network(network(1), DATA, "cka,kernel=rbf,estimator=debiased", settings=SETTINGS)
    assert (found.kernel, found.estimator) == ("rbf", "debiased")
    assert_same_matrix(found, named)
    assert not np.allclose(found.values, measure_network(network(1), DATA, "cka", settings=SETTINGS).values)


def test_reduce_reaches_every_measure():
    settings = replace(SETTINGS, layers="layer1,layer2", reduce="pool")
    model = network(1, "resnet20-cifar")
    for name in ("cka", "mutual_knn", "rankme", "alignment"):
        pooled = measure_network(model, DATA, name, settings=settings, groups=0)
        whole = measure_network(model, DATA, name, settings=replace(SETTINGS, layers="layer1,layer2"))
        assert not np.allclose(pooled.values, whole.values)


def test_groups_of_zero_mean_no_intervals():
    found = measure_network(network(1), DATA, "mutual_knn", settings=SETTINGS, groups=0)
    assert np.isnan(found.low).all()
    assert found.replicates.shape == (0, 3, 3)
    with_groups = measure_network(network(1), DATA, "mutual_knn", settings=SETTINGS, groups=4)
    assert np.isfinite(with_groups.low).all()
    np.testing.assert_array_equal(with_groups.values, found.values)


@pytest.mark.parametrize("name", [*SINGLE, *VIEWS])
@pytest.mark.parametrize("extra", [{"permutations": 3}, {"tolerance": 0.1}, {"settle": lambda matrix: True}])
def test_what_only_pairs_have_is_refused_for_single_layers(name, extra):
    with pytest.raises(ConfigError, match=f"{name} is a measure of single layers"):
        measure_network(network(1), DATA, name, settings=SETTINGS, **extra)


def test_settle_stops_the_sweep_at_the_first_batch_that_satisfies_it_but_not_before_four():
    seen = []

    def twice(matrix):
        seen.append(matrix.samples)
        return len(seen) == 2

    found = measure_network(network(1), DATA, "cka", settings=SETTINGS, settle=twice)
    assert seen == [32, 40]
    assert found.samples == 40
    assert measure_network(network(1), DATA, "cka", settings=SETTINGS, settle=lambda m: True).samples == 32
    assert measure_network(network(1), DATA, "cka", settings=SETTINGS, settle=lambda m: False).samples == 48


def test_tolerance_stops_once_every_interval_is_narrow_enough():
    settings = Settings(samples=60, batch_size=5)
    everything = measure_network(network(1), DATA, "cka", settings=settings)
    reach = float(np.fmax(everything.high - everything.values, everything.values - everything.low).max())
    found = measure_network(network(1), DATA, "cka", settings=settings, tolerance=1.5 * reach)
    assert 20 <= found.samples < 60
    assert np.fmax(found.high - found.values, found.values - found.low).max() <= 1.5 * reach
    assert measure_network(network(1), DATA, "cka", settings=settings, tolerance=0.5 * reach).samples == 60


def debiased_cka_by_definition(x, y):
    """Linear CKA of unbiased HSIC in float64, as Song et al. 2012 write it."""

    def hsic(k, m):
        n = len(k)
        ones = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()
        return (np.trace(k @ m) + ones) / (n * (n - 3))

    grams = []
    for rows in (x, y):
        flat = np.asarray(rows, dtype=np.float64).reshape(len(rows), -1)
        grams.append(flat @ flat.T * (1 - np.eye(len(flat))))
    k, m = grams
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def test_influence_is_what_leaving_out_the_image_at_that_place_changes():
    settings, model = Settings(samples=24, batch_size=8, estimator="debiased"), network(1)
    found = influence_of_samples(model, DATA, settings)
    assert (found.layers, found.samples, len(found.largest)) == (LAYERS, 24, 24)
    first, _, last = rows_of(model, LAYERS, DATA.batches("test", samples=24, batch_size=8, seed=0))
    whole = debiased_cka_by_definition(first, last)
    expected = np.array(
        [debiased_cka_by_definition(*(np.delete(rows.numpy(), i, 0) for rows in (first, last))) for i in range(24)]
    ) - whole  # fmt: skip
    strongest = np.argsort(-np.abs(expected))[: found.index.shape[2]]
    assert found.index[0, 2].tolist() == strongest.tolist()
    np.testing.assert_allclose(found.change[0, 2], expected[strongest], atol=1e-6)
    assert (found.largest >= np.abs(expected) - 1e-6).all()


def levels(lengths, *, noise=0.01, batches=8, seed=0, between=None):
    """A CKA matrix of runs of layers, .9 alike within and .2 across, whose batches vary by the noise.

    The layer `between` is .6 alike to all others.
    """
    label = np.repeat(np.arange(len(lengths)), lengths)
    similarity = np.where(label[:, None] == label[None, :], 0.9, 0.2)
    if between is not None:
        similarity[between] = similarity[:, between] = 0.6
    np.fill_diagonal(similarity, 1.0)
    draws = np.triu(np.random.default_rng(seed).normal(0, noise, (batches, *similarity.shape)), 1)
    blocks, weights = similarity + draws + draws.swapaxes(1, 2), np.full(batches, 64.0)
    values = cka_of(blocks.mean(0))
    low, high = jackknife_intervals(values, leave_one_out(blocks, weights), weights, 0.95, bounded=True, unbias=False)
    return SimilarityMatrix(
        layers=tuple(f"l{i}" for i in range(len(label))), values=values, low=low, high=high, samples=64 * batches,
        participation=np.full(len(label), 9.0), blocks=blocks, weights=weights,
    )  # fmt: skip


def test_a_clear_recommendation_is_settled():
    assert settled()(levels([2, 3, 1]))
    assert settled(1.0, baseline=levels([6], seed=1))(levels([2, 3, 1]))


def test_nothing_is_settled_without_a_target():
    assert not settled(0.01)(levels([6]))
    assert not settled(0.01)(levels([2, 3, 1], batches=3))


def test_what_the_untrained_twin_has_too_is_not_settled():
    found = levels([2, 3, 1])
    assert settled()(found)
    assert not settled(baseline=found)(found)


def test_settled_asks_that_every_edge_recurs_in_the_share_that_is_asked_for():
    found = levels([3, 3], noise=0.1, between=2)
    confidences = [target.confidence for target in recommend(found).targets]
    assert 0.1 < min(confidences) < 0.9
    assert settled(min(confidences))(found)
    assert not settled(min(confidences) + 0.01)(found)
