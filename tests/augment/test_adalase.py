"""AdaLASE: its update by hand, whom it augments, and what training feeds it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from layerlens.augment.adalase import KINDS, MIXING, AdaLASE
from layerlens.augment.deep import DeepAugmentation
from layerlens.augment.spatial import Mix, cutout
from layerlens.data import Dataset, dataset_from_arrays
from layerlens.errors import ConfigError, ShapeError, UnknownLayerError, UnknownNameError
from layerlens.training import feeds, loop
from layerlens.training.config import RunConfig, make_config
from layerlens.training.loop import Progress, resolve, train
from layerlens.training.network import adalase_layers, build_start
from layerlens.training.order import generator, seed_of
from layerlens.training.run_folder import read_ratios

MLP = "mlp,width=8,depth=2"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def q_of(adalase: AdaLASE) -> list[float]:
    return adalase.ratios.tolist()


def observe(adalase: AdaLASE, arm: int, product: float) -> None:
    """One step at an arm, whose two gradients have the given inner product."""
    adalase.active = arm
    adalase.observe([torch.tensor([product, 0.0]), torch.zeros(2, 2)], [torch.tensor([1.0, 9.0]), torch.ones(2, 2)])


def net() -> nn.Sequential:
    """Three layers that change nothing."""
    return nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity())


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- the update ---


def test_an_update_by_hand_with_interval_1():
    """q = (.25 + 1 · .1, .25, .25, .25) = (.35, …), inside [.025, .975]; divided by 1.1."""
    adalase = AdaLASE(["a", "b", "c", "d"], eta=1.0, interval=1)
    assert q_of(adalase) == [0.25] * 4
    observe(adalase, 0, 0.1)
    assert q_of(adalase) == pytest.approx([0.35 / 1.1, 0.25 / 1.1, 0.25 / 1.1, 0.25 / 1.1], abs=1e-8)


def test_an_update_by_hand_with_clipping():
    """K = 2, d = .2 / 2 = .1: (.5 + 3, .5) -> (.9, .5) / 1.4; then (.9/1.4, .5/1.4 − 2) -> (.9/1.4, .1) / sum."""
    adalase = AdaLASE(["a", "b"], eta=0.5, floor=0.2, interval=1)
    observe(adalase, 0, 6.0)
    assert q_of(adalase) == pytest.approx([0.9 / 1.4, 0.5 / 1.4])
    observe(adalase, 1, -4.0)
    first = 0.9 / 1.4
    assert q_of(adalase) == pytest.approx([first / (first + 0.1), 0.1 / (first + 0.1)])


def test_an_update_by_hand_with_interval_3():
    """Arm 0 gets .3 and .6, arm 2 gets −.9: means over the three steps .3, 0, −.3; eta .5 moves by .15, 0, −.15."""
    adalase = AdaLASE(["a", "b", "c"], eta=0.5, interval=3)
    for arm, product in ((0, 0.3), (2, -0.9)):
        observe(adalase, arm, product)
        assert q_of(adalase) == pytest.approx([1 / 3] * 3), "nothing moves within an interval"
    observe(adalase, 0, 0.6)
    assert q_of(adalase) == pytest.approx([1 / 3 + 0.15, 1 / 3, 1 / 3 - 0.15], abs=1e-7)
    for _ in range(3):
        observe(adalase, 1, 0.0)
    assert q_of(adalase) == pytest.approx([1 / 3 + 0.15, 1 / 3, 1 / 3 - 0.15], abs=1e-7), "the sums begin anew"


def test_ratios_stay_a_distribution_above_the_floor_whatever_comes():
    adalase = AdaLASE(["a", "b", "c"], eta=1.0, floor=0.3, interval=1)
    for k, product in enumerate([1e30, -1e30, float("inf"), float("nan"), -float("inf"), 5.0, -5.0]):
        observe(adalase, k % 3, product)
        assert sum(q_of(adalase)) == pytest.approx(1)
        assert min(q_of(adalase)) >= 0.1 / (0.9 + 0.9 + 0.9) - 1e-12  # d over the largest sum


def test_a_floor_of_1_leaves_them_uniform():
    adalase = AdaLASE(["a", "b", "c", "d"], floor=1.0, interval=1)
    observe(adalase, 2, -100.0)
    assert q_of(adalase) == pytest.approx([0.25] * 4)


def test_one_arm_has_everything():
    adalase = AdaLASE(["a"], interval=1)
    observe(adalase, 0, -3.0)
    assert q_of(adalase) == [1.0]


def test_the_inner_product_runs_over_all_parameters():
    """2·3 + 1·1 + … : (1, 2)·(3, 4) + (5)·(6) = 41."""
    adalase = AdaLASE(["a", "b"], eta=0.001, interval=1)
    adalase.active = 0
    adalase.observe(
        [torch.tensor([[1.0, 2.0]]), torch.tensor([5.0])], [torch.tensor([[3.0, 4.0]]), torch.tensor([6.0])]
    )
    assert q_of(adalase) == pytest.approx([0.541 / 1.041, 0.5 / 1.041])


@pytest.mark.parametrize("ratios", ["uniform", [1.0, 3.0]])
def test_uniform_and_fixed_ratios_never_move(ratios: Any):
    adalase = AdaLASE(["a", "b"], ratios=ratios, interval=1)
    before = q_of(adalase)
    observe(adalase, 0, 100.0)
    assert q_of(adalase) == before


def test_fixed_ratios_are_brought_to_sum_1():
    assert q_of(AdaLASE(["a", "b", "c"], ratios=[1, 3, 0])) == [0.25, 0.75, 0.0]


# --- drawing ---


def test_draws_follow_the_ratios():
    """Chi-square with 3 degrees of freedom; 16.3 has p = .001."""
    weights, n = [0.1, 0.2, 0.3, 0.4], 4000
    adalase, source = AdaLASE(["a", "b"], ("cutout", "dropout"), ratios=weights), seeded(3)
    counts = np.bincount([adalase.draw(source) for _ in range(n)], minlength=4)
    expected = n * np.array(weights)
    assert ((counts - expected) ** 2 / expected).sum() < 16.3


def test_an_arm_of_ratio_0_is_never_drawn():
    adalase, source = AdaLASE(["a", "b", "c"], ratios=[1, 0, 1]), seeded()
    assert {adalase.draw(source) for _ in range(300)} == {0, 2}


def test_a_draw_is_a_function_of_its_generator_and_leaves_the_global_one_alone():
    adalase, before = AdaLASE(list("abcde")), torch.get_rng_state()
    draws = [[adalase.draw(source) for _ in range(20)] for source in (seeded(1), seeded(1), seeded(2))]
    assert draws[0] == draws[1] != draws[2]
    assert adalase.active == draws[2][-1]
    assert torch.equal(torch.get_rng_state(), before)


def test_resting_augments_nothing_and_ends_after_an_error():
    adalase, model = AdaLASE(["0"], ("dropout",)), net()
    adalase.draw(seeded())

    def fails_while_resting() -> None:
        with adalase.resting():
            assert adalase.active is None
            assert torch.equal(model(torch.ones(8, 3)), torch.ones(8, 3))
            raise KeyboardInterrupt

    with adalase.attached(model):
        with pytest.raises(KeyboardInterrupt):
            fails_while_resting()
        assert adalase.active == 0
        assert not torch.equal(model(torch.ones(8, 3)), torch.ones(8, 3))


# --- where it augments ---


def test_arms_are_layers_times_kinds():
    adalase = AdaLASE(["input", "0"], ("mixup", "dropout"))
    assert sorted(adalase.arms) == [("0", "dropout"), ("0", "mixup"), ("input", "dropout"), ("input", "mixup")]
    assert q_of(adalase) == [0.25] * 4


@pytest.mark.parametrize("layers", [["0", "1", "2"], ["input", "0", "1"], ["0#1", "1#1", "2"]])
def test_only_the_active_arm_augments(layers: list[str], monkeypatch: pytest.MonkeyPatch):
    """Each kind adds a number of its own, so that the output names the kind, and what each layer saw the place."""
    monkeypatch.setitem(KINDS, "dropout", lambda h: h + 10)
    monkeypatch.setitem(KINDS, "noise", lambda h: h + 100)
    model, adalase = net(), AdaLASE(layers, ("dropout", "noise"))
    seen: list[Tensor] = []
    for module in model:
        module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with adalase.attached(model):
        for k, (layer, kind) in enumerate(adalase.arms):
            adalase.active = k
            seen.clear()
            out = model(torch.zeros(2, 2))
            added = {"dropout": 10.0, "noise": 100.0}[kind]
            place = 0 if layer == "input" else int(layer[0]) + 1  # how many of (three inputs, the output) are before
            assert [float(h.unique()) for h in [*seen, out]] == [0.0] * place + [added] * (4 - place)


def test_eval_mode_is_the_identity():
    adalase, model = AdaLASE(["input", "0"], ("dropout",)), net().eval()
    x = torch.ones(16, 4)
    with adalase.attached(model):
        for adalase.active in (0, 1):
            assert torch.equal(model(x), x)


def test_nothing_is_augmented_before_the_first_draw():
    adalase, model = AdaLASE(["0"], ("dropout",)), net()
    with adalase.attached(model):
        assert torch.equal(model(torch.ones(8, 4)), torch.ones(8, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_augments_maps_and_keeps_the_shape(kind: str):
    adalase, model = AdaLASE(["1"], (kind,)), net()
    adalase.active = 0
    x = torch.rand(16, 3, 8, 8, generator=seeded())
    with torch.random.fork_rng(devices=[]), adalase.attached(model):
        torch.manual_seed(0)
        out = model(x)
    assert out.shape == x.shape
    assert not torch.equal(out, x)
    assert (adalase.mix is not None) == (kind in MIXING)


MIX_LAYERS = [
    ["0"],
    ["0", "1"],
    ["1", "input"],
    pytest.param(
        ["input", "0"],
    ),
]


@pytest.mark.parametrize("layers", MIX_LAYERS, ids=str)
@pytest.mark.parametrize("kind", MIXING)
def test_a_mixing_kind_leaves_its_mix_at_every_layer(kind: str, layers: list[str]):
    adalase, model, x = AdaLASE(layers, (kind,)), net(), torch.rand(8, 3, 6, 6, generator=seeded())
    with torch.random.fork_rng(devices=[]), adalase.attached(model):
        torch.manual_seed(1)
        for adalase.active in range(len(layers)):
            out, mix = model(x), adalase.mix
            assert isinstance(mix, Mix)
            mean, expected = out.mean((1, 2, 3)), x
            if kind == "mixup":
                expected = mix.weight * x + (1 - mix.weight) * x[mix.partner]
                torch.testing.assert_close(mean, expected.mean((1, 2, 3)))
            else:
                own = (out == x).float().mean((1, 2, 3))
                moved = mix.partner != torch.arange(8)
                torch.testing.assert_close(own[moved], mix.weight.expand(8)[moved])


def test_a_mix_is_forgotten_by_the_next_pass():
    adalase, model, x = AdaLASE(["0"], ("mixup", "dropout")), net(), torch.rand(8, 3)
    with adalase.attached(model):
        adalase.active = 0
        model(x)
        assert adalase.mix is not None
        adalase.active = 1
        model(x)
        assert adalase.mix is None
        adalase.active = 0
        model(x)
        with adalase.resting():
            model(x)
        assert adalase.mix is None


def test_hooks_leave_with_the_block_even_when_a_layer_is_unknown():
    model = net()
    with pytest.raises(KeyboardInterrupt), AdaLASE(["input", "0"]).attached(model):
        raise KeyboardInterrupt
    assert hooks_on(model) == 0
    with pytest.raises(UnknownLayerError, match=r"no layer '7' in Sequential"), AdaLASE(["0", "7"]).attached(model):
        pass
    assert hooks_on(model) == 0


def test_a_copy_of_the_model_shares_the_ratios():
    adalase, model = AdaLASE(["0"], ("dropout",)), net()
    with adalase.attached(model):
        twin = copy.deepcopy(model)
        adalase.active = 0
        assert not torch.equal(twin(torch.ones(8, 4)), torch.ones(8, 4))


# --- state ---


def test_a_state_dict_in_mid_interval_goes_on_to_identical_ratios():
    steps = [(0, 0.3), (1, -0.2), (2, 0.7), (1, 0.5), (0, -0.9), (2, 0.1), (1, 0.4)]
    whole = AdaLASE(["a", "b", "c"], interval=3)
    part, rest = (AdaLASE(["a", "b", "c"], interval=3) for _ in range(2))
    for arm, product in steps:
        observe(whole, arm, product)
    for arm, product in steps[:4]:
        observe(part, arm, product)
    rest.load_state_dict(part.state_dict())
    for arm, product in steps[4:]:
        observe(rest, arm, product)
    assert q_of(rest) == q_of(whole)
    assert q_of(rest) != [1 / 3] * 3


def test_a_state_dict_does_not_change_when_the_original_goes_on():
    part, rest = (AdaLASE(["a", "b"], interval=2) for _ in range(2))
    observe(part, 0, 0.4)
    rest.load_state_dict(part.state_dict())
    observe(part, 1, 0.6)
    observe(rest, 1, 0.6)
    assert q_of(rest) == q_of(part)


# --- errors ---


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layers": []}, r"layers=\[\], kinds=\['cutout'\]; allowed: at least one of each, each once"),
        ({"kinds": ()}, r"kinds=\[\]; allowed: at least one of each"),
        ({"layers": ["a", "a"]}, r"each once"),
        ({"kinds": ("cutout", "cutout")}, r"each once"),
        ({"eta": 0.0}, r"eta=0\.0, .*; allowed: above 0"),
        ({"eta": -1.0}, r"eta=-1\.0"),
        ({"floor": 0.0}, r"floor=0\.0"),
        ({"floor": 1.1}, r"floor=1\.1"),
        ({"floor": float("nan")}, r"floor=nan"),
        ({"interval": 0}, r"interval=0"),
        ({"ratios": [1.0]}, r"ratios=\[1\.0\] for 2 arms; allowed: one number from 0 per arm, not all 0"),
        ({"ratios": [1.0, -0.1]}, r"ratios=\[1\.0, -0\.1\]"),
        ({"ratios": [0.0, 0.0]}, r"not all 0"),
        ({"ratios": [1.0, float("nan")]}, r"ratios=\[1\.0, nan\]"),
        ({"ratios": [1.0, float("inf")]}, r"ratios=\[1\.0, inf\]"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, Any], match: str):
    with pytest.raises(ConfigError, match=match):
        AdaLASE(**{"layers": ["a", "b"], **options})


@pytest.mark.parametrize("eta", [float("nan"), float("inf")])
def test_an_eta_that_is_no_number_is_refused(eta: float):
    with pytest.raises(ConfigError, match="eta="):
        AdaLASE(["a"], eta=eta)


def test_unknown_names_are_refused():
    with pytest.raises(UnknownNameError, match="unknown kind 'cutuot'; closest: cutout"):
        AdaLASE(["a"], ("cutuot",))
    with pytest.raises(UnknownNameError, match="unknown ratios 'unifrom'; closest: uniform"):
        AdaLASE(["a"], ratios="unifrom")


def test_observing_without_an_arm_is_refused():
    with pytest.raises(ConfigError, match=r"no arm is active; call draw\(\) before the step"):
        AdaLASE(["a"]).observe([torch.ones(1)], [torch.ones(1)])


def test_a_layer_without_a_map_can_not_be_cut_out():
    adalase, model = AdaLASE(["0"]), net()
    adalase.active = 0
    with pytest.raises(ShapeError, match=r"needs float images or maps"), adalase.attached(model):
        model(torch.ones(4, 3))
    assert hooks_on(model) == 0


# --- in training ---


def tiny(n: int = 64, side: int = 8, channels: int = 1) -> Dataset:
    rng = np.random.default_rng(0)
    y = np.arange(n + 8) % 4
    patterns = np.random.default_rng(7).random((4, channels, side, side)) * 180
    x = (patterns[y] + rng.random((n + 8, channels, side, side)) * 70).astype(np.uint8)
    return dataset_from_arrays("tiny", x[:n], y[:n], x[n:], y[n:])


def flat(n: int = 64) -> Dataset:
    """Image i has the grey value i everywhere, so that a batch names its rows."""
    x = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 1, 8, 8)).copy()
    return dataset_from_arrays("flat", x, np.arange(n) % 4, x[:4], np.arange(4))


def config(**settings: Any) -> RunConfig:
    usual = {"model": MLP, "data": "tiny", "epochs": 2, "batch_size": 16, "objective": "supervised", "warmup_epochs": 0}
    return make_config({**usual, "adalase": {"kinds": ["dropout"]}, **settings})


def trainer_of(folder: Path, dataset: Dataset | None = None, **settings: Any) -> Any:
    dataset = dataset or tiny()
    return loop._Trainer(resolve(config(**settings), dataset), dataset, folder, "cpu", None)


@contextmanager
def at_work(trainer: Any) -> Iterator[Any]:
    """As in the middle of `run`."""
    with torch.random.fork_rng(devices=[]), ExitStack() as stack:
        for operator in trainer.operators:
            stack.enter_context(operator.attached(trainer.network))
        trainer._set_modes()
        yield trainer.order.epoch(0)[:, 0]


def two_layers(parameters: list[Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of W2 relu(W1 x + b1) + b2, in float64."""
    w1, b1, w2, b2 = parameters
    logits = (images.double().flatten(1) @ w1.T + b1).relu() @ w2.T + b2
    return -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean()


def test_the_inner_product_of_a_step_is_that_worked_out_by_hand(tmp_path: Path):
    """And it is −dL_val/dq of theta − lr · q · g, up to lr, by finite differences."""
    data, settings = tiny(), {"layers": "input", "kinds": ["cutout"], "interval": 9, "rotation": 40.0}
    trainer = trainer_of(
        tmp_path, data, model="mlp,width=6,depth=1", adalase=settings, momentum=0.0, weight_decay=0.0, learning_rate=0.5
    )
    start = [p.detach().double().clone() for p in trainer.network.parameters()]
    with at_work(trainer) as order:
        trainer._train_step(order[0])
    assert trainer.adalase.arms == [("input", "cutout")]
    found, rate = float(trainer.adalase._sums[0]), trainer.rate

    def seen(rows: Tensor, views: Any, source: torch.Generator) -> Tensor:
        return (views(data.x_train[rows].float() / 255, source) - trainer.feed.mean) / trainer.feed.std

    rows, usual = order[0][0], trainer.method.views
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(0, "model", 0, 0))
        images = cutout(seen(rows, usual, generator(0, "views", 0, 0)), 0.5)
    leaves = [p.clone().requires_grad_() for p in start]
    train_gradient = torch.autograd.grad(two_layers(leaves, images, data.y_train[rows]), leaves)

    moved = [p - rate * g for p, g in zip(start, train_gradient, strict=True)]
    for own, now in zip(moved, trainer.network.parameters(), strict=True):
        torch.testing.assert_close(own, now.detach().double(), atol=1e-5, rtol=1e-4)
    drawn = torch.randperm(len(trainer.order.rows), generator=generator(0, "validation", 0))[:16]
    kept = trainer.order.rows[drawn]
    images = seen(kept, replace(usual, rotation=40.0), generator(0, "validation", 0))
    leaves = [p.clone().requires_grad_() for p in moved]
    gradient = torch.autograd.grad(two_layers(leaves, images, data.y_train[kept]), leaves)
    product = sum(float((a * b).sum()) for a, b in zip(train_gradient, gradient, strict=True))
    assert found == pytest.approx(product, rel=1e-3)
    assert abs(product) > 1e-3

    def validation_loss(q: float) -> float:
        here = [p - rate * q * g for p, g in zip(start, train_gradient, strict=True)]
        return float(two_layers(here, images, data.y_train[kept]))

    slope = (validation_loss(1 + 1e-4) - validation_loss(1 - 1e-4)) / 2e-4
    assert rate * found == pytest.approx(-slope, rel=1e-3)


def test_the_sum_of_the_drawn_arm_alone_grows(tmp_path: Path):
    trainer = trainer_of(tmp_path)
    with at_work(trainer) as order:
        trainer._train_step(order[0])
    sums = trainer.adalase._sums
    others = [k for k in range(len(sums)) if k != trainer.adalase.active]
    assert sums[trainer.adalase.active] != 0
    assert not sums[others].any()


@pytest.mark.parametrize("objective", ["simclr", "supcon", "supervised"])
def test_the_validation_pass_leaves_statistics_gradients_and_weights_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
):
    trainer = trainer_of(tmp_path, model="resnet20-cifar", objective=objective, adalase={"kinds": ["cutout"]})
    whole, checked = loop._Trainer._observe, []

    def watch(self: Any, adalase: AdaLASE, gradients_before: Any) -> None:
        def state() -> dict[str, Tensor]:
            gradients = {f"grad {n}": p.grad for n, p in self.network.named_parameters()}
            tensors = {**self.network.state_dict(), **gradients}
            return {name: value.clone() for name, value in tensors.items()}

        before, modes = state(), [m.training for m in self.network.modules()]
        wrapped, views, active = self.wrapped, self.method.views, adalase.active
        whole(self, adalase, gradients_before)
        after = state()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert modes == [m.training for m in self.network.modules()]
        tracking = [m.track_running_stats for m in self.network.modules() if isinstance(m, nn.BatchNorm2d)]
        assert tracking
        assert all(tracking)
        assert (self.wrapped, self.method.views, adalase.active) == (wrapped, views, active)
        checked.append(int(after["bn1.num_batches_tracked"]))

    monkeypatch.setattr(loop._Trainer, "_observe", watch)
    with at_work(trainer) as order:
        for rows in order[:2]:
            trainer._train_step(rows)
            trainer.step += 1
    assert checked == [1, 2]
    assert trainer.adalase._sums is not None


def test_the_validation_pass_uses_batch_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Poisoned running statistics would show in the gradient."""
    sums = []
    for poisoned in (False, True):
        trainer = trainer_of(tmp_path, model="resnet20-cifar", adalase={"kinds": ["cutout"]})
        whole = loop._Trainer._validation_gradient

        def poison(self: Any, poisoned: bool = poisoned, whole: Any = whole) -> Any:
            if poisoned:
                self.network.bn1.running_mean.fill_(1e3)
            return whole(self)

        with monkeypatch.context() as patch, at_work(trainer) as order:
            patch.setattr(loop._Trainer, "_validation_gradient", poison)
            trainer._train_step(order[0])
        sums.append(trainer.adalase._sums)
    assert torch.equal(sums[0], sums[1])


def passes(monkeypatch: pytest.MonkeyPatch, objective: str) -> list[tuple[bool, list[int], float, bytes]]:
    """Of each call of an objective's loss: at rest?, its rows, the rotation of its views, its generator's state."""
    seen: list[tuple[bool, list[int], float, bytes]] = []
    kind = feeds.METHODS[objective]
    plain = kind.loss
    attached: list[AdaLASE] = []
    begin = AdaLASE.draw
    monkeypatch.setattr(AdaLASE, "draw", lambda self, source: (attached.append(self), begin(self, source))[1])

    def note(self: Any, batch: Any, *rest: Any) -> Tensor:
        rows = (batch.images[:, 0, 0, 0] * 255).round().int().tolist()
        state = batch.draws.get_state().numpy().tobytes()
        seen.append((attached[-1].active is None, rows, self.views.rotation, state))
        return plain(self, batch, *rest)

    monkeypatch.setattr(kind, "loss", note)
    return seen


@pytest.mark.parametrize("objective", ["simclr", "supervised"])
def test_the_validation_batch_comes_from_the_images_trained_on_and_stays_for_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
):
    seen, data = passes(monkeypatch, objective), flat()
    chosen = config(objective=objective, train_samples=24, holdout=0.25, batch_size=8, epochs=3, views={"rotation": 3})
    train(chosen, tmp_path / "run", dataset=data, device="cpu")
    assert [rests for rests, *_ in seen] == [False, True] * 9
    trained = {row for rests, rows, *_ in seen if not rests for row in rows}
    validation = [(rows, rotation, state) for rests, rows, rotation, state in seen if rests]
    assert len(trained) == 24
    assert all(set(rows) <= trained and len(set(rows)) == 8 for rows, *_ in validation)
    epochs = [validation[3 * e : 3 * e + 3] for e in range(3)]
    assert all(step == epoch[0] for epoch in epochs for step in epoch), "the same images and views all through an epoch"
    assert epochs[0] != epochs[1] != epochs[2]
    assert sorted(epochs[0][0][0]) != sorted(epochs[1][0][0])
    assert {rotation for _, rotation, _ in validation} == {10.0}
    assert {rotation for rests, _, rotation, _ in seen if not rests} == {3.0}


def test_the_validation_pass_does_not_augment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer, calls = trainer_of(tmp_path), []
    plain = KINDS["dropout"]
    monkeypatch.setitem(KINDS, "dropout", lambda h: calls.append(1) or plain(h))
    with at_work(trainer) as order:
        trainer._train_step(order[0])
        assert len(calls) == 1
        trainer._validation_gradient()
    assert len(calls) == 1


def test_no_deep_augmentation_in_the_validation_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """methods.md, section 4: pseudo-validation has no latent augmentation."""
    trainer = trainer_of(tmp_path, augment={"layer": "blocks.0"})
    with at_work(trainer) as order:
        trainer._train_step(order[0])
        calls: list[int] = []
        plain = DeepAugmentation._transformed
        monkeypatch.setattr(DeepAugmentation, "_transformed", lambda self, h: calls.append(1) or plain(self, h))
        trainer._validation_gradient()
    assert not calls


@pytest.mark.parametrize(
    "foreach",
    [False, True],
    ids=["as on a CPU", "as on a GPU"],
)
def test_the_gradient_that_counts_is_the_one_before_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreach: bool
):
    if foreach:
        monkeypatch.setattr(loop.torch.optim, "SGD", partial(torch.optim.SGD, foreach=True))
    trainer, before, seen = trainer_of(tmp_path, nesterov=True, weight_decay=0.0), [], []
    step, observe_ = trainer.optimizer.step, trainer.adalase.observe

    def note_and_step() -> None:
        before.append([p.grad.clone() for p in trainer.learning])
        step()

    def note(train: Any, validation: Any) -> None:
        seen.append([g.clone() for g in train])
        observe_(train, validation)

    monkeypatch.setattr(trainer.optimizer, "step", note_and_step)
    monkeypatch.setattr(trainer.adalase, "observe", note)
    with at_work(trainer) as order:
        for rows in order[:2]:
            trainer._train_step(rows)
            trainer.step += 1
    assert len(before) == len(seen) == 2
    for mine, theirs in zip(before, seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


RUNS: dict[str, dict[str, Any]] = {
    "mlp": {"adalase": {"kinds": ["mixup", "dropout"], "interval": 2}},
    "resnet20": {"model": "resnet20-cifar", "adalase": {"kinds": ["cutmix", "cutout", "translation"], "interval": 1}},
    "simclr": {"objective": "simclr", "model": "resnet20-cifar", "adalase": {"kinds": ["cutout"], "interval": 1}},
    "supcon": {"objective": "supcon", "adalase": {"kinds": ["noise", "channel-dropout"], "interval": 1}},
    "bf16": {"precision": "bf16-mixed", "adalase": {"kinds": ["noise"], "interval": 1}},
    "accumulate": {"accumulate": 2, "adalase": {"kinds": ["noise"], "interval": 1}},
    "lars": {"optimizer": "lars", "adalase": {"kinds": ["noise"], "interval": 1}},
    "frozen": {"freeze": {"part": "before", "layer": "blocks.0"}, "adalase": {"kinds": ["noise"], "interval": 1}},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_writes_one_line_of_ratios_per_step(tmp_path: Path, name: str):
    train(config(**RUNS[name]), tmp_path / "run", dataset=tiny(), device="cpu")
    lines = read_ratios(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 7))
    arms = set(lines[0]) - {"step", "arm"}
    kinds = RUNS[name]["adalase"]["kinds"]
    assert {arm.rpartition("/")[2] for arm in arms} == set(kinds)
    assert len(arms) % len(kinds) == 0
    assert all(line["arm"] in arms and set(line) == {"step", "arm"} | arms for line in lines)
    ratios = np.array([[line[arm] for arm in sorted(arms)] for line in lines])
    np.testing.assert_allclose(ratios.sum(1), 1, atol=1e-12)
    assert (ratios > 0).all()
    assert len(np.unique(ratios, axis=0)) > 1, "they move"


@pytest.mark.parametrize("ratios", ["uniform", [0.7, 0.2, 0.1]], ids=["uniform", "fixed"])
def test_ratios_that_are_given_stay_through_training(tmp_path: Path, ratios: Any):
    train(
        config(adalase={"kinds": ["dropout"], "ratios": ratios, "interval": 1}), tmp_path, dataset=tiny(), device="cpu"
    )
    lines = read_ratios(tmp_path)
    expected = [1 / 3] * 3 if ratios == "uniform" else ratios
    names = ["input/dropout", "blocks.0/dropout", "blocks.1/dropout"]
    assert [[line[name] for name in names] for line in lines] == [pytest.approx(expected)] * 6


@pytest.mark.parametrize("stop", [2, 5])
@pytest.mark.parametrize("save_every", [60.0, -1.0], ids=["saves each epoch", "saves each step"])
def test_an_interrupted_run_has_the_ratios_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, save_every: float
):
    monkeypatch.setattr(loop, "SAVE_EVERY_S", save_every)
    chosen = config(adalase={"kinds": ["mixup", "noise"], "interval": 2})

    def interrupt(progress: Progress) -> None:
        if progress.step == stop:
            raise KeyboardInterrupt

    train(chosen, tmp_path / "whole", dataset=tiny(), device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(chosen, tmp_path / "run", dataset=tiny(), device="cpu", progress=interrupt)
    train(chosen, tmp_path / "run", dataset=tiny(), device="cpu")
    assert read_ratios(tmp_path / "run") == read_ratios(tmp_path / "whole")
    for name in ("ratios.csv", "checkpoints/epoch-0002.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def layers_of(model: str, data: Dataset, **adalase: Any) -> list[str]:
    chosen = config(model=model, adalase=adalase)
    start = build_start(chosen, data)
    return adalase_layers(chosen, start.network, start.example)


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("kinds", [["cutout"], ["mixup", "translation"], ["cutmix"], ["position-dropout"]])
def test_auto_means_the_input_and_the_layers_that_have_maps(side: int, kinds: list[str]):
    found = layers_of("resnet18-cifar,width=8", tiny(16, side, 3), kinds=kinds)
    assert found == ["input", "relu", "layer1", "layer2", "layer3", "layer4"]


def test_auto_leaves_out_a_map_of_one_pixel():
    found = layers_of("resnet18-cifar,width=8", tiny(16, 8, 3), kinds=["cutout"])
    assert found == ["input", "relu", "layer1", "layer2", "layer3"]


def test_auto_means_the_input_and_hidden_layers_of_an_mlp():
    assert layers_of(MLP, tiny(), kinds=["mixup", "dropout"]) == ["input", "blocks.0", "blocks.1"]


class Tokens(nn.Module):
    """A patch embedding, two blocks on (n, 4, 6) tokens, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 6, 4, stride=4)
        kind = nn.TransformerEncoderLayer
        self.blocks = nn.ModuleList([kind(6, 2, 8, batch_first=True) for _ in range(2)])
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean(1))


@pytest.mark.parametrize("kind", ["cutout", "cutmix", "translation"])
def test_auto_leaves_out_tokens_that_a_kind_can_not_augment(kind: str):
    chosen = config(adalase={"kinds": [kind]})
    assert adalase_layers(chosen, Tokens(), torch.zeros(2, 1, 8, 8)) == ["input", "embed"]


def test_auto_takes_tokens_where_positions_are_dropped():
    chosen = config(adalase={"kinds": ["position-dropout"]})
    assert adalase_layers(chosen, Tokens(), torch.zeros(2, 1, 8, 8)) == ["input", "embed", "blocks.0", "blocks.1"]


def test_layers_can_be_selected_in_any_order_and_come_in_that_of_execution():
    assert layers_of(MLP, tiny(), layers="blocks.1,input", kinds=["dropout"]) == ["input", "blocks.1"]
    with pytest.raises(UnknownLayerError, match=r"no layer 'blocks\.9'"):
        layers_of(MLP, tiny(), layers="blocks.9", kinds=["dropout"])


def test_the_loss_of_a_batch_mixed_at_the_input_is_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mixes: list[Mix | None] = []
    plain = loop._Trainer._latent_mix
    monkeypatch.setattr(loop._Trainer, "_latent_mix", lambda self: (mixes.append(plain(self)), mixes[-1])[1])
    trainer = trainer_of(tmp_path, adalase={"kinds": ["mixup"], "ratios": [1, 0, 0]})
    with at_work(trainer) as order:
        trainer._train_step(order[0])
    assert mixes[0] is not None


def test_the_loss_of_a_batch_mixed_at_a_layer_is_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By hand: λ·CE(own) + (1 − λ)·CE(partner) of the logits that the network gave."""
    data, logits = tiny(), []
    trainer = trainer_of(tmp_path, data, adalase={"kinds": ["mixup"], "ratios": [0, 1, 0]})
    trainer.network.register_forward_hook(lambda _m, _a, out: logits.append(out.detach()))
    mixes = []
    plain = loop._Trainer._latent_mix
    monkeypatch.setattr(loop._Trainer, "_latent_mix", lambda self: (mixes.append(plain(self)), mixes[-1])[1])
    with at_work(trainer) as order:
        loss = trainer._train_step(order[0])
    (mix,), labels = mixes, data.y_train[order[0][0]]
    own, partner = (F.cross_entropy(logits[0], of) for of in (labels, labels[mix.partner]))
    torch.testing.assert_close(loss, mix.weight * own + (1 - mix.weight) * partner)
    assert own != partner


def test_weights_and_gradient_agree_with_a_functional_call(tmp_path: Path):
    """The validation gradient is that of the loss as a function of the weights after the step."""
    trainer = trainer_of(tmp_path, model="resnet20-cifar", objective="simclr", adalase={"kinds": ["cutout"]})
    with at_work(trainer) as order:
        trainer._train_step(order[0])
        gradient = trainer._validation_gradient()
        names = [name for name, _ in trainer.network.named_parameters()]
        size = float(sum((g.double() ** 2).sum() for g in gradient) ** 0.5)
        values = [p.detach().clone() for p in trainer.learning]
        rows = trainer.order.rows[torch.randperm(58, generator=trainer._validation_draws())[:16]]

        def loss(step: float) -> float:
            moved = {n: p + step * g / size for n, p, g in zip(names, values, gradient, strict=True)}
            trainer.method.run = lambda images: functional_call(trainer.network, moved, trainer.feed.normalize(images))
            turned = replace(trainer.method.views, rotation=10.0)
            with torch.no_grad(), trainer.method.seeing(turned), trainer.adalase.resting():
                return float(trainer.method.loss(trainer.feed.batch(rows, trainer._validation_draws())))

        assert (loss(5e-3) - loss(-5e-3)) / 1e-2 == pytest.approx(size, rel=0.05)
