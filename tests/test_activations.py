"""Capture hands over what each layer computed, and leaves the model as it was, whatever happened."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layerlens.activations import capture, features, sweep, to_device
from layerlens.errors import DataError, ShapeError, UnknownLayerError
from layerlens.layers import INPUT, Layer, discover, run_batch
from layerlens.models import build_model
from layerlens.reduction import masked_mean
from layerlens.untouched import untouched


class Keep:
    """A consumer that keeps a copy of everything, concatenated over batches."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.rows: dict[str, list[Tensor]] = {}
        self.batches = 0

    def begin(self, layers: list[Layer]) -> Keep:
        self.layers, self.rows = layers, {layer.name: [] for layer in layers}
        return self

    def take(self, position: int, activation: Tensor) -> None:
        self.rows[self.layers[position].name].append(activation.clone())

    def end_batch(self) -> None:
        self.batches += 1

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat(self.rows[name])


def swept(model: nn.Module, loader: Any, layers: str | list[str] = "all", **kwargs: Any) -> Keep:
    keep = Keep()
    sweep(model, loader, layers, keep.begin, **kwargs)
    return keep


def captured(model: nn.Module, batch: Any, *layers: str) -> dict[str, Tensor]:
    """What each named layer gives for one batch; a layer may come several times, the last one stays."""
    found: dict[str, Tensor] = {}
    with torch.no_grad(), capture(model, layers, lambda position, out: found.update({layers[position]: out.clone()})):
        run_batch(model, batch)
    return found


class Counter(nn.Module):
    """Changes a buffer at every pass, also in eval mode."""

    def __init__(self, *, rebinds: bool = False) -> None:
        super().__init__()
        self.rebinds = rebinds
        self.register_buffer("passes", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.rebinds:
            self.passes = self.passes + 1
        else:
            self.passes += 1
        return x


class Draws(nn.Module):
    """Uses up random numbers of torch, NumPy and Python at every pass."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.0 * (torch.rand(1) + np.random.rand() + random.random())


class Raises(nn.Module):
    """Raises at its k-th pass."""

    def __init__(self, error: BaseException, at: int) -> None:
        super().__init__()
        self.error, self.left = error, at

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            raise self.error
        return x


def partially_frozen(*tail: nn.Module) -> nn.Sequential:
    """In train mode but for its batch norm; drop-out in between is active; batch-norm statistics move."""
    generator = torch.Generator().manual_seed(0)
    linear, norm, second = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    linear.weight.data = torch.randn(4, 3, generator=generator)
    norm.running_mean += 0.5
    model = nn.Sequential(linear, norm, nn.Dropout(0.5), second, Draws(), Counter(), *tail)
    model.train()
    norm.eval()
    return model


def batches(count: int = 3, size: int = 5, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, *(shape or (3,)), generator=generator) for _ in range(count)]


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a look at a model must not change."""
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: [len(getattr(module, kind)) for kind in HOOKS] for name, module in model.named_modules()},
        "parameters": {name: value.tolist() for name, value in model.named_parameters()},
        "buffers": {name: value.tolist() for name, value in model.named_buffers()},
        "gradients": {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        "torch": torch.get_rng_state().tolist(),
        "numpy": repr(np.random.get_state()),
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
    }  # fmt: skip


# --- the model stays as it was -----------------------------------------------------------------------------------

LOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "discover": lambda model: discover(model, batches()[0]),
    "sweep": lambda model: swept(model, batches()),
    "features": lambda model: features(model, batches()),
    "features of a layer": lambda model: features(model, batches(), "1"),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_look_leaves_the_model_as_it_was(look):
    model = partially_frozen()
    before = state(model)
    look(model)
    assert state(model) == before


def test_the_model_of_these_tests_would_change_without_protection():
    model = partially_frozen()
    before = state(model)
    model(batches()[0])
    after = state(model)
    assert {key for key in before if after[key] != before[key]} == {"buffers", "torch", "numpy", "python"}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_buffer_that_forward_replaces_is_put_back(look):
    model = nn.Sequential(nn.Linear(3, 2), nn.Identity(), Counter(rebinds=True))
    look(model)
    assert model[2].passes.item() == 0


@pytest.mark.parametrize("error", [ValueError("odd"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
@pytest.mark.parametrize("at", [1, 2, 3], ids=["first look", "first batch", "second batch"])
def test_sweep_leaves_the_model_as_it_was_when_forward_raises(error, at):
    model = partially_frozen(Raises(error, at))
    before = state(model)
    with pytest.raises(type(error)):
        swept(model, batches())
    assert state(model) == before


@pytest.mark.parametrize("method", ["begin", "take", "end_batch"])
@pytest.mark.parametrize("error", [ValueError("odd"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
def test_sweep_leaves_the_model_as_it_was_when_the_consumer_raises(error, method, monkeypatch):
    def fail(*_args: Any) -> None:
        raise error

    monkeypatch.setattr(Keep, method, fail)
    model = partially_frozen()
    before = state(model)
    with pytest.raises(type(error)):
        swept(model, batches())
    assert state(model) == before


def test_sweep_leaves_the_model_as_it_was_when_the_loader_raises():
    def loader() -> Iterator[Tensor]:
        yield batches()[0]
        np.random.rand()
        raise OSError("disk")

    model = partially_frozen()
    before = state(model)
    with pytest.raises(OSError, match="disk"):
        swept(model, loader())
    assert state(model) == before


@pytest.mark.parametrize("error", [ValueError("odd"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
@pytest.mark.parametrize("layer", [None, "1"], ids=["embedding", "layer"])
def test_features_leaves_the_model_as_it_was_when_forward_raises(error, layer):
    model = partially_frozen(Raises(error, 3))
    before = state(model)
    with pytest.raises(type(error)):
        features(model, batches(4), layer)
    assert state(model) == before


@pytest.mark.parametrize("error", [ValueError("odd"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
def test_capture_leaves_no_hooks_when_the_block_raises(error):
    model = partially_frozen()
    before = state(model)
    with pytest.raises(type(error)), capture(model, ["input", "0", "1"], lambda *_: None):
        raise error
    assert state(model) == before


def test_capture_leaves_no_hooks_when_a_layer_is_unknown():
    model = partially_frozen()
    before = state(model)
    with (
        pytest.raises(UnknownLayerError, match="no layer 'nope' in Sequential"),
        capture(model, ["0", "nope", "1"], lambda *_: None),
    ):
        pass
    assert state(model) == before


def test_capture_keeps_the_hooks_that_were_there():
    model = nn.Sequential(nn.Linear(3, 2))
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    swept(model, batches(1))
    calls.clear()
    model(batches()[0])
    assert calls == [1]


def test_untouched_restores_modes_that_train_would_not():
    class Frozen(nn.BatchNorm1d):
        def train(self, _mode: bool = True) -> Frozen:
            return super().train(False)

    model = nn.Sequential(nn.Linear(3, 3), Frozen(3))
    model[1].training = True
    with untouched(model):
        model.eval()
    assert model[1].training


def test_untouched_keeps_the_blocks_buffers_on_request():
    model = Counter()
    with untouched(model, keep_buffers=False):
        model(torch.zeros(1))
    assert model.passes.item() == 1


def test_untouched_restores_a_buffer_of_nan():
    model = Counter()
    model.passes.fill_(torch.nan)
    with untouched(model):
        model.passes.zero_()
    assert model.passes.isnan().all()


# --- what is handed over -----------------------------------------------------------------------------------------


def by_hand() -> nn.Sequential:
    """Doubles, cuts below zero, sums: [1, -2] -> [2, -4] -> [2, 0] -> 2."""
    double, total = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
    double.weight.data = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    total.weight.data = torch.tensor([[1.0, 1.0]])
    return nn.Sequential(double, nn.ReLU(), total)


def test_sweep_hands_over_values_worked_by_hand():
    keep = swept(by_hand(), [torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 3.0]])], "input,0,1,2")
    assert keep["input"].tolist() == [[1.0, -2.0], [0.5, 3.0]]
    assert keep["0"].tolist() == [[2.0, -4.0], [1.0, 6.0]]
    assert keep["1"].tolist() == [[2.0, 0.0], [1.0, 6.0]]
    assert keep["2"].tolist() == [[2.0], [7.0]]
    assert keep.batches == 2


def test_sweep_runs_in_eval_mode():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3))
    model.train()
    rows = torch.cat(batches())
    torch.testing.assert_close(swept(model, batches())["1"], rows / (1 + 1e-5) ** 0.5)


def test_sweep_builds_no_graph():
    taken: list[Tensor] = []
    keep = Keep()
    keep.take = lambda _position, activation: taken.append(activation)  # type: ignore[method-assign]
    sweep(by_hand(), [torch.ones(2, 2)], "all", keep.begin)
    assert len(taken) == 3
    assert not any(activation.requires_grad for activation in taken)


@pytest.mark.parametrize("size", [1, 2, 3, 12])
def test_sweep_does_not_depend_on_the_batch_size(size):
    rows = torch.cat(batches(4, 3))
    model = partially_frozen()
    torch.testing.assert_close(swept(model, rows.split(size), "3")["3"], swept(model, [rows], "3")["3"])


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 0), lambda x: [x, x[:, 0]], lambda x: {"input": x}],
                         ids=["tensor", "tuple", "list", "mapping"])  # fmt: skip
def test_sweep_takes_every_kind_of_batch(wrap):
    model = by_hand()
    rows = torch.tensor([[1.0, -2.0]])
    assert swept(model, [wrap(rows)], "input,2")["2"].tolist() == [[2.0]]
    assert swept(model, [wrap(rows)], "input")["input"].tolist() == rows.tolist()


def test_sweep_takes_labels_that_are_none():
    assert swept(by_hand(), [(torch.ones(3, 2), None)], "2")["2"].tolist() == [[4.0]] * 3


def test_sweep_runs_the_forward_it_is_given():
    keep = swept(by_hand(), [torch.tensor([[1.0, -2.0]])], "0", forward=lambda model, batch: model(-batch))
    assert keep["0"].tolist() == [[-2.0, 4.0]]


@dataclass
class Result:
    loss: None
    state: Tensor


class Returns(nn.Module):
    """Doubles, and returns it in a structure."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(2 * x)


class Chain(nn.Module):
    """A layer with a structured output, and one behind it."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = Returns(wrap), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        self.first(x)
        return self.second(x)


WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda y: (y, y + 1),
    "dict": lambda y: {"note": "text", "state": y, "other": y + 1},
    "dataclass": lambda y: Result(None, y),
    "nested": lambda y: ([{"inner": Result(None, y)}], y + 1),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_structured_output_stands_for_its_first_tensor(wrap):
    rows = torch.tensor([[1.0, -2.0]])
    assert swept(Chain(wrap), [rows], "first")["first"].tolist() == [[2.0, -4.0]]
    assert captured(Chain(wrap), rows, "first")["first"].tolist() == [[2.0, -4.0]]


def test_an_lstm_stands_for_its_output_sequence():
    model = nn.Sequential(nn.LSTM(3, 4, batch_first=True))
    rows = batches(1, 5, 7, 3)
    expected = model(rows[0])[0].detach()
    torch.testing.assert_close(swept(model, rows, "0")["0"], expected)


def test_capture_refuses_an_output_without_a_tensor():
    with pytest.raises(ShapeError, match="layer 'first' returned a str without a tensor"):
        captured(Chain(lambda _y: "text"), torch.ones(1, 2), "first")


class Repeats(nn.Module):
    """One ReLU behind two linear layers, and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.minus, self.halve = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.minus.weight.data, self.halve.weight.data = torch.tensor([[-1.0]]), torch.tensor([[0.5]])
        self.relu, self.unused = nn.ReLU(), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.halve(self.relu(self.minus(x))))


def test_each_call_of_a_module_is_its_own_layer_in_every_batch():
    keep = swept(Repeats(), [torch.tensor([[-4.0]]), torch.tensor([[-8.0]])], "relu#1,relu#2")
    assert keep["relu#1"].tolist() == [[4.0], [8.0]]
    assert keep["relu#2"].tolist() == [[2.0], [4.0]]


def test_capture_starts_counting_calls_anew_at_every_pass():
    model, taken = Repeats(), []
    with capture(model, ["relu#2"], lambda _position, out: taken.append(out.item())):
        model(torch.tensor([[-4.0]]))
        model(torch.tensor([[-8.0]]))
    assert taken == [2.0, 4.0]


@pytest.mark.parametrize("run", [swept, lambda model, loader, name: features(model, loader, name)],
                         ids=["sweep", "features"])  # fmt: skip
def test_the_bare_name_of_a_repeated_module_is_an_error_that_names_the_calls(run):
    with pytest.raises(UnknownLayerError, match="'relu' runs 2 times in a pass; name one call: relu#1, relu#2"):
        run(Repeats(), [torch.ones(2, 1)], "relu")


@pytest.mark.parametrize("run", [swept, lambda model, loader, name: features(model, loader, name)],
                         ids=["sweep", "features"])  # fmt: skip
def test_a_module_that_never_runs_is_an_error_that_says_so(run):
    with pytest.raises(UnknownLayerError, match="'unused' never runs in the forward pass"):
        run(Repeats(), [torch.ones(2, 1)], "unused")


class InPlace(nn.Module):
    """Changes the captured layer's output in place, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.relu = nn.Linear(2, 2, bias=False), nn.ReLU(inplace=True)
        self.linear.weight.data = torch.eye(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.linear(x))
        y += 10
        return y


def test_the_value_handed_over_is_the_one_before_an_in_place_operation():
    keep = swept(InPlace(), [torch.tensor([[1.0, -2.0]])], "all")
    assert keep["linear"].tolist() == [[1.0, -2.0]]
    assert keep["relu"].tolist() == [[1.0, 0.0]]


def test_features_are_those_before_an_in_place_operation():
    assert features(InPlace(), [torch.tensor([[1.0, -2.0]])], "linear").tolist() == [[1.0, -2.0]]


def test_the_input_is_handed_over_before_the_model_changes_it():
    model = nn.Sequential(nn.ReLU(inplace=True))
    assert captured(model, torch.tensor([[1.0, -2.0]]), "input", "0")["input"].tolist() == [[1.0, -2.0]]


def test_capture_hands_over_positions_in_the_order_asked_for():
    seen: list[tuple[int, float]] = []
    model = by_hand()
    with capture(model, ["2", INPUT, "0"], lambda position, out: seen.append((position, out[0, 0].item()))):
        model(torch.tensor([[1.0, -2.0]]))
    assert seen == [(1, 1.0), (2, 2.0), (0, 2.0)]


# --- precision and memory layout ---------------------------------------------------------------------------------


def test_sweep_under_autocast_hands_over_the_layers_own_precision():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keep = swept(by_hand(), [torch.tensor([[1.0, -2.0]])], "input,0,2")
    assert keep["input"].dtype == torch.float32
    assert keep["0"].dtype == torch.bfloat16
    assert keep["2"].tolist() == [[2.0]]


def test_sweep_takes_a_model_in_bfloat16():
    rows = torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)
    keep = swept(by_hand().bfloat16(), [rows], "0,2")
    assert keep["0"].dtype == torch.bfloat16
    assert keep["2"].tolist() == [[2.0]]


def test_features_are_float32_whatever_the_model_computes_in():
    rows = torch.tensor([[1.0, -2.0]])
    assert features(by_hand().bfloat16(), [rows.bfloat16()], "1").dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = features(by_hand(), [rows], "1")
    assert found.dtype == torch.float32
    assert found.tolist() == [[2.0, 0.0]]


class Views(nn.Module):
    """A network that flattens as `view` does (needs contiguous maps) or as `flatten` does (takes any)."""

    def __init__(self, *, view: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.conv, self.fc, self.view = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 2), view
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        return self.fc(maps.view(len(x), -1) if self.view else maps.flatten(1))


@pytest.mark.parametrize("view", [True, False], ids=["view", "flatten"])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x, x.sum((1, 2, 3))]], ids=["tensor", "pair"])
def test_sweep_gives_what_contiguous_images_give(view, wrap):
    model, images = Views(view=view), batches(2, 4, 3, 8, 8)
    keep = swept(model, [wrap(x) for x in images], "conv,fc")
    with torch.no_grad():
        expected = [model.conv(x) for x in images], [model(x) for x in images]
    torch.testing.assert_close(keep["conv"].contiguous(), torch.cat(expected[0]))
    torch.testing.assert_close(keep["fc"], torch.cat(expected[1]))


def test_view_really_fails_on_channels_last_maps():
    images = batches(1, 4, 3, 8, 8)[0].contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        Views(view=True)(images)


def test_an_error_of_the_model_itself_still_comes_out_for_images():
    with pytest.raises(ShapeError, match=r"the model can't run a batch of shape \(2, 3, 9, 9\): .*mat1 and mat2"):
        swept(Views(view=False), batches(1, 4, 3, 9, 9))


# --- loaders and batches that don't fit --------------------------------------------------------------------------


class Once:
    """A loader that counts how often it is begun and how many batches it gave."""

    def __init__(self, items: list[Any]) -> None:
        self.items, self.begun, self.given = items, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.begun += 1
        for item in self.items:
            self.given += 1
            yield item


@pytest.mark.parametrize("layer", [None, "0", "sweep"])
def test_the_loader_is_read_exactly_once(layer):
    loader = Once(batches())
    model = partially_frozen()
    swept(model, loader) if layer == "sweep" else features(model, loader, layer)
    assert (loader.begun, loader.given) == (1, 3)


def test_a_generator_is_a_loader():
    assert len(swept(by_hand(), (torch.ones(2, 2) for _ in range(3)), "2")["2"]) == 6


def test_an_empty_loader_is_an_error():
    with pytest.raises(DataError, match="the loader yielded no batch"):
        swept(by_hand(), [])
    with pytest.raises(DataError, match="the loader yielded no batch"):
        features(by_hand(), [])


def test_a_layer_whose_first_dimension_is_not_the_samples_is_an_error():
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.T

    with pytest.raises(ShapeError, match=r"layer '0' returned shape \(2, 5\) for a batch of 5; its first dimension"):
        swept(nn.Sequential(Turned()), [torch.zeros(5, 2)], "0")


def test_a_batch_without_samples_is_an_error():
    with pytest.raises(ShapeError, match="batch 0 holds no tensor of samples"):
        swept(nn.Sequential(nn.Identity()), [torch.tensor(1.0)], "all")


class Sometimes(nn.Module):
    """Runs its second layer only for batches that begin with a positive number; the third twice for a negative."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.positive, self.often = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.always(x)
        x = self.often(x)
        return self.positive(x) if x[0, 0] > 0 else self.often(x)


PLUS, MINUS = torch.ones(2, 2), -torch.ones(2, 2)


@pytest.mark.parametrize("run", [swept, lambda model, loader, name: features(model, loader, name)],
                         ids=["sweep", "features"])  # fmt: skip
def test_a_layer_that_runs_in_only_some_batches_is_an_error(run):
    with pytest.raises(UnknownLayerError, match="layer 'positive' ran 0 times in batch 1"):
        run(Sometimes(), [PLUS, MINUS], "positive")


@pytest.mark.parametrize(
    "run",
    [
        lambda model, loader, name: swept(model, loader, name, forward=lambda m, batch: m(batch)),
        lambda model, loader, name: features(model, loader, name),
    ],
    ids=["sweep", "features"],
)
def test_a_layer_that_runs_more_often_in_a_later_batch_is_an_error(run):
    """With a custom forward: by default a sweep ends a pass once all chosen layers have run."""
    with pytest.raises(UnknownLayerError, match="layer 'often' ran 2 times in batch 1"):
        run(Sometimes(), [PLUS, MINUS], "often")


def test_a_layer_that_first_runs_in_a_later_batch_counts_as_never_run():
    with pytest.raises(UnknownLayerError, match="'positive' never runs"):
        swept(Sometimes(), [MINUS, PLUS], "positive")


def test_layers_that_always_run_are_unharmed_by_one_that_does_not():
    assert len(swept(Sometimes(), [PLUS, MINUS], "always")["always"]) == 4


# --- tokens and padding ------------------------------------------------------------------------------------------


def test_masked_mean_worked_by_hand():
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], [[5.0, 6.0], [7.0, 7.0], [8.0, 8.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert masked_mean(tokens, mask).tolist() == [[2.0, 3.0], [5.0, 6.0]]


@pytest.mark.parametrize("content", [0.0, 1e30, torch.inf, torch.nan])
def test_masked_mean_ignores_what_stands_at_padding(content):
    tokens = torch.tensor([[[1.0], [3.0], [content], [content]]])
    assert masked_mean(tokens, torch.tensor([[1, 1, 0, 0]])).tolist() == [[2.0]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masked_mean_takes_masks_of_any_type(dtype):
    assert masked_mean(torch.tensor([[[1.0], [3.0]]]), torch.tensor([[1, 0]]).to(dtype)).tolist() == [[1.0]]


def test_masked_mean_takes_any_place_of_the_padding():
    assert masked_mean(torch.tensor([[[7.0], [1.0], [3.0]]]), torch.tensor([[0, 1, 1]])).tolist() == [[2.0]]


def test_masked_mean_of_half_precision_is_float32():
    assert masked_mean(torch.ones(1, 2, 3, dtype=torch.bfloat16), torch.ones(1, 2)).dtype == torch.float32


class Tokens(nn.Module):
    """Embeds tokens, doubles them, and averages over those that the mask keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.twice = nn.Embedding(6, 2), nn.Linear(2, 2, bias=False)
        self.head = nn.Linear(2, 1, bias=False)
        self.embed.weight.data = torch.arange(12.0).view(6, 2)  # token t is [2t, 2t + 1]
        self.twice.weight.data, self.head.weight.data = 2 * torch.eye(2), torch.ones(1, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(masked_mean(self.twice(self.embed(input_ids)), attention_mask))


def padded(ids: list[list[int]], length: int, filler: int) -> dict[str, Tensor]:
    """A batch of tokens, filled up on the right."""
    rows = torch.tensor([[*row, *[filler] * (length - len(row))] for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    return {"input_ids": rows, "attention_mask": mask}


IDS = [[1, 3], [4], [5, 4, 0]]


def test_token_layers_are_averaged_over_what_the_mask_keeps():
    keep = swept(Tokens(), [padded(IDS, 3, 0)], "all")
    assert keep["embed"].tolist() == [[4.0, 5.0], [8.0, 9.0], [6.0, 7.0]]
    assert keep["twice"].tolist() == [[8.0, 10.0], [16.0, 18.0], [12.0, 14.0]]
    assert keep["head"].tolist() == [[18.0], [34.0], [26.0]]


@pytest.mark.parametrize(("length", "filler"), [(3, 5), (4, 0), (9, 1)])
def test_neither_content_nor_length_of_the_padding_has_an_influence(length, filler):
    plain, other = (swept(Tokens(), [padded(IDS, *how)], "all") for how in ((3, 0), (length, filler)))
    for name in ("embed", "twice", "head"):
        torch.testing.assert_close(other[name], plain[name])


def test_batches_of_different_length_go_together():
    keep = swept(Tokens(), [padded(IDS[:2], 2, 0), padded(IDS[2:], 7, 3)], "twice")
    assert keep["twice"].tolist() == [[8.0, 10.0], [16.0, 18.0], [12.0, 14.0]]


class Encoder(nn.Module):
    """torch's own encoder, as its documentation builds it, with its padding mask."""

    def __init__(self, *, nested: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        return self.head(masked_mean(hidden, attention_mask))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("nested", [False, True], ids=["dense", "nested tensors, torch's default"])
def test_padding_has_no_influence_on_a_transformer_encoder(nested):
    model = Encoder(nested=nested)
    names = ["embed", "encoder.layers.0", "encoder.layers.1", "head"]
    plain, other = (swept(model, [padded(IDS, *how)], names) for how in ((3, 0), (8, 5)))
    for name in names:
        assert plain[name].shape == (3, 2 if name == "head" else 8)
        torch.testing.assert_close(other[name], plain[name], rtol=1e-5, atol=1e-6)


# --- features ----------------------------------------------------------------------------------------------------


def test_features_of_a_classifier_are_what_goes_into_its_head():
    model = build_model("resnet20-cifar")
    images = batches(2, 3, 3, 8, 8)
    found = features(model, images)
    assert found.shape == (6, 64)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.linear(found), torch.cat([model(x) for x in images]), rtol=1e-4, atol=1e-5)


def test_features_of_resnet20_are_its_pooled_last_stage():
    model, images = build_model("resnet20-cifar"), batches(1, 4, 3, 8, 8)
    torch.testing.assert_close(features(model, images), features(model, images, "layer3"), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(features(model, images), features(model, images, "avgpool"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda net: nn.Sequential(nn.Identity(), net)],
                         ids=["alone", "behind another"])  # fmt: skip
def test_features_of_a_wrapped_classifier_are_what_goes_into_its_head(wrap):
    assert features(wrap(by_hand()), [torch.tensor([[1.0, -2.0]])]).tolist() == [[2.0, 0.0]]


class Embeds(nn.Module):
    """A network without a head: two numbers per sample, cut below zero, out of a function."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)
        self.linear.weight.data = torch.eye(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


class Plain(nn.Module):
    """No submodules at all."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Embeds(), [[1.0, 0.0]]),
        (Plain(), [[3.0, -6.0]]),
        (nn.Sequential(by_hand()[0], nn.ReLU()), [[2.0, 0.0]]),
        (nn.Sequential(Embeds(), nn.Identity()), [[1.0, 0.0]]),
    ],
    ids=["function", "no layers", "activation", "identity"],
)
def test_features_of_a_model_without_a_head_are_its_output(model, expected):
    assert features(model, [torch.tensor([[1.0, -2.0]])]).tolist() == expected


def test_features_of_a_model_that_ends_in_flatten_are_its_output():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten())
    images = batches(1, 4, 1, 3, 3)
    torch.testing.assert_close(features(model, images), model(images[0]).detach())


def test_features_of_a_named_layer_come_in_the_loaders_order():
    assert features(by_hand(), [torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 3.0]])], "1").tolist() == [
        [2.0, 0.0],
        [1.0, 6.0],
    ]
    assert features(by_hand(), [torch.tensor([[1.0, -2.0]])], "input").tolist() == [[1.0, -2.0]]


def test_features_of_maps_are_averaged_over_positions():
    images = torch.arange(8.0).view(1, 2, 2, 2)
    assert features(nn.Sequential(nn.Identity()), [images], "0").tolist() == [[1.5, 5.5]]


def test_features_takes_batches_of_named_arguments():
    assert features(Tokens(), [padded(IDS, 3, 0)], "head").tolist() == [[18.0], [34.0], [26.0]]
    assert features(Tokens(), [padded(IDS, 3, 0)]).tolist() == [[8.0, 10.0], [16.0, 18.0], [12.0, 14.0]]


def test_features_of_an_unknown_layer_lists_the_closest():
    with pytest.raises(UnknownLayerError, match="no layer 'twise' in Tokens; closest: twice"):
        features(Tokens(), [padded(IDS, 3, 0)], "twise")


def test_features_do_not_share_memory_with_the_batches():
    rows = torch.tensor([[1.0, -2.0]])
    found = features(nn.Sequential(nn.Identity()), [rows], "0")
    rows.zero_()
    assert found.tolist() == [[1.0, -2.0]]


def test_to_device_moves_nested_batches_and_leaves_the_rest():
    meta = torch.device("meta")
    moved = to_device({"x": [torch.ones(2), {"y": torch.ones(1)}], "label": None, "name": "text"}, meta)
    assert moved["x"][0].device == moved["x"][1]["y"].device == meta
    assert (moved["label"], moved["name"]) == (None, "text")
