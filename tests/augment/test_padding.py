"""Padding enters no statistic and is never changed, however much of it there is and whatever it holds."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layerlens.augment.adalase import AdaLASE
from layerlens.augment.deep import TRANSFORMS, DeepAugmentation
from layerlens.augment.transforms import gaussian_noise, remove_principal_components
from layerlens.errors import ConfigError, ShapeError

LENGTHS = (5, 2, 4, 1, 5, 3, 4, 2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masked(lengths: tuple[int, ...] = LENGTHS, t: int | None = None) -> Tensor:
    return (torch.arange(t or max(lengths)) < torch.tensor(lengths)[:, None]).long()


def drawn(*shape: int, seed: int = 1) -> Tensor:
    """Correlated numbers: the directions are far apart, so that rounding can't swap them."""
    scales = 1.5 ** -torch.arange(shape[-1], dtype=torch.float64)
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64) * scales + 0.3


def spoiled(h: Tensor, mask: Tensor, seed: int = 9) -> Tensor:
    return torch.where(mask[..., None].bool(), h, 100 * torch.randn(h.shape, generator=seeded(seed), dtype=h.dtype))


def longer(h: Tensor, mask: Tensor, extra: int) -> tuple[Tensor, Tensor]:
    more = h.new_full((len(h), extra, h.shape[-1]), 50.0)
    return torch.cat([h, more], 1), torch.cat([mask, mask.new_zeros(len(h), extra)], 1)


def on_tokens(h: Tensor, mask: Tensor) -> Tensor:
    return h[mask.bool()]


def without_directions(rows: np.ndarray, wanted: slice, kept: int) -> np.ndarray:
    """By the definition: singular vectors of centred rows in float64."""
    centred = rows - rows.mean(0)
    basis = np.linalg.svd(centred, full_matrices=False)[2][: min(kept, len(rows) - 1)][wanted]
    return rows - centred @ basis.T @ basis


class Reader(nn.Module):
    """Takes a mask as a Transformer does; `give` makes the hidden states from the ids."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.embeddings = Hands(hidden)
        self.block = nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.block(self.embeddings(input_ids))


class Hands(nn.Module):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.hidden


class Featured(nn.Module):
    """Passes its features as SentenceTransformer does: one mapping, the first positional argument."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.reader = Reader(hidden)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.reader(**features)


# --- PCA ---


@pytest.mark.parametrize("components", [1, 3, -1, -2])
def test_per_token_pca_is_that_of_the_tokens_alone(components: int):
    h, mask = drawn(8, 5, 9), masked()
    out = remove_principal_components(spoiled(h, mask), components, per_token=True, mask=mask)
    wanted = slice(components) if components > 0 else slice(components, None)
    expected = without_directions(on_tokens(h, mask).numpy(), wanted, 6)
    np.testing.assert_allclose(on_tokens(out, mask).numpy(), expected, atol=1e-5)


def test_per_sample_pca_counts_padding_as_the_mean_of_its_position():
    """The definition: mean per position over the samples that reach it, the rest filled with that mean, then SVD."""
    h, mask = drawn(8, 5, 3), masked()
    present = mask.bool().numpy()
    filled = h.numpy().copy()
    for position in range(5):
        filled[~present[:, position], position] = filled[present[:, position], position].mean(0)
    expected = without_directions(filled.reshape(8, 15), slice(2), 6).reshape(8, 5, 3)
    out = remove_principal_components(spoiled(h, mask), 2, mask=mask)
    np.testing.assert_allclose(out.numpy()[present], expected[present], atol=1e-4)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("components", [1, 6, -1, -6])
@pytest.mark.parametrize(("n", "d"), [(8, 9), (8, 1), (40, 3), (3, 2)], ids=str)
def test_pca_ignores_what_padding_holds_and_how_much_there_is(n: int, d: int, components: int, per_token: bool):
    mask = masked((LENGTHS * 5)[:n])
    h = drawn(n, mask.shape[1], d)
    first = remove_principal_components(h, components, per_token=per_token, mask=mask)
    other = spoiled(h, mask)
    assert torch.allclose(
        on_tokens(remove_principal_components(other, components, per_token=per_token, mask=mask), mask),
        on_tokens(first, mask),
        atol=1e-4,
    )
    for extra in (1, 7):
        padded, wide = longer(other, mask, extra)
        again = remove_principal_components(padded, components, per_token=per_token, mask=wide)
        torch.testing.assert_close(on_tokens(again, wide), on_tokens(first, mask), atol=1e-4, rtol=0)
        assert torch.equal(again[~wide.bool()], padded[~wide.bool()])


def test_padding_on_the_left_is_padding_too():
    h, mask = drawn(8, 5, 9), masked()
    right = remove_principal_components(h, 1, per_token=True, mask=mask)
    left = remove_principal_components(h.flip(1), 1, per_token=True, mask=mask.flip(1))
    torch.testing.assert_close(left.flip(1)[mask.bool()], right[mask.bool()], atol=1e-5, rtol=0)


@pytest.mark.parametrize("components", [1, -1])
def test_few_tokens_have_few_directions_however_long_the_padding(components: int):
    """Three tokens span two directions: the last of the kept ones is the second, not the sixth."""
    h, mask = drawn(1, 3, 4), torch.tensor([[1, 1, 1]])
    expected = remove_principal_components(h[0], components)
    padded, wide = longer(h, mask, 20)
    out = remove_principal_components(padded, components, per_token=True, mask=wide)
    torch.testing.assert_close(out[0, :3], expected, atol=1e-5, rtol=0)
    assert not torch.allclose(out[0, :3], h[0], atol=1e-2)


@pytest.mark.parametrize("per_token", [True, False])
def test_a_full_mask_is_no_mask(per_token: bool):
    h = drawn(8, 5, 9)
    whole = remove_principal_components(h, 2, per_token=per_token, mask=torch.ones(8, 5))
    torch.testing.assert_close(whole, remove_principal_components(h, 2, per_token=per_token), atol=1e-5, rtol=0)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_the_mask_may_be_of_any_type(dtype: torch.dtype, per_token: bool):
    h, mask = drawn(8, 5, 9), masked()
    expected = remove_principal_components(h, 1, per_token=per_token, mask=mask.bool())
    assert torch.equal(remove_principal_components(h, 1, per_token=per_token, mask=mask.to(dtype)), expected)


@pytest.mark.parametrize("per_token", [True, False])
def test_no_token_at_all_leaves_everything(per_token: bool):
    h = drawn(4, 3, 2)
    assert torch.equal(remove_principal_components(h, 1, per_token=per_token, mask=torch.zeros(4, 3)), h)


@pytest.mark.parametrize("per_token", [True, False])
def test_no_gradient_reaches_padding_from_tokens(per_token: bool):
    h, mask = drawn(8, 5, 3).requires_grad_(), masked()
    weights = drawn(8, 5, 3, seed=4)
    on_tokens(remove_principal_components(h, 1, per_token=per_token, mask=mask) * weights, mask).sum().backward()
    assert h.grad is not None
    assert not h.grad[~mask.bool()].any()
    assert h.grad[mask.bool()].any()


def test_pca_of_bfloat16_keeps_its_type_and_finds_the_same_directions():
    h, mask = drawn(8, 5, 4).float(), masked()
    out = remove_principal_components(h.bfloat16(), 1, per_token=True, mask=mask)
    assert out.dtype == torch.bfloat16
    expected = remove_principal_components(h, 1, per_token=True, mask=mask)
    torch.testing.assert_close(on_tokens(out, mask).float(), on_tokens(expected, mask), atol=0.05, rtol=0)


@pytest.mark.parametrize("shape", [(8, 4), (7, 5), (8, 5, 1)], ids=str)
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ShapeError, match=r"a mask \(n, t\) goes with activations \(n, t, d\); got .* and \(8, 5, 9\)"):
        remove_principal_components(drawn(8, 5, 9), mask=torch.ones(shape))
    with pytest.raises(ShapeError, match=r"a mask \(n, t\) goes with activations"):
        gaussian_noise(drawn(8, 5), 0.5, mask=torch.ones(8, 5))


# --- noise ---


def test_noise_is_measured_on_the_samples_tokens():
    h, mask = drawn(8, 5, 6), masked()
    out = gaussian_noise(spoiled(h, mask), 0.5, generator=seeded(3), mask=mask)
    noise = torch.randn(h.shape, generator=seeded(3))
    for row in range(8):
        tokens = h[row, : LENGTHS[row]].float()
        expected = h[row, : LENGTHS[row]] + 0.5 * tokens.std(unbiased=False) * noise[row, : LENGTHS[row]]
        torch.testing.assert_close(out[row, : LENGTHS[row]], expected, atol=1e-5, rtol=0)


def test_noise_leaves_a_sample_without_tokens_finite():
    h = drawn(2, 3, 4)
    assert torch.equal(gaussian_noise(h, 0.5, generator=seeded(), mask=torch.zeros(2, 3)), h)


# --- as an operator ---


def zero(h: Tensor) -> Tensor:
    return torch.zeros_like(h)


CASES: list[Any] = [*TRANSFORMS, zero]


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("transform", CASES)
def test_every_transform_leaves_padding_exactly_as_it_was(transform: Any, per_token: bool, stop: bool):
    mask = masked()
    h = spoiled(drawn(8, 5, 6), mask).requires_grad_()
    operator = DeepAugmentation(
        "0", transform=transform, fraction=1.0, per_token=per_token, stop_gradient=stop, generator=seeded()
    )
    out = operator.augment(h, mask)
    assert torch.equal(out[~mask.bool()], h[~mask.bool()])
    assert not torch.equal(on_tokens(out, mask), on_tokens(h, mask))
    out.sum().backward()
    assert h.grad is not None
    assert torch.equal(h.grad[~mask.bool()], torch.ones_like(h.grad[~mask.bool()]))
    if stop:
        assert not h.grad[mask.bool()].any()


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_tokens_do_not_depend_on_what_padding_holds(transform: str, per_token: bool):
    h, mask = drawn(8, 5, 6), masked()
    outs = [
        DeepAugmentation("0", transform=transform, per_token=per_token, generator=seeded(5)).augment(source, mask)
        for source in (h, spoiled(h, mask, 1), spoiled(h, mask, 2))
    ]
    for out in outs[1:]:
        torch.testing.assert_close(on_tokens(out, mask), on_tokens(outs[0], mask), atol=1e-5, rtol=0)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_mask_changes_no_draw(transform: str):
    """Where nothing is padding, a mask makes no difference."""
    h = drawn(8, 5, 6)
    plain = DeepAugmentation("0", transform=transform, generator=seeded(5)).augment(h)
    full = DeepAugmentation("0", transform=transform, generator=seeded(5)).augment(h, torch.ones(8, 5))
    torch.testing.assert_close(full, plain, atol=1e-5, rtol=0)


# --- where the mask comes from ---


def passes(hidden: Tensor, mask: Tensor) -> dict[str, Any]:
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
    features = {"input_ids": ids, "attention_mask": mask}
    return {
        "keyword": lambda op: run(Reader(hidden), op, "embeddings", ids, attention_mask=mask),
        "positional": lambda op: run(Reader(hidden), op, "embeddings", ids, mask),
        "all keywords": lambda op: run(Reader(hidden), op, "block", **features),
        "features": lambda op: run(Featured(hidden), op, "reader.block", features),
    }


def run(model: nn.Module, operator: DeepAugmentation, layer: str, *args: Any, **kwargs: Any) -> Tensor:
    operator.layers = [layer]
    with operator.attached(model):
        return model(*args, **kwargs)


@pytest.mark.parametrize("way", ["keyword", "positional", "all keywords", "features"])
def test_the_mask_is_found_however_the_model_is_called(way: str):
    mask = masked()
    h = spoiled(drawn(8, 5, 6), mask)
    operator = DeepAugmentation("0", transform="pca", per_token=True, fraction=1.0)
    out = passes(h, mask)[way](operator)
    torch.testing.assert_close(out, remove_principal_components(h, per_token=True, mask=mask))
    assert not torch.allclose(out, remove_principal_components(h, per_token=True), atol=1e-2)


@pytest.mark.parametrize("shape", [(8, 1, 1, 5), (8, 4), (7, 5), (8, 5, 5)], ids=str)
def test_a_mask_that_is_none_of_tokens_is_ignored(shape: tuple[int, ...]):
    h = drawn(8, 5, 6)
    operator = DeepAugmentation("0", transform="pca", per_token=True, fraction=1.0)
    ids = torch.zeros(8, 5, dtype=torch.int64)
    out = run(Reader(h), operator, "block", ids, attention_mask=torch.zeros(shape))
    assert torch.equal(out, remove_principal_components(h, per_token=True))


def test_a_layer_without_positions_has_no_padding():
    """A pooled vector is transformed like any other."""
    h = drawn(8, 6)
    operator = DeepAugmentation("0", transform=zero, fraction=1.0)
    out = run(Reader(h), operator, "block", torch.zeros(8, 5, dtype=torch.int64), attention_mask=masked())
    assert not out.any()


def test_each_pass_has_its_own_mask():
    h, ids = drawn(8, 5, 6), torch.zeros(8, 5, dtype=torch.int64)
    model, operator = Reader(h), DeepAugmentation("block", transform=zero, fraction=1.0)
    with operator.attached(model):
        for mask in (masked(), masked().flip(0)):
            assert torch.equal((model(ids, attention_mask=mask) != 0).any(-1), ~mask.bool())
        assert not model(ids).any(), "none is left over from the pass before"


def test_float_input_with_a_mask_keeps_its_padding():
    class Frames(nn.Module):
        def forward(self, frames: Tensor, attention_mask: Tensor) -> Tensor:
            return frames

    h, mask = drawn(8, 5, 6), masked()
    out = run(Frames(), DeepAugmentation("0", transform=zero, fraction=1.0), "input", h, attention_mask=mask)
    assert torch.equal((out != 0).any(-1), ~mask.bool())


# --- AdaLASE ---


def one_arm(kind: str) -> AdaLASE:
    adalase = AdaLASE(["block"], [kind])
    adalase.draw(seeded())
    return adalase


@pytest.mark.parametrize("kind", ["dropout", "channel-dropout", "position-dropout", "noise", "mixup"])
def test_adalase_leaves_padding_and_takes_nothing_from_it(kind: str):
    mask, ids = masked(), torch.zeros(8, 5, dtype=torch.int64)
    h, outs = drawn(8, 5, 6), []
    for source in (h, spoiled(h, mask)):
        model = Reader(source)
        with torch.random.fork_rng(devices=[]), one_arm(kind).attached(model):
            torch.manual_seed(2)
            outs.append(model(ids, attention_mask=mask))
        assert torch.equal(outs[-1][~mask.bool()], source[~mask.bool()])
    assert not torch.equal(on_tokens(outs[0], mask), on_tokens(h, mask))
    torch.testing.assert_close(on_tokens(outs[1], mask), on_tokens(outs[0], mask), atol=1e-5, rtol=0)


# --- token ids, packed batches, checkpointing, compilation ---


def test_token_ids_can_not_be_augmented():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    match = r"the input of Reader are token ids, whole numbers \(2, 3\), .*choose the embeddings layer, 'embeddings'"
    for args, kwargs in (((ids,), {}), ((), {"input_ids": ids})):
        with pytest.raises(ConfigError, match=match):
            run(Reader(drawn(2, 3, 4)), DeepAugmentation("input"), "input", *args, **kwargs)
    run(Reader(drawn(2, 3, 4)).eval(), DeepAugmentation("input"), "input", ids)  # nothing is augmented


def test_a_layer_that_hands_on_token_ids_can_not_be_augmented():
    """A module of SentenceTransformer gives a mapping that begins with the ids."""
    model = nn.Sequential(nn.Identity())
    with pytest.raises(ConfigError, match=r"'0' \(Sequential\) gives whole numbers \(2, 3\), .*a layer inside it"):
        run(nn.Sequential(model), DeepAugmentation("0"), "0", {"input_ids": torch.zeros(2, 3, dtype=torch.int64)})


def test_packed_sentences_are_refused():
    features = {"input_ids": torch.zeros(1, 9, dtype=torch.int64), "cu_seq_lens_q": torch.tensor([0, 4, 9])}
    model = Featured(drawn(1, 9, 4))
    with pytest.raises(ConfigError, match=r"packed into one row .*unpad_inputs = False"):
        run(model, DeepAugmentation("0"), "reader.block", features)


class Checkpointed(nn.Module):
    """block(x) with or without the layer's hooks inside of the checkpoint."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.block, self.reentrant = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh()), reentrant
        self.last = nn.Identity()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.last(checkpoint(self.block, self.first(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_is_computed_again_is_refused_and_one_outside_is_not(reentrant: bool):
    model, h = Checkpointed(reentrant), torch.randn(4, 5, 3, generator=seeded())
    inside, outside = DeepAugmentation("block.0"), DeepAugmentation("last", fraction=1.0, rate=0.0)
    with inside.attached(model):
        loss = model(h, attention_mask=torch.ones(4, 5)).sum()
        with pytest.raises(ConfigError, match=r"'block\.0' runs again in the backward pass \(gradient checkpointing\)"):
            loss.backward()
    model.zero_grad()
    with outside.attached(model):
        model(h).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.block = nn.Embedding(11, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.block(self.embeddings(input_ids))


@pytest.mark.parametrize(("transform", "per_token"), [("dropout", False), ("noise", False), ("pca", True)])
def test_a_model_with_a_mask_compiles(transform: str, per_token: bool):
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about the compiler's insides
        torch.manual_seed(0)
        model, mask = Small(), masked()
        ids = torch.randint(11, mask.shape, generator=seeded())
        operator = DeepAugmentation("embeddings", transform=transform, per_token=per_token, fraction=1.0)
        with operator.attached(model):
            torch.compiler.reset()
            runs = torch.compile(model, fullgraph=transform != "pca", backend="aot_eager")
            outs = [runs(ids, attention_mask=m) for m in (mask, mask.flip(0))]
        torch.compiler.reset()
    plain = model(ids, attention_mask=mask)
    for out, m in zip(outs, (mask, mask.flip(0)), strict=True):
        torch.testing.assert_close(out[~m.bool()], plain[~m.bool()])
        assert not torch.allclose(out[m.bool()], plain[m.bool()], atol=1e-3)
