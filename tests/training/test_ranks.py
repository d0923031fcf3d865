"""Losses over several processes: averaged gradients and queues are those of one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
from rank_processes import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from layerlens.errors import ConfigError
from layerlens.training.objectives.moco import KeyQueue, info_nce
from layerlens.training.objectives.simclr import nt_xent
from layerlens.training.objectives.supcon import sup_con
from layerlens.training.ranks import gather_rows, mean_over_ranks, rank, world

IMAGES = 12  # 6 or 4 for each rank
LABELS = torch.tensor([0, 1, -1, 2, 0, 1, -1, 0, 3, 1, 0, -1])  # classes span ranks; 2 and 3 have one image


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share(x: Tensor) -> Tensor:
    """This rank's part of a batch of images; all of it without ranks."""
    return x.chunk(world())[rank()]


def linear() -> nn.Linear:
    network = nn.Linear(5, 4, dtype=torch.float64)
    with torch.no_grad():
        network.weight.copy_(drawn(4, 5, seed=1))
        network.bias.copy_(drawn(4, seed=2))
    return network


def ddp_gradients(loss_of) -> tuple[list[Tensor], Tensor]:
    """Gradients of a small network, averaged over ranks by DDP, and the mean of the ranks' losses."""
    network = linear()
    trained = network if world() == 1 else DistributedDataParallel(network)
    views = torch.cat([share(drawn(IMAGES, 5, seed=3)), share(drawn(IMAGES, 5, seed=4))])
    loss = loss_of(trained(views))
    loss.backward()
    return [parameter.grad for parameter in network.parameters()], mean_over_ranks(loss)


def moco_gradients() -> tuple[list[Tensor], Tensor]:
    queue = KeyQueue(2 * IMAGES, 4, IMAGES, generator=torch.Generator().manual_seed(5))

    def loss_of(z: Tensor) -> Tensor:
        q, k = z.chunk(2)
        loss = info_nce(q, k, queue.keys, excluded=queue.same_class(share(LABELS)))
        queue.enqueue(k.detach(), share(LABELS))
        return loss + info_nce(q, k, queue.keys, excluded=queue.same_class(share(LABELS)))

    return ddp_gradients(loss_of)


def queue_contents() -> dict[str, Tensor]:
    queue = KeyQueue(2 * IMAGES, 3, IMAGES, generator=torch.Generator().manual_seed(6))
    for step in range(3):  # the third overwrites the first
        queue.enqueue(share(drawn(IMAGES, 3, seed=10 + step)), share(LABELS + step))
    return queue.state_dict()


def refused_queue() -> str:
    """With one rank six keys fit; those of all ranks do not."""
    queue = KeyQueue(6, 3, 6, generator=torch.Generator().manual_seed(6))
    with pytest.raises(ConfigError) as caught:
        queue.enqueue(drawn(6, 3))
    return str(caught.value)


def row_gradients() -> tuple[Tensor, Tensor, list[float]]:
    """Rank r weighs row j of all rows by 100 r + j."""
    x = torch.full((2, 1), float(rank()), requires_grad=True)
    rows = gather_rows(x)
    (rows[:, 0] * (100 * rank() + torch.arange(len(rows)))).sum().backward()
    mine = torch.tensor([float(rank()), 3.0])
    mean = mean_over_ranks(mine)
    assert mine.tolist() == [float(rank()), 3.0]  # left as it was
    return rows.detach(), x.grad, mean.tolist()


SCENARIOS = {
    "who": lambda: (rank(), world()),
    "rows": row_gradients,
    "labels": lambda: gather_rows(torch.tensor([rank(), -1])).tolist(),
    "NT-Xent": lambda: ddp_gradients(lambda z: nt_xent(z, temperature=0.2)),
    "SupCon": lambda: ddp_gradients(lambda z: sup_con(z, share(LABELS), temperature=0.2)),
    "MoCo": moco_gradients,
    "queue": queue_contents,
    "refused queue": refused_queue,
}


def outcomes(_rank: int, _world: int) -> dict[str, object]:
    return {name: scenario() for name, scenario in SCENARIOS.items()}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """What each scenario gave in 2 and in 3 processes, rank by rank."""
    found = on_ranks(outcomes, request.param, tmp_path_factory.mktemp(f"ranks{request.param}"))
    return {name: [of_rank[name] for of_rank in found] for name in SCENARIOS}


def test_each_rank_knows_who_it_is(ranks):
    count = len(ranks["who"])
    assert ranks["who"] == [(own, count) for own in range(count)]


def test_rows_come_in_rank_order_and_their_gradient_is_the_sum_over_all_ranks(ranks):
    count = len(ranks["rows"])
    hundreds = 100 * sum(range(count))
    for own, (rows, grad, mean) in enumerate(ranks["rows"]):
        assert rows[:, 0].tolist() == [float(r) for r in range(count) for _ in range(2)]
        assert grad[:, 0].tolist() == [hundreds + count * row for row in (2 * own, 2 * own + 1)]
        assert mean == [sum(range(count)) / count, 3.0]


def test_integers_are_gathered_too(ranks):
    count = len(ranks["labels"])
    assert ranks["labels"] == [[value for r in range(count) for value in (r, -1)]] * count


@pytest.mark.parametrize("name", ["NT-Xent", "SupCon", "MoCo"])
def test_ddp_gradients_and_loss_are_those_of_one_process_with_the_whole_batch(ranks, name):
    gradients, loss = SCENARIOS[name]()
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients)
    for found, mean in ranks[name]:
        torch.testing.assert_close(found, gradients, rtol=0, atol=1e-12)
        torch.testing.assert_close(mean, loss, rtol=0, atol=1e-12)


def test_the_loss_of_a_share_alone_would_have_other_gradients(ranks):
    """So the test above sees whether anything is gathered."""
    half = torch.cat([drawn(IMAGES, 5, seed=3)[:6], drawn(IMAGES, 5, seed=4)[:6]])
    network = linear()
    nt_xent(network(half), temperature=0.2).backward()
    assert (network.weight.grad - ranks["NT-Xent"][0][0][0]).abs().max() > 1e-3


def test_queues_hold_on_every_rank_what_one_process_holds_to_the_last_bit(ranks):
    alone = queue_contents()
    assert alone["position"] == IMAGES
    for found in ranks["queue"]:
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_a_queue_that_the_keys_of_all_ranks_do_not_divide_is_refused(ranks):
    count = len(ranks["refused queue"])
    for message in ranks["refused queue"]:
        assert f"queue of 6 keys, batch of {6 * count}; allowed: a multiple of the batch" in message


def test_one_rank_gathers_nothing():
    x = drawn(3, 2)
    assert gather_rows(x) is x
    assert (rank(), world()) == (0, 1)


def test_a_mean_has_no_gradient_and_shares_no_memory():
    x = drawn(3).requires_grad_()
    mean = mean_over_ranks(x)
    assert not mean.requires_grad
    mean.zero_()
    assert x.abs().min() > 0
