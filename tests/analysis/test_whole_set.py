"""Whole-set CKA: every way to the sums gives the definition's numbers, within the memory that it promises."""

import itertools
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform

from layerlens.analysis import whole_set
from layerlens.analysis.resampling import cka_of, leave_one_out
from layerlens.analysis.rows import MIB, RowStore
from layerlens.analysis.whole_set import Plan, WholeSetCKA, cka, plan_whole_set
from layerlens.errors import BatchTooSmallError, ConfigError, NonFiniteError, ShapeError

N = 194  # its number of pairs is odd, so that there is one median distance
PLENTY = 2048.0  # MiB
SMALL_TILES = Plan("grams", 64, 0, 0.0)
WAYS = ["one Gram matrix", "tiles", "features"]
KERNEL_WAYS = [(way, kernel) for way in WAYS for kernel in ("linear", "rbf") if (way, kernel) != ("features", "rbf")]


def width(way):
    """Few enough features that covariances are the cheapest way, or too many."""
    return 10 if way == "features" else 60


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def related_layers(n, p, mean=0.0, seed=0):
    """Three float32 layers whose 8, 8 and 12 factors overlap, so that CKA is far from 0 and 1 for any p."""
    factors = draw(n, 12, seed=seed)
    parts = [factors[:, :8], factors[:, 4:], factors]
    return [
        part @ draw(part.shape[1], p, seed=seed + 1 + i) + 0.5 * draw(n, p, seed=seed + 10 + i) + mean
        for i, part in enumerate(parts)
    ]


def kernel_matrix(x, kernel="linear", factor=1.0):
    """K as the definition writes it, float64; the median of an even number of distances is the lower one."""
    x = x.double().flatten(1).numpy()
    if kernel == "linear":
        x = x - x.mean(0)
        return x @ x.T
    distances = pdist(x)
    median = np.sort(distances)[(len(distances) - 1) // 2]
    return np.exp(-(squareform(distances) ** 2) / (2 * (factor * median) ** 2))


def song_hsic(k, l):  # noqa: E741
    """Unbiased HSIC₁, Song et al. 2012, term by term."""
    n, one = len(k), np.ones(len(k))
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    trace, sums, cross = (k * l.T).sum(), (one @ k @ one) * (one @ l @ one), one @ k @ l @ one
    return (trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3))


def biased_hsic(k, l):  # noqa: E741
    h = np.eye(len(k)) - 1 / len(k)
    return (h @ k @ h * l).sum()


def hsic_matrix(grams, estimator="debiased"):
    hsic = {"debiased": song_hsic, "biased": biased_hsic}[estimator]
    return np.array([[hsic(k, l) for l in grams] for k in grams])  # noqa: E741


def definition(layers, kernel="linear", estimator="debiased", factor=1.0):
    hsic = hsic_matrix([kernel_matrix(x, kernel, factor) for x in layers], estimator)
    return hsic / np.sqrt(np.diag(hsic)[:, None] * np.diag(hsic))


def cka_from_features(layers):
    """Debiased CKA of the linear kernel in float64 from ‖XᵀY‖² and row norms, for samples too many for n × n."""
    x = [t.double().numpy() - t.double().numpy().mean(0) for t in layers]
    n, d = len(x[0]), [(t**2).sum(1) for t in x]
    hsic = np.array(
        [
            [
                np.sum((x[i].T @ x[j]) ** 2) - n / (n - 2) * d[i] @ d[j] + d[i].sum() * d[j].sum() / ((n - 1) * (n - 2))
                for j in range(len(x))
            ]
            for i in range(len(x))
        ]
    )
    return cka_of(hsic)


def least_mib(layers, kernel, on_disk):
    """The smallest bound, in steps of 1/16 MiB, within which the sums can be taken."""
    n, widths = len(layers[0]), [x.flatten(1).shape[1] for x in layers]
    held = 0 if on_disk else sum(x.nbytes for x in layers)
    for mib in itertools.count(1 / 16, 1 / 16):
        try:
            plan_whole_set(n, widths, kernel=kernel, bytes_free=int(mib * MIB) - held, on_disk=on_disk)
        except ConfigError:
            continue
        return mib


@pytest.fixture
def plans(monkeypatch):
    """What was planned, in order."""
    made, plan = [], plan_whole_set
    monkeypatch.setattr(whole_set, "plan_whole_set", lambda *a, **k: made.append(plan(*a, **k)) or made[-1])
    return made


@pytest.fixture
def accumulate(plans):
    """Makes accumulators that take a given way to the sums, with the rows in memory or on disk."""
    made = []

    def make(layers, way="one Gram matrix", *, on_disk=False, batch=50, names=None, kernel="linear", **options):
        names = names or [f"layer{i}" for i in range(len(layers))]
        state = WholeSetCKA(names, kernel=kernel, memory_mib=1e-6 if on_disk else PLENTY, **options)
        made.append(state)
        for activations in zip(*(x.split(batch) for x in layers), strict=True):
            state.update(activations)
        assert state._store.on_disk is on_disk
        state._store.memory = int(PLENTY * MIB)
        if way == "tiles":  # so few samples fit into one Gram matrix as well
            state._plan = lambda: plans.append(SMALL_TILES) or plans[-1]
        return state

    yield make
    for state in made:
        state.close()


def assert_way(plan, way, n):
    assert {
        "one Gram matrix": plan.way == "grams" and plan.tile == n,
        "tiles": plan.way == "grams" and 0 < plan.tile < n,
        "features": plan.way == "features",
    }[way], f"{plan} is not {way}"


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("mean", [0, 2, 100, 1000])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize(
    ("way", "p"), [("one Gram matrix", 60), ("one Gram matrix", 400), ("tiles", 60), ("tiles", 400), ("features", 10)]
)
def test_cka_equals_its_definition(way, p, kernel, mean, on_disk, accumulate, plans):
    if way == "features" and kernel == "rbf":
        way = "one Gram matrix"
    layers = related_layers(N, p, mean)
    state = accumulate(layers, way, kernel=kernel, on_disk=on_disk)
    for estimator in ("debiased", "biased"):
        state.estimator = estimator
        found, expected = state.compute(), definition(layers, kernel, estimator)
        np.testing.assert_allclose(found.values, expected, atol=1e-7, rtol=0)
        assert (found.estimator, found.kernel, found.samples) == (estimator, kernel, N)
        assert 0.1 < expected[0, 1] < 0.9  # the case is not a trivial one
        assert_way(plans[-1], way, N)


@pytest.mark.parametrize("mean", [0, 100, 1000])
@pytest.mark.parametrize(("p", "kernel"), [(10, "linear"), (10, "rbf"), (400, "linear"), (400, "rbf")])
def test_all_ways_agree_on_values_intervals_blocks_and_directions(p, kernel, mean, accumulate, plans):
    layers = related_layers(N, p, mean)
    ways = WAYS if (p, kernel) == (10, "linear") else WAYS[:2]
    if "features" in ways:  # where features are cheapest, one Gram matrix is what permutations need
        first = accumulate(layers, permutations=1, kernel=kernel).compute()
    else:
        first = accumulate(layers, kernel=kernel, batch=N).compute()
    assert_way(plans[-1], ways[0], N)
    for way, on_disk in itertools.product(ways[1:], (False, True)):
        found = accumulate(layers, way, kernel=kernel, on_disk=on_disk).compute()
        assert_way(plans[-1], way, N)
        np.testing.assert_allclose(found.values, first.values, atol=1e-7, rtol=0)
        np.testing.assert_allclose(found.low, first.low, atol=1e-4, rtol=0)
        np.testing.assert_allclose(found.high, first.high, atol=1e-4, rtol=0)
        np.testing.assert_allclose(found.blocks, first.blocks, rtol=1e-5, atol=1e-5 * np.abs(first.blocks).max())
        np.testing.assert_array_equal(found.weights, first.weights)
        np.testing.assert_allclose(found.participation, first.participation, rtol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_float64_features_are_compared_in_float64(way, accumulate, plans):
    layers = [x.double() for x in related_layers(N, width(way), 1000)]
    found = accumulate(layers, way).compute()
    assert_way(plans[-1], way, N)
    np.testing.assert_allclose(found.values, definition(layers), atol=1e-11, rtol=0)


@pytest.mark.parametrize(("batch", "column"), [(N, 0), (N, 1), (N, 1415), (50, 1415)])
def test_one_feature_with_a_large_mean_does_not_drown_the_others(batch, column, accumulate):
    """Language models have such features: every 8th column or so would not show it."""
    layers = related_layers(N, 2000)
    for x in layers:
        x[:, column] += 1e4
    found = accumulate(layers, batch=batch).compute()
    np.testing.assert_allclose(found.values, definition(layers), atol=1e-7, rtol=0)


def test_features_below_float32_are_taken_as_they_are_rounded(accumulate):
    layers = [x.bfloat16() for x in related_layers(N, 60, 3)]
    np.testing.assert_allclose(accumulate(layers).compute().values, definition(layers), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("p", "kernel", "on_disk"), [(60, "linear", False), (60, "rbf", False), (3600, "linear", True)]
)
def test_a_bound_on_the_memory_alone_leads_to_tiles(p, kernel, on_disk, plans):
    layers = related_layers(1026, p)
    state = WholeSetCKA(["a", "b", "c"], kernel=kernel, memory_mib=least_mib(layers, kernel, on_disk))
    state.update(layers)
    assert state._store.on_disk is on_disk
    found = state.compute()
    state.close()
    assert_way(plans[-1], "tiles", 1026)
    np.testing.assert_allclose(found.values, definition(layers, kernel), atol=1e-7, rtol=0)


@pytest.mark.parametrize("p", [2, 10, 100])
def test_features_of_many_samples_are_exact_to_a_ten_millionth(p, plans, accumulate):
    """Covariances of few features average few roundings away."""
    for mean, seed in itertools.product((0, 1000), (0, 100, 200, 300, 400, 500)):
        layers = related_layers(3000, p, mean, seed)
        found = accumulate(layers, "features", batch=500).compute()
        assert_way(plans[-1], "features", 3000)
        np.testing.assert_allclose(found.values, cka_from_features(layers), atol=1e-7, rtol=0)


@pytest.mark.parametrize("factor", [0.3, 2.0])
def test_rbf_width_in_tiles_is_the_factor_times_the_median(factor, accumulate, plans):
    layers = related_layers(N, 10)
    found = accumulate(layers, "tiles", kernel="rbf", rbf_factor=factor).compute()
    assert_way(plans[-1], "tiles", N)
    np.testing.assert_allclose(found.values, definition(layers, "rbf", factor=factor), atol=1e-7, rtol=0)
    assert found.options["rbf_factor"] == factor


SPREADS = {
    "Gaussian": lambda n: draw(n, 5),
    "few distances, many ties": lambda n: (draw(n, 3) > 0).float(),
    "integers": lambda n: (3 * draw(n, 4)).round(),
    "two far groups": lambda n: draw(n, 5) + 1e4 * (torch.arange(n) % 2)[:, None],
    "one far sample": lambda n: draw(n, 5) * torch.cat([torch.tensor([1e5]), torch.ones(n - 1)])[:, None],
    "heavy tails": lambda n: draw(n, 2).exp() ** 4,
    "most of them the same": lambda n: torch.eye(n)[:, : n // 10],
}


@pytest.mark.parametrize("few", [1, 30, 1 << 18])
@pytest.mark.parametrize("n", [70, 131])
@pytest.mark.parametrize("spread", SPREADS)
def test_median_distance_found_in_tiles_is_exact(spread, n, few, monkeypatch):
    monkeypatch.setattr(whole_set, "_FEW_VALUES", few)
    x = SPREADS[spread](n)
    store = RowStore(["a"], PLENTY)
    for part in x.split(40):
        store.append(0, part)
    kernel = whole_set._TiledKernel(store, 64, whole_set._norms(store), 1.0)
    squared = np.sort(pdist(x.double().numpy()) ** 2)
    wanted = squared[(len(squared) - 1) // 2]
    assert kernel.widths[0] == pytest.approx(wanted, rel=1e-6, abs=1e-9 * squared.max())


@pytest.mark.parametrize("batch", [1, 3, 64, 193, N])
@pytest.mark.parametrize(("way", "kernel"), [("one Gram matrix", "rbf"), ("tiles", "linear"), ("features", "linear")])
def test_batches_of_any_size_give_the_same(way, kernel, batch, accumulate, plans):
    layers = related_layers(N, 10, mean=100)
    expected = accumulate(layers, way, kernel=kernel, batch=97).compute()
    found = accumulate(layers, way, kernel=kernel, batch=batch).compute()
    assert_way(plans[-1], way, N)
    for name in ("values", "low", "high", "participation"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-6, rtol=0)
    np.testing.assert_allclose(found.values, expected.values, atol=1e-7, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_order_of_the_batches_does_not_matter(way, accumulate, plans):
    layers = related_layers(N, width(way))
    order = torch.cat(list(reversed(torch.arange(N).split(50))))
    one, other = accumulate(layers, way).compute(), accumulate([x[order] for x in layers], way).compute()
    assert_way(plans[-1], way, N)
    np.testing.assert_allclose(other.values, one.values, atol=1e-7, rtol=0)
    np.testing.assert_allclose(other.high - other.low, one.high - one.low, rtol=1e-3, atol=1e-9)


def test_maps_count_as_their_features_whatever_their_memory_format(accumulate):
    maps, rest = draw(40, 3, 4, 4), related_layers(40, 5)[:2]
    expected = accumulate([maps.flatten(1), *rest]).compute().values
    for layout in (torch.contiguous_format, torch.channels_last):
        found = accumulate([maps.contiguous(memory_format=layout), *rest], batch=15).compute().values
        np.testing.assert_allclose(found, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("estimator", ["debiased", "biased"])
@pytest.mark.parametrize("constant", [0.0, 0.1, 100.0, 1e4 / 3])
@pytest.mark.parametrize(("way", "kernel"), KERNEL_WAYS)
def test_a_constant_layer_is_missing_and_harms_no_other(way, kernel, constant, estimator, accumulate, plans):
    layers = related_layers(N, width(way))
    dead = torch.full((N, width(way)), constant)
    alone = accumulate(layers, way, kernel=kernel, estimator=estimator).compute()
    found = accumulate(
        [*layers[:2], dead, layers[2]], way, names=["a", "b", "dead", "c"], kernel=kernel, estimator=estimator
    ).compute()
    assert_way(plans[-1], way, N)
    assert found.missing == ("dead",)
    for name in ("values", "low", "high"):
        array = getattr(found, name)
        assert np.isnan(array[2]).all()
        assert np.isnan(array[:, 2]).all()
        np.testing.assert_allclose(array[np.ix_([0, 1, 3], [0, 1, 3])], getattr(alone, name), atol=1e-6, rtol=0)
    assert np.isnan(found.participation[2])
    assert np.isfinite(found.blocks).all()


def rounded_constant(n, p, seed=0):
    """A constant but for its last bit, as a layer behind a saturated activation may be."""
    return torch.full((n, p), 0.1) * (1 + 1.2e-7 * (draw(n, p, seed=seed) > 0))


@pytest.mark.parametrize(("way", "kernel"), [("one Gram matrix", "linear"), ("tiles", "rbf"), ("features", "linear")])
def test_a_layer_that_varies_by_rounding_alone_is_constant(way, kernel, accumulate, plans):
    x, y, _ = related_layers(N, width(way))
    found = accumulate([x, rounded_constant(N, width(way)), y], way, kernel=kernel).compute()
    assert_way(plans[-1], way, N)
    assert found.missing == ("layer1",)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("batch", [N, 50])
@pytest.mark.parametrize(("way", "kernel"), KERNEL_WAYS)
def test_a_number_that_is_not_finite_names_the_first_layer_with_one(way, kernel, batch, value, accumulate):
    layers = related_layers(N, width(way))
    layers[1][150, 3] = layers[2][2, 2] = value
    state = accumulate(layers, way, kernel=kernel, batch=batch)
    with pytest.raises(NonFiniteError, match="layer 'layer1'"):
        state.compute()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_than_four_samples_in_all_are_refused(n, accumulate):
    with pytest.raises(BatchTooSmallError, match=f"{n} samples in all.*at least 4"):
        accumulate(related_layers(n, 5), batch=1).compute()


@pytest.mark.parametrize("n", [4, 5, 6])
def test_batches_of_one_sample_add_up_to_enough(n, accumulate):
    layers = related_layers(n, 5, seed=n)
    np.testing.assert_allclose(accumulate(layers, batch=1).compute().values, definition(layers), atol=1e-5, rtol=0)


def test_without_a_batch_nothing_is_computed():
    for call in (WholeSetCKA(["a"]).compute, WholeSetCKA(["a"]).influence):
        with pytest.raises(ShapeError, match="no batch was seen"):
            call()


def test_layers_with_different_sample_counts_are_refused_and_named():
    with pytest.raises(ShapeError, match=r"different sample counts.*\[7, 8\]"):
        WholeSetCKA(["a", "b"]).update([draw(8, 3), draw(7, 3)])
    state = WholeSetCKA(["a", "b", "c"])
    for position, n in enumerate((8, 8, 7)):
        state.take(position, draw(n, 3))
    state.end_batch()
    with pytest.raises(ShapeError, match=r"8 for 'a', 7 for 'c'"):
        state.compute()


# --- memory -----------------------------------------------------------------------------------------------------


def computed_within(mib, layers, **options):
    state = WholeSetCKA([f"layer{i}" for i in range(len(layers))], memory_mib=mib, **options)
    try:
        state.update(layers)
        return state.compute(), state._store.on_disk
    finally:
        state.close()


def refusal(mib, layers, **options):
    """(what one tile needs, by how much to raise the bound), in MiB, as the message says."""
    with pytest.raises(ConfigError) as caught:
        computed_within(mib, layers, **options)
    needs, by = re.search(r"needs (\d+) MiB; raise memory_mib by (\d+)", str(caught.value)).groups()
    return int(needs), int(by)


@pytest.mark.parametrize("options", [{}, {"kernel": "rbf"}, {"permutations": 2}], ids=str)
@pytest.mark.parametrize(("n", "mib"), [(N, 5), (600, 12), (1026, 12)])
def test_a_bound_that_is_too_small_is_refused_with_the_least_that_works(n, mib, options):
    layers = related_layers(n, 60)
    needs, by = refusal(mib, layers, **options)
    assert by > 0
    found, _ = computed_within(mib + by, layers, **options)
    np.testing.assert_allclose(found.values, definition(layers, options.get("kernel", "linear")), atol=1e-7, rtol=0)
    refusal(mib + by - 2, layers, **options)  # it is the least, rounded up
    assert needs <= mib + by


@pytest.mark.parametrize("options", [{}, {"kernel": "rbf"}], ids=str)
@pytest.mark.parametrize("mib", [4, 20])
@pytest.mark.parametrize(("n", "p"), [(600, 5000), (N, 14000)])
def test_the_least_that_works_with_many_rows_does_so(n, p, mib, options):
    layers = [draw(n, p, seed=s) for s in (0, 1)]
    _, by = refusal(mib, layers, **options)
    found, _ = computed_within(mib + by, layers, **options)
    assert found.values[0, 0] == 1.0


def test_permutations_need_one_gram_matrix_and_say_how_much_that_is(plans):
    layers = related_layers(1026, 400)
    tiled, _ = computed_within(55, layers)
    assert plans[-1].tile < 1026
    _, by = refusal(55, layers, permutations=3)
    whole, _ = computed_within(55 + by, layers, permutations=3)
    assert plans[-1].tile == 1026
    np.testing.assert_allclose(whole.values, tiled.values, atol=1e-7, rtol=0)


def test_the_plan_is_the_cheapest_that_fits():
    def plan(n, widths, mib, **options):
        return plan_whole_set(n, widths, kernel=options.pop("kernel", "linear"), bytes_free=mib * MIB, **options)

    assert plan(4000, [50, 50], 2000).way == "features"
    assert plan(4000, [50, 50], 2000, kernel="rbf").way == "grams"
    assert plan(4000, [50, 50], 2000, whole=True).tile == 4000
    assert plan(4000, [4096] * 3, 2000).tile == 4000
    assert plan(4000, [4096] * 3, 200).tile < 4000
    for mib in (60, 80, 200, 2000):
        assert plan(4000, [4096] * 3, mib).bytes <= mib * MIB


PEAK = """
import sys, torch
from pathlib import Path
from layerlens.analysis.whole_set import WholeSetCKA

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

n, count, p, mib, kernel, batch = *map(int, sys.argv[1:5]), sys.argv[5], 200
draw = torch.Generator().manual_seed(0)
warm = WholeSetCKA(["a", "b"], kernel=kernel)
warm.update([torch.randn(40, 8, generator=draw) for _ in "ab"])
warm.compute()
activations = torch.empty(count, batch, p)
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
before = peak()
state = WholeSetCKA([str(i) for i in range(count)], kernel=kernel, memory_mib=mib)
for _ in range(n // batch):
    state.update(list(activations.normal_(generator=draw)))
state.compute()
print(peak() - before)
"""


def peak_mib(*case):
    """Peak above that of the forward pass, in a process of its own that gives freed memory back at once."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAK, *map(str, case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


linux = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's peak memory")
SLACK_MIB = 8  # libraries' own buffers


@linux
@pytest.mark.slow
@pytest.mark.parametrize("mib", [64, 1024])
def test_peak_memory_of_wide_layers_stays_within_the_bound(mib):
    """188 MiB of rows: on disk within the small bound, in memory within the large one."""
    assert peak_mib(4000, 3, 4096, mib, "linear") <= mib + SLACK_MIB


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "count", "p", "mib", "kernel"),
    [
        (4000, 10, 100, 100, "linear"),  # small tiles of rows in memory
        (2000, 2, 20000, 150, "linear"),  # tiles of wide rows on disk
        (2000, 3, 1000, 150, "rbf"),  # tiles
    ],
)
def test_peak_memory_stays_within_the_bound_whatever_takes_most_of_it(n, count, p, mib, kernel):
    assert peak_mib(n, count, p, mib, kernel) <= mib + SLACK_MIB


# --- influence --------------------------------------------------------------------------------------------------


def recomputed_changes(layers, kernel="linear"):
    """Change of every entry without each sample, float64, shape (n, L, L); the RBF width stays."""
    grams = [kernel_matrix(x, kernel) for x in layers]
    whole, changes = cka_of(hsic_matrix(grams)), []
    for s in range(len(layers[0])):
        keep = np.arange(len(layers[0])) != s
        changes.append(cka_of(hsic_matrix([k[np.ix_(keep, keep)] for k in grams])) - whole)
    return np.array(changes)


def assert_influence(found, changes):
    """The largest change of every sample, and for every entry its strongest samples and their changes."""
    n, count = changes.shape[:2]
    np.testing.assert_allclose(found.largest, np.abs(changes).max((1, 2)), atol=1e-9, rtol=0)
    assert found.samples == n
    assert found.index.shape == found.change.shape == (count, count, min(n, 5))
    for i, j in itertools.product(range(count), repeat=2):
        np.testing.assert_allclose(found.change[i, j], changes[found.index[i, j], i, j], atol=1e-9, rtol=0)
        strongest = np.sort(np.abs(changes[:, i, j]))[::-1][:5]
        np.testing.assert_allclose(np.abs(found.change[i, j]), strongest, atol=1e-9, rtol=0)
    middle = np.median(found.largest)
    spread = 1.4826 * np.median(np.abs(found.largest - middle))
    np.testing.assert_allclose(found.z_score, (found.largest - middle) / spread, rtol=1e-9)


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize(("way", "kernel"), KERNEL_WAYS)
def test_influence_equals_recomputing_without_each_sample(way, kernel, on_disk, accumulate, plans):
    n = 86
    layers = [x.double() for x in related_layers(n, 5 if way == "features" else 40)]
    for x in layers[:2]:
        x[17] += 3  # the two that this sample makes alike
    found = accumulate(layers, way, kernel=kernel, on_disk=on_disk, influence=True).influence()
    assert_way(plans[-1], way, n)
    assert_influence(found, recomputed_changes(layers, kernel))


def test_influence_of_five_samples_shows_the_change_of_every_entry_by_each(accumulate):
    layers = [x.double() for x in related_layers(5, 6)]
    changes = recomputed_changes(layers)
    found = accumulate(layers, influence=True).influence()
    every = np.take_along_axis(found.change, np.argsort(found.index, axis=2), axis=2).transpose(2, 0, 1)
    np.testing.assert_allclose(every, np.nan_to_num(changes), atol=1e-9, rtol=0)


def test_influence_of_four_samples_is_refused(accumulate):
    with pytest.raises(BatchTooSmallError, match=r"4 samples.*at least 5"):
        accumulate(related_layers(4, 6), influence=True).influence()


def test_influence_leaves_a_constant_layer_out(accumulate):
    x, y, _ = related_layers(40, 6)
    alone = accumulate([x, y], influence=True).influence()
    found = accumulate([x, torch.full((40, 6), 0.1), y], influence=True).influence()
    np.testing.assert_allclose(found.largest, alone.largest, atol=1e-9, rtol=0)
    assert not found.change[1].any()


def test_influence_leaves_a_layer_out_that_varies_by_rounding_alone(accumulate):
    x, y, _ = related_layers(40, 6)
    alone = accumulate([x, y], influence=True).influence()
    found = accumulate([x, rounded_constant(40, 6), y], influence=True).influence()
    np.testing.assert_allclose(found.largest, alone.largest, atol=1e-9, rtol=0)
    assert not found.change[1].any()


# --- null -------------------------------------------------------------------------------------------------------


def test_null_tells_related_layers_from_unrelated_ones(accumulate):
    x, y, _ = related_layers(100, 10)
    other = draw(100, 10, seed=77)
    found = accumulate([x, y, other], permutations=49).compute()
    null = found.null
    assert null.permutations == 49
    assert null.p_value[0, 1] == 1 / 50
    assert null.p_value[0, 2] > 1 / 50
    assert null.bound[0, 1] < found.values[0, 1]
    assert np.abs(null.mean[np.triu_indices(3, 1)]).max() < 0.02
    for name in ("mean", "bound", "p_value"):
        np.testing.assert_array_equal(getattr(null, name), getattr(null, name).T)


def test_null_is_the_cka_of_wrongly_paired_samples(accumulate):
    """One permutation: its mean is the CKA of one layer against the other with samples in the drawn order."""
    x, y, _ = related_layers(60, 10)
    for estimator, kernel in itertools.product(("debiased", "biased"), ("linear", "rbf")):
        null = accumulate([x, y], permutations=1, seed=3, estimator=estimator, kernel=kernel).compute().null
        order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
        wrong = definition([x, y[order]], kernel, estimator)[0, 1]
        assert null.mean[0, 1] == pytest.approx(wrong, abs=1e-6)


def test_null_is_set_by_the_seed(accumulate):
    layers = related_layers(60, 10)
    one, same, other = (accumulate(layers, permutations=5, seed=s).compute().null for s in (1, 1, 2))
    np.testing.assert_array_equal(one.mean, same.mean)
    assert not np.array_equal(one.mean, other.mean)


def test_asking_twice_gives_the_same_values(accumulate):
    state = accumulate(related_layers(60, 10), influence=True)
    first, influence, second = state.compute(), state.influence(), state.compute()
    np.testing.assert_array_equal(first.values, second.values)
    np.testing.assert_array_equal(first.low, second.low)
    np.testing.assert_array_equal(influence.largest, state.influence().largest)


def test_asking_twice_gives_the_same_null(accumulate):
    state = accumulate(related_layers(60, 10), permutations=5)
    first, second = state.compute(), state.compute()
    np.testing.assert_array_equal(first.null.mean, second.null.mean)


def test_null_of_a_constant_layer_is_missing(accumulate):
    x, y, _ = related_layers(60, 10)
    null = accumulate([x, torch.full((60, 10), 0.1), y], permutations=5).compute().null
    for name in ("mean", "bound", "p_value"):
        assert np.isnan(getattr(null, name)[1]).all()
        assert np.isfinite(getattr(null, name)[0, 2])


# --- groups of samples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "groups"), [(7, 1), (8, 2), (102, 25), (N, 48), (400, 64)])
def test_blocks_of_interleaved_samples_average_to_hsic(n, groups, accumulate):
    layers = related_layers(n, 10)
    found = accumulate(layers).compute()
    assert len(found.blocks) == groups
    assert found.weights.sum() == n
    assert found.weights.max() - found.weights.min() <= 1
    hsic = hsic_matrix([kernel_matrix(x) for x in layers])
    np.testing.assert_allclose(np.average(found.blocks, axis=0, weights=found.weights), hsic, rtol=1e-6)


def test_leaving_a_block_out_is_like_leaving_its_samples_out(accumulate):
    layers = [x.double() for x in related_layers(192, 10)]
    found = accumulate(layers).compute()
    changes = (leave_one_out(found.blocks, found.weights) - found.values)[:, 0, 1]
    grams, index, recomputed = [kernel_matrix(x) for x in layers[:2]], np.arange(192), []
    for group in range(48):
        keep = index % 48 != group
        recomputed.append(cka_of(hsic_matrix([k[np.ix_(keep, keep)] for k in grams]))[0, 1] - found.values[0, 1])
    assert np.corrcoef(changes, recomputed)[0, 1] > 0.99
    assert np.std(changes) / np.std(recomputed) == pytest.approx(1, abs=0.1)


def test_directions_that_carry_the_variance_are_counted_for_either_kernel(accumulate):
    layers = related_layers(N, 10)
    eigenvalues = [np.linalg.eigvalsh(np.cov(x.double().numpy().T)) for x in layers]
    expected = [v.sum() ** 2 / (v**2).sum() for v in eigenvalues]
    for way, kernel in (("features", "linear"), ("tiles", "linear"), ("tiles", "rbf"), ("one Gram matrix", "rbf")):
        found = accumulate(layers, way, kernel=kernel).compute()
        np.testing.assert_allclose(found.participation, expected, rtol=1e-6)


def test_without_errors_there_are_values_but_no_intervals(accumulate):
    layers = related_layers(60, 40)
    found = accumulate(layers, errors=False, batch=60).compute()
    np.testing.assert_allclose(found.values, definition(layers), atol=1e-7, rtol=0)
    assert np.isnan(found.low[0, 1])
    assert np.isnan(found.high[0, 1])


def test_intervals_of_the_biased_estimator_are_as_wide_on_its_own_scale(accumulate):
    layers = related_layers(N, 60)
    one, other = (accumulate(layers, estimator=e).compute() for e in ("debiased", "biased"))
    width = [(np.arctanh(m.high[0, 1]) - np.arctanh(m.low[0, 1])) * (1 - m.values[0, 1] ** 2) for m in (one, other)]
    assert width[0] == pytest.approx(width[1], rel=1e-6)


# --- rows with several positions --------------------------------------------------------------------------------


def accumulated_positions(layers, counts, way, parts=3):
    state = WholeSetCKA([f"layer{i}" for i in range(len(layers))], positions=True)
    for activations, c in zip(zip(*(x.split(len(x) // parts) for x in layers), strict=True), counts, strict=True):
        state.counts = c
        state.update(activations)
    if way == "tiles":
        state._plan = lambda: SMALL_TILES
    return state


@pytest.mark.parametrize("p", [12, 60])
def test_positions_of_a_sample_move_together_in_every_way(p, accumulate, plans):
    """Six copies of each row say no more than one, whichever way the sums are taken."""
    m, copies = 36, 6
    layers = [x.repeat_interleave(copies, 0) for x in related_layers(m, p)]
    counts = [torch.full((12,), copies)] * 3
    ways = ["features" if p == 12 else "one Gram matrix", "tiles"]
    grouped = [accumulated_positions(layers, counts, way).compute() for way in ways]
    assert_way(plans[-1], ways[0], m * copies)
    np.testing.assert_allclose(grouped[0].values, grouped[1].values, atol=1e-7, rtol=0)
    np.testing.assert_allclose(grouped[0].low, grouped[1].low, atol=1e-5, rtol=0)
    np.testing.assert_allclose(grouped[0].values, definition(layers), atol=1e-7, rtol=0)
    independent = accumulate(layers).compute()
    assert (grouped[0].high - grouped[0].low)[0, 1] > 1.8 * (independent.high - independent.low)[0, 1]


def test_influence_of_positions_is_refused():
    layers = [x.repeat_interleave(2, 0) for x in related_layers(12, 8)]
    state = accumulated_positions(layers, [torch.full((4,), 2)] * 3, "features")
    with pytest.raises(ShapeError, match="influence is of single samples"):
        state.influence()


# --- shards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("how", ["merge", "state", "pickled state"])
def test_shards_together_are_one_accumulator(how, on_disk, accumulate):
    layers = related_layers(N, 10, mean=3)
    options = {"kernel": "rbf", "influence": True, "permutations": 4, "check": True, "on_disk": on_disk}
    whole = accumulate(layers, batch=97, **options)
    first, second = accumulate([x[:97] for x in layers], **options), accumulate([x[97:] for x in layers], **options)
    if how == "merge":
        first.merge(second)
    else:
        state = second.state()
        assert all(rows.device.type == "cpu" for rows in state["rows"])
        first.load_state(pickle.loads(pickle.dumps(state)) if "pickled" in how else state)
    found, expected = first.compute(), whole.compute()
    for name in ("values", "low", "high", "participation", "blocks", "weights"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-12, rtol=1e-12)
    np.testing.assert_allclose(found.null.mean, expected.null.mean, atol=1e-12)
    np.testing.assert_allclose(first.influence().largest, whole.influence().largest, atol=1e-12)
    assert found.precision_error == expected.precision_error
    assert found.samples == N


def test_a_shard_without_batches_adds_nothing(accumulate):
    layers = related_layers(N, 10)
    state, empty = accumulate(layers), WholeSetCKA(["layer0", "layer1", "layer2"])
    before = state.compute()
    state.load_state(WholeSetCKA(["layer0", "layer1", "layer2"]).state())
    np.testing.assert_array_equal(state.compute().values, before.values)
    empty.load_state(state.state())
    np.testing.assert_allclose(empty.compute().values, before.values, atol=1e-12)


def test_positions_of_two_shards_are_counted_together():
    layers = [x.repeat_interleave(3, 0) for x in related_layers(24, 8)]
    counts = [torch.full((12,), 3)] * 2
    whole = accumulated_positions(layers, counts, "features", parts=2)
    first = accumulated_positions([x[:36] for x in layers], counts[:1], "features", parts=1)
    second = accumulated_positions([x[36:] for x in layers], counts[:1], "features", parts=1)
    first.merge(second)
    for name in ("values", "low", "high"):
        np.testing.assert_allclose(getattr(first.compute(), name), getattr(whole.compute(), name), atol=1e-12)


def test_the_check_in_float64_finds_whole_set_gram_matrices_precise(accumulate):
    layers = related_layers(N, 60, mean=100)
    assert accumulate(layers, check=True).compute().precision_error < 1e-6
    assert np.isnan(accumulate(layers).compute().precision_error)


def test_cka_of_two_layers_takes_the_whole_set():
    x, y, _ = related_layers(N, 60, 100)
    assert cka(x, y) == pytest.approx(definition([x, y])[0, 1], abs=1e-7)
    assert cka(x, y, kernel="rbf", rbf_factor=0.5, estimator="biased") == pytest.approx(
        definition([x, y], "rbf", "biased", 0.5)[0, 1], abs=1e-7
    )
