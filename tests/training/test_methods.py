"""The objectives' methods: which views, networks, queues and losses a batch meets."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerlens.augment.spatial import Mix
from layerlens.augment.views import Views
from layerlens.data import Dataset, dataset_from_arrays
from layerlens.errors import ConfigError
from layerlens.training import loop, methods
from layerlens.training.config import RunConfig, make_config
from layerlens.training.feeds import METHODS
from layerlens.training.loop import resolve, train
from layerlens.training.methods import Batch, Method, MoCo
from layerlens.training.objectives.simclr import nt_xent
from layerlens.training.objectives.supcon import sup_con
from layerlens.training.run_folder import read_metrics

STILL = Views(scale=1.0, flip=0.0, jitter=(0.0, 0.0, 0.0, 0.0), jitter_p=0.0, grey=0.0)
MOVING = Views(scale=0.5, flip=0.5, jitter=(0.4, 0.4, 0.0, 0.0))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(out: int = 8) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, out))


def images(n: int = 16) -> Tensor:
    return torch.rand(n, 1, 6, 6, generator=seeded(1)) * 0.8 + 0.1


def batch(labels: Tensor | None = None, n: int = 16, seed: int = 2) -> Batch:
    return Batch(images=images(n), labels=labels, draws=seeded(seed))


def config(objective: str, **settings: Any) -> RunConfig:
    usual = {"objective": objective, "batch_size": 16, "projection": 8}
    return make_config({**usual, **({"moco": {"queue": 64}} if objective == "moco" else {}), **settings})


def method(objective: str, views: Views = STILL, out: int = 8, **settings: Any) -> tuple[Any, list[Tensor]]:
    """A method on a network of its own, and what that network was fed."""
    net, fed = network(out), []

    def run(x: Tensor) -> Tensor:
        fed.append(x.detach().clone())
        return net(x)

    return METHODS[objective](config(objective, **settings), net, run, views, lambda x: x), fed


# --- contrastive ---


def test_simclr_compares_two_views_of_each_image():
    simclr, fed = method("simclr", MOVING, temperature=0.3, loss_scale=2.0)
    loss = simclr.loss(batch())
    (views,) = fed
    assert views.shape == (32, 1, 6, 6)
    assert torch.equal(views, MOVING(torch.cat([images()] * 2), seeded(2)))
    assert not torch.equal(views[:16], views[16:])
    torch.testing.assert_close(loss, nt_xent(network()(views), temperature=0.3, scale=2.0))


def test_supcon_takes_unseen_labels_as_classes_of_their_own():
    supcon, fed = method("supcon", MOVING, temperature=0.3, loss_scale=2.0)
    seen = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, *[-1] * 8])
    loss = supcon.loss(batch(seen))
    alone = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, *range(10, 18)])
    z = network()(fed[0])
    torch.testing.assert_close(loss, sup_con(z, alone, temperature=0.3, scale=2.0))
    assert not torch.isclose(loss, sup_con(z, torch.arange(16) % 4, temperature=0.3, scale=2.0))


@pytest.mark.parametrize("objective", ["simclr", "supcon", "supervised", "moco"])
@pytest.mark.parametrize("augment", ["erasing", "cutout"])
def test_masks_of_the_input_reach_every_view(objective: str, augment: str):
    """The views stand still and no pixel is 0, so zeros are what was masked."""
    seen = torch.arange(16) % 4
    one, fed = method(objective, STILL, input_augment=augment)
    if objective == "moco":
        one.keys.register_forward_pre_hook(lambda _m, args: fed.append(args[0].detach().clone()))
    one.loss(batch(seen))
    views = torch.cat(fed)
    assert len(views) == (16 if objective == "supervised" else 32)
    masked = (views == 0).flatten(1)
    halves = masked.view(-1, 16, 36)
    for half in halves:
        share = half.any(1).double().mean().item()
        assert share == 1 if augment == "cutout" else 0.1 < share < 0.9
    assert torch.equal(torch.where(views == 0, 0.0, images().repeat(len(halves), 1, 1, 1)), views)
    if len(halves) == 2:
        assert not torch.equal(halves[0], halves[1]), "each view has a mask of its own"


def test_other_views_are_seen_inside_the_block_alone():
    simclr, _ = method("simclr")

    def fails() -> None:
        with simclr.seeing(MOVING):
            assert simclr.views is MOVING
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert simclr.views is STILL


# --- supervised ---


def test_supervised_loss_is_the_cross_entropy_of_one_view():
    supervised, fed = method("supervised", MOVING, out=4, loss_scale=3.0)
    labels = torch.arange(16) % 4
    loss = supervised.loss(batch(labels))
    assert fed[0].shape == (16, 1, 6, 6)
    torch.testing.assert_close(loss, 3 * F.cross_entropy(network(4)(fed[0]), labels))


class Given(nn.Module):
    """Logits that are written down."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])


def test_a_mixed_loss_by_hand():
    """λ = ¼; rows (¼, ¾) and (⅘, ⅕); labels 0 and 1, each the other's partner.

    Row 0: ¼·log 4 + ¾·log(4/3); row 1: ¼·log 5 + ¾·log(5/4).
    """
    made = METHODS["supervised"](config("supervised"), network(), Given(), STILL, lambda x: x)
    mix = Mix(partner=torch.tensor([1, 0]), weight=torch.tensor(0.25))
    loss = made.loss(batch(torch.tensor([0, 1]), 2), lambda: mix)
    rows = [0.25 * math.log(4) + 0.75 * math.log(4 / 3), 0.25 * math.log(5) + 0.75 * math.log(5 / 4)]
    assert loss.item() == pytest.approx(sum(rows) / 2, rel=1e-6)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_have_a_mixed_loss(kind: str, monkeypatch: pytest.MonkeyPatch):
    mixes: list[Mix] = []
    plain = methods._MIXES[kind]

    def note(*args: Any, **options: Any) -> Any:
        mixed, mix = plain(*args, **options)
        mixes.append(mix)
        return mixed, mix

    monkeypatch.setitem(methods._MIXES, kind, note)
    supervised, fed = method("supervised", out=4, input_augment=kind)
    labels = torch.arange(16) % 4
    loss = supervised.loss(batch(labels))
    (mix,) = mixes
    assert not torch.equal(fed[0], images())
    logits = network(4)(fed[0])
    own, partner = (F.cross_entropy(logits, of) for of in (labels, labels[mix.partner]))
    torch.testing.assert_close(loss, mix.weight * own + (1 - mix.weight) * partner)


def test_supervised_with_a_share_of_the_labels_is_refused_clearly():
    with pytest.raises(ConfigError, match=r"labels=0\.5 with supervised training.*set train_samples"):
        tiny_config("supervised", labels=0.5)


# --- MoCo ---


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_key_network_starts_as_a_copy_and_learns_nothing_by_itself():
    moco, _ = method("moco")
    assert equal(moco.keys, moco.network)
    assert moco.keys is not moco.network
    loss = moco.loss(batch())
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in moco.keys.parameters())
    assert all(p.grad is not None and p.requires_grad for p in moco.network.parameters())
    assert [type(module) for module in moco.modules()] == [nn.Sequential, nn.ModuleDict]


def test_the_key_network_follows_by_its_momentum_after_the_step():
    moco, _ = method("moco", moco={"queue": 64, "key_momentum": 0.75})
    start = copy.deepcopy(moco.keys)
    moco.loss(batch()).backward()
    for slow, old in zip(moco.keys.parameters(), start.parameters(), strict=True):
        assert torch.equal(slow, old), "a pass alone moves nothing"
    with torch.no_grad():
        for p in moco.network.parameters():
            p.add_(1.0)
    moco.after_step()
    for slow, old in zip(moco.keys.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(slow, old + 0.25)


def test_batch_statistics_of_the_key_network_are_its_own():
    moco, _ = method("moco", MOVING)
    norm, keys_norm = moco.network[2], moco.keys[2]
    moco.loss(batch())
    moco.after_step()
    assert int(norm.num_batches_tracked) == int(keys_norm.num_batches_tracked) == 1
    assert not torch.equal(norm.running_mean, keys_norm.running_mean)
    views = MOVING(torch.cat([images()] * 2), seeded(2))
    for module, half in ((norm, views[:16]), (keys_norm, views[16:])):
        torch.testing.assert_close(module.running_mean, 0.1 * network()[:2](half).mean(0))


def test_the_queue_gets_the_keys_in_order():
    moco, _ = method("moco", MOVING)
    twin = copy.deepcopy(moco.keys)
    begin = moco.queues["unlabelled"].keys.clone()
    for k in range(5):
        moco.loss(batch(seed=k))
        views = MOVING(torch.cat([images()] * 2), seeded(k))
        made = F.normalize(twin(views[16:]), dim=1)
        place = 16 * (k % 4)
        torch.testing.assert_close(moco.queues["unlabelled"].keys[place : place + 16], made)
        if k == 0:
            assert torch.equal(moco.queues["unlabelled"].keys[16:], begin[16:])
    assert moco.queues["unlabelled"].position.item() == 16


def spied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    plain = methods.info_nce

    def note(q: Tensor, k: Tensor, negatives: Tensor, **options: Any) -> Tensor:
        loss = plain(q, k, negatives, **options)
        calls.append({"q": q.detach(), "k": k, "negatives": negatives.clone(), "loss": loss.detach(), **options})
        return loss

    monkeypatch.setattr(methods, "info_nce", note)
    return calls


@pytest.mark.parametrize(
    ("labels", "sizes", "counts"),
    [
        (0.0, {"unlabelled": 64}, [16]),
        (0.25, {"labelled": 16, "unlabelled": 48}, [4, 12]),
        (0.5, {"labelled": 32, "unlabelled": 32}, [8, 8]),
        (1.0, {"labelled": 64}, [16]),
    ],
)
def test_each_kind_of_image_meets_the_queue_of_its_kind(
    monkeypatch: pytest.MonkeyPatch, labels: float, sizes: dict[str, int], counts: list[int]
):
    calls = spied(monkeypatch)
    moco, _ = method("moco", MOVING, labels=labels, temperature=0.4, loss_scale=2.0)
    assert {name: len(queue.keys) for name, queue in moco.queues.items()} == sizes
    known = torch.where(torch.arange(16) < round(16 * labels), torch.arange(16) % 4, -1)
    twin, twin_keys = copy.deepcopy(moco.network), copy.deepcopy(moco.keys)
    begin = {name: queue.keys.clone() for name, queue in moco.queues.items()}
    first = moco.loss(batch(known))
    views = MOVING(torch.cat([images()] * 2), seeded(2))
    q, k, start = twin(views[:16]), twin_keys(views[16:]), 0
    for call, (name, negatives), count in zip(calls, begin.items(), counts, strict=True):
        rows = slice(start, start + count)
        start += count
        torch.testing.assert_close(call["q"], q[rows])
        torch.testing.assert_close(call["k"], k[rows])
        assert torch.equal(call["negatives"], negatives)
        assert call["temperature"] == 0.4
        assert call["excluded"] is None or not call["excluded"].any(), "the first keys are of no class"
        assert (call["excluded"] is None) == (name == "unlabelled")
        assert call["mix"] is None
        torch.testing.assert_close(moco.queues[name].keys[:count], F.normalize(k[rows], dim=1))
        expected = known[rows] if name == "labelled" else torch.full((count,), -1)
        assert torch.equal(moco.queues[name].labels[:count], expected)
        assert (moco.queues[name].labels[count:] == -1).all()
    weighted = sum(call["loss"] * count / 16 for call, count in zip(calls, counts, strict=True))
    torch.testing.assert_close(first.detach(), 2.0 * weighted)

    calls.clear()
    moco.loss(batch(known, seed=3))
    for call, name, count in zip(calls, begin, counts, strict=True):
        if name == "unlabelled":
            assert call["excluded"] is None
            continue
        own = known[:count]
        assert torch.equal(call["excluded"][:, :count], own[:, None] == own[None])
        assert not call["excluded"][:, count:].any()


def test_unlabelled_queries_are_not_told_labels_that_the_batch_has():
    """labels = 0 on a data set with classes: order.seen hides them, and so does MoCo itself."""
    outcomes = []
    for known in (None, torch.arange(16) % 4):
        moco, _ = method("moco", MOVING)
        moco.loss(batch(known))
        outcomes.append((moco.loss(batch(known, seed=3)), moco.queues["unlabelled"].labels))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert (outcomes[1][1] == -1).all()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("labels", [0.0, 0.5])
def test_queries_are_mixed_within_their_kind_and_keys_are_not(
    monkeypatch: pytest.MonkeyPatch, kind: str, labels: float
):
    """λ·CE(own key) + (1 − λ)·CE(partner's key), each against the queue alone."""
    calls = spied(monkeypatch)
    moco, fed = method("moco", STILL, labels=labels, input_augment=kind, temperature=0.5)
    keyed: list[Tensor] = []
    moco.keys.register_forward_pre_hook(lambda _m, args: keyed.append(args[0]))
    known = torch.where(torch.arange(16) < 16 * labels, torch.arange(16) % 4, -1)
    total = moco.loss(batch(known))
    assert torch.equal(keyed[0], images())
    assert not torch.equal(fed[0], images())
    expected, start = torch.zeros(()), 0
    for call in calls:
        n, mix = len(call["q"]), call["mix"]
        assert mix.partner.shape == (n,)
        assert mix.partner.max() < n
        if kind == "mixup":
            rows = images()[start : start + n]
            torch.testing.assert_close(
                fed[0][start : start + n], mix.weight * rows + (1 - mix.weight) * rows[mix.partner]
            )
        start += n
        q, k = F.normalize(call["q"], dim=1), F.normalize(call["k"], dim=1)
        far = (q @ call["negatives"].T / 0.5).exp().sum(1)

        def cross_entropy(keys: Tensor, q: Tensor = q, far: Tensor = far) -> Tensor:
            near = ((q * keys).sum(1) / 0.5).exp()
            return -(near / (near + far)).log().mean()

        mixed = mix.weight * cross_entropy(k) + (1 - mix.weight) * cross_entropy(k[mix.partner])
        torch.testing.assert_close(call["loss"], mixed)
        expected = expected + mixed * n / 16
    torch.testing.assert_close(total.detach(), expected)


@pytest.mark.parametrize("splits", [2, 4, 8])
def test_keys_of_split_groups_are_those_of_separate_passes_put_back_in_order(splits: int):
    moco, _ = method("moco", moco={"queue": 64, "bn_splits": splits})
    fed: list[Tensor] = []
    moco.keys.register_forward_pre_hook(lambda _m, args: fed.append(args[0].clone()))
    twin = copy.deepcopy(moco.keys)
    found = moco._keys(images(), seeded(7))
    assert [len(group) for group in fed] == [16 // splits] * splits
    rows = images().flatten(1)
    order = torch.cat([(group.flatten(1)[:, None] == rows[None]).all(2).int().argmax(1) for group in fed])
    assert sorted(order.tolist()) == list(range(16))
    assert order.tolist() != list(range(16)), "shuffled"
    twin._forward_pre_hooks.clear()
    expected = torch.empty(16, 8)
    for group in order.chunk(splits):
        expected[group] = twin(images()[group]).detach()
    torch.testing.assert_close(found, expected)
    assert int(moco.keys[2].num_batches_tracked) == splits
    assert not found.requires_grad


def test_queries_of_split_groups_are_normalised_apart():
    moco, fed = method("moco", moco={"queue": 64, "bn_splits": 4})
    twin = copy.deepcopy(moco.network)
    found = moco._queries(images())
    assert [len(group) for group in fed] == [4] * 4
    groups = [twin(images()[k::4]) for k in range(4)]
    for k, group in enumerate(groups):
        torch.testing.assert_close(found[k::4], group)


def test_the_shuffle_of_keys_is_a_function_of_the_batch_draws():
    moco, _ = method("moco", moco={"queue": 64, "bn_splits": 4})
    outs = [moco._keys(images(), seeded(s)) for s in (0, 0, 1)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize(("labels", "expected"), [(0.0, 0), (0.5, 8), (0.3, 5), (1.0, 16), (None, 0)])
def test_how_many_of_a_pass_are_labelled(labels: float | None, expected: int):
    assert config("moco", labels=labels).labelled_per_part == expected
    assert config("supcon", labels=labels).labelled_per_part == 0


def test_queues_begin_as_functions_of_the_seed():
    found = [method("moco", seed=s)[0].queues["unlabelled"].keys for s in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_loss_is_asked_of_a_child():
    with pytest.raises(NotImplementedError):
        Method(config("simclr"), network(), network(), STILL, lambda x: x).loss(batch())


# --- whole runs ---


def tiny() -> Dataset:
    rng = np.random.default_rng(0)
    y = np.arange(72) % 4
    patterns = np.random.default_rng(7).random((4, 1, 8, 8)) * 180
    x = (patterns[y] + rng.random((72, 1, 8, 8)) * 70).astype(np.uint8)
    return dataset_from_arrays("tiny", x[:64], y[:64], x[64:], y[64:])


def tiny_config(objective: str, **settings: Any) -> RunConfig:
    usual = {"model": "mlp,width=8,depth=2", "data": "tiny", "epochs": 2}
    return config(objective, **{**usual, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"labels": 0.0},
        {"labels": 0.5, "input_augment": "mixup"},
        {"labels": 1.0, "input_augment": "cutmix", "accumulate": 2, "moco": {"queue": 32}},
        {"model": "resnet20-cifar", "moco": {"queue": 32, "bn_splits": 2}, "precision": "bf16-mixed"},
        {"augment": {"layer": "blocks.0", "stop_gradient": True}, "input_augment": "erasing"},
    ],
    ids=["plain", "half", "whole", "splits", "deep"],
)
def test_moco_runs_and_an_interrupted_one_ends_alike(tmp_path: Path, settings: dict[str, Any]):
    chosen = tiny_config("moco", **settings)

    def interrupt(progress: Any) -> None:
        if progress.step == 4:
            raise KeyboardInterrupt

    train(chosen, tmp_path / "whole", dataset=tiny(), device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(chosen, tmp_path / "run", dataset=tiny(), device="cpu", progress=interrupt)
    train(chosen, tmp_path / "run", dataset=tiny(), device="cpu")
    name = "checkpoints/epoch-0002.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    losses = [[line["loss"] for line in read_metrics(tmp_path / run)] for run in ("run", "whole")]
    assert losses[0] == losses[1]


def test_moco_sees_the_labels_of_its_share_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Tensor] = []
    plain = MoCo.loss
    monkeypatch.setattr(MoCo, "loss", lambda self, batch, *rest: seen.append(batch.labels) or plain(self, batch, *rest))
    train(tiny_config("moco", labels=0.5), tmp_path / "run", dataset=tiny(), device="cpu")
    for labels in seen:
        assert (labels[:8] >= 0).all()
        assert (labels[8:] == -1).all()


def test_supcon_with_half_of_the_labels_runs_and_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Tensor] = []
    plain = methods.sup_con
    monkeypatch.setattr(methods, "sup_con", lambda z, labels, **o: seen.append(labels) or plain(z, labels, **o))
    losses = [
        train(tiny_config("supcon", labels=share), tmp_path / str(share), dataset=tiny(), device="cpu").loss
        for share in (0.5, 1.0)
    ]
    assert losses[0] != losses[1]
    hidden = torch.cat(seen[: len(seen) // 2])
    assert 0.3 < (hidden == -1).double().mean() < 0.7
    assert (torch.cat(seen[len(seen) // 2 :]) >= 0).all()


def test_the_key_network_of_a_run_moves_after_each_step(tmp_path: Path):
    chosen = tiny_config("moco", moco={"queue": 32, "key_momentum": 0.9}, learning_rate=0.5, warmup_epochs=0)
    data = tiny()
    trainer: Any = loop._Trainer(resolve(chosen, data), data, tmp_path, "cpu", None)
    with torch.random.fork_rng(devices=[]):
        trainer._set_modes()
        for rows in trainer.order.epoch(0)[:2, 0]:
            before = [p.clone() for p in trainer.method.keys.parameters()]
            trainer._train_step(rows)
            trainer.step += 1
            network = list(trainer.network.parameters())
            for old, new, fast in zip(before, trainer.method.keys.parameters(), network, strict=True):
                torch.testing.assert_close(new, 0.9 * old + 0.1 * fast.detach())
            assert any(not torch.equal(a, b) for a, b in zip(before, trainer.method.keys.parameters(), strict=True))
