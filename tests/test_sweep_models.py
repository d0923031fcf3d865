"""A sweep over several models: one reading of the data, nothing run in vain, nothing left behind, and its digest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layerlens.activations import Look, Seen, sweep, sweep_models
from layerlens.analysis.similarity import similarity_matrix
from layerlens.errors import DataError, ShapeError, UnknownLayerError
from layerlens.layers import Layer
from layerlens.reduction import Reduction


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Keep:
    """A consumer that keeps all that it is handed, by position, and in which order it came."""

    def __init__(self) -> None:
        self.parts: list[list[str]] = []
        self.rows: dict[int, list[Tensor]] = {}
        self.order: list[int] = []
        self.batches = 0

    def begin(self, chosen: list[list[Layer]]) -> Keep:
        self.parts = [[layer.name for layer in part] for part in chosen]
        return self

    def take(self, position: int, activation: Tensor) -> None:
        self.rows.setdefault(position, []).append(activation.clone())
        self.order.append(position)

    def end_batch(self) -> None:
        self.batches += 1

    def __getitem__(self, position: int) -> Tensor:
        return torch.cat(self.rows[position])


class Loader:
    """Counts how often it is started and how many batches are taken."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.starts, self.taken = batches, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.starts += 1
        for batch in self.batches:
            self.taken += 1
            yield batch


class Scale(nn.Module):
    """Multiplies by a number; counts its calls."""

    def __init__(self, factor: float, *, in_place: bool = False) -> None:
        super().__init__()
        self.factor, self.in_place, self.calls = factor, in_place, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.mul_(self.factor) if self.in_place else self.factor * x


class Forbidden(nn.Module):
    """Runs once, when the layers are discovered, and never again."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self.calls, self.error = 0, error or AssertionError("this layer must not run")

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise self.error
        return x


def swept(*looks: Look, loader: Any, **options: Any) -> tuple[Keep, Seen]:
    keep = Keep()
    return keep, sweep_models(looks, loader, keep.begin, **options)


ROWS = torch.tensor([[1.0, -2.0], [3.0, 4.0], [5.0, 6.0]])
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def state(model: nn.Module) -> dict[str, Any]:
    """What a sweep must leave as it was."""
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [[len(getattr(module, kind)) for kind in HOOKS] for module in model.modules()],
        "buffers": {name: value.tolist() for name, value in model.named_buffers()},
        "parameters": {name: value.tolist() for name, value in model.named_parameters()},
        "random": (torch.get_rng_state().tolist(), repr(np.random.get_state())),
        "gradients": torch.is_grad_enabled(),
    }


class Moves(nn.Module):
    """A buffer that every pass changes, and a draw of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return x + 0 * torch.rand(1)


def partly_frozen(*tail: nn.Module) -> nn.Sequential:
    """In train mode but for its drop-out; batch-norm statistics and a buffer move in every pass."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), Moves(), *tail)
    model.train()
    model[1].eval()
    return model


# --- two models in one pass --------------------------------------------------------------------------------------


def test_two_models_are_numbered_through_and_see_the_same_rows():
    first, second = nn.Sequential(Scale(2), Scale(3)), nn.Sequential(Scale(5), nn.Flatten(), Scale(7))
    keep, seen = swept(Look(first, "all"), Look(second, "0,2"), loader=[ROWS[:2], ROWS[2:]])
    assert keep.parts == [["0", "1"], ["0", "2"]]
    for position, factor in enumerate((2, 6, 5, 35)):
        assert torch.equal(keep[position], factor * ROWS)
    assert keep.order == [0, 1, 2, 3, 0, 1, 2, 3]
    assert keep.batches == seen.batches == 2


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_loader_is_read_once_however_many_models_there_are(count):
    loader = Loader(list(ROWS.split(1)))
    swept(*[Look(nn.Sequential(Scale(k)), "all") for k in range(count)], loader=loader)
    assert (loader.starts, loader.taken) == (1, 3)


def test_a_generator_is_enough_for_two_models():
    keep, seen = swept(
        Look(nn.Sequential(Scale(1)), "0"), Look(nn.Sequential(Scale(2)), "0"), loader=iter(ROWS.split(1))
    )
    assert seen.batches == 3
    assert torch.equal(2 * keep[0], keep[1])


def test_a_loader_that_draws_its_batches_gives_both_models_the_same_draws():
    loader = (torch.randn(4, 2) for _ in range(3))
    keep, _ = swept(Look(nn.Sequential(Scale(1)), "0"), Look(nn.Sequential(Scale(1)), "0"), loader=loader)
    assert torch.equal(keep[0], keep[1])
    assert not torch.equal(*keep.rows[0][:2])


def test_an_in_place_first_layer_of_one_model_does_not_reach_the_other():
    changes, plain = nn.Sequential(Scale(-3, in_place=True)), nn.Sequential(nn.Identity())
    keep, _ = swept(Look(changes, "0"), Look(plain, "0"), loader=[ROWS.clone()])
    assert torch.equal(keep[1], ROWS)


def test_the_digest_is_that_of_the_data_whatever_an_in_place_layer_does():
    changes, plain = nn.Sequential(Scale(-3, in_place=True)), nn.Sequential(nn.Identity())
    seen = [swept(Look(model, "0"), loader=[ROWS.clone()])[1] for model in (changes, plain)]
    assert seen[0] == seen[1]


def test_one_model_may_be_looked_at_twice_in_one_sweep():
    model = nn.Sequential(Scale(2), Scale(3))
    keep, _ = swept(Look(model, "0"), Look(model, "1", lambda net, batch: net(-batch)), loader=[ROWS])
    assert torch.equal(keep[0], 2 * ROWS)
    assert torch.equal(keep[1], -6 * ROWS)


def test_sweep_is_sweep_models_of_one_look():
    model, one, many = nn.Sequential(Scale(2)), Keep(), Keep()
    a = sweep(model, [ROWS], "all", lambda layers: one.begin([layers]))
    b = sweep_models([Look(model, "all")], [ROWS], many.begin)
    assert a == b
    assert one.parts == many.parts
    assert torch.equal(one[0], many[0])


def test_each_model_runs_in_eval_mode_without_gradients():
    keep = Keep()
    grads: list[bool] = []
    keep.take = lambda _p, activation: grads.append(activation.requires_grad)  # type: ignore[method-assign]
    models = [nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9)).train() for _ in range(2)]
    modes: list[bool] = []
    for model in models:
        model[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    sweep_models([Look(model, "all") for model in models], [ROWS], keep.begin)
    assert grads == [False] * 4
    assert modes
    assert not any(modes)


def test_the_reduction_reaches_every_model():
    maps = draw(3, 2, 4, 4)
    keep, _ = swept(Look(nn.Identity(), "input"), Look(nn.Identity(), "input"), loader=[maps], reduce=Reduction("pool"))
    torch.testing.assert_close(keep[0], maps.mean((2, 3)))
    torch.testing.assert_close(keep[1], maps.mean((2, 3)))


def test_positions_tell_the_consumer_how_many_rows_each_sample_has():
    keep = Keep()
    sweep_models([Look(nn.Identity(), "input")], [draw(3, 2, 4, 4)], keep.begin, reduce=Reduction("positions"))
    assert keep.counts.tolist() == [16, 16, 16]  # type: ignore[attr-defined]


@pytest.mark.parametrize("which", [0, 1])
def test_an_unknown_layer_of_either_model_is_refused(which):
    choices = ["all", "all"]
    choices[which] = "nope"
    with pytest.raises(UnknownLayerError, match="no layer 'nope' in Sequential"):
        swept(*[Look(nn.Sequential(Scale(1)), layers) for layers in choices], loader=[ROWS])


def test_an_empty_loader_is_refused_before_any_consumer_is_made():
    with pytest.raises(DataError, match="the loader yielded no batch"):
        sweep_models([Look(nn.Sequential(Scale(1)))], [], lambda _: pytest.fail("a consumer was made"))


# --- nothing runs behind the last chosen layer -------------------------------------------------------------------


@pytest.mark.parametrize("last", ["input", "0", "1"])
def test_nothing_runs_behind_the_last_chosen_layer(last):
    model = nn.Sequential(Scale(2), Scale(3), Forbidden(), Forbidden())
    keep, seen = swept(Look(model, last), loader=ROWS.split(1))
    assert torch.equal(keep[0], {"input": 1, "0": 2, "1": 6}[last] * ROWS)
    assert (model[2].calls, model[3].calls, seen.batches) == (1, 1, 3)  # once, when the layers were discovered


def test_layers_between_chosen_ones_run_and_those_behind_do_not():
    model = nn.Sequential(*[Scale(2) for _ in range(5)])
    keep, _ = swept(Look(model, ["3", "0"]), loader=ROWS.split(1))
    assert [layer.calls for layer in model] == [4, 4, 4, 4, 1]
    assert torch.equal(keep[1], 16 * ROWS)


def test_each_model_stops_at_its_own_last_layer():
    first, second = (nn.Sequential(*[Scale(2) for _ in range(3)]) for _ in range(2))
    keep, _ = swept(Look(first, "0"), Look(second, "1"), loader=ROWS.split(1))
    assert [layer.calls for layer in first] == [4, 1, 1]
    assert [layer.calls for layer in second] == [4, 4, 1]
    assert torch.equal(keep[1], 4 * ROWS)


def test_the_stop_waits_for_the_chosen_call_of_a_repeated_module():
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.last = Scale(2), Scale(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.twice(self.twice(self.twice(x))))

    model = Repeats()
    keep, _ = swept(Look(model, "twice#2"), loader=[ROWS])
    assert torch.equal(keep[0], 4 * ROWS)
    assert (model.twice.calls, model.last.calls) == (3 + 2, 1)


def test_a_container_is_the_last_layer_when_it_has_finished():
    model = nn.Sequential(nn.Sequential(Scale(2), Scale(3)), Forbidden())
    keep, _ = swept(Look(model, "0,0.0"), loader=[ROWS])
    assert keep.parts == [["0.0", "0"]]
    assert torch.equal(keep[1], 6 * ROWS)


def test_a_model_that_catches_every_exception_still_stops():
    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.behind = Scale(2), Scale(3)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.behind(self.first(x))
            except Exception:
                return self.behind(x)

    model = Catches()
    keep, _ = swept(Look(model, "first"), loader=[ROWS])
    assert torch.equal(keep[0], 2 * ROWS)
    assert model.behind.calls == 1


def test_a_forward_of_the_users_own_runs_to_its_end():
    ends: list[int] = []

    def forward(net: nn.Module, batch: Tensor) -> Tensor:
        out = net(batch)
        ends.append(1)
        return out

    model = nn.Sequential(Scale(2), Scale(3))
    swept(Look(model, "0", forward), loader=ROWS.split(1))
    assert len(ends) == model[1].calls == 4


def test_with_the_last_layer_chosen_the_forward_pass_runs_to_its_end():
    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.ends = Scale(2), 0

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            self.ends += 1
            return x

    model = Tail()
    swept(Look(model, "layer"), loader=ROWS.split(1))
    assert model.ends == 4


def test_a_wrapper_of_several_devices_runs_to_its_end():
    class DataParallel(nn.Sequential):
        """Its threads can't be left by an exception."""

    model = DataParallel(Scale(2), Scale(3))
    swept(Look(model, "0"), loader=[ROWS])
    assert model[1].calls == 2


def test_similarity_runs_nothing_behind_the_last_chosen_layer():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Forbidden())
    found = similarity_matrix(model, draw(24, 4).split(8), "0,1")
    assert found.layers == ("0", "1")
    assert model[2].calls == 1


# --- the models are left as they were ----------------------------------------------------------------------------


def test_the_models_of_these_tests_would_change_without_protection():
    model = partly_frozen()
    before = state(model)
    model(ROWS)
    after = state(model)
    assert {key for key in before if before[key] != after[key]} == {"buffers", "random"}


@pytest.mark.parametrize("layers", ["all", "0", "input"])
def test_both_models_are_left_as_they_were(layers):
    models = [partly_frozen(Scale(2)), partly_frozen(Scale(3), Scale(4))]
    before = [state(model) for model in models]
    swept(*[Look(model, layers) for model in models], loader=ROWS.repeat(2, 1).split(3))
    assert [state(model) for model in models] == before


ERRORS = pytest.mark.parametrize("error", [ValueError("odd"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])


@ERRORS
def test_both_models_are_left_as_they_were_when_a_later_batch_fails(error):
    models = [partly_frozen(Scale(2)), partly_frozen(Forbidden(error), Scale(2))]
    before = [state(model) for model in models]
    with pytest.raises(type(error)):
        swept(Look(models[0], "3"), Look(models[1], "3,4"), loader=ROWS.split(3))
    assert models[0][3].calls == 2  # the first model's part of the batch was over
    assert [state(model) for model in models] == before


@ERRORS
def test_a_layer_that_would_fail_behind_the_last_chosen_one_does_no_harm(error):
    model = partly_frozen(Forbidden(error))
    before = state(model)
    keep, _ = swept(Look(model, "2"), loader=ROWS.split(3))
    assert keep.batches == 1
    assert state(model) == before


@ERRORS
@pytest.mark.parametrize("method", ["begin", "take", "end_batch"])
def test_both_models_are_left_as_they_were_when_the_consumer_fails(error, method, monkeypatch):
    def fail(*_args: Any) -> None:
        raise error

    monkeypatch.setattr(Keep, method, fail)
    models = [partly_frozen(Scale(2)), partly_frozen(Scale(3))]
    before = [state(model) for model in models]
    with pytest.raises(type(error)):
        swept(*[Look(model, "2") for model in models], loader=ROWS.split(3))
    assert [state(model) for model in models] == before


def test_both_models_are_left_as_they_were_when_enough_fails():
    def fail() -> bool:
        raise ValueError("odd")

    models = [partly_frozen(Scale(2)), partly_frozen(Scale(3))]
    before = [state(model) for model in models]
    with pytest.raises(ValueError, match="odd"):
        swept(*[Look(model, "2") for model in models], loader=ROWS.split(3), enough=fail)
    assert [state(model) for model in models] == before


def test_a_layer_that_does_not_run_in_a_later_batch_is_named():
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.first_only, self.last = Scale(1), Scale(1), Scale(1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.always(x)
            return self.last(self.first_only(x) if x.sum() > 0 else x)

    model = Sometimes()
    with pytest.raises(UnknownLayerError, match="'first_only' ran 0 times in batch 1 but once in the first"):
        swept(Look(model, "always,first_only"), loader=[ROWS, -ROWS])
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_without_samples_in_front_is_named_in_the_second_model_too():
    bad = nn.Sequential(nn.Flatten(0, 1))
    with pytest.raises(ShapeError, match=r"layer '0' returned shape \(6,\) for a batch of 3"):
        swept(Look(nn.Sequential(Scale(1)), "0"), Look(bad, "0"), loader=[ROWS])


# --- the digest of the samples -----------------------------------------------------------------------------------


def digest(batches: list[Any], model: nn.Module | None = None) -> str:
    return swept(Look(model or nn.Identity(), "input"), loader=batches)[1].sample_id


DATA = draw(12, 3, 4, 4)


def test_equal_data_have_equal_digests_for_any_model_and_run():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    found = {digest(list(DATA.clone().split(4)), m) for m in (None, model, nn.Sequential(Scale(3)))}
    assert len(found) == 1
    assert found == {digest([(batch, torch.zeros(4)) for batch in DATA.split(4)])}  # labels do not count
    assert len(found.pop()) == 16


CHANGES: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "batches in another order": lambda b: [b[1], b[0], b[2]],
    "samples in another order": lambda b: [b[0].flip(0), *b[1:]],
    "samples exchanged between batches": lambda b: [torch.cat(p) for p in ((b[1][:1], b[0][1:]), (b[0][:1], b[1][1:]))]
    + b[2:],
    "features in another order": lambda b: [x.flip(3) for x in b],
    "other signs": lambda b: [-x for x in b],
    "one number changed by a thousandth": lambda b: [b[0], b[1] + 1e-3 * (torch.arange(4) == 2).view(4, 1, 1, 1), b[2]],
    "other data": lambda b: list(draw(12, 3, 4, 4, seed=1).split(4)),
    "fewer batches": lambda b: b[:2],
    "the last batch twice": lambda b: [*b, b[-1]],
    "a short last batch": lambda b: [*b[:2], b[2][:3]],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_tells(change):
    assert digest(CHANGES[change](list(DATA.split(4)))) != digest(list(DATA.split(4)))


def test_the_digest_tells_token_ids_apart():
    ids = torch.arange(20).view(4, 5)
    assert digest([{"input": ids}]) == digest([{"input": ids.clone()}])
    assert digest([{"input": ids}]) != digest([{"input": ids.flip(1)}])
    assert digest([{"input": ids}]) != digest([{"input": ids + (ids == 7)}])


@pytest.mark.parametrize("form", ["channels last", "not contiguous", "float64"])
def test_the_digest_does_not_depend_on_how_the_data_lie_in_memory(form):
    forms = {
        "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "not contiguous": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "float64": lambda x: x.double(),
    }
    assert digest([forms[form](x) for x in DATA.split(4)]) == digest(list(DATA.split(4)))


def test_the_digest_does_not_depend_on_where_the_data_begin_in_memory():
    """A view into a larger tensor, as `split` gives, and a fresh copy, as a DataLoader makes."""
    found = []
    for seed in range(8):
        data = draw(256, 784, seed=seed)
        inside = torch.zeros(data.numel() + 1)[1:].view(data.shape)
        inside.copy_(data)
        found.append(digest([inside]) == digest([data]))
    assert all(found)


def test_the_digest_tells_masks_apart():
    """Another mask gives other rows, so that two results do not rest on the same samples."""

    class Tokens(nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return x

    tokens, masks = draw(4, 3, 2), torch.ones(2, 4, 3, dtype=torch.long)
    masks[1, :, 2] = 0
    first, second = (digest([{"x": tokens, "attention_mask": mask}], Tokens()) for mask in masks)
    assert first != second


# --- enough ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [1, 2, 3, 99])
def test_enough_stops_the_sweep_after_the_batch_that_satisfied_it(wanted):
    loader, keep = Loader(list(ROWS.split(1))), Keep()
    looks = [Look(nn.Sequential(Scale(1)), "0"), Look(nn.Sequential(Scale(2)), "0")]
    seen = sweep_models(looks, loader, keep.begin, enough=lambda: keep.batches >= wanted)
    assert loader.taken == seen.batches == keep.batches == min(wanted, 3)
    assert len(keep.rows[1]) == seen.batches


def test_the_digest_of_a_stopped_sweep_is_that_of_the_batches_it_took():
    _, stopped = swept(Look(nn.Identity(), "input"), loader=DATA.split(4), enough=lambda: True)
    assert stopped.sample_id == digest([DATA[:4]])


def test_enough_is_asked_once_per_batch_behind_its_end():
    keep, asked = Keep(), []
    sweep_models([Look(nn.Identity(), "input")], ROWS.split(1), keep.begin, enough=lambda: asked.append(keep.batches))
    assert asked == [1, 2, 3]
