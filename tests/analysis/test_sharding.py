"""Batches shared out over real processes: what all see is what one would have seen, and none waits for ever."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rank_processes import on_ranks
from torch import nn

from layerlens.analysis.sharding import gather
from layerlens.analysis.similarity import similarity_matrix
from layerlens.errors import ConfigError, DataError, NonFiniteError, ShapeError, UnknownLayerError

LAYERS = "0,1,2"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(seed=1):
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5))
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed + k))
    return model


def convolutions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1))
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=k))
    return model


SIZES = [16, 16, 12, 20]  # of the batches, in order
BATCHES = list(draw(sum(SIZES), 6).split(SIZES))
IMAGES = list(draw(sum(SIZES), 3, 4, 4).split(SIZES))
SHARES = {2: [[0, 1, 2], [3]], 3: [[0], [], [1, 2, 3]]}  # which batches each rank has, for as many ranks


def mine(rank, world, batches=BATCHES):
    return [batches[i] for i in SHARES[world][rank]]


CASES = {
    "cka": {},
    "cka,kernel=rbf": {"measure": "cka,kernel=rbf"},
    "debiased": {"measure": "cka,estimator=debiased", "permutations": 5},
    "biased": {"measure": "cka,estimator=biased"},
    "svcca": {"measure": "svcca,variance=0.8", "permutations": 5},
    "mutual_knn": {"measure": "mutual_knn,k=5"},
    "two models": {"other": network(7), "other_layers": "0,2"},
    "two models, procrustes": {"other": network(7), "other_layers": "0,2", "measure": "procrustes"},
    "projection": {"projection": 16, "reduce": "flatten"},
}
MAPS = {
    "positions": {"reduce": "positions"},
    "positions, debiased": {"reduce": "positions", "measure": "cka,estimator=debiased"},
    "positions, svcca": {"reduce": "positions", "measure": "svcca"},
}


def matrix(name, batches, **more):
    """The result of a case, in one process or sharded."""
    if name in MAPS:
        return similarity_matrix(convolutions(), batches, LAYERS, **MAPS[name], **more)
    return similarity_matrix(network(), batches, LAYERS, **CASES[name], **more)


def spoilt(batches):
    """The same batches with one NaN in the last one."""
    return [*batches[:-1], torch.cat([batches[-1][:-1], torch.full((1, 6), float("nan"))])]


def broken_loader(batches):
    yield from batches
    raise DataError("image 17 is damaged")


def sharded(rank, world, **options):
    return similarity_matrix(network(), mine(rank, world), **{"layers": LAYERS, "sharded": True, **options})


SCENARIOS = {
    **{name: lambda rank, world, name=name: matrix(name, mine(rank, world), sharded=True) for name in CASES},
    **{name: lambda rank, world, name=name: matrix(name, mine(rank, world, IMAGES), sharded=True) for name in MAPS},
    **{
        f"{name}, rank 0 without a batch": lambda rank, _world, name=name: matrix(
            name, BATCHES if rank else [], sharded=True
        )
        for name in ("cka", "debiased", "svcca")
    },
    "layers differ": lambda rank, world: sharded(rank, world, layers=LAYERS if rank == 0 else "0,1"),
    "second models differ": lambda rank, world: sharded(
        rank, world, other=network(), other_layers=LAYERS if rank == 0 else "0,1"
    ),
    "no batch anywhere": lambda rank, world: similarity_matrix(network(), [], LAYERS, sharded=True),
    "NaN on the last rank": lambda rank, world: matrix(
        "cka", spoilt(mine(rank, world)) if rank == world - 1 else mine(rank, world), sharded=True
    ),
    "NaN on the last rank, svcca": lambda rank, world: matrix(
        "svcca", spoilt(mine(rank, world)) if rank == world - 1 else mine(rank, world), sharded=True
    ),
    "unknown layer on rank 0": lambda rank, world: sharded(rank, world, layers="nope" if rank == 0 else LAYERS),
    "too small a batch on rank 0": lambda rank, world: similarity_matrix(
        network(), [BATCHES[0][:3]] if rank == 0 else mine(rank, world), LAYERS, sharded=True
    ),
    "a loader that breaks": lambda rank, world: similarity_matrix(
        network(), broken_loader(mine(rank, world)) if rank == world - 1 else mine(rank, world), LAYERS, sharded=True
    ),
    "numbers": lambda rank, world: gather(lambda: rank * 10),
    "an error of rank 1": lambda rank, world: gather(lambda: fail_on(1, rank)),
}


def fail_on(which, rank):
    if rank == which:
        raise ShapeError("five rows are too few")
    return rank


def outcomes(rank, world, names):
    """All scenarios in order: what came back, or the error."""
    found = {}
    for name in names:
        try:
            found[name] = SCENARIOS[name](rank, world)
        except Exception as error:
            found[name] = error
    return found


def start(world, folder, names):
    """Each scenario's outcomes, rank by rank."""
    found = on_ranks(outcomes, world, folder, list(names))
    return {name: [of_rank[name] for of_rank in found] for name in names}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return start(2, tmp_path_factory.mktemp("two"), SCENARIOS)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    names = ["cka", "debiased", "svcca", "two models", "NaN on the last rank", "layers differ", "numbers"]
    return start(3, tmp_path_factory.mktemp("three"), names)


def assert_same(found, expected):
    """Values, intervals, null and what goes with them."""
    assert type(found) is type(expected), found
    assert (found.rows, found.columns, found.samples) == (expected.rows, expected.columns, expected.samples)
    assert (found.options, found.reduce, found.measure) == (expected.options, expected.reduce, expected.measure)
    for name in ("values", "low", "high", "weights"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-6, err_msg=name)
    assert [c.code for c in found.cautions] == [c.code for c in expected.cautions]
    np.testing.assert_allclose(found.precision_error, expected.precision_error, atol=1e-6)
    assert (found.null is None) == (expected.null is None)
    if found.null is not None:
        np.testing.assert_allclose(found.null.bound, expected.null.bound, atol=1e-6)
        np.testing.assert_allclose(found.null.p_value, expected.null.p_value, atol=1e-6)


@pytest.mark.parametrize("name", [*CASES, *MAPS])
def test_two_ranks_with_unequal_shares_give_what_one_process_gives(two, name):
    expected = matrix(name, IMAGES if name in MAPS else BATCHES)
    for found in two[name]:
        assert_same(found, expected)


@pytest.mark.parametrize("name", ["cka", "debiased", "svcca"])
def test_a_rank_without_a_batch_gets_the_result_of_the_others(two, name):
    for found in two[f"{name}, rank 0 without a batch"]:
        assert_same(found, matrix(name, BATCHES))


def test_all_ranks_get_the_same_result_to_the_last_bit(two):
    for name in CASES:
        first, second = two[name]
        np.testing.assert_array_equal(first.values, second.values)
        np.testing.assert_array_equal(first.low, second.low)
        assert first.sample_id == second.sample_id != ""


def test_the_cases_of_these_tests_are_no_trivial_ones(two):
    off = ~np.eye(3, dtype=bool)
    assert all((np.abs(two[name][0].values[off]) < 0.999).all() for name in ("cka", "debiased", "svcca", "mutual_knn"))
    assert np.isfinite(two["cka"][0].precision_error)


def test_gather_hands_every_rank_what_all_returned_in_order(two):
    assert two["numbers"] == [[0, 10], [0, 10]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cka", "debiased", "svcca", "two models"])
def test_three_ranks_of_which_one_has_no_batch_give_what_one_process_gives(three, name):
    expected = matrix(name, BATCHES)
    for found in three[name]:
        assert_same(found, expected)


@pytest.mark.slow
def test_three_ranks_fail_together(three):
    assert three["numbers"] == [[0, 10, 20]] * 3
    # rank 1 has no batch, and so no layers
    for error in three["layers differ"]:
        assert isinstance(error, ShapeError)
        assert "ranks have different layers: rank 0 has 3 (0, 1, 2), rank 2 has 2 (0, 1)" in str(error)
    for rank in (0, 1):
        assert isinstance(three["NaN on the last rank"][rank], ConfigError)
        assert "rank 2 failed: NonFiniteError: NaN or infinity" in str(three["NaN on the last rank"][rank])


def test_ranks_with_different_layers_all_say_so(two):
    for error in two["layers differ"]:
        assert isinstance(error, ShapeError)
        assert "rank 0 has 3 (0, 1, 2), rank 1 has 2 (0, 1); give all ranks the same model" in str(error)


def test_ranks_whose_second_models_differ_all_say_so(two):
    for error in two["second models differ"]:
        assert isinstance(error, ShapeError)
        assert "rank 0 has 3 (0, 1, 2); 3 (0, 1, 2), rank 1 has 3 (0, 1, 2); 2 (0, 1)" in str(error)


def test_loaders_that_are_all_empty_are_an_error_on_every_rank(two):
    for error in two["no batch anywhere"]:
        assert isinstance(error, DataError)
        assert "the loaders of all ranks yielded no batch" in str(error)


FAILURES = {
    "NaN on the last rank": (1, NonFiniteError, r"layer '0'"),
    "unknown layer on rank 0": (0, UnknownLayerError, "no layer 'nope'"),
    "too small a batch on rank 0": (0, ShapeError, "batch 0 has 3 samples"),
    "an error of rank 1": (1, ShapeError, "five rows are too few"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_on_one_rank_reaches_every_rank_and_the_others_are_told_whose_it_was(two, name):
    rank, kind, message = FAILURES[name]
    own, other = two[name][rank], two[name][1 - rank]
    assert isinstance(own, kind), own
    assert message in str(own)
    assert isinstance(other, ConfigError), other
    assert f"rank {rank} failed: {type(own).__name__}: " in str(other)
    assert message in str(other)


@pytest.mark.parametrize("name", FAILURES)
def test_the_rank_that_failed_is_named_on_that_rank_too(two, name):
    rank = FAILURES[name][0]
    assert f"rank {rank}" in str(two[name][rank])


def test_nan_in_a_whole_set_measure_fails_on_every_rank_and_names_the_layer(two):
    for error in two["NaN on the last rank, svcca"]:
        assert "NaN or infinity" in str(error)
        assert "layer '0'" in str(error)


def test_nan_in_a_whole_set_measure_names_the_rank(two):
    assert all("rank 1" in str(error) for error in two["NaN on the last rank, svcca"])


def test_a_loader_that_breaks_on_one_rank_fails_on_every_rank(two):
    """It had yielded its batch by then; the result of the other ranks alone would be wrong."""
    for error in two["a loader that breaks"]:
        assert isinstance(error, Exception), f"a matrix of {error.samples} of {sum(SIZES)} samples"
        assert "image 17 is damaged" in str(error)


def lost(rank, world, folder):
    """Rank 1 fails with an error that is not layerlens' own, catches it and lives on."""

    def loader():
        yield BATCHES[rank]
        if rank == 1:
            raise OSError("disk")

    outcome = None
    try:
        outcome = similarity_matrix(network(), loader(), LAYERS, sharded=True)
    except Exception as error:
        outcome = error
    (Path(folder) / f"ended{rank}").touch()
    end = time.monotonic() + 12  # twice as long as an exchange may take
    while time.monotonic() < end and not (Path(folder) / f"ended{1 - rank}").exists():
        time.sleep(0.05)
    return outcome


@pytest.mark.slow
def test_an_error_of_any_kind_on_one_rank_reaches_the_others(tmp_path):
    other, own = on_ranks(lost, 2, tmp_path, str(tmp_path), timeout_s=6)
    assert "disk" in str(own)
    assert "rank 1 failed" in str(other)
    assert "disk" in str(other)


def test_sharded_without_a_process_group_says_how_to_start_one():
    message = "sharded=True needs a process group; start with `torchrun`"
    with pytest.raises(ConfigError, match=message):
        gather(lambda: 1)
    with pytest.raises(ConfigError, match=message):
        similarity_matrix(network(), BATCHES, LAYERS, sharded=True)


def test_without_a_process_group_no_batch_is_read():
    def loader():
        pytest.fail("the loader was read")
        yield

    with pytest.raises(ConfigError, match="process group"):
        similarity_matrix(network(), loader(), LAYERS, sharded=True)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A group of this one process."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ["cka", "debiased", "svcca", "two models"])
def test_a_group_of_one_gives_what_no_group_gives(name):
    assert_same(matrix(name, BATCHES, sharded=True), matrix(name, BATCHES))


@pytest.mark.usefixtures("alone")
def test_errors_of_a_group_of_one_are_its_own():
    with pytest.raises(NonFiniteError, match="layer '0'"):
        matrix("cka", spoilt(BATCHES), sharded=True)
    with pytest.raises(DataError, match="all ranks yielded no batch"):
        matrix("cka", [], sharded=True)
