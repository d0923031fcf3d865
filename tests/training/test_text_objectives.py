"""The losses over sentences against their definitions, written out in loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from layerlens.errors import ConfigError, ShapeError
from layerlens.training.objectives.mlm import mask_tokens
from layerlens.training.objectives.simcse import simcse


def rows(n: int, d: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(z: Tensor, columns: int, temperature: float) -> float:
    """-log of each anchor's softmax over partners and negatives, one number at a time."""
    n = len(z) // columns
    unit = [row / row.norm() for row in z]
    total = 0.0
    for i in range(n):
        scores = [math.exp(float(unit[i] @ unit[j]) / temperature) for j in range(n, columns * n)]
        total -= math.log(scores[i] / sum(scores))
    return total / n


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_simcse_is_its_definition(columns: int, temperature: float):
    z = rows(4 * columns)
    found = simcse(z, columns=columns, temperature=temperature)
    assert found.item() == pytest.approx(by_definition(z, columns, temperature), rel=1e-9)


def test_simcse_is_low_where_views_coincide_and_high_where_partners_are_exchanged():
    z = torch.eye(4, dtype=torch.float64)
    assert simcse(torch.cat([z, z])).item() < 1e-6
    assert simcse(torch.cat([z, z.roll(1, 0)])).item() > 10


def test_a_hard_negative_can_only_raise_the_loss():
    pairs = rows(8)
    with_negatives = torch.cat([pairs, rows(4, seed=1)])
    assert simcse(with_negatives, columns=3).item() > simcse(pairs).item()


def test_the_scale_multiplies_loss_and_gradient():
    z = rows(6).requires_grad_()
    (once,) = torch.autograd.grad(simcse(z), z)
    (twice,) = torch.autograd.grad(simcse(z, scale=2.0), z)
    torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize(
    ("z", "columns"), [(rows(5), 2), (rows(2), 2), (rows(4), 3), (rows(4).unsqueeze(0), 2), (rows(4), 4)]
)
def test_rows_that_are_no_columns_are_refused(z: Tensor, columns: int):
    with pytest.raises(ShapeError, match=f"SimCSE needs {columns}n rows"):
        simcse(z, columns=columns)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ConfigError, match="temperature=0"):
        simcse(rows(4), temperature=0)


# --- what is hidden ---


def masked(share: float = 0.15, seed: int = 0, n: int = 200, t: int = 50) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids = torch.arange(n * t).view(n, t) % 90 + 10
    maskable = torch.ones(n, t, dtype=torch.bool)
    maskable[:, 0] = maskable[:, -5:] = False
    hidden, asked = mask_tokens(
        ids, maskable, mask_id=3, words=range(10, 100), share=share, draws=torch.Generator().manual_seed(seed)
    )
    return ids, maskable, hidden, asked


def test_the_share_is_asked_for_and_four_fifths_of_it_is_hidden_and_a_tenth_replaced():
    ids, maskable, hidden, asked = masked()
    count = int(asked.sum())
    assert count / int(maskable.sum()) == pytest.approx(0.15, abs=0.01)
    assert int((hidden[asked] == 3).sum()) / count == pytest.approx(0.8, abs=0.03)
    replaced = (hidden[asked] != 3) & (hidden[asked] != ids[asked])
    assert int(replaced.sum()) / count == pytest.approx(0.1 * 89 / 90, abs=0.025)


def test_nothing_else_changes_and_random_tokens_are_words():
    ids, maskable, hidden, asked = masked()
    assert torch.equal(hidden[~asked], ids[~asked])
    assert not bool((asked & ~maskable).any())
    assert set(hidden[asked].tolist()) <= {3, *range(10, 100)}
    assert len(set(hidden[asked].tolist())) > 80


def test_the_draw_is_the_generators():
    assert all(torch.equal(a, b) for a, b in zip(masked(seed=1), masked(seed=1), strict=True))
    assert not torch.equal(masked(seed=1)[3], masked(seed=2)[3])


def test_where_chance_asks_for_nothing_one_token_is_asked_for():
    ids = torch.arange(3).view(1, 3)
    maskable = torch.tensor([[False, True, True]])
    for seed in range(20):
        draws = torch.Generator().manual_seed(seed)
        _, asked = mask_tokens(ids, maskable, mask_id=3, words=[0, 1, 2], share=1e-6, draws=draws)
        assert int(asked.sum()) == 1
        assert not asked[0, 0]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_outside_its_range_is_refused(share: float):
    with pytest.raises(ConfigError, match="share="):
        masked(share=share)
