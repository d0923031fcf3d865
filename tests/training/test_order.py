"""Which images a step sees: each at most once an epoch, the held-out ones never, the same ones on any ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from layerlens.data import Dataset, dataset_from_arrays
from layerlens.errors import ConfigError
from layerlens.training.config import RunConfig, make_config
from layerlens.training.order import Order, generator, seed_of

N = 200


def images(n: int = N, labels: bool = True) -> Dataset:
    x = np.arange((n + 4) * 4, dtype=np.uint32).astype(np.uint8).reshape(-1, 1, 2, 2)
    y = np.arange(n + 4) % 3
    known = (y[:n], y[n:]) if labels else (None, None)
    return dataset_from_arrays("tiny", x[:n], known[0], x[n:], known[1])


def config(**settings: Any) -> RunConfig:
    return make_config({"model": "mlp,width=8,depth=2", "data": "tiny", "batch_size": 16, **settings})


def moco(**settings: Any) -> RunConfig:
    return config(**{"objective": "moco", "labels": 0.5, "moco": {"queue": 480}, **settings})


LAYOUTS = [{}, {"devices": 2}, {"accumulate": 4}, {"devices": 2, "accumulate": 2}, {"devices": 8}]


@pytest.mark.parametrize("make", [config, moco])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", [{}, {"holdout": 0.0}, {"train_samples": 37}, {"holdout": 0.5, "seed": 3}])
def test_each_image_comes_at_most_once_an_epoch_and_held_out_ones_never(make: Any, layout: Any, settings: Any):
    order = Order(make(**layout, **settings), images())
    chosen, held_out = set(order.rows.tolist()), set(order.held_out.tolist())
    assert len(held_out) == int(N * settings.get("holdout", 0.1))
    assert not chosen & held_out
    assert len(chosen) == settings.get("train_samples", N - len(held_out))
    assert chosen | held_out <= set(range(N))
    for number in range(3):
        rows = order.epoch(number).flatten().tolist()
        assert len(rows) == len(set(rows)) == order.steps * 16
        assert set(rows) <= chosen
    assert (order.steps + 1) * 16 > len(chosen) - 16 * (make is moco), "nothing is left out that fills a batch"


@pytest.mark.parametrize("make", [config, moco])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout_of_ranks_and_parts_sees_the_same_images_in_a_step(make: Any, layout: dict[str, int]):
    one, many = Order(make(), images()), Order(make(**layout), images())
    ranks, accumulate = layout.get("devices", 1), layout.get("accumulate", 1)
    assert one.steps == many.steps
    for number in range(3):
        rows = many.epoch(number)
        assert rows.shape == (one.steps, ranks, accumulate, 16 // (ranks * accumulate))
        assert torch.equal(rows.flatten(1).sort(dim=1).values, one.epoch(number).flatten(1).sort(dim=1).values)
    assert torch.equal(one.rows, many.rows)
    assert torch.equal(one.seen, many.seen)


def test_parts_of_a_batch_are_its_consecutive_pieces():
    whole = Order(config(), images()).epoch(2)
    assert torch.equal(Order(config(devices=2, accumulate=2), images()).epoch(2).flatten(1), whole.flatten(1))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.6])
@pytest.mark.parametrize("layout", [{}, {"devices": 2}, {"accumulate": 2}, {"devices": 2, "accumulate": 2}])
def test_each_part_of_moco_begins_with_its_share_of_labelled_images(layout: dict[str, int], share: float):
    chosen = moco(labels=share, **layout)
    order = Order(chosen, images())
    labelled = round(chosen.part * share)
    seen = order.seen[order.epoch(1)]
    assert 0 < labelled < chosen.part
    assert seen[..., :labelled].all()
    assert not seen[..., labelled:].any()
    assert order.seen.sum() == round(180 * share)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_moco_with_one_kind_of_images_has_one_order(share: float):
    order = Order(moco(labels=share), images())
    assert order.seen.sum() == 180 * share
    assert torch.equal(order.epoch(0), Order(config(), images()).epoch(0))


def test_labels_that_may_be_seen_are_a_share_of_the_images_trained_on():
    order = Order(config(objective="supcon", labels=0.25, train_samples=40), images())
    assert order.seen.sum() == 10
    assert set(order.seen.nonzero().flatten().tolist()) <= set(order.rows.tolist())
    assert not Order(config(), images(labels=False)).seen.any()


def test_fewer_images_are_the_first_of_more():
    few, many = (Order(config(train_samples=n), images()) for n in (20, 100))
    assert torch.equal(few.rows, many.rows[:20])
    assert torch.equal(few.held_out, many.held_out)


def test_without_labels_nothing_is_held_out():
    order = Order(config(), images(labels=False))
    assert (len(order.held_out), len(order.rows)) == (0, N)


def test_orders_are_functions_of_seed_and_epoch_alone():
    first, again = (Order(config(), images()) for _ in range(2))
    again.epoch(5)
    assert torch.equal(first.epoch(1), again.epoch(1))
    assert not torch.equal(first.epoch(1), first.epoch(2))
    other = Order(config(seed=1), images())
    assert not torch.equal(first.epoch(1), other.epoch(1))
    assert not torch.equal(first.held_out, other.held_out)
    state = torch.get_rng_state()
    Order(config(), images()).epoch(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_image_has_its_turn_although_some_are_left_out_of_each_epoch():
    order = Order(config(train_samples=31, batch_size=16), images())
    seen = {row for number in range(20) for row in order.epoch(number).flatten().tolist()}
    assert seen == set(order.rows.tolist())


def test_each_purpose_has_a_seed_of_its_own():
    seeds = [seed_of(*parts) for parts in ((0, "a"), (0, "b"), (1, "a"), (0, "a", 0), (0, "a", 1), ("0", "a"))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert torch.equal(torch.rand(3, generator=generator(0, "a")), torch.rand(3, generator=generator(0, "a")))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"batch_size": 181}, "batch_size=181 but only 180 training images; use a smaller batch"),
        (
            {"train_samples": 181},
            r"train_samples=181 but only 180 training images beside the 20 held out; ask for fewer",
        ),
        ({"train_samples": 15}, "batch_size=16 but only 15 training images"),
    ],
    ids=["batch", "samples", "few samples"],
)
def test_more_images_than_there_are_is_refused(settings: dict[str, Any], match: str):
    with pytest.raises(ConfigError, match=match):
        Order(config(**settings), images())


def test_a_batch_of_all_images_is_one_step():
    assert Order(config(batch_size=180), images()).epoch(0).shape == (1, 1, 1, 180)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_kind_with_too_few_images_is_refused(share: float):
    """Of 12 images one is of this kind, and each of the two parts of a batch needs one."""
    with pytest.raises(ConfigError, match=r"only \d+ labelled or unlabelled training images; use a smaller batch"):
        Order(moco(labels=share, train_samples=12, batch_size=12, accumulate=2, moco={"queue": 12}), images())


def test_moco_without_the_labels_it_asks_for_is_refused():
    with pytest.raises(ConfigError, match="0 labelled or unlabelled training images"):
        Order(moco(), images(labels=False))


def test_epochs_that_are_parts_of_a_pass_share_no_sample_and_make_up_the_pass():
    whole = Order(config(batch_size=16, train_samples=160), images())
    parts = Order(config(batch_size=16, train_samples=160, epoch_samples=50), images())
    assert (whole.steps, parts.steps) == (10, 3)
    first, second = (torch.cat([parts.epoch(3 * k + i).flatten() for i in range(3)]) for k in range(2))
    assert torch.equal(first, whole.epoch(0).flatten()[:144])
    assert torch.equal(second, whole.epoch(1).flatten()[:144])
    assert len(first.unique()) == 144


@pytest.mark.parametrize("samples", [8, 161])
def test_an_epoch_of_less_than_a_batch_or_more_than_the_data_is_refused(samples: int):
    with pytest.raises(ConfigError, match=rf"epoch_samples={samples}; allowed: 16 \(a batch\) to 160"):
        Order(config(batch_size=16, train_samples=160, epoch_samples=samples), images())
