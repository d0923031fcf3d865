"""Deep Augmentation as a hook: whom it transforms, what gradient passes, and what stays behind."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from layerlens.augment.deep import DeepAugmentation
from layerlens.errors import ConfigError, ShapeError, UnknownLayerError, UnknownNameError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double(h: Tensor) -> Tensor:
    return 2 * h


def linear_net() -> nn.Sequential:
    """y = W2 W1 x with W1 = [[1, 2], [3, 4]] and W2 = [[5, 6]]."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        net[1].weight.copy_(torch.tensor([[5.0, 6.0]]))
    return net


def hooks_on(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks)
        for m in model.modules()
    )


class Twice(nn.Module):
    """x -> relu(relu(x)) by one module that runs twice; `seen` keeps what the first call handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.relu(x)
        return self.relu(self.seen)


class Gives(nn.Module):
    """Hands on whatever `make` builds from the input."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor):
        return self.make(x)


class Holds(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor):
        return self.inner(x)


class Pair(NamedTuple):
    hidden: Tensor
    name: str


@dataclass
class Output:
    name: str
    hidden: Tensor


# --- when and whom ---


def test_eval_mode_is_never_augmented():
    net, x = linear_net().eval(), torch.ones(8, 2)
    with DeepAugmentation("0", transform=double, fraction=1.0).attached(net):
        assert torch.equal(net(x), torch.full((8, 1), 57.0))  # 5·3 + 6·7


def test_only_the_frozen_layers_own_mode_counts():
    net, x = linear_net().train(), torch.ones(8, 2)
    net[0].eval()
    with DeepAugmentation("0", transform=double, fraction=1.0).attached(net):
        assert torch.equal(net(x), torch.full((8, 1), 57.0))


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.75])
def test_fraction_is_the_share_of_transformed_samples(fraction: float):
    operator = DeepAugmentation("0", transform=torch.zeros_like, fraction=fraction, generator=seeded())
    out = operator.augment(torch.ones(20_000, 3))
    assert ((out == 0).all(1) | (out == 1).all(1)).all(), "a sample is transformed whole or not at all"
    assert (out[:, 0] == 0).double().mean().item() == pytest.approx(fraction, abs=4 * (0.25 / 20_000) ** 0.5)


def test_the_two_views_of_a_pair_are_drawn_independently():
    out = DeepAugmentation("0", transform=torch.zeros_like, generator=seeded(1)).augment(torch.ones(40_000, 1))
    first, second = (out[:, 0] == 0).view(2, -1)
    shares = [(first & second).double().mean(), (first ^ second).double().mean(), (~first & ~second).double().mean()]
    assert [s.item() for s in shares] == pytest.approx([0.25, 0.5, 0.25], abs=0.015)


def test_fraction_0_leaves_everything_and_draws_nothing():
    generator = seeded()
    before = generator.get_state()
    h = torch.randn(6, 3, generator=seeded(1))
    assert torch.equal(DeepAugmentation("0", fraction=0.0, generator=generator).augment(h), h)
    assert torch.equal(generator.get_state(), before)


def test_fraction_1_transforms_every_sample():
    h = torch.randn(512, 3, generator=seeded(1))
    operator = DeepAugmentation("0", transform=double, fraction=1.0, generator=seeded())
    assert torch.equal(operator.augment(h), 2 * h)


@pytest.mark.parametrize("shape", [(64,), (64, 3), (64, 5, 3), (64, 2, 4, 4)])
def test_the_mask_is_per_sample_for_activations_of_any_rank(shape: tuple[int, ...]):
    out = DeepAugmentation("0", transform=torch.zeros_like, generator=seeded()).augment(torch.ones(shape))
    rows = out.reshape(64, -1)
    assert 0 < (rows[:, 0] == 0).sum() < 64
    assert (rows == rows[:, :1]).all()


def test_dropout_rate_is_the_share_of_zeros_and_the_rest_is_scaled():
    operator = DeepAugmentation("0", rate=0.25, fraction=1.0, generator=seeded())
    out = operator.augment(torch.ones(200, 200))
    assert (out == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(out[out != 0].unique(), torch.tensor([4 / 3]))


@pytest.mark.parametrize("transform", ["dropout", "pca"])
def test_the_same_seed_gives_the_same_result(transform: str):
    h = torch.randn(32, 5, generator=seeded(3))
    outs = [DeepAugmentation("0", transform=transform, generator=seeded(s)).augment(h) for s in (0, 0, 1)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_a_generator_of_its_own_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    DeepAugmentation("0", generator=seeded()).augment(torch.ones(16, 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_the_global_one_decides():
    h = torch.randn(32, 5, generator=seeded(3))
    with torch.random.fork_rng(devices=[]):
        outs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            outs.append(DeepAugmentation("0").augment(h))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


# --- gradients ---


@pytest.mark.parametrize(("stop", "factor"), [(True, 0.0), (False, 2.0)])
def test_gradient_of_masked_samples_only_is(stop: bool, factor: float):
    """dL/dx_i = W2 W1 = (23, 34) where nothing happened; times `factor` where the sample was doubled."""
    net, x = linear_net(), torch.ones(64, 2, requires_grad=True)
    operator = DeepAugmentation("0", transform=double, stop_gradient=stop, generator=seeded())
    with operator.attached(net):
        out = net(x)
        out.sum().backward()
    masked = out.detach()[:, 0] == 114
    assert ((out == 57) | (out == 114)).all()
    assert 10 < masked.sum() < 54
    gradient = torch.tensor([23.0, 34.0])
    torch.testing.assert_close(x.grad, torch.where(masked[:, None], factor * gradient, gradient))
    share = (~masked).sum() + factor * masked.sum()
    torch.testing.assert_close(net[0].weight.grad, share * torch.tensor([[5.0, 5.0], [6.0, 6.0]]))
    torch.testing.assert_close(net[1].weight.grad, torch.tensor([[3.0, 7.0]]) * (64 + masked.sum()))


@pytest.mark.parametrize("stop", [True, False])
def test_gradients_equal_those_of_indexed_assignment(stop: bool):
    net, x = linear_net().double(), torch.randn(40, 2, generator=seeded(5), dtype=torch.float64)
    with DeepAugmentation("0", transform=torch.sin, stop_gradient=stop, generator=seeded(7)).attached(net):
        net(x).square().mean().backward()
    ours = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()

    mask = torch.rand(40, generator=seeded(7)) <= 0.5
    h = net[0](x)
    changed = h.clone()
    changed[mask] = torch.sin(h[mask]).detach() if stop else torch.sin(h[mask])
    net[1](changed).square().mean().backward()
    for own, other in zip(ours, net.parameters(), strict=True):
        torch.testing.assert_close(own, other.grad)


def test_stop_gradient_on_the_whole_batch_blocks_everything_below():
    net = linear_net()
    with DeepAugmentation("0", fraction=1.0, stop_gradient=True, generator=seeded()).attached(net):
        net(torch.ones(8, 2)).sum().backward()
    assert not net[0].weight.grad.any()
    assert net[1].weight.grad.any()


# --- attaching and detaching ---


def test_no_hook_survives_an_exception_and_outputs_are_as_before():
    net, x = linear_net().eval(), torch.randn(4, 2, generator=seeded())
    before = net(x)

    def interrupted() -> None:
        assert hooks_on(net) > 0
        net.train()(x)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), DeepAugmentation(["0", "1"], fraction=1.0).attached(net):
        interrupted()
    assert hooks_on(net) == 0
    assert torch.equal(net.eval()(x), before)
    assert torch.equal(net.train()(x), before)


def test_no_hook_survives_a_transform_that_raises():
    net = linear_net()
    with pytest.raises(ZeroDivisionError), DeepAugmentation("0", transform=lambda h: h / (1 // 0)).attached(net):
        net(torch.ones(4, 2))
    assert hooks_on(net) == 0


def test_other_peoples_hooks_stay():
    net, calls = linear_net(), []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    with DeepAugmentation("0").attached(net):
        net(torch.ones(4, 2))
    net(torch.ones(4, 2))
    assert calls == [1, 1]


def test_several_layers_are_each_augmented():
    net, x = linear_net(), torch.ones(4, 2)
    with DeepAugmentation(["0", "1"], transform=double, fraction=1.0).attached(net):
        assert torch.equal(net(x), torch.full((4, 1), 4 * 57.0))


def test_two_operators_can_share_a_model():
    net, x = linear_net(), torch.ones(4, 2)
    one, other = (DeepAugmentation(name, transform=double, fraction=1.0) for name in "01")
    with one.attached(net):
        with other.attached(net):
            assert torch.equal(net(x), torch.full((4, 1), 4 * 57.0))
        assert torch.equal(net(x), torch.full((4, 1), 2 * 57.0))


def test_attaching_twice_is_refused_and_the_first_one_stays():
    net, operator = linear_net(), DeepAugmentation("0", transform=double, fraction=1.0)
    with operator.attached(net):
        with pytest.raises(ConfigError, match=r"attached already; call detach\(\)"):
            operator.attach(net)
        assert torch.equal(net(torch.ones(4, 2)), torch.full((4, 1), 114.0))
    assert hooks_on(net) == 0


def test_an_operator_can_be_attached_again_after_detaching():
    net, operator = linear_net(), DeepAugmentation("0", transform=double, fraction=1.0)
    for _ in range(2):
        with operator.attached(net):
            assert torch.equal(net(torch.ones(4, 2)), torch.full((4, 1), 114.0))
        assert torch.equal(net(torch.ones(4, 2)), torch.full((4, 1), 57.0))


@pytest.mark.parametrize("layers", ["layer11.conv", ["layer1.conv", "layer11.conv"]])
def test_an_unknown_layer_names_the_closest_and_leaves_nothing_attached(layers: str | list[str]):
    net = nn.Sequential()
    net.add_module("layer1", nn.Sequential())
    net.layer1.add_module("conv", nn.Linear(2, 2))
    operator = DeepAugmentation(layers)
    with pytest.raises(UnknownLayerError, match=r"no layer 'layer11\.conv' in Sequential; closest: layer1\.conv"):
        operator.attach(net)
    assert hooks_on(net) == 0
    operator.layers = ["layer1.conv"]
    operator.attach(net)  # the failure did not leave it half attached
    operator.detach()


def test_input_is_a_layer_like_any_other():
    """methods.md, section 1: layer -1 is the input; `layers.discover` calls it `input`."""
    net = linear_net()
    with DeepAugmentation("input", transform=lambda h: h + 1, fraction=1.0).attached(net):
        assert torch.equal(net(torch.ones(4, 2)), torch.full((4, 1), 2 * 57.0))
    assert hooks_on(net) == 0


def test_a_copied_model_is_augmented_and_the_original_is_not():
    net = linear_net()
    twin = copy.deepcopy(net)
    with DeepAugmentation("0", transform=double, fraction=1.0).attached(twin):
        assert torch.equal(twin(torch.ones(4, 2)), torch.full((4, 1), 114.0))
        assert torch.equal(net(torch.ones(4, 2)), torch.full((4, 1), 57.0))


def test_a_copy_made_while_attached_runs_as_often_as_one_likes():
    """Momentum encoders copy the network in the middle of training."""
    net = linear_net()
    with DeepAugmentation("0", transform=double, fraction=1.0).attached(net):
        twin = copy.deepcopy(net)
        for _ in range(3):
            assert twin(torch.ones(4, 2)).isfinite().all()


# --- modules that run several times ---


def test_a_call_is_chosen_by_its_number():
    net, x = Twice(), torch.ones(4, 3)
    with DeepAugmentation("relu#2", transform=double, fraction=1.0).attached(net):
        for _ in range(2):  # the count begins anew with every pass
            out = net(x)
            assert torch.equal(net.seen, x)
            assert torch.equal(out, 2 * x)
    with DeepAugmentation("relu#1", transform=lambda h: h + 1, fraction=1.0).attached(net):
        out = net(x)
        assert torch.equal(net.seen, x + 1)
        assert torch.equal(out, x + 1)


def test_both_calls_may_be_chosen():
    net, x = Twice(), torch.ones(4, 3)
    with DeepAugmentation(["relu#1", "relu#2"], transform=double, fraction=1.0).attached(net):
        assert torch.equal(net(x), 4 * x)


def test_the_count_begins_anew_after_a_pass_that_failed():
    net = Twice()
    with DeepAugmentation("relu#2", transform=double, fraction=1.0).attached(net):
        handle = net.relu.register_forward_pre_hook(lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            net(torch.ones(2, 2))
        handle.remove()
        net(torch.ones(2, 2))
        assert torch.equal(net.seen, torch.ones(2, 2))


def test_a_bare_name_of_a_module_that_runs_twice_is_ambiguous():
    net = Twice()
    match = r"'relu' runs several times in a pass; name one call: 'relu#1', 'relu#2'"
    with pytest.raises(UnknownLayerError, match=match), DeepAugmentation("relu").attached(net):
        net(torch.ones(4, 3))
    assert hooks_on(net) == 0


# --- what a layer may return ---


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (lambda x: (x, "kept", x + 5), lambda o: (tuple, o[0], o[1], o[2])),
        (lambda x: ["kept", x, x + 5], lambda o: (list, o[1], o[0], o[2])),
        (lambda x: {"name": "kept", "hidden": x, "rest": x + 5}, lambda o: (dict, o["hidden"], o["name"], o["rest"])),
        (lambda x: Pair(x, "kept"), lambda o: (Pair, o.hidden, o.name, torch.full((4, 2), 6.0))),
        (lambda x: Output("kept", x), lambda o: (Output, o.hidden, o.name, torch.full((4, 2), 6.0))),
        (lambda x: ((x, "kept"), x + 5), lambda o: (tuple, o[0][0], o[0][1], o[1])),
    ],
    ids=["tuple", "list", "dict", "namedtuple", "dataclass", "nested"],
)
def test_the_structure_of_an_output_is_kept(make, read):
    net = Holds(Gives(make))
    with DeepAugmentation("inner", transform=double, fraction=1.0).attached(net):
        out = net(torch.ones(4, 2))
    kind, hidden, name, rest = read(out)
    assert type(out) is kind
    assert name == "kept"
    assert torch.equal(hidden, torch.full((4, 2), 2.0))
    assert torch.equal(rest, torch.full((4, 2), 6.0))


def test_a_layer_without_a_tensor_is_left_alone():
    net = Holds(Gives(lambda x: "no tensor"))
    with DeepAugmentation("inner", fraction=1.0).attached(net):
        assert net(torch.ones(4, 2)) == "no tensor"


# --- settings ---


@pytest.mark.parametrize("name", ["rate", "fraction"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_probabilities_outside_0_to_1_are_refused(name: str, value: float):
    with pytest.raises(ConfigError, match=rf"{name}={value}; allowed: 0 to 1"):
        DeepAugmentation("0", **{name: value})


def test_an_unknown_transform_names_the_known_ones():
    with pytest.raises(UnknownNameError, match="unknown transform 'dropuot'; closest: dropout"):
        DeepAugmentation("0", transform="dropuot")


def test_a_transform_must_keep_the_shape():
    net = linear_net()
    operator = DeepAugmentation("0", transform=lambda h: h[:, :1])
    with pytest.raises(ShapeError, match=r"made \(4, 1\) of \(4, 2\); it must keep the shape"), operator.attached(net):
        net(torch.ones(4, 2))
    assert hooks_on(net) == 0


def test_pca_counts_its_components_from_the_operator():
    h = torch.randn(30, 4, generator=seeded(2)) * torch.tensor([9.0, 5.0, 3.0, 1.0])
    centred = (h - h.mean(0)).double()
    first, last = (DeepAugmentation("0", transform="pca", fraction=1.0, components=k).augment(h) for k in (1, -1))
    directions = torch.linalg.svd(centred, full_matrices=False)[2]
    spread = [((out - out.mean(0)).double() @ directions.T).norm(dim=0) for out in (first, last)]
    assert (spread[0] < 1e-3).tolist() == [True, False, False, False]
    assert (spread[1] < 1e-3).tolist() == [False, False, False, True]
