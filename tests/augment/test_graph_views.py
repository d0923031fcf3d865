"""Random views of graphs: what each kind takes away and adds, how often, and what it leaves alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import comb, sqrt

import pytest
import torch
from torch import Tensor

from layerlens.augment.graph_views import KINDS, GraphViews
from layerlens.errors import ConfigError, UnknownNameError

Edges = list[tuple[int, int]]
Batch = dict[str, Tensor]
Shape = tuple[int, Edges]  # nodes and undirected edges of one graph


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def path(n: int) -> Shape:
    return n, [(k, k + 1) for k in range(n - 1)]


def ring(n: int) -> Shape:
    return n, [(k, (k + 1) % n) for k in range(n)]


def star(leaves: int) -> Shape:
    return leaves + 1, [(0, k) for k in range(1, leaves + 1)]


def complete(n: int) -> Shape:
    return n, [(a, b) for a in range(n) for b in range(a + 1, n)]


TRIANGLE_WITH_TAIL: Shape = (4, [(0, 1), (0, 2), (1, 2), (0, 3)])
STAR_WITH_LEG: Shape = (5, [(0, 1), (0, 2), (0, 3), (3, 4)])
TWO_PARTS: Shape = (5, [(0, 1), (2, 3), (3, 4)])
SHAPES = [ring(10), path(7), star(5), complete(4), (1, []), (4, []), TWO_PARTS, path(2)]
SIZES = [n for n, _ in SHAPES]


def batch_of(shapes: Sequence[Shape] = SHAPES) -> Batch:
    """Graphs whose nodes have their own number in the batch as feature, from 1, and ten times it."""
    sizes = torch.tensor([n for n, _ in shapes])
    starts = (sizes.cumsum(0) - sizes).tolist()
    both = [
        (s + a, s + b) for s, (_, edges) in zip(starts, shapes, strict=True) for e in edges for a, b in (e, e[::-1])
    ]
    number = torch.arange(1.0, 1 + int(sizes.sum()))
    return {
        "x": torch.stack([number, 10 * number], 1),
        "edge_index": torch.tensor(both, dtype=torch.int64).view(-1, 2).T,
        "batch": torch.arange(len(shapes)).repeat_interleave(sizes),
    }


def view(kinds: str | tuple[str, ...], graphs: Batch, seed: int = 0, **shares: float) -> Batch:
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    return GraphViews(kinds=kinds, **shares)(graphs, seeded(seed))


def names(graphs: Batch) -> list[int]:
    """The number of each node in the batch that it comes from, by its second feature."""
    return (graphs["x"][:, 1] / 10).int().tolist()


def edges_of(graphs: Batch, known: list[int] | None = None) -> list[tuple[int, int]]:
    """Directed edges by the nodes' numbers, sorted."""
    known = names(graphs) if known is None else known
    return sorted((known[a], known[b]) for a, b in graphs["edge_index"].T.tolist())


def per_graph(owner: Tensor, count: int = len(SHAPES)) -> list[int]:
    return torch.bincount(owner, minlength=count).tolist()


def floor_of(share: float, n: int) -> int:
    """In exact arithmetic, of the number as one writes it."""
    return int(Fraction(str(share)) * n)


def ceil_of(share: float, n: int) -> int:
    return -int(-Fraction(str(share)) * n // 1)


def component(edges: list[tuple[int, int]], start: int) -> set[int]:
    reached, rim = {start}, [start]
    while rim:
        here = rim.pop()
        new = {b for a, b in edges if a == here} - reached
        reached |= new
        rim += new
    return reached


def within(count: int, draws: int, probability: float) -> bool:
    """Inside 4.5 standard deviations of a binomial."""
    return abs(count - draws * probability) <= 4.5 * sqrt(draws * probability * (1 - probability)) + 1e-9


# --- node-drop ---


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.34, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_node_drop_leaves_out_its_share_of_each_graph_rounded_down(ratio: float, seed: int):
    seen = view("node-drop", batch_of(), seed, ratio=ratio)
    assert per_graph(seen["batch"]) == [n - floor_of(ratio, n) for n in SIZES]


@pytest.mark.parametrize("seed", range(3))
def test_node_drop_takes_every_edge_at_its_nodes_and_no_other(seed: int):
    graphs = batch_of()
    seen = view("node-drop", graphs, seed, ratio=0.4)
    kept = set(names(seen))
    assert edges_of(seen) == [(a, b) for a, b in edges_of(graphs) if a in kept and b in kept]
    assert 0 < len(edges_of(seen)) < len(edges_of(graphs))


@pytest.mark.parametrize("seed", range(3))
def test_node_drop_keeps_order_features_and_owner_of_those_that_stay(seed: int):
    graphs = batch_of()
    seen = view("node-drop", graphs, seed, ratio=0.4)
    rows = torch.tensor(names(seen)) - 1
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert torch.equal(seen["x"], graphs["x"][rows])
    assert torch.equal(seen["batch"], graphs["batch"][rows])


def test_node_drop_worked_by_hand():
    """A path of four that loses one node: two neighbours stay joined, unless an end left the two edges behind."""
    found = Counter()
    for seed in range(40):
        seen = view("node-drop", batch_of([path(4)]), seed, ratio=0.25)
        found[tuple(names(seen)), tuple(map(tuple, seen["edge_index"].T.tolist()))] += 1
    assert set(found) == {
        ((2, 3, 4), ((0, 1), (1, 0), (1, 2), (2, 1))),
        ((1, 3, 4), ((1, 2), (2, 1))),
        ((1, 2, 4), ((0, 1), (1, 0))),
        ((1, 2, 3), ((0, 1), (1, 0), (1, 2), (2, 1))),
    }


def test_each_node_of_a_ring_is_dropped_as_often_as_any_other_and_each_pair_too():
    """Two of ten: a node with probability 1/5, a pair of them with 1/45."""
    copies = 5000
    seen = view("node-drop", batch_of([ring(10)] * copies), ratio=0.2)
    gone = torch.ones(copies * 10, dtype=torch.bool)
    gone[torch.tensor(names(seen)) - 1] = False
    gone = gone.view(copies, 10)
    assert (gone.sum(1) == 2).all()
    assert all(within(count, copies, 0.2) for count in gone.sum(0).tolist())
    together = Counter(tuple(row.nonzero().flatten().tolist()) for row in gone)
    assert len(together) == comb(10, 2)
    assert all(within(count, copies, 1 / 45) for count in together.values())


# --- feature-mask ---


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.34, 0.5, 0.9])
def test_feature_mask_sets_exactly_its_share_of_rows_to_zero(ratio: float):
    graphs = batch_of()
    seen = view("feature-mask", graphs, ratio=ratio)
    masked = (seen["x"] == 0).all(1)
    assert per_graph(graphs["batch"][masked]) == [floor_of(ratio, n) for n in SIZES]
    assert torch.equal(seen["x"][~masked], graphs["x"][~masked])
    assert torch.equal(seen["edge_index"], graphs["edge_index"])
    assert torch.equal(seen["batch"], graphs["batch"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_feature_mask_keeps_the_type_of_the_features(dtype: torch.dtype):
    graphs = batch_of()
    seen = view("feature-mask", {**graphs, "x": graphs["x"].to(dtype)}, ratio=0.5)
    assert seen["x"].dtype == dtype


def test_each_node_is_masked_as_often_as_any_other():
    copies = 5000
    seen = view("feature-mask", batch_of([star(4)] * copies), ratio=0.4)
    masked = (seen["x"] == 0).all(1).view(copies, 5)
    assert (masked.sum(1) == 2).all()
    assert all(within(count, copies, 0.4) for count in masked.sum(0).tolist())


# --- edge-perturb ---


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.34, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_edge_perturb_leaves_out_its_share_of_undirected_edges_and_adds_no_more(ratio: float, seed: int):
    graphs = batch_of()
    seen = view("edge-perturb", graphs, seed, ratio=ratio)
    before, after = set(edges_of(graphs)), set(edges_of(seen))
    owner = dict(zip(names(graphs), graphs["batch"].tolist(), strict=True))
    gone, new = (Counter(owner[a] for a, b in some if a < b) for some in (before - after, after - before))
    for graph, (_, edges) in enumerate(SHAPES):
        assert gone[graph] == floor_of(ratio, len(edges))
        assert new[graph] <= gone[graph]


@pytest.mark.parametrize("seed", range(5))
def test_edge_perturb_keeps_graphs_simple_undirected_and_apart(seed: int):
    graphs = batch_of()
    seen = view("edge-perturb", graphs, seed, ratio=0.5)
    found = edges_of(seen)
    owner = dict(zip(names(graphs), graphs["batch"].tolist(), strict=True))
    assert len(found) == len(set(found)), "no edge stands twice"
    assert {(b, a) for a, b in found} == set(found), "both directions go and come together"
    assert all(a != b for a, b in found)
    assert all(owner[a] == owner[b] for a, b in found)
    assert set(found) - set(edges_of(graphs)), "some edges are new"


def test_edge_perturb_leaves_the_nodes_alone():
    graphs = batch_of()
    seen = view("edge-perturb", graphs, ratio=0.5)
    assert torch.equal(seen["x"], graphs["x"])
    assert torch.equal(seen["batch"], graphs["batch"])


def test_a_complete_graph_has_no_room_for_new_edges():
    seen = view("edge-perturb", batch_of([complete(4)]), ratio=0.5)
    assert len(edges_of(seen)) == 2 * 3


def test_a_square_loses_each_side_as_often_and_each_diagonal_comes_in_an_eighth_of_the_views():
    """Both ends of a new edge are drawn from all nodes; 2 of the 16 draws give a diagonal, 2 the other one."""
    copies = 5000
    seen = view("edge-perturb", batch_of([ring(4)] * copies), ratio=0.25)
    there = torch.zeros(copies, 4, 4, dtype=torch.bool)
    a, b = seen["edge_index"]
    there[a // 4, a % 4, b % 4] = True
    sides = [int((~there[:, k, (k + 1) % 4]).sum()) for k in range(4)]
    assert sum(sides) == copies
    assert all(within(count, copies, 1 / 4) for count in sides)
    assert all(within(int(there[:, k, k + 2].sum()), copies, 1 / 8) for k in range(2))


# --- subgraph ---


@pytest.mark.parametrize("keep", [0.01, 0.2, 0.34, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_subgraph_is_connected_and_has_its_share_rounded_up(keep: float, seed: int):
    """Fewer only where the component of its root has fewer."""
    graphs = batch_of()
    seen = view("subgraph", graphs, seed, keep=keep)
    whole, inner, owner = edges_of(graphs), edges_of(seen), seen["batch"].tolist()
    for graph, n in enumerate(SIZES):
        nodes = {name for name, mine in zip(names(seen), owner, strict=True) if mine == graph}
        assert nodes
        root = min(nodes)
        assert component(inner, root) == nodes
        assert len(nodes) == min(ceil_of(keep, n), len(component(whole, root)))


@pytest.mark.parametrize("seed", range(3))
def test_a_subgraph_has_all_edges_between_its_nodes_and_their_features(seed: int):
    graphs = batch_of()
    seen = view("subgraph", graphs, seed, keep=0.6)
    kept = names(seen)
    assert edges_of(seen) == [(a, b) for a, b in edges_of(graphs) if a in kept and b in kept]
    assert torch.equal(seen["x"], graphs["x"][torch.tensor(kept) - 1])


def test_a_subgraph_of_all_nodes_is_the_graph_itself_where_it_is_connected():
    graphs = batch_of([ring(10), path(7), star(5), complete(4)])
    seen = view("subgraph", graphs, keep=1.0)
    assert all(torch.equal(seen[name], graphs[name]) for name in graphs)


@pytest.mark.parametrize("before", [0, 1])
def test_beside_a_number_without_nodes_a_subgraph_is_connected_too(before: int):
    """A root of its own would fall on its neighbour, which would grow from two."""
    graphs = batch_of([ring(20)] * 2)
    graphs["batch"] = graphs["batch"] * 2 + before  # 0 and 2, or 1 and 3
    for seed in range(5):
        seen = view("subgraph", graphs, seed, keep=0.4)
        inner = edges_of(seen)
        for graph in (before, 2 + before):
            mine = {name for name, owner in zip(names(seen), seen["batch"].tolist(), strict=True) if owner == graph}
            assert component(inner, min(mine)) == mine
            assert len(mine) == 8


def growth_law(shape: Shape, size: int) -> dict[frozenset[int], Fraction]:
    """Where growth from a random node over a random edge at the rim ends, by all its ways."""
    n, edges = shape
    both = [*edges, *((b, a) for a, b in edges)]
    reached: Counter[frozenset[int]] = Counter({frozenset([k]): Fraction(1, n) for k in range(n)})
    for _ in range(size - 1):
        grown: Counter[frozenset[int]] = Counter()
        for nodes, probability in reached.items():
            rim = [b for a, b in both if a in nodes and b not in nodes]
            if not rim:
                grown[nodes] += probability
            for b in rim:
                grown[nodes | {b}] += probability / len(rim)
        reached = grown
    return dict(reached)


def test_the_growth_law_worked_by_hand():
    """Of 0 - 1 - 2 - 3, two nodes: from 0 and 3 there is one way, from 1 and 2 there are two."""
    assert growth_law(path(4), 2) == {
        frozenset([0, 1]): Fraction(3, 8),
        frozenset([1, 2]): Fraction(1, 4),
        frozenset([2, 3]): Fraction(3, 8),
    }


@pytest.mark.parametrize(
    ("shape", "size"),
    [(path(4), 2), (path(5), 3), (star(4), 1), (star(4), 2), (star(4), 3), (TRIANGLE_WITH_TAIL, 2),
     (TRIANGLE_WITH_TAIL, 3), (STAR_WITH_LEG, 4), (ring(5), 3), (TWO_PARTS, 3)],
)  # fmt: skip
def test_subgraphs_grow_by_the_law_of_random_edges_at_the_rim(shape: Shape, size: int):
    n, copies = shape[0], 10_000
    seen = view("subgraph", batch_of([shape] * copies), keep=(size - 0.5) / n)
    kept = torch.zeros(copies * n, dtype=torch.bool)
    kept[torch.tensor(names(seen)) - 1] = True
    found = Counter(frozenset(row.nonzero().flatten().tolist()) for row in kept.view(copies, n))
    law = growth_law(shape, size)
    assert set(found) == set(law)
    assert all(within(found[nodes], copies, float(law[nodes])) for nodes in law)


# --- shares in exact numbers ---


def test_node_drop_rounds_every_share_in_hundredths_as_it_is_written():
    """0.84 of 75 nodes are 63, whatever numbers it is computed in."""
    sizes = [25, 45, 50, 75, 100, 120, 150, 180]
    graphs = batch_of([(n, []) for n in sizes])
    wrong = {
        (ratio / 100, n): lost
        for ratio in range(100)
        for n, left in zip(
            sizes, per_graph(view("node-drop", graphs, ratio=ratio / 100)["batch"], len(sizes)), strict=True
        )
        if (lost := n - left) != ratio * n // 100
    }
    assert wrong == {}


def test_edge_perturb_rounds_every_share_in_hundredths_as_it_is_written():
    graphs, wrong = batch_of([star(75), star(100)]), {}
    keys = graphs["edge_index"][0] * 1000 + graphs["edge_index"][1]
    owner = graphs["batch"][graphs["edge_index"][0]]
    for ratio in range(100):
        a, b = view("edge-perturb", graphs, ratio=ratio / 100)["edge_index"]
        gone = owner[~torch.isin(keys, a * 1000 + b)]
        if (lost := [n // 2 for n in per_graph(gone, 2)]) != [ratio * 75 // 100, ratio]:
            wrong[ratio / 100] = lost
    assert wrong == {}


def test_subgraph_rounds_every_share_in_hundredths_as_it_is_written():
    """0.6 of 25 nodes are 15, not 16."""
    sizes = [5, 25, 45, 50, 75, 85, 100]
    graphs = batch_of([star(n - 1) for n in sizes])
    wrong = {
        (keep / 100, n): kept
        for keep in range(1, 101)
        for n, kept in zip(
            sizes, per_graph(view("subgraph", graphs, keep=keep / 100)["batch"], len(sizes)), strict=True
        )
        if kept != -(-keep * n // 100)
    }
    assert wrong == {}


@pytest.mark.parametrize("ratio", [0.99, 0.99999, 1 - 1e-9, 1 - 2**-53])
def test_every_graph_keeps_a_node_whatever_the_ratio(ratio: float):
    seen = view("node-drop", batch_of(), ratio=ratio)
    assert seen["batch"].unique().tolist() == list(range(len(SHAPES)))


@pytest.mark.parametrize("keep", [1e-3, 1e-12])
def test_every_subgraph_has_a_node_however_little_it_keeps(keep: float):
    seen = view("subgraph", batch_of(), keep=keep)
    assert seen["batch"].tolist() == list(range(len(SHAPES)))


# --- which kind ---


def kind_of(before: Batch, after: Batch, count: int) -> list[str]:
    """What happened to each of many rings of ten, of ratio 0.2 and keep 0.5."""
    sizes = torch.bincount(after["batch"], minlength=count)
    zeros = torch.bincount(after["batch"], weights=(after["x"] == 0).all(1).double(), minlength=count)
    assert set(sizes.tolist()) <= {5, 8, 10}
    return [
        {5: "subgraph", 8: "node-drop"}.get(n, "feature-mask" if z else "edge-perturb")
        for n, z in zip(sizes.tolist(), zeros.tolist(), strict=True)
    ]


@pytest.mark.parametrize("kinds", [KINDS, ("node-drop", "subgraph"), ("subgraph", "feature-mask", "edge-perturb")])
def test_each_kind_is_drawn_equally_often_for_each_graph_by_itself(kinds: tuple[str, ...]):
    copies, graphs = 4000, batch_of([ring(10)] * 4000)
    found = kind_of(graphs, view(kinds, graphs, ratio=0.2, keep=0.5), copies)
    counts = Counter(found)
    assert set(counts) == set(kinds)
    assert all(within(count, copies, 1 / len(kinds)) for count in counts.values())
    repeats = sum(a == b for a, b in pairwise(found))
    assert within(repeats, copies - 1, 1 / len(kinds)), "neighbours in a batch are independent"


def test_in_a_mixed_batch_each_graph_has_the_view_of_its_kind_and_no_other():
    """Dropped nodes renumber their graph, and those behind it keep their edges."""
    copies, graphs = 200, batch_of([ring(10)] * 200)
    seen = view(KINDS, graphs, ratio=0.2, keep=0.5)
    found, owner = kind_of(graphs, seen, copies), seen["batch"]
    assert torch.equal(owner[seen["edge_index"][0]], owner[seen["edge_index"][1]])
    expected = {"node-drop": (8, 0), "subgraph": (5, 0), "feature-mask": (10, 2), "edge-perturb": (10, 0)}
    edge_owner = owner[seen["edge_index"][0]]
    for graph, kind in enumerate(found):
        x = seen["x"][owner == graph]
        rows = x[(x != 0).any(1)][:, 0].int() - 1
        assert (rows // 10 == graph).all()
        assert (len(x), int((x == 0).all(1).sum())) == expected[kind]
        first = int((owner < graph).sum())
        local = {(a - first, b - first) for a, b in seen["edge_index"][:, edge_owner == graph].T.tolist()}
        if kind == "feature-mask":
            assert local == {e for k in range(10) for e in ((k, (k + 1) % 10), ((k + 1) % 10, k))}
        elif kind == "edge-perturb":
            assert 16 <= len(local) <= 20
        else:
            kept = (rows % 10).tolist()
            joined = {(i, j) for i, a in enumerate(kept) for j, b in enumerate(kept) if (a - b) % 10 in (1, 9)}
            assert local == joined


def test_no_kinds_leave_the_graphs_as_they_are_and_draw_nothing():
    graphs, draws = batch_of(), seeded()
    before = draws.get_state()
    seen = GraphViews(kinds=())(graphs, draws)
    assert all(torch.equal(seen[name], graphs[name]) for name in graphs)
    assert torch.equal(draws.get_state(), before)


# --- draws, inputs, odd graphs ---


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(one[name], other[name]) for name in ("x", "edge_index", "batch"))


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS], ids=lambda kinds: "+".join(kinds))
def test_a_view_is_one_of_its_generator(kinds: tuple[str, ...]):
    graphs = batch_of()
    first, again, other = (view(kinds, graphs, seed, ratio=0.4, keep=0.5) for seed in (0, 0, 1))
    assert equal(first, again)
    assert not equal(first, other)


@pytest.mark.parametrize("kind", KINDS)
def test_two_views_from_one_generator_differ_and_leave_the_global_one_alone(kind: str):
    graphs, draws, before = batch_of(), seeded(), torch.get_rng_state()
    views = GraphViews(kinds=(kind,), ratio=0.4, keep=0.5)
    assert not equal(views(graphs, draws), views(graphs, draws))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_that_comes_in_is_not_changed(kind: str):
    graphs = batch_of()
    before = {name: value.clone() for name, value in graphs.items()}
    seen = view(kind, graphs, ratio=0.5)
    assert not equal(seen, before)
    assert equal(graphs, before)


@pytest.mark.parametrize("kind", KINDS)
def test_single_nodes_and_graphs_without_edges_have_views(kind: str):
    graphs = batch_of([(1, []), (3, []), (1, []), (2, []), (1, [])])
    seen = view(kind, graphs, ratio=0.9, keep=0.9)
    assert seen["batch"].unique().tolist() == [0, 1, 2, 3, 4]
    assert seen["edge_index"].shape == (2, 0)
    assert seen["edge_index"].dtype == torch.int64
    assert (seen["x"][:, 1] % 10 == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one_graph_has_views(kind: str):
    seen = view(kind, batch_of([ring(6)]), ratio=0.5, keep=0.5)
    assert seen["batch"].unique().tolist() == [0]
    assert seen["edge_index"].numel() == 0 or int(seen["edge_index"].max()) < len(seen["x"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_edges_does_not_matter_to_what_a_view_may_be(kind: str):
    """Edges of all graphs mixed, as an exchange of edges leaves them."""
    graphs = batch_of([ring(6), path(5), star(4)])
    order = torch.randperm(graphs["edge_index"].shape[1], generator=seeded(3))
    seen = view(kind, {**graphs, "edge_index": graphs["edge_index"][:, order]}, ratio=0.4, keep=0.6)
    known = names(graphs) if kind == "feature-mask" else names(seen)
    found = edges_of(seen, known)
    assert {(b, a) for a, b in found} == set(found)
    if kind != "edge-perturb":
        assert found == [(a, b) for a, b in edges_of(graphs) if a in known and b in known]


# --- settings ---


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_a_ratio_outside_0_to_below_1_is_refused(ratio: float):
    with pytest.raises(ConfigError, match=rf"ratio={ratio}, keep=0.2; allowed: 0 to below 1, above 0 to 1"):
        GraphViews(ratio=ratio)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_to_keep_outside_above_0_to_1_is_refused(keep: float):
    with pytest.raises(ConfigError, match=rf"ratio=0.1, keep={keep}; allowed: 0 to below 1, above 0 to 1"):
        GraphViews(keep=keep)


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(UnknownNameError, match="unknown view of graphs 'subgraf'; closest: subgraph"):
        GraphViews(kinds=("node-drop", "subgraf"))
