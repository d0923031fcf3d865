"""Dropout in two passes: values and gradients against formulas written out, and what stays behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerlens.augment.dropout import BACKWARD_RATE, KINDS, TwoPassDropout
from layerlens.augment.transforms import dropout
from layerlens.errors import ConfigError, UnknownLayerError, UnknownNameError
from layerlens.models import build_model

RATE, BACK = 0.3, 0.6


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def operator(kind: str, **options) -> TwoPassDropout:
    back = {"backward_rate": BACK} if kind == "augmented" else {}
    return TwoPassDropout(kind, **{"rate": RATE, "generator": seeded(), **back, **options})


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Linear, ReLU, Linear: 5 -> 6 -> 3."""
    return filled(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype))


def conv_net() -> nn.Sequential:
    """Two convolutions, the second with stride and padding: (2, 6, 6) -> (4, 6, 6) -> (3, 3, 3)."""
    return filled(nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 3, stride=2, padding=1)).double())


def filled(model: nn.Sequential) -> nn.Sequential:
    generator = seeded(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def scaled_masks(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What the seeded operator draws: ε at `RATE`, then ε′ at `BACK`, each over one minus its rate."""
    generator = seeded()
    first, second = (torch.rand(shape, generator=generator) for _ in range(2))
    return (first >= RATE).double() / (1 - RATE), (second >= BACK).double() / (1 - BACK)


def masks(kind: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(ε_f, ε_b) of a kind."""
    (first, second), ones = scaled_masks(shape), torch.ones(shape, dtype=torch.float64)
    return {
        "standard": (first, first), "forward": (first, ones), "backward": (ones, first), "augmented": (first, second),
    }[kind]  # fmt: skip


def assert_near(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


def gradients(model: nn.Sequential, x: Tensor, delta: Tensor, kind: str) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of ⟨output, delta⟩: W1, b1, W2, b2, x."""
    x = x.clone().requires_grad_()
    with operator(kind, layers=["2"]).attached(model):
        out = model(x)
        (out * delta).sum().backward()
    return out.detach(), [*(p.grad for p in model.parameters()), x.grad]


# --- values and gradients by hand --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_linear_values_and_gradients_are_the_formulas(kind):
    model, x, delta = net(), draw(4, 5), draw(4, 3, seed=2)
    with torch.no_grad():
        w1, b1, w2, b2 = model.parameters()
        z1 = x @ w1.T + b1
        h = z1 * (z1 > 0)
        forward, backward = masks(kind, h.shape)
        below = (delta @ w2) * backward * (z1 > 0)  # (Wᵀδ) ⊙ ε_b ⊙ f′
        expected = [below.T @ x, below.sum(0), delta.T @ (h * backward), delta.sum(0), below @ w1]
        value = (h * forward) @ w2.T + b2
    out, found = gradients(model, x, delta, kind)
    assert_near(out, value)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_convolution_values_and_gradients_are_the_formulas(kind):
    """A convolution is a matrix times the patches; 1×1, the matrix times the channels."""
    model, x, delta = conv_net(), draw(2, 2, 6, 6), draw(2, 3, 3, 3, seed=2)
    patches = {"kernel_size": 3, "stride": 2, "padding": 1}
    with torch.no_grad():
        w1, b1, w2, b2 = model.parameters()
        w1, matrix, d = w1[:, :, 0, 0], w2.reshape(3, -1), delta.flatten(2)  # d: (n, 3, 9)
        z1 = torch.einsum("oc,nchw->nohw", w1, x) + b1[:, None, None]
        h = z1 * (z1 > 0)
        forward, backward = masks(kind, h.shape)
        value = (matrix @ F.unfold(h * forward, **patches) + b2[:, None]).view(2, 3, 3, 3)
        below = F.fold(matrix.T @ d, (6, 6), **patches) * backward * (z1 > 0)
        expected = [
            torch.einsum("nohw,nchw->oc", below, x)[:, :, None, None],
            below.sum((0, 2, 3)),
            torch.einsum("nol,npl->op", d, F.unfold(h * backward, **patches)).view(w2.shape),
            d.sum((0, 2)),
            torch.einsum("oc,nohw->nchw", w1, below),
        ]
    out, found = gradients(model, x, delta, kind)
    assert_near(out, value)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv1d(2, 3, 2), (4, 2, 5)), (nn.Conv3d(2, 3, 2), (4, 2, 3, 3, 3))])
@pytest.mark.parametrize("kind", KINDS)
def test_other_convolutions_take_the_value_of_one_input_and_the_gradient_of_the_other(layer, shape, kind):
    model, h = nn.Sequential(copy.deepcopy(layer).double()), draw(*shape).requires_grad_()
    with operator(kind, layers=["0"]).attached(model):
        out = model(h)
    forward, backward = masks(kind, shape)
    assert_near(out, model(h * forward))
    found = torch.autograd.grad(out.square().sum(), [h, *model.parameters()])
    carrier = (model(h * backward) * 2 * out.detach()).sum()
    for one, other in zip(found, torch.autograd.grad(carrier, [h, *model.parameters()]), strict=True):
        assert_near(one, other)


def test_gradients_of_gradients_pass():
    """⟨∂⟨y, y⟩/∂x, 1⟩ depends on W2 through y and through the gradient."""
    model, x = net(), draw(4, 5).requires_grad_()
    with operator("forward", layers=["2"]).attached(model):
        out = model(x)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), model[2].bias)
    w1, _, w2, _ = model.parameters()
    active = (model[0](x) > 0).double()
    assert_near(second, 2 * (w2 @ (active * w1.sum(1)).sum(0)))


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["standard", "forward", "augmented"])
def test_the_value_is_plain_dropouts_with_the_same_mask(kind):
    model, x = net(), draw(8, 5)
    with operator(kind, layers=["2"]).attached(model):
        out = model(x)
    assert torch.equal(out, model[2](dropout(model[1](model[0](x)), RATE, generator=seeded())))


def test_standard_is_plain_dropout_by_the_global_generator_as_well():
    model, x = net(), draw(8, 5)
    plain = nn.Sequential(*model[:2], nn.Dropout(RATE), model[2])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = plain(x)
        torch.manual_seed(3)
        with TwoPassDropout("standard", rate=RATE, layers="2").attached(model):
            assert torch.equal(model(x), expected)


def test_backward_dropout_leaves_the_value_untouched():
    model, x = net(torch.float32), draw(8, 5).float()
    before = model(x)
    with operator("backward", layers=["2"]).attached(model):
        assert torch.equal(model(x), before)


def test_the_value_is_exact_where_the_two_inputs_differ_most():
    """y_b + (y_f - y_b) would round 1 to 0 beside 3e8 in float32."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    model[0].weight.data.fill_(1.0)
    dropper = TwoPassDropout("standard", rate=0.0, layers=["0"])
    dropper.kind, dropper.inputs = "forward", lambda h: (torch.ones_like(h), h)
    with dropper.attached(model):
        assert model(torch.tensor([[3e8]])).item() == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_unbiased(kind):
    """20,000 masks of the same sample: the mean of a linear layer's value and gradient is that without dropout."""
    model, h = nn.Sequential(net()[2]), draw(1, 6).abs().expand(20_000, 6).clone().requires_grad_()
    with operator(kind, layers=["0"]).attached(model):
        out = model(h)
    (gradient,) = torch.autograd.grad(out.sum(), h)
    torch.testing.assert_close(out.mean(0), model(h[0]), rtol=0, atol=0.06)
    torch.testing.assert_close(gradient.mean(0), model[0].weight.sum(0), rtol=0, atol=0.06)


@pytest.mark.parametrize("kind", KINDS)
def test_rate_0_changes_nothing(kind):
    model, x, delta = net(), draw(4, 5), draw(4, 3, seed=2)
    before, expected = model(x), torch.autograd.grad((model(x) * delta).sum(), list(model.parameters()))
    back = {"backward_rate": 0.0} if kind == "augmented" else {}
    with TwoPassDropout(kind, rate=0.0, layers=["2"], **back).attached(model):
        out = model(x)
    assert torch.equal(out, before)
    for one, other in zip(torch.autograd.grad((out * delta).sum(), list(model.parameters())), expected, strict=True):
        assert_near(one, other)


def test_augmented_has_the_papers_backward_rate():
    h = torch.ones(2000, 500)
    value, carrier = TwoPassDropout("augmented", rate=0.2, generator=seeded()).inputs(h)
    assert (value == 0).double().mean().item() == pytest.approx(0.2, abs=0.002)
    assert (carrier == 0).double().mean().item() == pytest.approx(BACKWARD_RATE, rel=0.3)


def test_the_same_seed_gives_the_same_pass():
    model, x = net(), draw(8, 5)
    outs = []
    for seed in (0, 0, 1):
        with operator("augmented", generator=seeded(seed)).attached(model):
            outs.append(model(x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


# --- when and where ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_eval_mode_is_the_identity(kind):
    model, x = net().eval(), draw(4, 5)
    before = model(x)
    with operator(kind, layers=["0", "2"]).attached(model):
        out = model(x)
    assert torch.equal(out, before)


def test_a_frozen_layers_own_mode_counts_and_it_is_no_error():
    model, x = net(), draw(4, 5)
    before = model(x)
    model[2].eval()
    with operator("standard", layers=["2"]).attached(model):
        assert torch.equal(model(x), before)


def test_works_without_gradients():
    model, x = net(), draw(4, 5)
    with torch.no_grad(), operator("forward", layers=["2"]).attached(model):
        out = model(x)
    assert torch.equal(out, model[2](dropout(model[1](model[0](x)), RATE, generator=seeded())))


class Backwards(nn.Module):
    """Registers its layers in the opposite of the order in which they run."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.middle, self.first = (nn.Linear(4, 4).double() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


@pytest.fixture
def fed(monkeypatch) -> Iterator[Callable[[nn.Module], dict[str, Tensor]]]:
    """What each linear layer and convolution is fed, after the operator's hooks."""
    seen: dict[str, Tensor] = {}
    handles = []

    def watch(model: nn.Module) -> dict[str, Tensor]:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                handles.append(
                    module.register_forward_pre_hook(lambda _m, a, name=name: seen.__setitem__(name, a[0].detach()))
                )
        return seen

    yield watch
    for handle in handles:
        handle.remove()


def test_auto_is_every_layer_but_the_first_to_run(fed):
    model = Backwards()
    with operator("standard", rate=0.9).attached(model):
        seen = fed(model)
        for _ in range(2):
            model(torch.ones(50, 4, dtype=torch.float64))
            assert {name for name, h in seen.items() if (h == 0).any()} == {"middle", "last"}


def test_auto_on_a_network_drops_in_front_of_all_but_the_stem(fed):
    model = build_model("convnet-quick", input_shape=(3, 8, 8))
    with operator("standard", rate=0.9).attached(model):
        seen = fed(model)
        model(torch.rand(4, 3, 8, 8, generator=seeded()) + 0.1)
    zeros = {name: (h == 0).double().mean().item() for name, h in seen.items()}
    assert zeros["conv1"] == 0
    assert min(share for name, share in zeros.items() if name != "conv1") > 0.8


def test_named_layers_alone_are_dropped_and_the_first_may_be_among_them(fed):
    model = Backwards()
    with operator("standard", rate=0.9, layers=["first", "last"]).attached(model):
        seen = fed(model)
        model(torch.ones(50, 4, dtype=torch.float64))
    assert {name for name, h in seen.items() if (h == 0).any()} == {"first", "last"}


def test_a_layer_that_runs_often_is_dropped_at_each_call():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(3, 3, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.step(self.step(x))

    model, x, generator = Recurrent(), draw(6, 3), seeded()
    with operator("forward", layers=["step"]).attached(model):
        out = model(x)
        (found,) = torch.autograd.grad(out.sum(), model.step.weight)
    w = model.step.weight.detach().clone().requires_grad_()
    h = F.linear(dropout(x, RATE, generator=generator), w.detach())
    value = F.linear(dropout(h, RATE, generator=generator), w.detach())
    assert torch.equal(out, value)
    ones = torch.ones(6, 3, dtype=torch.float64)
    assert_near(found, ones.T @ h + (ones @ w.detach()).T @ x)  # the values are dropped, the Jacobians are not


def test_an_input_by_keyword_is_dropped_too():
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=x)

    model, x = Calls(), draw(4, 5)
    with operator("forward", layers="fc").attached(model):
        out = model(x)
    assert torch.equal(out, model.fc(dropout(x, RATE, generator=seeded())))


# --- attaching and detaching -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_behind_after_an_exception(kind):
    model, x = net(), draw(4, 5)
    before, inside = model(x), operator(kind, layers=["2"])

    def interrupted() -> None:
        assert hooks_on(model) > 0
        model(x)
        model[2].forward = lambda _h: 1 // 0
        model(x)

    with pytest.raises(ZeroDivisionError), inside.attached(model):
        interrupted()
    del model[2].forward
    assert hooks_on(model) == 0
    assert not inside._hooks
    assert not inside.active
    assert torch.equal(model(x), before)


def test_a_failed_pass_does_not_leak_into_the_next():
    model, x = net(), draw(4, 5)
    with operator("forward", layers=["2"]).attached(model):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            model[2](draw(4, 4))
        model.eval()
        out = model(x)
    assert torch.equal(out, model(x))


def test_other_peoples_hooks_run_once_and_stay():
    model, calls = net(), []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    with operator("forward", layers=["2"]).attached(model):
        model(draw(4, 5))
    model(draw(4, 5))
    assert calls == [1, 1]


def test_attaching_twice_is_refused_and_after_detaching_it_is_not():
    model, inside = net(), operator("forward")
    with inside.attached(model), pytest.raises(ConfigError, match=r"attached already; call detach\(\)"):
        inside.attach(model)
    with inside.attached(model):
        assert hooks_on(model) > 0
    assert hooks_on(model) == 0


def test_a_copy_made_while_attached_drops_until_the_operator_is_detached():
    """Momentum encoders copy the network in the middle of training."""
    model, x = net(), draw(400, 5)
    before = model(x)
    with operator("forward").attached(model):
        model(x)
        twin = copy.deepcopy(model)
        assert not torch.equal(twin(x), before)
        assert torch.equal(twin.eval()(x), before)
    assert torch.equal(twin.train()(x), before)


# --- other machinery ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_dtype_value_and_every_gradient(kind):
    model, x = net(torch.float32), draw(16, 5).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), operator(kind, layers=["2"]).attached(model):
        h = model[1](model[0](x))
        out = model[2](h)
    assert out.dtype == torch.bfloat16
    forward, backward = masks(kind, tuple(h.shape))
    with torch.no_grad():
        expected = model[2](h.float() * forward.float())
    torch.testing.assert_close(out.float(), expected, rtol=0.03, atol=0.06)
    weight, below = torch.autograd.grad(out.float().sum(), [model[2].weight, x])
    torch.testing.assert_close(weight, (h.float() * backward.float()).sum(0).expand(3, 6), rtol=0.03, atol=0.1)
    assert below.any()


def test_autocast_shares_its_cached_weights_among_calls():
    """A weight first cast without gradients would be cached without them: `model[2]` would stop to learn."""
    model, x = net(torch.float32), draw(16, 5).float()
    with torch.autocast("cpu", torch.bfloat16), operator("forward", layers=["2"]).attached(model):
        (model(x) + model(x)).float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models_drop_in_the_same_passes(kind, backend):
    """One positive sample: ∂y_0/∂W2[0] is h ⊙ ε_b, and y is W2 (h ⊙ ε_f) for one of all masks ε_f."""
    torch._dynamo.reset()
    model, x = net(torch.float32), torch.ones(1, 5)
    model[0].weight.data.abs_()
    plain, h = model(x).detach(), model[1](model[0](x)).detach()[0]
    compiled = torch.compile(model, backend=backend)
    with TwoPassDropout(kind, rate=0.5, **({"backward_rate": 0.5} if kind == "augmented" else {})).attached(model):
        ratios, outs = [], []
        for _ in range(8):
            model.zero_grad()
            outs.append(compiled(x))
            outs[-1][0, 0].backward()
            ratios.append(model[2].weight.grad[0] / h)
    possible = torch.cartesian_prod(*[torch.tensor([0.0, 2.0])] * 6) * h @ model[2].weight.T + model[2].bias
    exact = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(torch.cat(outs).detach(), possible.detach(), compute_mode=exact).min(1).values
    assert (distances < 1e-4).all() == (kind != "backward")
    values = torch.stack(ratios).round(decimals=3).unique().tolist()
    assert values == ([1.0] if kind == "forward" else [0.0, 2.0])
    if kind == "backward":
        torch.testing.assert_close(torch.cat(outs), plain.expand(8, 3))
    torch.testing.assert_close(compiled(x), plain)  # detached


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rate", "backward_rate"])
@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, float("nan")])
def test_rates_outside_0_to_1_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"{name}={value}; allowed: 0 up to, but not, 1 \(what is kept is divided"):
        TwoPassDropout("augmented", **{"rate": 0.1, name: value})


@pytest.mark.parametrize("kind", ["standard", "forward", "backward"])
def test_a_backward_rate_without_a_second_mask_is_refused(kind):
    with pytest.raises(ConfigError, match=rf"backward_rate=0.1 with kind '{kind}'; only 'augmented'"):
        TwoPassDropout(kind, rate=0.1, backward_rate=0.1)


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(UnknownNameError, match="unknown kind of dropout 'foward'; closest: forward"):
        TwoPassDropout("foward", rate=0.1)


@pytest.mark.parametrize("layers", ["layer9.0.conv2", ["layer1.0.conv1", "layer9.0.conv2"]])
def test_an_unknown_layer_names_the_closest_and_leaves_nothing_attached(layers):
    model, inside = build_model("resnet20-cifar"), operator("forward", layers=layers)
    with pytest.raises(UnknownLayerError, match=r"no layer 'layer9\.0\.conv2' in CifarResNet; closest: layer\d\.0\.co"):
        inside.attach(model)
    assert hooks_on(model) == 0
    inside.layers = ["layer1.0.conv1"]
    inside.attach(model)  # the failure did not leave it half attached
    inside.detach()


def test_a_layer_that_consumes_nothing_linearly_is_refused():
    with pytest.raises(ConfigError, match=r"'bn1' is a BatchNorm2d; dropout hangs on the Linear or Conv1d/2d/3d"):
        operator("forward", layers=["bn1"]).attach(build_model("resnet20-cifar"))


def test_nothing_to_drop_is_an_error():
    with pytest.raises(ConfigError, match=r"Sequential has 1\. Name the layers"):
        operator("forward").attach(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(ConfigError, match=r"layers=\[\] drops nothing"):
        operator("forward", layers=[]).attach(net())


def test_a_named_layer_that_never_runs_is_an_error_at_the_first_training_pass():
    """The output projection of attention is used by its parent, without running."""
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.zeros(2, 3, 8)
    with operator("forward", layers=["linear1", "self_attn.out_proj"]).attached(model):
        model.eval()(x)
        model.train()
        with pytest.raises(UnknownLayerError, match=r"'self_attn\.out_proj' never ran as a module of its own"):
            model(x)
    assert hooks_on(model) == 0
    with operator("forward", layers="auto").attached(model):
        model(x)
