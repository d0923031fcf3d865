"""Reductions: what each kind makes of vectors, tokens and maps by hand; padding; specifications; errors."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
from torch.nn.functional import pad

from layerlens.errors import ConfigError, ShapeError, UnknownNameError
from layerlens.reduction import KINDS, Reduction, make_reduction, masked_mean

NAN = float("nan")
VECTORS = torch.tensor([[1.0, 2], [3, 4]])
TOKENS = torch.tensor([[[1.0, 10], [3, 30]], [[5, 50], [9, 90]]])  # (2 samples, 2 tokens, 2 features)
MAPS = torch.tensor([[[[1.0, 2], [3, 4]], [[10, 20], [30, 40]]]])  # (1 sample, 2 channels, 2, 2)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cells(maps, grid):
    """Adaptive averaging as its definition has it: cell i covers rows floor(i·h/g) to ceil((i+1)·h/g)."""
    h, w = maps.shape[2:]
    edges = [[(i * size // grid, -(-(i + 1) * size // grid)) for i in range(grid)] for size in (h, w)]
    return torch.stack([maps[:, :, a:b, c:d].mean((2, 3)) for a, b in edges[0] for c, d in edges[1]], dim=1)


# --- vectors, tokens, maps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", [VECTORS, TOKENS, MAPS, draw(3)], ids=["vectors", "tokens", "maps", "numbers"])
def test_flatten_hands_on_the_output_itself(output):
    assert Reduction()(output) is output


@pytest.mark.parametrize(
    ("output", "expected"),
    [(VECTORS, [[1, 2], [3, 4]]), (TOKENS, [[2, 20], [7, 70]]), (MAPS, [[2.5, 25]])],
    ids=["vectors", "tokens", "maps"],
)
def test_pool_is_the_mean_over_positions_worked_by_hand(output, expected):
    assert Reduction("pool")(output).tolist() == expected


@pytest.mark.parametrize(
    ("output", "expected"),
    [(TOKENS, [[1, 10], [3, 30], [5, 50], [9, 90]]), (MAPS, [[1, 10], [2, 20], [3, 30], [4, 40]])],
    ids=["tokens", "maps"],
)
def test_positions_are_rows_sample_by_sample_and_line_by_line(output, expected):
    assert Reduction("positions")(output).tolist() == expected


def test_pool_and_positions_take_volumes():
    volumes = draw(3, 5, 2, 3, 4)
    torch.testing.assert_close(Reduction("pool")(volumes), volumes.mean((2, 3, 4)))
    assert torch.equal(Reduction("positions")(volumes)[24 + 7], volumes[1, :, 0, 1, 3])


def test_a_grid_averages_maps_to_cells_worked_by_hand():
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    assert Reduction("positions", grid=2)(maps).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize(("size", "grid"), [((6, 6), 3), ((5, 7), 2), ((4, 4), 1), ((3, 5), 3)])
def test_a_grid_follows_its_definition_where_cells_overlap(size, grid):
    maps = draw(4, 3, *size)
    torch.testing.assert_close(Reduction("positions", grid=grid)(maps), cells(maps, grid).flatten(0, 1))


def test_a_grid_of_the_maps_own_size_changes_nothing():
    maps = draw(2, 3, 4, 4)
    torch.testing.assert_close(Reduction("positions", grid=4)(maps), Reduction("positions")(maps))


def test_a_grid_makes_maps_of_different_resolution_alike_in_rows():
    rows = [Reduction("positions", grid=2)(draw(3, 5, size, size)) for size in (2, 4, 7)]
    assert {tuple(r.shape) for r in rows} == {(12, 5)}


@pytest.mark.parametrize("kind", ["pool", "positions", "positions,grid=2"])
def test_channels_last_gives_the_rows_of_channels_first(kind):
    maps = draw(3, 5, 4, 6)
    last = make_reduction(f"{kind},channels=last")(maps.permute(0, 2, 3, 1))
    torch.testing.assert_close(last, make_reduction(kind)(maps))
    assert last.shape[1] == 5


def test_channels_last_leaves_tokens_and_vectors_alone():
    assert Reduction("pool", channels="last")(TOKENS).tolist() == [[2, 20], [7, 70]]
    assert Reduction("pool", channels="last")(VECTORS) is VECTORS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pooling_half_precision_sums_in_float32(dtype):
    """299 ones and a 256: neither type holds the mean, 1.85, and bfloat16 not even the sum, 555."""
    tokens = torch.ones(1, 300, 1, dtype=dtype)
    tokens[0, 0] = 256
    found = Reduction("pool")(tokens)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(555 / 300, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_itself_is_never_written_to(kind):
    output, mask = draw(3, 4, 5), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    before = output.clone()
    Reduction(kind)(output, mask)
    Reduction(kind)(output)
    assert torch.equal(output, before)


# --- padding -----------------------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
PADDED = torch.tensor([[[1.0, 10], [3, 30], [7, 7]], [[5, 50], [7, 7], [7, 7]]])
BY_KIND = {
    "flatten": [[2, 20], [5, 50]],
    "pool": [[2, 20], [5, 50]],
    "positions": [[1, 10], [3, 30], [5, 50]],
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_the_mask_leaves_out_do_not_count(kind):
    assert Reduction(kind)(PADDED, MASK).tolist() == BY_KIND[kind]


@pytest.mark.parametrize("value", [NAN, float("inf"), 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_at_a_padded_place_never_enters(kind, value):
    poisoned = PADDED.masked_fill(MASK.unsqueeze(-1) == 0, value)
    assert Reduction(kind)(poisoned, MASK).tolist() == BY_KIND[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_longer_padding_changes_no_row(kind):
    tokens, mask = draw(4, 5, 3), (torch.arange(5) < torch.tensor([5, 1, 3, 2])[:, None]).long()
    longer = pad(tokens, (0, 0, 0, 6), value=NAN), pad(mask, (0, 6))
    torch.testing.assert_close(Reduction(kind)(*longer), Reduction(kind)(tokens, mask))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_any_type_means_the_same(kind, dtype):
    assert Reduction(kind)(PADDED, MASK.to(dtype)).tolist() == BY_KIND[kind]


def test_a_mask_may_leave_out_tokens_in_the_middle():
    tokens, mask = torch.tensor([[[1.0], [NAN], [4.0]]]), torch.tensor([[1, 0, 1]])
    assert Reduction("pool")(tokens, mask).tolist() == [[2.5]]
    assert Reduction("positions")(tokens, mask).tolist() == [[1.0], [4.0]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_ones_pools_as_no_mask_does(kind):
    found = Reduction(kind)(TOKENS, torch.ones(2, 2))
    assert torch.equal(found, Reduction("pool" if kind == "flatten" else kind)(TOKENS))


@pytest.mark.parametrize("output", [VECTORS, draw(2, 4, 3), draw(2, 3, 3, 3)], ids=["vectors", "other length", "maps"])
@pytest.mark.parametrize("kind", ["flatten", "pool"])
def test_a_mask_does_not_touch_outputs_that_are_not_its_tokens(kind, output):
    assert torch.equal(Reduction(kind)(output, MASK), Reduction(kind)(output))


def test_the_masked_mean_of_bfloat16_is_taken_in_float32():
    tokens = torch.ones(1, 300, 1, dtype=torch.bfloat16)
    tokens[0, 0] = 256
    found = masked_mean(tokens, torch.ones(1, 300))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(555 / 300, rel=1e-6)


def test_the_masked_mean_of_float64_stays_in_float64():
    tokens = torch.tensor([[[1.0 + 1e-12], [1.0 + 3e-12]]], dtype=torch.float64)
    assert masked_mean(tokens, torch.ones(1, 2)).item() == pytest.approx(1 + 2e-12, abs=1e-14)


# --- counts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "output", "mask", "expected"),
    [
        ("flatten", TOKENS, None, None),
        ("pool", MAPS, None, None),
        ("positions", VECTORS, None, None),
        ("positions", TOKENS, None, [2, 2]),
        ("positions", draw(3, 2, 4, 5), None, [20, 20, 20]),
        ("positions,grid=2", draw(3, 2, 4, 5), None, [4, 4, 4]),
        ("positions,channels=last", draw(3, 4, 5, 2), None, [20, 20, 20]),
        ("positions", PADDED, MASK, [2, 1]),
        ("pool", PADDED, MASK, None),
        ("positions", draw(2, 4, 3), MASK, [4, 4]),
    ],
)
def test_counts_are_the_rows_that_each_sample_gives(text, output, mask, expected):
    reduction = make_reduction(text)
    found = reduction.counts(output, mask)
    assert (None if found is None else found.tolist()) == expected
    if found is not None:
        assert int(found.sum()) == len(reduction(output, mask))


# --- specifications and errors -----------------------------------------------------------------------------------

ALL = [
    Reduction(kind, grid, channels)
    for kind in KINDS
    for grid in ((0, 1, 4, 16) if kind == "positions" else (0,))
    for channels in ("first", "last")
]


@pytest.mark.parametrize("reduction", ALL, ids=str)
def test_a_reduction_comes_back_from_its_own_text(reduction):
    assert make_reduction(str(reduction)) == reduction


def test_the_texts_of_different_reductions_differ():
    assert len({str(r) for r in ALL}) == len(set(ALL)) == len(ALL)


def test_defaults_do_not_stand_in_the_text():
    assert str(Reduction()) == "flatten"
    assert str(make_reduction("positions,channels=last,grid=4")) == "positions,grid=4,channels=last"


def test_a_reduction_passes_through_make_reduction_and_is_frozen():
    reduction = Reduction("pool")
    assert make_reduction(reduction) is reduction
    with pytest.raises(FrozenInstanceError):
        reduction.kind = "flatten"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("poool", UnknownNameError, "unknown reduction 'poool'; closest: pool"),
        ("", UnknownNameError, "unknown reduction ''; allowed: flatten, pool, positions"),
        ("pool,channels=middle", UnknownNameError, r"unknown channels 'middle'; .*first, last"),
        ("positions,gird=4", ConfigError, "has no option 'gird'; closest: grid"),
        ("positions,grid=-1", ConfigError, "grid=-1; allowed: 1 or more"),
        ("positions,grid=2.5", ConfigError, "grid=2.5; allowed: 1 or more"),
        ("positions,grid=four", ConfigError, "grid=four; allowed: 1 or more"),
        ("pool,grid=2", ConfigError, "grid=2; allowed: 1 or more, with positions"),
        ("flatten,grid=2", ConfigError, "grid=2; .*with positions"),
        ("positions:4", ConfigError, r"'positions:4' has an argument; allowed: flatten, pool, positions, .*grid=N"),
    ],
)
def test_a_wrong_specification_is_refused(text, error, message):
    with pytest.raises(error, match=message):
        make_reduction(text)


def test_a_grid_that_is_a_truth_value_is_refused():
    with pytest.raises(ConfigError, match="grid="):
        make_reduction("positions,grid=true")


@pytest.mark.parametrize("output", [VECTORS, draw(3)], ids=["vectors", "numbers"])
def test_positions_refuse_an_output_that_has_none(output):
    with pytest.raises(ShapeError, match=r"has no positions; leave this layer out, or pool the maps"):
        Reduction("positions")(output)


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((2, 3, 4, 4), 5, r"maps of shape \(3, 4, 4\) can't be averaged to a 5-grid"),
        ((2, 3, 8, 4), 5, r"maps of shape \(3, 8, 4\)"),
        ((2, 3, 4, 4, 4), 2, r"maps of shape \(3, 4, 4, 4\) can't be averaged"),
    ],
)
def test_a_grid_refuses_maps_that_it_does_not_fit(shape, grid, message):
    with pytest.raises(ShapeError, match=message):
        Reduction("positions", grid=grid)(torch.zeros(shape))
