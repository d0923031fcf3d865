"""Deep Augmentation of graphs: whose nodes are transformed together, what gradient passes, and what counts as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerlens.augment.adalase import AdaLASE
from layerlens.augment.deep import DeepAugmentation
from layerlens.augment.transforms import (
    dropout_channels_of_graphs,
    dropout_nodes,
    gaussian_noise,
    remove_principal_components,
)
from layerlens.errors import ConfigError, ShapeError
from layerlens.graph_batches import import_graph_extra
from layerlens.graph_models import build_graph_encoder
from layerlens.layers import run_batch

Graphs = dict[str, Tensor]
LINEAR = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])  # (features out, features in)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def zeroing(layer: str | list[str] = "nodes", seed: int = 0, **settings: Any) -> DeepAugmentation:
    """What it transforms is exactly 0 afterwards."""
    return DeepAugmentation(layer, rate=1.0, generator=seeded(seed), **settings)


def batch_of(count: int = 8, seed: int = 0) -> Graphs:
    """Paths of 1 to 5 nodes with features between 1 and 2."""
    sizes = torch.tensor([1 + k % 5 for k in range(count)])
    owner = torch.arange(count).repeat_interleave(sizes)
    low = (owner[:-1] == owner[1:]).nonzero().flatten()
    edges = torch.stack([torch.cat([low, low + 1]), torch.cat([low + 1, low])])
    return {"x": torch.rand(len(owner), 3, generator=seeded(seed)) + 1, "edge_index": edges, "batch": owner}


class SumOfGraphs(nn.Module):
    def forward(self, h: Tensor, batch: Tensor) -> Tensor:
        return h.new_zeros(int(batch.max()) + 1, h.shape[1]).index_add(0, batch, h)


class Tiny(nn.Module):
    """h = W x at each node, summed over each graph, and a head; rows of h without `batch`."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes, self.pool, self.head = nn.Linear(3, 2, bias=False), SumOfGraphs(), nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.nodes.weight.copy_(LINEAR)
            self.head.weight.copy_(torch.tensor([[5.0, 7.0]]))

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Tensor:
        h = self.nodes(x)
        return self.head(h if batch is None else self.pool(h, batch))


class TakesWhole(Tiny):
    """Takes the batch itself, a mapping or torch_geometric's."""

    def forward(self, data: Any) -> Tensor:
        get = data.get if isinstance(data, Mapping) else lambda name: getattr(data, name)
        return super().forward(get("x"), get("edge_index"), get("batch"))


class EdgesFirst(Tiny):
    """Its edges stand before its nodes."""

    def forward(self, edge_index: Tensor, x: Tensor, batch: Tensor | None = None) -> Tensor:
        return super().forward(x, edge_index, batch)


def as_object(graphs: Graphs) -> Any:
    return import_graph_extra().data.Batch(**graphs)


def turned(graphs: Graphs) -> Graphs:
    """The same mapping, edges first."""
    return {name: graphs[name] for name in ("edge_index", "batch", "x")}


CALLS: dict[str, tuple[type[Tiny], Callable[[nn.Module, Graphs], Tensor]]] = {
    "by position": (Tiny, lambda model, g: model(g["x"], g["edge_index"], g["batch"])),
    "by position, edges first": (EdgesFirst, lambda model, g: model(g["edge_index"], g["x"], g["batch"])),
    "by keyword": (Tiny, lambda model, g: model(**g)),
    "by keyword, edges first": (Tiny, lambda model, g: model(**turned(g))),
    "by both": (Tiny, lambda model, g: model(g["x"], batch=g["batch"], edge_index=g["edge_index"])),
    "a mapping": (TakesWhole, lambda model, g: model(g)),
    "a mapping, edges first": (TakesWhole, lambda model, g: model(turned(g))),
    "a mapping by keyword": (TakesWhole, lambda model, g: model(data=g)),
    "an object": (TakesWhole, lambda model, g: model(as_object(g))),
    "an object by keyword": (TakesWhole, lambda model, g: model(data=as_object(g))),
    "as loaders do, a mapping": (Tiny, run_batch),
    "as loaders do, an object": (Tiny, lambda model, g: run_batch(model, as_object(g))),
    "as loaders do, an object itself": (TakesWhole, lambda model, g: run_batch(model, as_object(g))),
}
called = pytest.mark.parametrize(("kind", "call"), CALLS.values(), ids=CALLS)


def by_name(model: nn.Module, graphs: Graphs) -> Tensor:
    return model(**graphs)


@contextmanager
def seen_at(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What goes into a module and what comes out, behind the hooks that are there already."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    try:
        yield seen
    finally:
        handle.remove()


def states(
    model: nn.Module, operator: DeepAugmentation, layers: list[str], graphs: Graphs, call: Callable[..., Tensor]
) -> list[Tensor]:
    """What leaves each layer in one augmented pass."""
    seen: list[Tensor] = []
    with operator.attached(model):
        handles = [
            model.get_submodule(name).register_forward_hook(lambda _m, _a, out: seen.append(out.detach()))
            for name in layers
        ]
        call(model, graphs)
    for handle in handles:
        handle.remove()
    return seen


def gone(h: Tensor, owner: Tensor) -> list[bool]:
    """Which graphs are 0; every graph is so wholly or nowhere."""
    zero = [(h[owner == k] == 0).all(1).tolist() for k in range(int(owner[-1]) + 1)]
    assert all(all(rows) or not any(rows) for rows in zero), "a graph is transformed in part"
    return [all(rows) for rows in zero]


def gin(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = build_graph_encoder("gin,layers=2,width=8", features=3)
        made.head = nn.Linear(made.width, 4)
    return made.train()


def hooks_on(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks)
        for m in model.modules()
    )


def within(count: int, draws: int, probability: float) -> bool:
    """Inside 4.5 standard deviations of a binomial."""
    return abs(count - draws * probability) <= 4.5 * (draws * probability * (1 - probability)) ** 0.5


# --- whom ---


@called
def test_the_nodes_of_a_graph_are_transformed_together_or_not_at_all(kind: type[Tiny], call: Callable[..., Tensor]):
    graphs, hit = batch_of(20), []
    plain = graphs["x"] @ LINEAR.T
    for seed in range(10):
        (h,) = states(kind().train(), zeroing(seed=seed), ["nodes"], graphs, call)
        hit += gone(h, graphs["batch"])
        kept = h.abs().sum(1) > 0
        torch.testing.assert_close(h[kept], plain[kept])
    assert within(sum(hit), 200, 0.5)


@called
def test_the_input_is_a_layer_whose_samples_are_graphs(kind: type[Tiny], call: Callable[..., Tensor]):
    graphs, model = batch_of(20), kind().train()
    before = {name: value.clone() for name, value in graphs.items()}
    with zeroing("input").attached(model), seen_at(model.nodes) as seen:
        call(model, graphs)
    ((x, _),) = seen
    hit = torch.tensor(gone(x, graphs["batch"]))
    assert 0 < int(hit.sum()) < 20
    assert torch.equal(x, torch.where(hit[graphs["batch"], None], 0.0, before["x"]))
    assert all(torch.equal(graphs[name], before[name]) for name in graphs), "the batch itself is as it was"


def test_the_input_of_torch_geometrics_batch_is_not_changed_in_place():
    batch, model = as_object(batch_of()), TakesWhole().train()
    before = batch.x.clone()
    with zeroing("input", fraction=1.0).attached(model):
        assert not model(batch).any()
    assert torch.equal(batch.x, before)


@pytest.mark.parametrize("layer", ["layer1", "layer2", "layer1.conv", "layer2.norm"])
def test_every_layer_with_a_row_per_node_transforms_whole_graphs(layer: str):
    graphs, hit, model = batch_of(20), [], gin()
    for seed in range(10):
        (h,) = states(model, zeroing(layer, seed), [layer], graphs, by_name)
        assert len(h) == len(graphs["x"])
        hit += gone(h, graphs["batch"])
    assert within(sum(hit), 200, 0.5)


@pytest.mark.parametrize("layer", ["pool", "head"])
def test_layers_with_a_row_per_graph_are_transformed_row_by_row(layer: str):
    graphs, hit, model = batch_of(20), [], gin()
    (plain,) = states(model, zeroing(layer, fraction=0.0), [layer], graphs, by_name)
    for seed in range(10):
        (h,) = states(model, zeroing(layer, seed), [layer], graphs, by_name)
        rows = gone(h, torch.arange(20))
        torch.testing.assert_close(h, torch.where(torch.tensor(rows)[:, None], 0.0, plain))
        hit += rows
    assert within(sum(hit), 200, 0.5)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.75, 1.0])
def test_fraction_is_the_share_of_graphs_whatever_their_size(fraction: float):
    """Of 5,000 graphs there are a thousand of each size from 1 to 5."""
    graphs = batch_of(5000)
    h = zeroing(fraction=fraction).augment(graphs["x"], owner=graphs["batch"])
    zero = (h == 0).all(1)
    first = torch.cat([torch.tensor([True]), graphs["batch"].diff() > 0])
    assert torch.equal(zero, zero[first][graphs["batch"]])
    hit = zero[first].view(1000, 5).sum(0).tolist()
    assert all(within(count, 1000, fraction) for count in hit)


def test_every_graph_is_drawn_by_itself_once_per_layer():
    """As many numbers are drawn as there are graphs, the first of them for the first graph."""
    graphs = batch_of(20)
    (h,) = states(Tiny().train(), zeroing(seed=3), ["nodes"], graphs, by_name)
    assert gone(h, graphs["batch"]) == (torch.rand(20, generator=seeded(3)) <= 0.5).tolist()


def test_the_same_seed_gives_the_same_graphs_and_a_pass_draws_anew():
    graphs, model = batch_of(20), Tiny().train()
    found = [gone(states(model, zeroing(seed=s), ["nodes"], graphs, by_name)[0], graphs["batch"]) for s in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    with zeroing().attached(model), seen_at(model.nodes) as seen:
        model(**graphs)
        model(**graphs)
    first, second = (gone(h.detach(), graphs["batch"]) for _, h in seen)
    assert first == found[0] != second


def test_graphs_of_one_node_each_are_rows():
    graphs = {"x": torch.ones(6, 3), "edge_index": torch.zeros(2, 0).long(), "batch": torch.arange(6)}
    (h,) = states(Tiny().train(), zeroing(seed=2), ["nodes"], graphs, by_name)
    assert gone(h, graphs["batch"]) == (torch.rand(6, generator=seeded(2)) <= 0.5).tolist()


def test_without_batch_each_row_is_a_sample():
    graphs, model = batch_of(20), Tiny().train()
    (h,) = states(model, zeroing(seed=3), ["nodes"], graphs, lambda m, g: m(g["x"], g["edge_index"]))
    rows = (h == 0).all(1)
    assert torch.equal(rows, torch.rand(len(rows), generator=seeded(3)) <= 0.5)
    shared = [rows[graphs["batch"] == k] for k in range(20)]
    assert any(part.any() and not part.all() for part in shared)


def test_the_graphs_of_one_pass_are_forgotten_in_the_next():
    graphs, model, draws = batch_of(20), Tiny().train(), seeded(3)
    operator = DeepAugmentation("nodes", transform=torch.zeros_like, generator=seeded(3))
    with operator.attached(model), seen_at(model.nodes) as seen:
        model(**graphs)
        model(graphs["x"], graphs["edge_index"])
    first, second = ((h == 0).all(1) for _, h in seen)
    assert torch.equal(first, (torch.rand(20, generator=draws) <= 0.5)[graphs["batch"]])
    assert torch.equal(second, torch.rand(len(second), generator=draws) <= 0.5)


@called
def test_nodes_that_do_not_stand_graph_by_graph_are_refused(kind: type[Tiny], call: Callable[..., Tensor]):
    """Two graphs in the wrong order; by number of graphs alone the second would have no draw."""
    graphs = {**batch_of(2), "batch": torch.tensor([1, 0, 0])}
    model = kind().train()
    with pytest.raises(ShapeError, match="`batch` may not fall"), zeroing().attached(model):
        call(model, graphs)
    assert hooks_on(model) == 0


# --- gradients ---


@pytest.mark.parametrize(("stop", "factor"), [(True, 0.0), (False, 2.0)])
def test_gradient_of_the_rows_of_the_chosen_graphs_is(stop: bool, factor: float):
    """dL/dx = Wᵀ (5, 7) = (5, 21, 10) at every node where nothing happened; times `factor` in a doubled graph."""
    graphs, model = batch_of(30), Tiny().train()
    graphs["x"].requires_grad_()
    operator = DeepAugmentation("nodes", transform=lambda h: 2 * h, stop_gradient=stop, generator=seeded(1))
    chosen = torch.rand(30, generator=seeded(1)) <= 0.5
    with operator.attached(model):
        model(**graphs).sum().backward()
    assert 5 < int(chosen.sum()) < 25
    gradient = torch.tensor([5.0, 21.0, 10.0])
    rows = chosen[graphs["batch"], None]
    torch.testing.assert_close(graphs["x"].grad, torch.where(rows, factor * gradient, gradient))
    weighted = torch.where(rows, factor, 1.0) * graphs["x"].detach()
    torch.testing.assert_close(model.nodes.weight.grad, torch.outer(torch.tensor([5.0, 7.0]), weighted.sum(0)))


def test_stop_gradient_blocks_whole_graphs_below_a_layer_of_message_passing():
    """Layers below reach no further than a graph, so a blocked graph's features have no gradient at all."""
    graphs, model = batch_of(30), gin()
    for module in model.modules():  # its statistics would join all graphs
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    graphs["x"].requires_grad_()
    operator = DeepAugmentation("layer2", transform="noise", stop_gradient=True, generator=seeded(1))
    chosen = torch.rand(30, generator=seeded(1)) <= 0.5
    model.pool.register_forward_pre_hook(lambda _m, args: (args[0][1:] * 2, args[1]))  # which sees layer1 otherwise
    with operator.attached(model):
        model(**graphs).sum().backward()
    still = (graphs["x"].grad == 0).all(1)
    assert torch.equal(still, chosen[graphs["batch"]])


# --- pairs ---


@pytest.mark.parametrize("seed", range(5))
def test_exactly_one_of_graphs_i_and_i_plus_n_is_transformed_the_same_at_every_layer(seed: int):
    graphs, layers = batch_of(24), ["layer1", "layer2", "pool"]
    found = states(gin(), zeroing(layers, seed, pairs="one"), layers, graphs, by_name)
    hit = [gone(h, graphs["batch"] if len(h) > 24 else torch.arange(24)) for h in found]
    assert hit[0] == hit[1] == hit[2]
    assert all(one != other for one, other in zip(hit[0][:12], hit[0][12:], strict=True))


def test_a_coin_decides_which_of_a_pair_and_anew_in_each_pass():
    graphs, model = batch_of(1000), Tiny().train()
    with zeroing(pairs="one").attached(model), seen_at(model.nodes) as seen:
        for _ in range(6):
            model(**graphs)
    first = [tuple(gone(h.detach(), graphs["batch"])[:500]) for _, h in seen]
    assert len(set(first)) == 6
    assert within(sum(map(sum, first)), 3000, 0.5)


def test_pairs_need_an_even_number_of_graphs_whatever_the_number_of_nodes():
    three = batch_of(3)
    assert len(three["x"]) % 2 == 0
    model = Tiny().train()
    with pytest.raises(ShapeError, match=r"needs 2n rows, .*; got 3"), zeroing(pairs="one").attached(model):
        model(**three)
    two = batch_of(2)
    assert len(two["x"]) % 2 == 1
    (h,) = states(model, zeroing(pairs="one"), ["nodes"], two, by_name)
    assert sorted(gone(h, two["batch"])) == [False, True]


# --- transforms ---


def test_channel_dropout_drops_the_same_features_at_all_nodes_of_a_graph():
    graphs = batch_of(400)
    h, owner = torch.ones(len(graphs["x"]), 8), graphs["batch"]
    out = dropout_channels_of_graphs(h, owner, 0.25, generator=seeded())
    first = torch.cat([torch.tensor([True]), owner.diff() > 0])
    assert torch.equal(out, out[first][owner])
    assert torch.equal(out[out != 0].unique(), torch.tensor([4 / 3]))
    assert within(int((out[first] == 0).sum()), 400 * 8, 0.25)
    assert len({tuple(row.tolist()) for row in out[first]}) > 50, "graphs lose different features"


def test_position_dropout_drops_whole_nodes_each_by_itself():
    graphs = batch_of(400)
    h, owner = torch.ones(len(graphs["x"]), 8), graphs["batch"]
    out = dropout_nodes(h, owner, 0.25, generator=seeded())
    zero = out == 0
    assert torch.equal(zero.all(1), zero.any(1))
    assert torch.equal(out[~zero].unique(), torch.tensor([4 / 3]))
    assert within(int(zero[:, 0].sum()), len(h), 0.25)
    pairs = owner[1:] == owner[:-1]
    both = zero[1:, 0] & zero[:-1, 0] & pairs
    assert within(int(both.sum()), int(pairs.sum()), 1 / 16), "neighbours within a graph are independent"


@pytest.mark.parametrize("drop", [dropout_channels_of_graphs, dropout_nodes])
@pytest.mark.parametrize(("rate", "factor"), [(0.0, 1.0), (1.0, 0.0)])
def test_dropout_of_graphs_at_its_ends(drop: Callable[..., Tensor], rate: float, factor: float):
    graphs = batch_of()
    out = drop(graphs["x"], graphs["batch"], rate, generator=seeded())
    assert torch.equal(out, factor * graphs["x"])


@pytest.mark.parametrize("transform", ["dropout", "channel-dropout", "position-dropout"])
def test_dropouts_hang_on_a_layer_and_touch_the_chosen_graphs_only(transform: str):
    graphs, model = batch_of(60), Tiny().train()
    plain = graphs["x"] @ LINEAR.T
    operator = DeepAugmentation("nodes", transform=transform, rate=0.5, generator=seeded(4))
    (h,) = states(model, operator, ["nodes"], graphs, by_name)
    chosen = (torch.rand(60, generator=seeded(4)) <= 0.5)[graphs["batch"]]
    torch.testing.assert_close(h[~chosen], plain[~chosen])
    zero = h == 0
    torch.testing.assert_close(h[chosen], torch.where(zero, 0.0, 2 * plain)[chosen])
    parts = [zero[chosen & (graphs["batch"] == k)] for k in range(60)]
    parts = [part for part in parts if len(part) > 1]
    by_channel = all(torch.equal(part, part[:1].expand_as(part)) for part in parts)
    by_node = all(torch.equal(part, part[:, :1].expand_as(part)) for part in parts)
    assert (by_channel, by_node) == (transform == "channel-dropout", transform == "position-dropout")
    assert within(int(zero[chosen].sum()), zero[chosen].numel(), 0.5) or transform != "dropout"


def test_noise_is_relative_to_the_graphs_own_standard_deviation():
    """By hand: (1, 3, 5, 7) deviates by √5 and ten times that by 10 √5; four equal numbers not at all."""
    owner = torch.tensor([0, 0, 1, 1, 2, 2])
    h = torch.tensor([[1.0, 3.0], [5.0, 7.0], [10.0, 30.0], [50.0, 70.0], [4.0, 4.0], [4.0, 4.0]])
    out = gaussian_noise(h, 0.5, generator=seeded(), owner=owner)
    drawn = torch.randn(h.shape, generator=seeded())
    spread = torch.tensor([5.0, 500.0, 0.0]).sqrt()[owner, None]
    torch.testing.assert_close(out, h + 0.5 * spread * drawn)
    assert torch.equal(out[4:], h[4:]), "a constant graph gets no noise"


def test_noise_of_a_graph_does_not_depend_on_the_others():
    graphs = batch_of(8)
    alone = {name: graphs[name][graphs["batch"] == 0] for name in ("x", "batch")}
    together = gaussian_noise(graphs["x"], 1.0, generator=seeded(), owner=graphs["batch"])[: len(alone["x"])]
    drawn = torch.randn(graphs["x"].shape, generator=seeded())[: len(alone["x"])]
    torch.testing.assert_close(together, alone["x"] + alone["x"].std(unbiased=False) * drawn)


def test_noise_of_states_with_heads_is_relative_to_the_whole_graph():
    """Attention keeps states (nodes, heads, d); a graph's deviation is over all of them, as for any sample (n, …)."""
    owner = torch.tensor([0, 0, 1])
    h = torch.tensor([[[1.0, 30.0], [3.0, 10.0]], [[5.0, 50.0], [7.0, 70.0]], [[2.0, 2.0], [4.0, 4.0]]])
    noise = gaussian_noise(h, 1.0, generator=seeded(), owner=owner) - h
    drawn = torch.randn(h.shape, generator=seeded())
    spread = torch.stack([h[owner == k].std(unbiased=False) for k in range(2)])
    torch.testing.assert_close(noise, spread[owner, None, None] * drawn)


def test_noise_keeps_the_type_and_passes_the_gradient_of_the_states_alone():
    graphs = batch_of()
    h = graphs["x"].bfloat16().requires_grad_()
    out = gaussian_noise(h, 1.0, generator=seeded(), owner=graphs["batch"])
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert torch.equal(h.grad, torch.ones_like(h))


def test_noise_hangs_on_a_layer_by_graphs():
    graphs, model = batch_of(30), Tiny().train()
    plain = graphs["x"] @ LINEAR.T
    operator = DeepAugmentation("nodes", transform="noise", rate=0.5, fraction=1.0, generator=seeded(4))
    (h,) = states(model, operator, ["nodes"], graphs, by_name)
    draws = seeded(4)
    torch.rand(30, generator=draws)
    spread = torch.stack([plain[graphs["batch"] == k].std(unbiased=False) for k in range(30)])
    expected = plain + 0.5 * spread[graphs["batch"], None] * torch.randn(plain.shape, generator=draws)
    torch.testing.assert_close(h, expected)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("components", [1, -1])
def test_pca_is_over_the_nodes_of_the_batch_and_changes_the_chosen_graphs(per_token: bool, components: int):
    graphs, model = batch_of(20), Tiny().train()
    plain = graphs["x"] @ LINEAR.T
    operator = DeepAugmentation(
        "nodes", transform="pca", per_token=per_token, components=components, generator=seeded(4)
    )
    (h,) = states(model, operator, ["nodes"], graphs, by_name)
    chosen = (torch.rand(20, generator=seeded(4)) <= 0.5)[graphs["batch"], None]
    removed = remove_principal_components(plain, components)
    torch.testing.assert_close(h, torch.where(chosen, removed, plain))
    assert not torch.allclose(h[chosen[:, 0]], plain[chosen[:, 0]], atol=1e-2)


def test_a_transform_of_ones_own_sees_all_nodes_and_changes_the_chosen_graphs():
    shapes = []

    def negative(h: Tensor) -> Tensor:
        shapes.append(tuple(h.shape))
        return -h

    graphs = batch_of(20)
    operator = DeepAugmentation("nodes", transform=negative, generator=seeded(4))
    (h,) = states(Tiny().train(), operator, ["nodes"], graphs, by_name)
    plain = graphs["x"] @ LINEAR.T
    chosen = (torch.rand(20, generator=seeded(4)) <= 0.5)[graphs["batch"], None]
    torch.testing.assert_close(h, torch.where(chosen, -plain, plain))
    assert shapes == [tuple(plain.shape)]


# --- modes and hooks ---


@pytest.mark.parametrize("layer", ["input", "layer1", "pool", "head"])
def test_eval_mode_changes_nothing_and_draws_nothing(layer: str):
    graphs, model, draws = batch_of(), gin().eval(), seeded()
    before, state = model(**graphs), draws.get_state()
    with DeepAugmentation(layer, rate=1.0, fraction=1.0, generator=draws).attached(model):
        assert torch.equal(model(**graphs), before)
    assert torch.equal(draws.get_state(), state)


@called
def test_hooks_are_gone_afterwards_and_results_are_as_before(kind: type[Tiny], call: Callable[..., Tensor]):
    graphs, model = batch_of(), kind().train()
    before = call(model, graphs)
    with zeroing(["nodes", "pool"], fraction=1.0).attached(model):
        assert not call(model, graphs).any()
        assert hooks_on(model) > 0
    assert hooks_on(model) == 0
    assert torch.equal(call(model, graphs), before)


def test_hooks_are_gone_after_a_transform_that_raises():
    graphs, model = batch_of(), Tiny().train()
    operator = DeepAugmentation("nodes", transform=lambda h: h / (1 // 0))
    with pytest.raises(ZeroDivisionError), operator.attached(model):
        model(**graphs)
    assert hooks_on(model) == 0


def test_the_graphs_of_a_pass_that_failed_are_forgotten_in_the_next():
    """As many nodes, in other graphs."""
    graphs, model = batch_of(20), Tiny().train()
    others = {**graphs, "edge_index": torch.zeros(2, 0).long(), "batch": torch.arange(len(graphs["x"]))}
    with zeroing().attached(model), seen_at(model.nodes) as seen:
        failing = model.pool.register_forward_pre_hook(lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            model(**graphs)
        failing.remove()
        model(**others)
    zero = (seen[1][1] == 0).all(1)
    assert any(zero[graphs["batch"] == k].unique().numel() == 2 for k in range(20))


# --- AdaLASE ---


def adalase(layer: str) -> AdaLASE:
    made = AdaLASE([layer], kinds=["noise"])
    made.active = 0
    return made


@called
def test_adalase_refuses_layers_with_a_row_per_node(kind: type[Tiny], call: Callable[..., Tensor]):
    model = kind().train()
    match = "AdaLASE knows no graphs; 'nodes' has a row per node. Use DeepAugmentation there"
    with pytest.raises(ConfigError, match=match), adalase("nodes").attached(model):
        call(model, batch_of())
    assert hooks_on(model) == 0


def test_adalase_takes_layers_with_a_row_per_graph():
    graphs, model = batch_of(), Tiny().train()
    before = model(**graphs)
    with adalase("pool").attached(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.allclose(model(**graphs), before)
    assert torch.equal(model(**graphs), before)
